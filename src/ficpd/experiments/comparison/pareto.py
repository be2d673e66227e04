"""What a figure costs: Pareto fronts, and what it takes to reach a share of the centralised line's."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ficpd.experiments.comparison.results import Row
from ficpd.experiments.comparison.summary import CONDITION, ResultView, mean_of

UPPER = "centralized"
COSTS = {
    "bytes": lambda row: row["bytes"]["total"],
    "epsilon": lambda row: row["epsilon"],
    "queries": lambda row: row["queries"],
}


def pareto_fronts(seen: ResultView) -> list[dict[str, Any]]:
    """Figure against each cost, task by task. Without the centralised line: what it moves, all records, is not counted."""
    found = []
    for labels, rows in seen.grouped(("task", "partition")):
        for cost, of in COSTS.items():
            points = _points(seen, [row for row in rows if row["method"] != UPPER], of)
            if points:
                marked = is_pareto([(p["cost"], p["value"]) for p in points], seen.less_is_better(labels["task"]))
                points = [{**point, "on_front": on} for point, on in zip(points, marked, strict=True)]
                found.append({**labels, "cost": cost, "points": points})
    return found


def _points(seen: ResultView, rows: Sequence[Row], cost: Any) -> list[dict[str, Any]]:
    """One of each method, budget and sweep: means over its seeds."""
    found, keys = [], ("method", "budget", "sweep")
    for labels, of_point in replace(seen, rows=rows).grouped(keys):
        done = [row for row in of_point if seen.value(row) is not None]
        paid = mean_of(done, cost)
        if paid is not None:
            value = mean_of(done, seen.value)
            found.append({**labels, "cost": paid, "value": value})
    return found


def is_pareto(points: Sequence[tuple[float, float]], less_is_better: bool = False) -> list[bool]:
    """Of (cost, value) pairs, which no other beats: none that costs no more and is no worse, and better in one of both.

    >>> is_pareto([(1, 0.5), (2, 0.7), (3, 0.6), (2, 0.7)])
    [True, True, False, True]
    """
    sign = -1 if less_is_better else 1
    whole = [(cost, sign * value) for cost, value in points]
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in whole) for cost, value in whole]


def cost_to_target(seen: ResultView, shares: Sequence[float]) -> list[dict[str, Any]]:
    """For each condition and share: who reaches it, and with what."""
    found = []
    for labels, rows in seen.grouped(CONDITION):
        ends = {row["seed"]: row["curve"][-1][seen.figure] for row in rows if row["method"] == UPPER and row["curve"]}
        ends = {seed: end for seed, end in ends.items() if end is not None}
        less = seen.less_is_better(labels["task"])
        for share in shares:
            goals = {seed: end / share if less else end * share for seed, end in ends.items()}
            methods = {
                label: _of_method([row for row in rows if row["method"] == label], goals, seen.figure, less)
                for label in seen.methods
            }
            mean = sum(goals.values()) / len(goals) if goals else None
            found.append({**labels, "share": share, "target": mean, "methods": methods})
    return found


def _of_method(rows: Sequence[Row], goals: Mapping[int, float], figure: str, less: bool) -> dict[str, Any]:
    asked = [row for row in rows if row["curve"] and row["seed"] in goals]
    seeds = [first_reaching(row["curve"], figure, goals[row["seed"]], less) for row in asked]
    there = [one for one in seeds if one is not None]
    everybody = bool(asked) and len(there) == len(asked)

    def median(key: str) -> float | None:
        values = [one[key] for one in there if one[key] is not None]
        return statistics.median(values) if everybody and len(values) == len(there) else None

    return {
        "seeds": [None if one is None else {"seed": row["seed"], **one} for row, one in zip(asked, seeds, strict=True)],
        "of": [row["seed"] for row in asked],
        "reached": len(there),
        "rounds": median("round"),
        **{key: median(key) for key in ("bytes", "bytes_up", "bytes_down", "queries", "seconds")},
    }


def first_reaching(
    curve: Sequence[Mapping[str, Any]], figure: str, goal: float, less_is_better: bool
) -> dict[str, Any] | None:
    """The first point at or beyond the goal; None if no point is. Nothing is interpolated."""
    for point in curve:
        value = point[figure]
        if value is not None and (value <= goal if less_is_better else value >= goal):
            sent = {key: point[key] for key in ("bytes_up", "bytes_down")}
            spent = {"queries": point["queries"], "seconds": point["seconds"]}
            return {"round": point["round"], "bytes": sum(sent.values()), **sent, **spent}
    return None
