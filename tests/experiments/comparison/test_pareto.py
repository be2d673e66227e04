"""Fronts, targets and budgets on curves that were drawn by hand."""

import pytest

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.pareto import cost_to_target, first_reaching, is_pareto, pareto_fronts
from ficpd.experiments.comparison.results import truncate_to_budget
from ficpd.experiments.comparison.schema import CellResult, Point
from ficpd.experiments.comparison.summary import ResultView, conditions, settings

METRIC = Metric("accuracy", 100, 1, " %")
ERROR = Metric("rmse", less_is_better=True)


def curve(values: list[float], up: int = 60, down: int = 40) -> list[Point]:
    return [
        Point(
            round=n, own=v, everyone=None, bytes_up=n * up, bytes_down=n * down, queries=10 * n, seconds=0.5 * n
        )
        for n, v in enumerate(values, 1)
    ]  # fmt: skip


def row(
    method: str, values: list[float], seed: int = 0, task: str = "t", budget: str = "b", epsilon: float | None = None,
    **more,
):  # fmt: skip
    points = curve(values, **more)
    last = points[-1]
    labels = {
        "method": method, "task": task, "partition": "p", "budget": budget, "sweep": {}, "seed": seed, "key": method,
    }  # fmt: skip
    sent = {"up": last.bytes_up, "down": last.bytes_down, "total": last.bytes}
    figures = {"own": last.own, "everyone": None, "worst": None}
    spent = {"bytes": sent, "queries": last.queries, "seconds": last.seconds, "epsilon": epsilon}
    went = {"status": "done", "reason": None, "at_round": last.round, "rounds": last.round}
    return CellResult(**labels, **went, figures=figures, curve=points, **spent)


def seen(rows: list[CellResult], reference: str = "a", metrics: dict | None = None) -> ResultView:
    methods = list(dict.fromkeys(r.method for r in rows))
    return ResultView(rows, methods, "own", reference, metrics or {"t": METRIC})


def test_a_target_is_reached_in_the_first_round_at_or_beyond_it():
    found = first_reaching(curve([0.5, 0.75, 0.7, 0.8]), "own", 0.75, less_is_better=False)
    assert found == curve([0.5, 0.75])[1]
    assert found.bytes == 200
    assert first_reaching(curve([0.5, 0.7]), "own", 0.75, less_is_better=False) is None
    assert first_reaching(curve([3.0, 2.0, 1.0]), "own", 2.5, less_is_better=True).round == 2


def test_targets_are_shares_of_each_seeds_own_centralised_end():
    rows = [
        row("centralized", [0.9, 1.0], 0), row("centralized", [0.5, 0.5], 1),
        row("a", [0.85, 0.9, 0.95], 0), row("a", [0.4, 0.44, 0.46], 1),
    ]  # fmt: skip
    nine, more = cost_to_target(seen(rows), [0.9, 0.95])
    assert nine.target == pytest.approx(0.675)
    assert [one and one.round for one in nine.methods["a"].seeds] == [2, 3]  # of 0.90 and 0.45
    assert (nine.methods["a"].reached, nine.methods["a"].rounds, nine.methods["a"].bytes) == (2, 2.5, 250)
    assert more.methods["a"].seeds[1] is None  # 0.475 is never there
    assert (more.methods["a"].reached, more.methods["a"].rounds) == (1, None)
    assert more.methods["a"].of == [0, 1]


def test_of_an_error_the_target_is_above_the_end():
    rows = [row("centralized", [1.0, 0.9]), row("a", [1.2, 1.01, 0.99])]
    (found,) = cost_to_target(seen(rows, metrics={"t": ERROR}), [0.9])
    assert found.target == pytest.approx(1.0)
    assert found.methods["a"].rounds == 3


def test_the_front_is_whom_nobody_beats():
    points = [(10, 0.5), (20, 0.7), (20, 0.6), (30, 0.7), (40, 0.9), (5, 0.1)]
    assert is_pareto(points) == [True, True, False, False, True, True]
    assert is_pareto([(1, 2.0), (2, 3.0), (3, 1.0)], less_is_better=True) == [True, False, True]
    assert is_pareto([]) == []


