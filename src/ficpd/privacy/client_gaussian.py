"""Client-level privacy: the unit is all of one client's records (McMahan et al., ICLR 2018, arXiv 1710.06963).

`local`: each update has enough noise by itself, so the server need not be trusted. With few clients the noise exceeds the
signal. `central`: clients clip their updates. The trusted server adds noise once, to the sum over a Poisson cohort.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ficpd.errors import PrivacyError
from ficpd.interfaces import NoiseSource, ReleaseKind
from ficpd.privacy import accountant
from ficpd.privacy import config as settings
from ficpd.privacy.clipping import clipped_sum
from ficpd.privacy.none import NoiselessRecords
from ficpd.types import JSON, ClientUpdate, ClientWorkload, PrivacyCost

RELATION = {
    "local": "all records of one client replaced by any others; who takes part is known",
    "central": "one client more or less; how many there are is taken as known",
}


class Config(settings.DPConfig):
    """placement: "local": each client adds noise to its update. "central": the server adds noise to the sum of all."""

    exact: ClassVar[bool] = False
    placement: Literal["local", "central"] = "local"


def build(config: Config, plan: ClientWorkload) -> "ClientGaussian":
    """Raises `PrivacyError` if no noise keeps the plan within the budget, or the plan has statistics of records."""
    if plan.totals:
        raise PrivacyError(
            f"the method's clients release statistics of their records ({', '.join(plan.totals)}), which client-level "
            "privacy has no noise for; use privacy.name = 'record_gaussian'"
        )
    settings.warn_of_delta(config.delta, plan.num_clients, "clients")

    def costs(multiplier: float) -> list[PrivacyCost]:
        if config.placement == "central":
            return [PrivacyCost("sum", plan.cohort_rate, multiplier, plan.num_rounds)]
        count = max(plan.participations, 1)  # a client that is never invited is planned as if it took part once
        return [PrivacyCost("update", 1.0, multiplier, count)]

    multiplier = settings.calibrate_noise(config, costs)
    return ClientGaussian(config, multiplier, costs(multiplier))


class ClientGaussian(NoiselessRecords):
    """Guarantees:

    - an update has an L2 norm of at most `clip_norm` over all its arrays before noise; an update with a value that is not
      finite counts as zero (`tests/contracts/test_mechanism.py`);
    - local: the noise on it has deviation `noise_multiplier · 2 clip_norm`, because the updates of any two clients are up
      to two clip norms apart;
    - central: no noise is added here; `CentralGaussian` adds `noise_multiplier · clip_norm` to every sum;
    - the weight of an update is 1.
    """

    unit = "client"

    def __init__(self, config: Config, multiplier: float, planned: list[PrivacyCost]):
        self.config, self.noise, self.clip_norm = config, config.noise, settings.clip_norm(config)
        self.noise_multiplier, self._planned = multiplier, planned

    def cost(self, kind: ReleaseKind, name: str = "") -> PrivacyCost | None:
        released = ReleaseKind.SUM if self.config.placement == "central" else ReleaseKind.UPDATE
        return self._planned[0]._replace(count=1) if kind == released else None

    def planned_costs(self) -> Sequence[PrivacyCost]:
        return self._planned

    def noisy_sum(
        self, name: str, chunks: Iterable[Tensor], noise: NoiseSource, subject_B: Tensor | None = None
    ) -> Tensor:
        raise PrivacyError(
            f"client-level privacy has no release for the statistic {name!r}. Leave it out, or use record_gaussian"
        )

    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        names = sorted(update.arrays)
        if not names:
            return ClientUpdate(update.client, {})
        flat = clipped_sum(torch.cat([update.arrays[name].flatten() for name in names])[None], self.clip_norm)
        flat = flat.float().cpu()
        if self.config.placement == "local":
            flat = noise.add_gaussian(flat, self.noise_multiplier * 2 * self.clip_norm)
        parts = flat.split([update.arrays[name].numel() for name in names])
        arrays = {name: part.view(update.arrays[name].shape) for name, part in zip(names, parts, strict=True)}
        return ClientUpdate(update.client, arrays)

    def expected_noise_norm_sq(self, size: int) -> float:
        """Returns it, because participations and so the multiplier are public. Central: an update has no noise."""
        local = self.config.placement == "local"
        return size * (self.noise_multiplier * 2 * self.clip_norm) ** 2 if local else 0.0

    def guarantee(self) -> Mapping[str, JSON]:
        placement = self.config.placement
        return {
            "mechanism": f"client_gaussian ({placement})",
            "unit": "client",
            "neighbouring": RELATION[placement],
            "delta": self.config.delta,
            "budget": self.config.epsilon,
            "clip_norm": self.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "accountant": accountant.describe(),
        }
