"""A run's outcome from what it left: curves, queries, and figures that are no numbers."""

import pytest

import small
from ficpd.errors import DataError
from ficpd.experiments.comparison.run_cell import ContextCache, curve_of, outcome_of, run_cell
from ficpd.experiments.comparison.schema import BytesOfAll, Figures, Point
from ficpd.experiments.results import RunResult
from ficpd.experiments.runner import no_progress
from ficpd.federation.rounds import Round


def result(own: float = 0.8, counted: bool = True) -> RunResult:
    scores = {"per_client_mean": {"accuracy": own}, "per_client_worst": {"accuracy": 0.5}, "zero_shot": None}
    sent = dict.fromkeys(("up_per_client_round", "down_per_client_round", "up_total", "down_total"), 0)
    most = {"per_client_most": 12, "per_client_round": 4.0, "budget_per_client": None}
    backbone = {"name": "tiny", "fingerprint": "tiny-0", "dtype": "float32", "attention": "eager", "enters_at": 1}
    privacy = {"mechanism": "m", "unit": "record", "epsilon": 2.0, "delta": 1e-5, "noise": "simulated"}
    found = {
        "method": "fedavg", "label": "fedavg", "backbone": backbone, "task": "t",
        "num_clients": 1, "num_rounds": 3, "seed": 0,
        "metrics": {"global_prompt": {"accuracy": 0.7}, "per_client": {"a": {"accuracy": own}}, **scores}, "bytes": sent,
        "seconds": {"train": 1.0, "aggregate": 1.0}, "dropped_updates": 0, "compression": {}, "privacy": privacy,
        "queries": {"forward": 4, "gradient": 8, "per_client": {}, **most} if counted else None,
        "machine": {}, "versions": {},
    }  # fmt: skip
    return RunResult.model_validate(found)


def line(round: int, queries: dict | None = None, **metrics: float) -> Round:
    return Round(round, 2, 2, {}, 10 * round, 100, 1.0, 0.5, metrics, queries=queries or {})


ROUNDS = [
    line(1, {"a": [3, 1], "b": [0, 4]}, own_accuracy=0.6, global_accuracy=0.5),
    line(2, {"a": [3, 1]}),
    line(3, {}, own_accuracy=0.1),
]


def test_a_curve_sums_what_was_spent_and_ends_with_the_result():
    """The second round was not evaluated; the last is, at the end of the run."""
    first, last = curve_of(result(), ROUNDS)
    assert first == Point(round=1, own=0.6, everyone=0.5, bytes_up=10, bytes_down=100, queries=8, seconds=1.5)
    assert last == Point(round=3, own=0.8, everyone=0.7, bytes_up=60, bytes_down=300, queries=12, seconds=4.5)


def test_a_run_without_rounds_has_one_point():
    (only,) = curve_of(result(), [])
    assert (only.round, only.own, only.bytes_up, only.queries) == (0, 0.8, 0, 0)


def test_queries_that_were_not_counted_are_none():
    points = curve_of(result(counted=False), [line(1, own_accuracy=0.6), line(2)])
    assert [point.queries for point in points] == [None, None]
    assert outcome_of("key", result(counted=False), [line(1)], "").gradients is None
    assert outcome_of("key", result(), ROUNDS, "").gradients == 8


def test_figures_are_those_of_the_end():
    found = outcome_of("key", result(), ROUNDS, "data")
    assert found.figures == Figures(own=0.8, everyone=0.7, worst=0.5)
    assert found.bytes == BytesOfAll(up=60, down=300, total=360)
    assert (found.epsilon, found.guarantee) == (2.0, "ε = 2.00 per record, simulated noise")
    assert (found.status, found.metric.unit) == ("done", " %")


def test_what_is_no_number_is_none():
    found = outcome_of("key", result(own=float("nan")), ROUNDS, "")
    assert (found.status, found.figures.own, found.per_client, found.curve[-1].own) == (
        "failed", None, {"a": None}, None,
    )  # fmt: skip


def test_a_cell_that_could_not_be_distilled_at_its_end_is_not_begun(tmp_path):
    given = small.experiment(tmp_path, "ficpd", "distillation.how=kl", "distillation.texts=nowhere.txt")
    with pytest.raises(DataError, match=r"distillation\.texts: nowhere\.txt"):
        run_cell(given, "key", "ground", tmp_path / "cells", ContextCache(), no_progress)
    assert not (tmp_path / "cells").exists()
