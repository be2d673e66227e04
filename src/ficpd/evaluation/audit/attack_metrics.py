"""Measures an attack: AUC, advantage, and the true positive rate at low false positive rates.

Shapes: N records (members and non-members), A attacks. All intervals have 95% confidence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score, roc_curve

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.membership import as_bool_vector, as_floats

Interval = tuple[float, float]
RATES = (0.01, 0.001)


@dataclass(frozen=True)
class AttackMetrics:
    """The metrics of one attack.

    auc: the probability that a member scores above a non-member.
    advantage: TPR - FPR at a threshold chosen on other records; about 0 for a useless attack.
    tpr: the true positive rate at a false positive rate of at most 1% and 0.1%; None with too few non-members.
    """

    auc: float
    auc_interval: Interval
    advantage: float
    advantage_interval: Interval
    tpr: Mapping[float, float | None]
    tpr_interval: Mapping[float, Interval | None]
    num_members: int
    num_nonmembers: int


def attack_metrics(score_N: ArrayLike, member_N: ArrayLike, seed: int) -> AttackMetrics:
    """Computes the metrics of one attack. The seed fixes the bootstrap and the halves.

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
    """Returns the advantage of the best attack at its best threshold, and its interval.

    Attack and threshold are chosen on one half of the records and measured on the other half, in both directions. A choice
    on the measured records would bias the advantage upwards. The interval is that of two independent proportions (Agresti
    and Caffo, The American Statistician 54(4), 2000), valid also near 0 and 1.
    """
    if not scores:
        raise PrivacyError("scores: expected at least one attack")
    checked = [_checked(score, member_N) for score in scores.values()]
    score_AN, member = np.stack([score for score, _ in checked]), checked[0][1]
    accused, half = np.zeros(len(member), dtype=bool), _halves(member, seed)
    for chosen_on in (half, ~half):
        attack, threshold = _best_threshold(score_AN[:, chosen_on], member[chosen_on])
        accused[~chosen_on] = score_AN[attack, ~chosen_on] >= threshold
    true, false = accused[member], accused[~member]
    return float(true.mean() - false.mean()), _difference_interval(true, false)


def label_matched(labels_members: ArrayLike, labels_nonmembers: ArrayLike, seed: int) -> np.ndarray:
    """Returns the sorted indices of as many non-members as possible with the members' label shares.

    Without matching, an attack could succeed by the label alone. Raises `PrivacyError` if a label has no non-member.

    >>> label_matched(["a", "a", "b"], ["b", "b", "b", "a", "a"], seed=0).size
    3
    """
    labels, wanted = np.unique(np.asarray(labels_members), return_counts=True)
    places = [np.flatnonzero(np.asarray(labels_nonmembers) == label) for label in labels]
    missing = [str(label) for label, place in zip(labels, places, strict=True) if not len(place)]
    if missing or not len(labels):
        raise PrivacyError(f"no non-member has the label {', '.join(missing)}: expected every label of the members")
    scarce = min(range(len(labels)), key=lambda i: len(places[i]) / wanted[i])
    have, need = len(places[scarce]), int(wanted[scarce])
    counts = [(2 * int(count) * have + need) // (2 * need) for count in wanted]
    random = np.random.default_rng(seed)
    drawn = [random.choice(place, count, replace=False) for place, count in zip(places, counts, strict=True)]
    return np.sort(np.concatenate(drawn))


def _checked(score_N: ArrayLike, member_N: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    score = as_floats("score_N", score_N)
    member = as_bool_vector("member_N", member_N, len(score))
    if min(member.sum(), (~member).sum()) < 2:
        raise PrivacyError(f"{member.sum()} members and {(~member).sum()} non-members: expected at least 2 of each")
    return score, member


def _halves(member_N: np.ndarray, seed: int) -> np.ndarray:
    """Returns True for a random half of the members and a random half of the non-members, [N]."""
    random, half = np.random.default_rng(seed), np.zeros(len(member_N), dtype=bool)
    for group in (np.flatnonzero(member_N), np.flatnonzero(~member_N)):
        half[random.permutation(group)[: len(group) // 2]] = True
    return half


def _best_threshold(score_AN: np.ndarray, member_N: np.ndarray) -> tuple[int, float]:
    """Returns the attack and the threshold with the highest TPR - FPR."""
    best = []
    for score_N in score_AN:
        fpr, tpr, thresholds = roc_curve(member_N, score_N)
        place = int(np.argmax(tpr - fpr))
        best.append((float(tpr[place] - fpr[place]), float(thresholds[place])))
    attack = max(range(len(best)), key=lambda i: best[i][0])
    return attack, best[attack][1]


def _difference_interval(true: np.ndarray, false: np.ndarray) -> Interval:
    """Returns Agresti and Caffo's interval: each proportion gets one more success and failure."""
    p, q, m, n = (true.sum() + 1) / (len(true) + 2), (false.sum() + 1) / (len(false) + 2), len(true) + 2, len(false) + 2
    margin = norm.ppf(0.975) * np.sqrt(p * (1 - p) / m + q * (1 - q) / n)
    return max(float(p - q - margin), -1.0), min(float(p - q + margin), 1.0)


def _auc_interval(score_N: np.ndarray, member_N: np.ndarray, seed: int, resamples: int = 1000) -> Interval:
    """Returns the percentile bootstrap interval; members and non-members are resampled separately."""
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
    """Returns the highest true positive rate at a false positive rate of at most `rate`, and its interval.

    The interval (Clopper-Pearson) is over the members, given the threshold. None with fewer than 1 / `rate` non-members.
    """
    members, others = int(member_N.sum()), int((~member_N).sum())
    if others * rate < 1 - 1e-9:
        return None
    fpr, tpr, _ = roc_curve(member_N, score_N, drop_intermediate=False)
    found = round(float(tpr[fpr <= rate + 1e-12].max()) * members)
    interval = binomtest(found, members).proportion_ci(confidence_level=0.95, method="exact")
    return found / members, (float(interval.low), float(interval.high))
