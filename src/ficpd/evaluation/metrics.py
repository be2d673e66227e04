"""The metrics: the main figure of a task, and its format."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric and its format (`scale`, `digits`, `unit`). `less_is_better`: lower values are better."""

    name: str
    scale: float = 1.0
    digits: int = 3
    unit: str = ""
    less_is_better: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """Returns the least and the largest value: shares lie in [0, 1], errors are not negative."""
        share = self.unit.strip() == "%"
        return 0.0 if share or self.less_is_better else -math.inf, 1.0 if share else math.inf

    def shown(self, value: float) -> str:
        """Formats a value without its unit, for a table with the unit in the heading.

        >>> Metric("accuracy", 100, 1, " %").shown(0.8125)
        '81.2'
        """
        return f"{self.scale * value:.{self.digits}f}"


MAIN = (Metric("accuracy", 100, 1, " %"), Metric("rmse", less_is_better=True), Metric("bleu", digits=1))
"""The main metrics, in order of precedence."""


def main_metric(names: Iterable[str]) -> Metric:
    """Returns the first of `MAIN` among a score's metrics, else the first in alphabetical order, unscaled.

    >>> main_metric({"f1": 0.7, "accuracy": 0.8}).name, main_metric(["loss", "regret"]).name
    ('accuracy', 'loss')
    """
    found = sorted(names)
    return next((metric for metric in MAIN if metric.name in found), Metric(found[0]))


def less_is_better(name: str) -> bool:
    """Tells whether a higher value of a metric is worse.

    >>> less_is_better("rmse"), less_is_better("pearson")
    (True, False)
    """
    return any(metric.name == name and metric.less_is_better for metric in MAIN)
