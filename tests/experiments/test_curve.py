"""The accuracy curve: a sample of test records after each round, which changes nothing that a run leaves or pays."""

import json

import pytest

import small
from ficpd.evaluation.evaluate import draw_sample
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.library.library import PromptLibrary

PRIVATE = ("privacy.name=record_gaussian", "privacy.epsilon=8")


def metrics(folder):
    return [done.metrics for done in RunDir(folder / "run").rounds()]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), [
    ("ficpd", PRIVATE), ("fedavg", PRIVATE), ("fpl", ()), ("local", ()), ("fedhpl", ()), ("feddtpt", ()),
    ("fedlora", ()),
])  # fmt: skip
def test_curve_of_a_sample_changes_neither_results_nor_privacy(tmp_path, method, changes):
    for name, every in (("with", 1), ("without", 0)):
        scored = (f"federation.evaluate_every={every}", "federation.evaluate_records=9")
        small.run(tmp_path / name, method, *scored, *changes)
    one, other = (RunResult.load(tmp_path / name / "run") for name in ("with", "without"))
    left = [small.library(tmp_path / name) for name in ("with", "without")]
    assert small.same(*left)
    assert one.privacy == other.privacy
    assert one.queries == other.queries
    assert one.bytes == other.bytes
    assert one.scores.model_copy(update={"sample": None}) == other.scores
    assert other.scores.sample is None
    assert [sorted(of) for of in metrics(tmp_path / "with")] == [["sample_accuracy", "sample_f1"]] * 2 + [[]]
    assert metrics(tmp_path / "without") == [{}, {}, {}]


def test_last_point_of_all_records_is_the_result(tmp_path):
    small.run(tmp_path, "fedavg", "baselines=['local']")
    for folder in (tmp_path / "run", tmp_path / "run" / "baselines" / "zero_shot"):
        scores = RunResult.load(folder).scores
        assert scores.sample == scores.global_prompt


def test_evaluate_records_zero_scores_every_clients_own_model(tmp_path):
    small.run(tmp_path, "fedavg", "federation.evaluate_records=0", "federation.evaluate_every=2", rounds=4)
    found = metrics(tmp_path)
    assert [sorted(of) for of in found] == [
        [], ["global_accuracy", "global_f1", "own_accuracy", "own_f1"], [], [],
    ]  # fmt: skip
    assert RunResult.load(tmp_path / "run").scores.sample is None


def test_sample_is_drawn_over_all_clients_by_the_seed(model):
    clients = small.clients(model, small.method("fedavg"), count=5)
    drawn = draw_sample(clients, 12, 0)
    assert sum(map(len, drawn.values())) == 12
    assert all(places == sorted({*places}) for places in drawn.values())
    assert drawn == draw_sample(clients, 12, 0) != draw_sample(clients, 12, 1)
    assert sum(map(len, draw_sample(clients, 1000, 0).values())) == sum(len(c.test) for c in clients.values())
    assert draw_sample(clients, 0, 0) == {}


def test_library_does_not_hold_the_curve(tmp_path):
    small.run(tmp_path, "ficpd", *PRIVATE)
    folder = tmp_path / "run"
    assert RunResult.load(folder).scores.sample
    assert "sample_" not in json.dumps(PromptLibrary.load(folder).card)
    assert not [file for file in (folder / "library").iterdir() if b"sample_accuracy" in file.read_bytes()]


def test_seconds_of_the_curve_are_counted_as_evaluation(tmp_path, monkeypatch):
    from ficpd.experiments import runner

    times = iter(range(10_000))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(times)))
    small.run(tmp_path / "with", "fedavg")
    small.run(tmp_path / "without", "fedavg", "federation.evaluate_every=0")
    one, other = (RunResult.load(tmp_path / name / "run").seconds for name in ("with", "without"))
    assert one.evaluate == other.evaluate + 2
    assert one.train == other.train


def test_items_of_a_message_are_written_for_each_round(tmp_path):
    small.run(tmp_path, "ficpd", "compression.name=subspace", "compression.dimension=8", "compression.bits=8", *PRIVATE)
    found = [done.items for done in RunDir(tmp_path / "run").rounds()]
    assert found[0]["delta"] == [8, 8]
    assert found[0].keys() > {"delta", "delta.scale"}
    assert all(len(size) == 2 and min(size) > 0 for items in found for size in items.values())
