"""Computes Pareto fronts of figures and costs, and the cost to reach a share of the centralised line."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ficpd.experiments.comparison.schema import CellResult, Front, FrontPoint, MethodTarget, Point, Reached, Target
from ficpd.experiments.comparison.summary import CONDITION, ResultView, mean_of

UPPER = "centralized"
COSTS: dict[Any, Callable[[CellResult], float | None]] = {
    "bytes": lambda row: row.curve[-1].bytes,
    "epsilon": lambda row: row.epsilon,
    "queries": lambda row: row.curve[-1].queries,
}


def pareto_fronts(seen: ResultView) -> list[Front]:
    """Returns the fronts of the figure and each cost, by task and partition.

    The centralised line is left out, because the transfer of its records is not counted.
    """
    found = []
    for labels, rows in seen.grouped(("task", "partition")):
        for cost, of in COSTS.items():
            points = _points(seen, [row for row in rows if row.method != UPPER], of)
            if points:
                marked = is_pareto([(p["cost"], p["value"]) for p in points], seen.less_is_better(labels["task"]))
                drawn = [FrontPoint(**point, on_front=on) for point, on in zip(points, marked, strict=True)]
                found.append(Front(**labels, cost=cost, points=drawn))
    return found


def _points(
    seen: ResultView, rows: Sequence[CellResult], cost: Callable[[CellResult], float | None]
) -> list[dict[str, Any]]:
    """Returns a point for each method, budget and sweep: means over seeds."""
    found, keys = [], ("method", "budget", "sweep")
    for labels, of_point in replace(seen, rows=rows).grouped(keys):
        done = [row for row in of_point if seen.value(row) is not None]
        mean = mean_of([cost(row) for row in done])
        if mean is not None:
            found.append({**labels, "cost": mean, "value": mean_of([seen.value(row) for row in done])})
    return found


def is_pareto(points: Sequence[tuple[float, float]], less_is_better: bool = False) -> list[bool]:
    """Marks the (cost, value) pairs that no other pair beats.

    A pair beats another if it costs no more, is no worse, and is better in one of the two.

    >>> is_pareto([(1, 0.5), (2, 0.7), (3, 0.6), (2, 0.7)])
    [True, True, False, True]
    """
    sign = -1 if less_is_better else 1
    whole = [(cost, sign * value) for cost, value in points]
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in whole) for cost, value in whole]


def cost_to_target(seen: ResultView, shares: Sequence[float]) -> list[Target]:
    """Returns, for each condition and share, the methods' costs to reach it."""
    found = []
    for labels, rows in seen.grouped(CONDITION):
        ends = {row.seed: getattr(row.curve[-1], seen.figure) for row in rows if row.method == UPPER and row.curve}
        ends = {seed: end for seed, end in ends.items() if end is not None}
        less = seen.less_is_better(labels["task"])
        for share in shares:
            goals = {seed: end / share if less else end * share for seed, end in ends.items()}
            methods = {
                label: _of_method([row for row in rows if row.method == label], goals, seen.figure, less)
                for label in seen.methods
            }
            mean = sum(goals.values()) / len(goals) if goals else None
            found.append(Target(**labels, share=share, target=mean, methods=methods))
    return found


def _of_method(rows: Sequence[CellResult], goals: Mapping[int, float], figure: str, less: bool) -> MethodTarget:
    asked = [row for row in rows if row.curve and row.seed in goals]
    points = [first_reaching(row.curve, figure, goals[row.seed], less) for row in asked]
    there = [point for point in points if point is not None]
    everybody = bool(asked) and len(there) == len(asked)

    def median(key: str) -> float | None:
        values = [value for point in there if (value := getattr(point, key)) is not None]
        return statistics.median(values) if everybody and len(values) == len(there) else None

    costs = ("bytes", "bytes_up", "bytes_down", "queries", "seconds")
    return MethodTarget(
        seeds=[
            point and Reached(seed=row.seed, round=point.round, **{key: getattr(point, key) for key in costs})
            for row, point in zip(asked, points, strict=True)
        ],
        of=[row.seed for row in asked],
        reached=len(there),
        rounds=median("round"),
        **{key: median(key) for key in costs},
    )


def first_reaching(curve: Sequence[Point], figure: str, goal: float, less_is_better: bool) -> Point | None:
    """Returns the first point at or beyond the goal, without interpolation; None if there is none."""
    for point in curve:
        value = getattr(point, figure)
        if value is not None and (value <= goal if less_is_better else value >= goal):
            return point
    return None