def test_fronts_are_of_means_over_seeds_and_leave_out_who_has_no_such_cost():
    rows = [
        row("a", [0.6, 0.8], 0, epsilon=2.0), row("a", [0.6, 0.6], 1, epsilon=2.0),
        row("b", [0.9], 0), row("b", [0.7], 1), row("centralized", [0.95], 0),
    ]  # fmt: skip
    found = {front.cost: front for front in pareto_fronts(seen(rows))}
    assert [(p.method, p.cost, p.on_front) for p in found["bytes"].points] == [("a", 200, False), ("b", 100, True)]
    assert [p.value for p in found["bytes"].points] == pytest.approx([0.7, 0.8])
    assert [(p.method, p.cost) for p in found["epsilon"].points] == [("a", 2.0)]


def test_a_budget_of_bytes_takes_the_last_round_that_it_pays_for():
    found = truncate_to_budget(row("a", [0.5, 0.6, 0.7]), {"bytes": 250})
    assert (found.figures.own, found.at_round, found.bytes.total) == (0.6, 2, 200)
    assert (found.rounds, len(found.curve)) == (3, 2)
    assert truncate_to_budget(row("a", [0.5, 0.6]), {"bytes": 200}).figures.own == 0.6
    assert truncate_to_budget(row("a", [0.5, 0.6]), {"bytes": 1000, "queries": 10}).at_round == 1


def test_a_budget_that_pays_for_nothing_says_so():
    found = truncate_to_budget(row("a", [0.5]), {"bytes": 99})
    assert (found.status, found.figures) == ("refused", None)
    assert found.reason == "its first evaluated round takes 100 bytes where the budget has 99"
    uncounted = row("a", [0.5])
    points = [point.model_copy(update={"queries": None}) for point in uncounted.curve]
    uncounted = uncounted.model_copy(update={"curve": points})
    assert "were not counted" in truncate_to_budget(uncounted, {"queries": 5}).reason


def test_a_condition_pairs_seeds_and_a_setting_pairs_tasks_too():
    ends = {"a": {"t": (0.8, 0.84), "u": (0.5, 0.58)}, "b": {"t": (0.7, 0.72), "u": (0.5, 0.51)}}
    rows = [row(m, [v], s, t) for m, tasks in ends.items() for t, values in tasks.items() for s, v in enumerate(values)]
    both = seen(rows, metrics={"t": METRIC, "u": METRIC})
    first, _ = conditions(both)
    assert (first.task, first.methods["a"].against) == ("t", None)
    assert first.methods["b"].against.difference == pytest.approx(-0.11)
    assert first.methods["b"].against.pairs == 2
    (whole,) = settings(both)
    against = whole.methods["b"].against
    assert (against.pairs, against.difference) == (4, pytest.approx(-0.0725))
    assert against.p_holm == against.p
    assert (whole.methods["a"].rank, whole.methods["b"].rank) == (1.0, 2.0)
    assert whole.ranked == ["t", "u"]


def test_tasks_with_different_measures_are_ranked_and_not_pooled():
    rows = [row(m, [v], s, t) for m, v in (("a", 0.8), ("b", 0.7)) for t in ("t", "u") for s in (0, 1)]
    (whole,) = settings(seen(rows, metrics={"t": METRIC, "u": ERROR}))
    assert "measured differently (accuracy, rmse)" in whole.methods["b"].against.why
    assert whole.methods["b"].against.difference is None
    assert whole.methods["a"].rank == 1.5  # the best of one, the worst of the other


def test_a_missing_seed_is_no_pair():
    rows = [row("a", [0.8], 0), row("a", [0.9], 1), row("b", [0.7], 0)]
    failed = {"status": "failed", "figures": None, "curve": [], "bytes": None, "seconds": None}
    rows.append(row("b", [0.7], 1).model_copy(update=failed))
    (found,) = conditions(seen(rows))
    assert (found.methods["b"].n, found.methods["b"].against.pairs) == (1, 1)
    assert found.methods["b"].against.why == "one pair is too few"
