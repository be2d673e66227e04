"""Computes means, intervals, paired tests and ranks over seeds and tasks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from ficpd.experiments.comparison.schema import Against, Friedman
from ficpd.experiments.results import Interval

if TYPE_CHECKING:
    from pandas import DataFrame

CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""With fewer values, Student's interval is too wide to be useful."""


class MeanCI(NamedTuple):
    mean: float | None
    sd: float | None
    interval: Interval | None


def mean_ci(values: Sequence[float]) -> MeanCI:
    """Returns the mean, the standard deviation (n - 1), and Student's interval (None below three values).

    >>> found = mean_ci([1.0, 2.0, 3.0])
    >>> found.mean, found.sd, [round(end, 3) for end in found.interval]
    (2.0, 1.0, [-0.484, 4.484])
    """
    if not values:
        return MeanCI(None, None, None)
    mean = float(np.mean(values))
    if len(values) < 2:
        return MeanCI(mean, None, None)
    sd = float(np.std(values, ddof=1))
    if len(values) < LEAST_SEEDS:
        return MeanCI(mean, sd, None)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return MeanCI(mean, sd, (mean - half, mean + half))


def paired_test(own: Sequence[float], other: Sequence[float], reference: str) -> Against:
    """Compares a method with the reference, in pairs of the same seed (and task), without `p_holm`."""
    differences = [one - two for one, two in zip(own, other, strict=True)]
    found = mean_ci(differences)
    p, why = p_of(own, other) if differences else (None, f"no pair of finished cells with {reference}")
    return Against(pairs=len(differences), difference=found.mean, interval=found.interval, p=p, why=why)


def p_of(own: Sequence[float], other: Sequence[float]) -> tuple[float | None, str | None]:
    """Returns the two-sided p-value of a paired t-test, or None and the reason for a missing test."""
    differences = np.subtract(own, other)
    if len(differences) < 2:
        return None, "one pair is too few"
    if not differences.any():
        return None, "no pair differs"
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return None, "all pairs differ by the same"
    return float(stats.ttest_rel(own, other).pvalue), None  # type: ignore[attr-defined]


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Applies Holm's step-down correction to p values (Scandinavian Journal of Statistics 6, 1979).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(values) - place) * p))
        corrected[name] = largest
    return corrected


def apply_holm(found: Mapping[str, Against | None]) -> dict[str, Against | None]:
    """Adds `p_holm` over all tested methods and baselines."""
    corrected = holm({label: one.p for label, one in found.items() if one and one.p is not None})
    return {label: one and one.model_copy(update={"p_holm": corrected.get(label)}) for label, one in found.items()}


def mean_ranks(table: "DataFrame", less_is_better: Callable[[str], bool]) -> tuple[dict[str, float], Friedman | None]:
    """Returns the mean rank of each method (column) over tasks (rows), and Friedman's test of a difference.

    Rank 1 is the best; ties get their mean rank. The test is None for fewer than three methods or two tasks, or if all
    ranks are equal.
    """
    if table.empty:
        return {}, None
    errors = table.mul([1 if less_is_better(task) else -1 for task in table.index], axis=0)
    friedman = None
    if len(errors.columns) > 2 and len(errors) > 1 and (errors.nunique(axis=1) > 1).any():
        ran = stats.friedmanchisquare(*errors.to_numpy().T)
        friedman = Friedman(statistic=float(ran.statistic), p=float(ran.pvalue))
    return errors.rank(axis=1).mean().to_dict(), friedman
