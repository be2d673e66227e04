"""Statistics against values that were worked out by hand."""

import pytest
from pandas import DataFrame

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.schema import CellResult, Figures, Point
from ficpd.experiments.comparison.statistics import apply_holm, holm, mean_ci, mean_ranks, p_of, paired_test
from ficpd.experiments.comparison.summary import ResultView, conditions


def test_mean_and_interval_of_three():
    """80, 82, 87: mean 83, sum of squares 26, sd √13, t(2) at 97.5 % is 4.302653."""
    found = mean_ci([80.0, 82.0, 87.0])
    assert found.mean == 83
    assert found.sd == pytest.approx(13**0.5)
    half = 4.302653 * 13**0.5 / 3**0.5
    assert found.interval == pytest.approx([83 - half, 83 + half], rel=1e-6)


def test_of_one_or_none_there_is_no_interval():
    assert mean_ci([0.5]) == (0.5, None, None)
    assert mean_ci([]) == (None, None, None)
    assert mean_ci([0.5, 0.5]) == (0.5, 0.0, None)
    assert mean_ci([0.5, 0.5, 0.5]) == (0.5, 0.0, (0.5, 0.5))


def test_a_paired_t_test_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, t = 2√3 = 3.4641 with 2 degrees of freedom. For those the two-sided
    p is 1 - t/√(2 + t²) = 1 - √(12/14)."""
    p, why = p_of([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert why is None
    assert p == pytest.approx(1 - (12 / 14) ** 0.5)


def test_where_there_is_no_test_it_says_why():
    assert p_of([1.0], [2.0]) == (None, "one pair is too few")
    assert p_of([1.0, 2.0], [1.0, 2.0]) == (None, "no pair differs")
    assert p_of([1.0, 2.0], [0.5, 1.5]) == (None, "all pairs differ by the same")
    assert paired_test([], [], "ficpd").why == "no pair of finished cells with ficpd"


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1, and never falling."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_apply_holm_counts_every_tested_row_lines_too():
    figures = {"a": [2.0, 4.0, 6.0], "b": [1.0, 2.1, 2.8], "local": [3.0, 2.0, 9.0]}
    entries = {label: paired_test(own, [1.0, 2.0, 3.0], "ref") for label, own in figures.items()}
    alone = holm({label: one.p for label, one in entries.items()})
    found = apply_holm({**entries, "ref": None})
    assert found["ref"] is None
    assert {label: found[label].p_holm for label in entries} == alone
    assert found["a"].p_holm > 2 * entries["a"].p
    assert found["local"].difference == pytest.approx(8 / 3)


def test_intervals_need_three_seeds_and_stay_within_shares():
    assert mean_ci([0.2, 0.9]).interval is None
    low, high = mean_ci([0.99, 0.9, 0.6]).interval
    assert high > 1
    rows = [cell_result("m", seed, value) for seed, value in enumerate([0.99, 0.9, 0.6])]
    view = ResultView(rows, ["m"], "own", "m", {"t": Metric("accuracy", 100, 1, " %")})
    (found,) = conditions(view)
    assert found.methods["m"].interval == (pytest.approx(low), 1.0)
    error = ResultView(rows, ["m"], "own", "m", {"t": Metric("rmse", less_is_better=True)})
    assert conditions(error)[0].methods["m"].interval == (pytest.approx(low), pytest.approx(high))


def cell_result(method: str, seed: int, value: float) -> CellResult:
    figures = {"own": value, "everyone": value, "worst": value}
    point = Point(round=1, own=value, everyone=value, bytes_up=0, bytes_down=0, queries=0, seconds=0.0)
    return CellResult(
        method=method, task="t", partition="p", budget="b", sweep={}, seed=seed, status="done", key="k",
        figures=Figures(**figures), curve=[point],
    )  # fmt: skip


def test_ranks_by_hand():
    """Ranks 1 2 3, 1.5 1.5 3, 2 1 3: sums 4.5, 4.5, 9. Friedman's statistic without ties would be 6; the one pair of ties
    divides by 1 - 6/72."""
    figures = ((0.9, 0.8, 0.7), (0.8, 0.8, 0.1), (0.5, 0.6, 0.4))
    table = {task: dict(zip("abc", own, strict=True)) for task, own in zip("xyz", figures, strict=True)}
    ranks, friedman = mean_ranks(DataFrame(table).T, lambda task: False)
    assert ranks == {"a": 1.5, "b": 1.5, "c": 3.0}
    whole = 12 / (3 * 3 * 4) * (4.5**2 + 4.5**2 + 9**2) - 3 * 3 * 4
    assert friedman.statistic == pytest.approx(whole / (1 - 6 / 72))
    assert 0 < friedman.p < 0.12


def test_less_may_be_better():
    ranks, friedman = mean_ranks(DataFrame({"x": {"a": 1.0, "b": 2.0}}).T, lambda task: task == "x")
    assert ranks == {"a": 1.0, "b": 2.0}
    assert friedman is None
    assert mean_ranks(DataFrame(), lambda task: False) == ({}, None)
