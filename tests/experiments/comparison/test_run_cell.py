"""A run's outcome from what it left: curves, queries, and figures that are no numbers."""

import pytest

import small
from ficpd.errors import DataError
from ficpd.experiments.comparison.run_cell import ContextCache, curve_of, figures_of, run_cell
from ficpd.experiments.runner import no_progress


def result(own: float = 0.8, **more) -> dict:
    metrics = {
        "global": {"accuracy": 0.7}, "per_client_mean": {"accuracy": own}, "per_client_worst": {"accuracy": 0.5},
        "per_client": {"a": {"accuracy": own}},
    }  # fmt: skip
    privacy = {"epsilon": 2.0, "unit": "record", "noise": "simulated"}
    return {"metrics": metrics, "privacy": privacy, "task": "t", "backbone": {"name": "tiny"}, "stopped": None, **more}


def line(round: int, queries: dict | None = None, **metrics: float) -> dict:
    sent = {"bytes_up": 10 * round, "bytes_down": 100, "seconds_train": 1.0, "seconds_aggregate": 0.5}
    return {"round": round, "metrics": metrics, **sent, **({} if queries is None else {"queries": queries})}


ROUNDS = [
    line(1, {"a": [3, 1], "b": [0, 4]}, own_accuracy=0.6, global_accuracy=0.5),
    line(2, {"a": [3, 1]}),
    line(3, {}, own_accuracy=0.1),
]


def test_a_curve_sums_what_was_spent_and_ends_with_the_result():
    """The second round was not evaluated; the last is, at the end of the run."""
    first, last = curve_of(result(), ROUNDS, "accuracy")
    assert first == {
        "round": 1, "own": 0.6, "everyone": 0.5, "bytes_up": 10, "bytes_down": 100, "queries": 8, "seconds": 1.5,
    }  # fmt: skip
    assert last == {
        "round": 3, "own": 0.8, "everyone": 0.7, "bytes_up": 60, "bytes_down": 300, "queries": 12, "seconds": 4.5,
    }  # fmt: skip


def test_a_run_without_rounds_has_one_point():
    (only,) = curve_of(result(), [], "accuracy")
    assert (only["round"], only["own"], only["bytes_up"], only["queries"]) == (0, 0.8, 0, 0)


def test_queries_that_were_not_counted_are_not_made_up():
    points = curve_of(result(), [line(1, own_accuracy=0.6), line(2)], "accuracy")
    assert [point["queries"] for point in points] == [None, None]
    assert figures_of(result(), [line(1)])["gradients"] is None
    assert figures_of(result(queries={"forward": 4, "gradient": 8}), ROUNDS)["gradients"] == 8


def test_figures_are_those_of_the_end():
    found = figures_of(result(), ROUNDS)
    assert found["figures"] == {"own": 0.8, "everyone": 0.7, "worst": 0.5}
    assert found["bytes"] == {"up": 60, "down": 300, "total": 360}
    assert (found["epsilon"], found["guarantee"]) == (2.0, "ε = 2.00 per record, simulated noise")
    assert found["metric"]["unit"] == " %"


def test_what_is_no_number_is_none():
    found = figures_of(result(own=float("nan")), ROUNDS)
    assert found["figures"]["own"] is None
    assert found["per_client"] == {"a": None}
    assert found["curve"][-1]["own"] is None


def test_a_cell_that_could_not_be_distilled_at_its_end_is_not_begun(tmp_path):
    given = small.experiment(tmp_path, "ficpd", "distillation.how=kl", "distillation.texts=nowhere.txt")
    with pytest.raises(DataError, match=r"distillation\.texts: nowhere\.txt"):
        run_cell(given, "key", "ground", tmp_path / "cells", ContextCache(), no_progress)
    assert not (tmp_path / "cells").exists()
