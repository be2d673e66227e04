"""Membership inference from losses.

An attack is a function from the losses to a score per record; a higher score indicates a member. Shapes: N records
under test, S shadow prompts, Z records of the population.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ficpd.errors import PrivacyError

FLOAT32_STEP = 2.0**-24
"""The smallest positive loss -log(p) in float32: 1 - 2**-24 is the largest probability p below 1."""


@dataclass(frozen=True, eq=False)
class AttackData:
    """The data of an attacker whose shadow prompts did not see the records ("offline").

    target_N, population_Z: losses under the attacked prompt, which was not trained on the Z records.
    shadow_SN, shadow_SZ: losses under S shadow prompts, not trained on the N records, nor if possible on the Z.
    member_N: whether a record is a member.
    likelihood: a loss is -log of a probability, so at least 0. False: any number, lower for a better fit.

    Arrays and tensors become float64 arrays.
    """

    target_N: np.ndarray
    shadow_SN: np.ndarray
    member_N: np.ndarray
    population_Z: np.ndarray
    shadow_SZ: np.ndarray
    likelihood: bool = True

    def __post_init__(self) -> None:
        N, Z, S = np.asarray(self.target_N).size, np.asarray(self.population_Z).size, len(self.shadow_SN)
        shapes = {"target_N": (N,), "shadow_SN": (S, N), "population_Z": (Z,), "shadow_SZ": (S, Z)}
        for name, shape in shapes.items():
            losses = as_floats(name, getattr(self, name), shape)
            if self.likelihood and (losses < -1e-6).any():
                raise PrivacyError(
                    f"{name} holds a loss of {losses.min():.3g}, expected at least 0 as for -log of a probability; for "
                    "another loss set likelihood=False."
                )
            object.__setattr__(self, name, losses)
        object.__setattr__(self, "member_N", as_bool_vector("member_N", self.member_N, N))


def yeom(evidence: AttackData) -> np.ndarray:
    """Scores by minus the loss (Yeom et al., CSF 2018, arXiv 1709.01604, adversary 2). [N]

    >>> yeom(AttackData([0.1, 2.0], [[1.0, 2.0]], [True, False], [1.0], [[1.0]]))
    array([-0.1, -2. ])
    """
    return -evidence.target_N


def lira(evidence: AttackData) -> np.ndarray:
    """Offline LiRA (Carlini et al., S&P 2022, arXiv 2112.03570, algorithm 1 without its "in" half). [N]

    The score is the record's logit-scaled confidence minus its mean over the shadows, in standard deviations. All records
    share one variance, as the paper advises for few shadows. The paper reports the normal distribution function of this
    score; the order is the same.
    """
    phi_N, phi_SN = _confidence(evidence.target_N, evidence), _confidence(evidence.shadow_SN, evidence)
    variance = phi_SN.var(axis=0, ddof=1).mean() if len(phi_SN) > 1 else 0.0
    return (phi_N - phi_SN.mean(axis=0)) / (np.sqrt(variance) or 1.0)


def _confidence(losses: np.ndarray, evidence: AttackData) -> np.ndarray:
    """Returns log(p / (1 - p)) with p = exp(-loss) (equation 4), or minus the loss without `likelihood`."""
    if not evidence.likelihood:
        return -losses
    losses = np.maximum(losses, FLOAT32_STEP)
    return -losses - np.log(-np.expm1(-losses))


def rmia(evidence: AttackData, gamma: float = 1.0, offline_scale: float = 0.3) -> np.ndarray:
    """Offline RMIA (Zarifzadeh et al., ICML 2024, arXiv 2312.03262, algorithm 1). [N], in (0, 1)

    The score is the share of the population that the record x dominates: (Pr(x | prompt) / Pr(x)) / (Pr(z | prompt) /
    Pr(z)) >= `gamma`. Ties are ordered by the record's own ratio: a number below 1 is added to the count, and the sum
    is divided by Z + 1.
    """
    ratio_N = _log_ratio(evidence.target_N, evidence.shadow_SN, evidence.likelihood, offline_scale)
    ratio_Z = np.sort(_log_ratio(evidence.population_Z, evidence.shadow_SZ, evidence.likelihood, offline_scale))
    beaten_N = np.searchsorted(ratio_Z, ratio_N - np.log(gamma), side="right")
    tie_N = 0.5 + np.arctan(ratio_N) / np.pi
    return (beaten_N + tie_N) / (len(ratio_Z) + 1)


def _log_ratio(target_X: np.ndarray, shadow_SX: np.ndarray, likelihood: bool, offline_scale: float) -> np.ndarray:
    """Returns log Pr(x | prompt) - log Pr(x), where Pr(x) is a mean over shadow prompts.

    Shadows not trained on x underestimate Pr(x), so the paper corrects it to ((1 + a) * mean + 1 - a) / 2. The correction
    needs probabilities; other losses are not corrected.
    """
    mean_X = logsumexp(-shadow_SX, axis=0) - np.log(len(shadow_SX))
    if likelihood:
        floor = np.log(1 - offline_scale) if offline_scale < 1 else -np.inf
        mean_X = np.logaddexp(np.log1p(offline_scale) + mean_X, floor) - np.log(2)
    return -target_X - mean_X


def as_floats(name: str, values: ArrayLike, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Returns values as float64, by default of one dimension.

    Raises `PrivacyError` for another shape, for a number that is not finite, and for no number of a given `shape`.
    """
    array = np.asarray(values, dtype=float)
    expected = shape or (array.size,)
    if array.shape != expected or not np.isfinite(array).all() or (shape and not array.size):
        raise PrivacyError(f"{name} has shape {array.shape}, expected finite numbers in the shape {expected}.")
    return array


def as_bool_vector(name: str, values: ArrayLike, size: int) -> np.ndarray:
    """Returns values as `size` booleans. Raises `PrivacyError` if they are not."""
    array = np.asarray(values)
    if array.shape != (size,) or array.dtype != bool:
        raise PrivacyError(f"{name} is {array.dtype} of shape {array.shape}, expected bool of shape {(size,)}.")
    return array


ATTACKS: Mapping[str, Callable[[AttackData], np.ndarray]] = {"yeom": yeom, "lira": lira, "rmia": rmia}
