"""Conditions and settings of `compare.json`: what the cells say together."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ficpd.experiments.comparison import statistics
from ficpd.experiments.comparison.overrides import REFERENCE_METHODS
from ficpd.experiments.comparison.results import Row
from ficpd.experiments.comparison.statistics import PairedSamples


@dataclass(frozen=True)
class ResultView:
    """The grid, and how it is looked at: the `figure` of a cell, `test`, `reference`. `metrics`: METRIC of each task, or
    None."""

    rows: Sequence[Row]
    methods: Sequence[str]
    figure: str
    test: str
    reference: str
    metrics: Mapping[str, Mapping[str, Any] | None]

    @property
    def lines(self) -> list[str]:
        return [label for label in self.methods if label in REFERENCE_METHODS]

    def value(self, row: Row) -> float | None:
        """The figure that is compared; None where there is none."""
        return None if row["figures"] is None else row["figures"][self.figure]

    def less_is_better(self, task: str) -> bool:
        return bool((self.metrics.get(task) or {}).get("less_is_better"))

    def grouped(self, keys: Sequence[str]) -> list[tuple[dict[str, Any], list[Row]]]:
        """Rows by these keys, in the grid's order."""
        found: dict[str, tuple[dict[str, Any], list[Row]]] = {}
        for row in self.rows:
            labels = {key: row[key] for key in keys}
            found.setdefault(json.dumps(labels), (labels, []))[1].append(row)
        return list(found.values())


SETTING = ("partition", "budget", "sweep")
CONDITION = ("task", *SETTING)


def metrics_of(rows: Iterable[Row], tasks: Iterable[str]) -> dict[str, Mapping[str, Any] | None]:
    """What each task is measured by, as its finished cells say."""
    known = {row["task"]: row["metric"] for row in rows if row.get("metric")}
    return {task: known.get(task) for task in tasks}


def conditions(seen: ResultView) -> list[dict[str, Any]]:
    found = []
    for labels, rows in seen.grouped(CONDITION):
        by_method = {label: [row for row in rows if row["method"] == label] for label in seen.methods}
        tests = _tests(seen, by_method)
        statistics.apply_holm(tests, seen.lines)
        methods = {label: {**_summary(seen, own), "against": tests[label]} for label, own in by_method.items()}
        found.append({**labels, "methods": methods})
    return found


def settings(seen: ResultView) -> list[dict[str, Any]]:
    found = []
    for labels, rows in seen.grouped(SETTING):
        by_method = {label: [row for row in rows if row["method"] == label] for label in seen.methods}
        names = {(seen.metrics.get(row["task"]) or {}).get("name") for row in rows if seen.value(row) is not None}
        tests = _tests(seen, by_method)
        for test in filter(None, tests.values()):
            if len(names) > 1:
                said = f"tasks are measured differently ({', '.join(sorted(map(str, names)))}): see their ranks"
                test |= {"difference": None, "interval": None, "p": None, "why": said}
        statistics.apply_holm(tests, seen.lines)
        ranks, ranked, friedman = _ranks(seen, rows)
        methods = {label: {"rank": ranks.get(label), "against": tests[label]} for label in seen.methods}
        found.append({**labels, "methods": methods, "ranked": ranked, "friedman": friedman})
    return found


def _summary(seen: ResultView, rows: Sequence[Row]) -> dict[str, Any]:
    done = [row for row in rows if seen.value(row) is not None]
    found = statistics.mean_ci([value for row in done if (value := seen.value(row)) is not None])
    return {
        "n": len(done),
        **found._asdict(),
        "everyone": mean_of(done, lambda row: row["figures"]["everyone"]),
        "worst": mean_of(done, lambda row: row["figures"]["worst"]),
        "bytes": mean_of(done, lambda row: row["bytes"]["total"]),
        **{f"bytes_{way}": mean_of(done, lambda row, way=way: row["bytes"][way]) for way in ("up", "down")},
        **{key: mean_of(done, lambda row, key=key: row[key]) for key in ("queries", "seconds", "epsilon")},
    }


def _tests(seen: ResultView, by_method: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any] | None]:
    """AGAINST of each method; None of the reference."""
    reference = by_method[seen.reference]
    return {
        label: None if label == seen.reference else _against(seen, own, reference) for label, own in by_method.items()
    }


def mean_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> float | None:
    """None if any of them has none."""
    values = [value(row) for row in rows]
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _against(seen: ResultView, own: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """In pairs of the same task and seed, where both have a figure."""
    values = {(row["task"], row["seed"]): value for row in other if (value := seen.value(row)) is not None}
    mine = {(row["task"], row["seed"]): value for row in own if (value := seen.value(row)) is not None}
    both = [place for place in mine if place in values]
    pairs = PairedSamples([mine[place] for place in both], [values[place] for place in both])
    return statistics.paired_test(pairs, seen.test, seen.reference)


def _ranks(seen: ResultView, rows: Sequence[Row]) -> tuple[dict[str, float], list[str], dict[str, float] | None]:
    """Over the tasks in which every method that has any figure has one: its mean over seeds."""
    ranked = [label for label in seen.methods if label not in seen.lines]
    by_task: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        for label in ranked:
            own = [
                v
                for row in rows
                if (row["task"], row["method"]) == (task, label) and (v := seen.value(row)) is not None
            ]
            if own:
                by_task.setdefault(task, {})[label] = sum(own) / len(own)
    having = {label for values in by_task.values() for label in values}
    whole = {task: {m: v[m] for m in ranked if m in having} for task, v in by_task.items() if v.keys() == having}
    ranks, friedman = statistics.mean_ranks(whole, seen.less_is_better)
    return ranks, list(whole), friedman
