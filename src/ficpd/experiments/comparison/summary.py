"""Summarises the cells to the conditions and settings of `compare.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison import statistics
from ficpd.experiments.comparison.overrides import REFERENCE_METHODS
from ficpd.experiments.comparison.schema import (
    Against,
    CellResult,
    Condition,
    Figures,
    Friedman,
    MethodRank,
    Setting,
    Summary,
)

SETTING = ("partition", "budget", "sweep")
CONDITION = ("task", *SETTING)


@dataclass(frozen=True)
class ResultView:
    """The cells of a grid, with the compared `figure`, the `reference`, and the `metrics` by task."""

    rows: Sequence[CellResult]
    methods: Sequence[str]
    figure: str
    reference: str
    metrics: Mapping[str, Metric | None]

    @property
    def lines(self) -> list[str]:
        return [label for label in self.methods if label in REFERENCE_METHODS]

    def value(self, row: CellResult) -> float | None:
        """Returns the compared figure of a cell; None without one."""
        return None if row.figures is None else getattr(row.figures, self.figure)

    def less_is_better(self, task: str) -> bool:
        metric = self.metrics.get(task)
        return metric is not None and metric.less_is_better

    def grouped(self, keys: Sequence[str]) -> list[tuple[dict[str, Any], list[CellResult]]]:
        """Groups rows by these keys, in the grid's order."""
        found: dict[str, tuple[dict[str, Any], list[CellResult]]] = {}
        for row in self.rows:
            labels = {key: getattr(row, key) for key in keys}
            found.setdefault(json.dumps(labels), (labels, []))[1].append(row)
        return list(found.values())


def conditions(seen: ResultView) -> list[Condition]:
    found = []
    for labels, rows in seen.grouped(CONDITION):
        by_method = {label: [row for row in rows if row.method == label] for label in seen.methods}
        tests = statistics.apply_holm(_tests(seen, by_method))
        bounds = (seen.metrics.get(labels["task"]) or Metric("figure")).bounds
        methods = {label: _summary(seen, own, tests[label], bounds) for label, own in by_method.items()}
        found.append(Condition(**labels, methods=methods))
    return found


def settings(seen: ResultView) -> list[Setting]:
    found = []
    for labels, rows in seen.grouped(SETTING):
        by_method = {label: [row for row in rows if row.method == label] for label in seen.methods}
        metrics = [seen.metrics.get(row.task) for row in rows if seen.value(row) is not None]
        names = sorted({metric.name if metric else "None" for metric in metrics})
        tests = _tests(seen, by_method)
        if len(names) > 1:
            why = f"tasks are measured differently ({', '.join(names)}): see their ranks"
            no_test = {"difference": None, "interval": None, "p": None, "why": why}
            tests = {label: test and test.model_copy(update=no_test) for label, test in tests.items()}
        tests = statistics.apply_holm(tests)
        ranks, ranked, friedman = _ranks(seen, rows)
        methods = {label: MethodRank(rank=ranks.get(label), against=tests[label]) for label in seen.methods}
        found.append(Setting(**labels, methods=methods, ranked=ranked, friedman=friedman))
    return found


def _summary(
    seen: ResultView, rows: Sequence[CellResult], against: Against | None, bounds: tuple[float, float]
) -> Summary:
    done = [row for row in rows if seen.value(row) is not None]
    ends = [row.curve[-1] for row in done]
    found = statistics.mean_ci([value for row in done if (value := seen.value(row)) is not None])
    if found.interval:  # Student's interval has no bounds
        found = found._replace(interval=tuple(min(max(end, bounds[0]), bounds[1]) for end in found.interval))
    figures = [row.figures or Figures(own=None, everyone=None, worst=None) for row in done]
    return Summary(
        n=len(done),
        **found._asdict(),
        everyone=mean_of([one.everyone for one in figures]),
        worst=mean_of([one.worst for one in figures]),
        bytes=mean_of([end.bytes for end in ends]),
        bytes_up=mean_of([end.bytes_up for end in ends]),
        bytes_down=mean_of([end.bytes_down for end in ends]),
        queries=mean_of([end.queries for end in ends]),
        seconds=mean_of([end.seconds for end in ends]),
        epsilon=mean_of([row.epsilon for row in done]),
        against=against,
    )


def _tests(seen: ResultView, by_method: Mapping[str, Sequence[CellResult]]) -> dict[str, Against | None]:
    """Compares each method with the reference; None for the reference."""
    reference = by_method[seen.reference]
    return {
        label: None if label == seen.reference else _against(seen, own, reference) for label, own in by_method.items()
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """Returns the mean; None for no values, or if any value is None."""
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _against(seen: ResultView, own: Sequence[CellResult], other: Sequence[CellResult]) -> Against:
    """Compares a method with the reference in pairs of one task and seed, if both have a figure."""
    values = {(row.task, row.seed): value for row in other if (value := seen.value(row)) is not None}
    mine = {(row.task, row.seed): value for row in own if (value := seen.value(row)) is not None}
    both = [place for place in mine if place in values]
    pairs = [mine[place] for place in both], [values[place] for place in both]
    return statistics.paired_test(*pairs, seen.reference)


def _ranks(seen: ResultView, rows: Sequence[CellResult]) -> tuple[dict[str, float], list[str], Friedman | None]:
    """Ranks methods by their means over seeds, on the tasks in which every method with a figure has one."""
    import pandas as pd

    figures = [
        {"task": row.task, "method": row.method, "value": value}
        for row in rows
        if row.method not in seen.lines and (value := seen.value(row)) is not None
    ]
    if not figures:
        return {}, [], None
    table = pd.DataFrame(figures).pivot_table("value", "task", "method", lambda own: sum(own) / len(own), sort=False)
    whole = table.reindex(columns=[label for label in seen.methods if label in table]).dropna()
    ranks, friedman = statistics.mean_ranks(whole, seen.less_is_better)
    return ranks, list(whole.index), friedman
