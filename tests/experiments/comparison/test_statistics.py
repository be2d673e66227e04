"""Statistics against values that were worked out by hand."""

import pytest
from pandas import DataFrame

from ficpd.experiments.comparison.statistics import (
    apply_holm,
    holm,
    mean_ci,
    mean_ranks,
    p_of,
    paired_test,
)


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
    assert mean_ci([0.5, 0.5]) == (0.5, 0.0, (0.5, 0.5))


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


def test_a_line_is_not_tested_and_does_not_count():
    entries = {
        label: paired_test(own, [1.0, 2.0, 3.0], "ref")
        for label, own in {"a": [2.0, 4.0, 6.0], "b": [1.0, 2.1, 2.8], "local": [3.0, 2.0, 9.0]}.items()
    }
    first = entries["a"].p
    found = apply_holm({**entries, "ref": None}, ["local"])
    assert found["ref"] is None
    assert found["a"].p_holm == pytest.approx(2 * first)
    assert found["local"].p is None
    assert found["local"].difference == pytest.approx(8 / 3)
    assert found["local"].why.startswith("a line")


def test_ranks_by_hand():
    """Ranks 1 2 3, 1.5 1.5 3, 2 1 3: sums 4.5, 4.5, 9. Friedman's statistic without ties would be 6; the one pair of ties
    divides by 1 - 6/72."""
    table = {
        "x": {"a": 0.9, "b": 0.8, "c": 0.7},
        "y": {"a": 0.8, "b": 0.8, "c": 0.1},
        "z": {"a": 0.5, "b": 0.6, "c": 0.4},
    }
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
