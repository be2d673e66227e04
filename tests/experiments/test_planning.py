"""A plan against the run that it is about: questions to the backbone, kept bytes, clients' states; and the command."""

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.cli import app
from ficpd.errors import ConfigError
from ficpd.experiments import planning, runner
from ficpd.experiments.planning import PlanningEngine, plan

SETTINGS = [
    "baselines=['local','fedavg:none']", "training.local_steps=2", "training.batch_size=4",
]  # fmt: skip


def experiment(folder: Path, method: str, *changes: str):
    return small.experiment(folder, method, *SETTINGS, *changes, rounds=5)


@pytest.fixture
def contexts(monkeypatch) -> list:
    """The contexts that are built."""
    found, own = [], runner.build_context

    def build(given):
        found.append(own(given))
        return found[-1]

    monkeypatch.setattr(runner, "build_context", build)
    return found


def positions_of_a_run(given, folder: Path, monkeypatch) -> Counter:
    """The positions that the backbone computes for each method of a real run, with and without gradients."""
    counted, now, own = Counter(), [""], QueryEngine.answer
    counters: dict[QueryEngine, PlanningEngine] = {}

    def answer(self, queries):
        if now[0]:
            counter = counters.setdefault(self, PlanningEngine(self))
            counted[now[0]] += sum(map(counter.computed, queries))
        return own(self, queries)

    prepare = runner.Runner.prepare

    def watched(self):
        now[0] = self.config["name"]
        prepare(self)

    monkeypatch.setattr(QueryEngine, "answer", answer)
    monkeypatch.setattr(runner.Runner, "prepare", watched)
    runner.run(given, folder)
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ficpd", "fedavg", "fedbpt"])
@pytest.mark.parametrize("evaluate_every", [0, 2])
def test_a_plan_counts_what_a_run_asks(method, evaluate_every, tmp_path, monkeypatch, contexts):
    given = experiment(tmp_path, method, f"federation.evaluate_every={evaluate_every}")
    works: dict[str, float] = {}
    own = planning._rehearse

    def rehearse(context, engine, part, private):
        rounds, phases, size = own(context, engine, part, private)
        works[part["name"]] = works.get(part["name"], 0) + sum(sum(work.positions.values()) for work in phases)
        return rounds, phases, size

    monkeypatch.setattr(planning, "_rehearse", rehearse)
    planned = plan(given)
    counted = positions_of_a_run(given, tmp_path / "run", monkeypatch)
    assert works.keys() == counted.keys()
    for name, positions in counted.items():
        assert works[name] == pytest.approx(positions, rel=0.15), name
    assert {one.name: one.rounds for one in planned.methods}[method] == 5
    assert planned.seconds > planned.seconds_load > 0
    assert 0.5 < planned.kept / contexts[0].model.kept.size < 1.5


def test_a_plan_leaves_nothing_and_says_what_a_run_would_refuse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = experiment(tmp_path, "local", "baselines=[]")
    before = {*tmp_path.iterdir()}
    found = plan(given)
    assert {*tmp_path.iterdir()} == before
    assert found.clients > 0, "each client keeps a prompt of its own"
    with pytest.raises(ConfigError, match=r"engine.name = 'flower': a plan is for one process"):
        plan(given.model_copy(update={"engine": given.engine.model_copy(update={"name": "flower"})}))


def test_the_command_prints_memory_and_time_within_80_columns(tmp_path, monkeypatch):
    recipe = small.toml(small.table(tmp_path / "records.csv"))
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "80")
    words = ["plan", str(tmp_path / "recipe.toml"), *(word for change in SETTINGS for word in ("--set", change))]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for line in (
        "weights", "forward and backward", "kept lower layers", "clients' states", "lower layers of all", "all",
    ):  # fmt: skip
        assert line in shown.stdout
    shown = CliRunner().invoke(app, [*words, "--json"])
    told = json.loads(shown.stdout)
    assert told["bytes"] == sum(told[part] for part in ("weights", "forward", "kept", "program", "clients"))
    assert [method["name"] for method in told["methods"]][:2] == ["zero_shot", told["methods"][1]["name"]]
