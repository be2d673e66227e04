"""What is measured. Which figure stands for a task, and how it is read, is said here and nowhere else."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`scale` and `unit`: how it is shown to a person. `less_is_better`: the worst client has the most of it."""

    name: str
    scale: float = 1.0
    digits: int = 3
    unit: str = ""
    less_is_better: bool = False

    def shown(self, value: float) -> str:
        """The figure for a table whose heading has the unit.

        >>> Metric("accuracy", 100, 1, " %").shown(0.8125)
        '81.2'
        """
        return f"{self.scale * value:.{self.digits}f}"


MAIN = (Metric("accuracy", 100, 1, " %"), Metric("rmse", less_is_better=True), Metric("bleu", digits=1))
"""The figures that a task may be known by, the first that it has."""


def main_metric(names: Iterable[str]) -> Metric:
    """The one figure to show of a score; one that is not known here is shown as it is.

    >>> main_metric({"f1": 0.7, "accuracy": 0.8}).name, main_metric(["loss", "regret"]).name
    ('accuracy', 'loss')
    """
    found = sorted(names)
    return next((metric for metric in MAIN if metric.name in found), Metric(found[0]))


def less_is_better(name: str) -> bool:
    """
    >>> less_is_better("rmse"), less_is_better("pearson")
    (True, False)
    """
    return any(metric.name == name and metric.less_is_better for metric in MAIN)
