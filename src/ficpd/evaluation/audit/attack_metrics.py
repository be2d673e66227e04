"""How well an attack does: AUC, advantage, and the share of members found while few others are accused.

Shapes: N records, members and non-members together. All intervals are at 95%.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score, roc_curve

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.membership import as_bool_vector, as_float_vector

Interval = tuple[float, float]
RATES = (0.01, 0.001)


@dataclass(frozen=True)
class AttackMetrics:
    """`auc`: the probability that a member scores above a non-member. `advantage`: TPR - FPR, measured on records that
    had no say in the threshold; about 0 (below or above) if the attack learns nothing. `tpr`: the share of members found
    at a false positive rate of at most 1% and 0.1%; None where there are too few non-members to see such a rate."""

    auc: float
    auc_interval: Interval
    advantage: float
    advantage_interval: Interval
    tpr: Mapping[float, float | None]
    tpr_interval: Mapping[float, Interval | None]
    num_members: int
    num_nonmembers: int


def attack_metrics(score_N: ArrayLike, member_N: ArrayLike, seed: int) -> AttackMetrics:
    """One attack's outcome. The seed fixes the bootstrap and the halves.

    >>> attack_metrics([0.9, 0.8, 0.2, 0.1], [True, True, False, False], seed=0).auc
    1.0
    """
    score, member = _checked(score_N, member_N)
    advantage, advantage_interval = best_advantage({"": score}, member, seed)
    tpr = {rate: _tpr_at(rate, score, member) for rate in RATES}
    return AttackMetrics(
        float(roc_auc_score(member, score)),
        _auc_interval(score, member, seed),
        advantage,
        advantage_interval,
        {rate: None if found is None else found[0] for rate, found in tpr.items()},
        {rate: None if found is None else found[1] for rate, found in tpr.items()},
        int(member.sum()),
        int((~member).sum()),
    )


def best_advantage(scores: Mapping[str, ArrayLike], member_N: ArrayLike, seed: int) -> tuple[float, Interval]:
    """The advantage of the best attack at its best threshold, and its interval.

    Both are chosen on one half of the records and measured on the other, both ways round: the most over attacks and
    thresholds of what is measured on the same records would be above 0 for records that nobody saw. The interval is that
    of two independent proportions (Agresti and Caffo, The American Statistician 54(4), 2000), also near 0 and 1.
    """
    if not scores:
        raise PrivacyError("no attack's scores were given, expected at least one.")
    checked = [_checked(score, member_N) for score in scores.values()]
    score_AN, member = np.stack([score for score, _ in checked]), checked[0][1]
    accused, half = np.zeros(len(member), dtype=bool), _halves(member, seed)
    for chosen_on in (half, ~half):
        attack, threshold = _best_threshold(score_AN[:, chosen_on], member[chosen_on])
        accused[~chosen_on] = score_AN[attack, ~chosen_on] >= threshold
    true, false = accused[member], accused[~member]
    return float(true.mean() - false.mean()), _difference_interval(true, false)


def label_matched(labels_members: ArrayLike, labels_nonmembers: ArrayLike, seed: int) -> np.ndarray:
    """Indices, ascending, of non-members among whom each label has the share that it has among members: as many as there
    can be, each label's count to the nearest record. Else an attack that only reads the label would seem to work.

    >>> label_matched(["a", "a", "b"], ["b", "b", "b", "a", "a"], seed=0).size
    3
    """
    labels, wanted = np.unique(np.asarray(labels_members), return_counts=True)
    places = [np.flatnonzero(np.asarray(labels_nonmembers) == label) for label in labels]
    missing = [str(label) for label, place in zip(labels, places, strict=True) if not len(place)]
    if missing or not len(labels):
        raise PrivacyError(f"no non-member has the label {', '.join(missing)}, expected every label of the members.")
    scarce = min(range(len(labels)), key=lambda i: len(places[i]) / wanted[i])
    have, need = len(places[scarce]), int(wanted[scarce])
    counts = [(2 * int(count) * have + need) // (2 * need) for count in wanted]
    random = np.random.default_rng(seed)
    drawn = [random.choice(place, count, replace=False) for place, count in zip(places, counts, strict=True)]
    return np.sort(np.concatenate(drawn))


def _checked(score_N: ArrayLike, member_N: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    score = as_float_vector("score_N", score_N)
    member = as_bool_vector("member_N", member_N, len(score))
    if min(member.sum(), (~member).sum()) < 2:
        raise PrivacyError(
            f"{member.sum()} members and {(~member).sum()} non-members were given, expected at least 2 of each."
        )
    return score, member


def _halves(member_N: np.ndarray, seed: int) -> np.ndarray:
    """True for half of the members and half of the non-members, drawn at random. [N]"""
    random, half = np.random.default_rng(seed), np.zeros(len(member_N), dtype=bool)
    for group in (np.flatnonzero(member_N), np.flatnonzero(~member_N)):
        half[random.permutation(group)[: len(group) // 2]] = True
    return half


def _best_threshold(score_AN: np.ndarray, member_N: np.ndarray) -> tuple[int, float]:
    """The attack and the threshold with the most TPR - FPR on these records."""
    best = []
    for score_N in score_AN:
        fpr, tpr, thresholds = roc_curve(member_N, score_N)
        place = int(np.argmax(tpr - fpr))
        best.append((float(tpr[place] - fpr[place]), float(thresholds[place])))
    attack = max(range(len(best)), key=lambda i: best[i][0])
    return attack, best[attack][1]


def _difference_interval(true: np.ndarray, false: np.ndarray) -> Interval:
    """One success and one failure are added to each proportion."""
    p, q, m, n = (true.sum() + 1) / (len(true) + 2), (false.sum() + 1) / (len(false) + 2), len(true) + 2, len(false) + 2
    margin = norm.ppf(0.975) * np.sqrt(p * (1 - p) / m + q * (1 - q) / n)
    return max(float(p - q - margin), -1.0), min(float(p - q + margin), 1.0)


def _auc_interval(score_N: np.ndarray, member_N: np.ndarray, seed: int, resamples: int = 1000) -> Interval:
    """Percentile bootstrap: members and non-members are drawn again, each among themselves."""
    place_N = np.unique(score_N, return_inverse=True)[1]
    members, others = place_N[member_N], place_N[~member_N]
    random, size = np.random.default_rng(seed), int(place_N.max()) + 1
    aucs = []
    for _ in range(resamples):
        true = np.bincount(members[random.integers(len(members), size=len(members))], minlength=size)
        false = np.bincount(others[random.integers(len(others), size=len(others))], minlength=size)
        aucs.append(true @ (np.cumsum(false) - false / 2) / (len(members) * len(others)))
    low, high = np.quantile(aucs, [0.025, 0.975])
    return float(low), float(high)


def _tpr_at(rate: float, score_N: np.ndarray, member_N: np.ndarray) -> tuple[float, Interval] | None:
    """The most members found while at most `rate` of the non-members are accused, and the Clopper-Pearson interval.

    The interval is that of the members' draw, given the threshold, which the non-members fix. None if 1 / `rate`
    non-members are not there: then the rate could only be met by accusing none.
    """
    members, others = int(member_N.sum()), int((~member_N).sum())
    if others * rate < 1 - 1e-9:
        return None
    fpr, tpr, _ = roc_curve(member_N, score_N, drop_intermediate=False)
    found = round(float(tpr[fpr <= rate + 1e-12].max()) * members)
    interval = binomtest(found, members).proportion_ci(confidence_level=0.95, method="exact")
    return found / members, (float(interval.low), float(interval.high))
