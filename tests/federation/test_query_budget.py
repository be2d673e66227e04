"""Queries: counted where they are asked, kept within a budget, the same after an interruption."""

import json

import pytest

import small
from ficpd.errors import BudgetError, ConfigError
from ficpd.experiments.build import build_context_without_records
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation.query_budget import QueryBudget
from ficpd.federation.rounds import Round
from ficpd.optimizers import LocalTrainingConfig
from ficpd.privacy import record_gaussian
from ficpd.types import ClientWorkload

SPSA = ("training.optimizer=spsa", "training.directions=3")
PRIVATE = ("privacy.name=record_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]


def test_gradients_and_forward_queries_are_counted_apart(tmp_path):
    """Three clients of 20 records, two steps of four records in each of three rounds."""
    white = small.run(tmp_path / "white", "fedavg").queries
    black = small.run(tmp_path / "black", "fedavg", *SPSA).queries
    assert (white.forward, white.gradient) == (0, 3 * 3 * 2 * 4)
    assert (black.forward, black.gradient) == (3 * 3 * 2 * 4 * 6, 0)
    assert black.per_client_round == 2 * 4 * 6
    assert black.per_client_most == 3 * 2 * 4 * 6
    assert {(one.forward, one.gradient) for one in black.per_client.values()} == {(144, 0)}
    queries = [line["queries"] for line in lines(tmp_path / "black")]
    assert queries == [{name: [48, 0] for name in ("site-0", "site-1", "site-2")}] * 3


def test_what_a_client_tunes_for_itself_is_counted_too(tmp_path):
    found = small.run(tmp_path, "fpl", "method.clusters=none", "method.held_back=0").queries
    assert found.gradient > 3 * 3 * 2 * 4


@pytest.mark.parametrize("most", [47, 48, 100, 143, 144])
def test_a_run_ends_before_a_round_that_could_ask_more(tmp_path, most):
    result = small.run(tmp_path, "fedavg", *SPSA, f"federation.max_queries={most}")
    assert result.num_rounds == most // 48
    assert result.queries.per_client_most == most // 48 * 48
    if most < 144:
        assert f"federation.max_queries = {most}" in result.stopped
        assert f"round {most // 48 + 1} does not take place" in result.stopped
    else:
        assert result.stopped is None


def test_a_method_that_does_not_say_what_it_asks_is_known_from_its_first_round(tmp_path):
    asks = small.run(tmp_path / "free", "fpl", "method.clusters=none", rounds=1).queries.per_client_most
    result = small.run(tmp_path / "bound", "fpl", "method.clusters=none", f"federation.max_queries={2 * asks}")
    assert result.num_rounds < 3
    assert result.queries.per_client_most <= 2 * asks


def test_a_poisson_sample_is_expected_to_be_large(model):
    """Nobody knows how many records the next one has: a client stops in time whatever it is."""
    of = small.method("dp_zo", LocalTrainingConfig(local_steps=2, batch_size=4, learning_rate=0.1, directions=2))
    plan = ClientWorkload(100, 0.04, 2, 1, 1, 1.0, 1)
    mechanism = record_gaussian.build(record_gaussian.Config(noise_multiplier=1.0, clip_norm=1.0, delta=1e-3), plan)
    members = small.clients(model, of, 1, mechanism=mechanism)
    members["site-0"].train = small.records(100)
    state = small.first_state(of, members)
    could = 4 * (8 + 6 * 8**0.5)
    for most, fine in ((int(could) - 2, False), (int(could) + 2, True)):
        queries = QueryBudget(of, state, members, [], most)
        if fine:
            queries.before(1, ["site-0"])
        else:
            with pytest.raises(BudgetError, match="could ask 100 more"):
                queries.before(1, ["site-0"])


@pytest.mark.slow
@pytest.mark.parametrize("private", [(), PRIVATE])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_run_counts_as_one_that_was_not(tmp_path, monkeypatch, private, when):
    """Killed before or after the second round's checkpoint; with privacy, its answers are in the ledger by then, and are
    not asked for again."""
    whole = small.run(tmp_path / "whole", "dp_zo", *private)
    experiment = small.experiment(tmp_path / "cut", "dp_zo", *private)
    original, saved = RunDir.save, []

    class KilledError(Exception):
        pass

    def once(self, *given):
        if len(saved) == 1 and when == "before":
            raise KilledError
        original(self, *given)
        saved.append(1)
        if len(saved) == 2:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", once)
        with pytest.raises(KilledError):
            run_experiment(experiment, tmp_path / "cut" / "run")
    again = run_experiment(experiment, tmp_path / "cut" / "run", resume=True)
    assert again.queries == whole.queries
    cut, whole = ([line["queries"] for line in lines(tmp_path / name)] for name in ("cut", "whole"))
    assert cut == whole
    ours, theirs = small.library(tmp_path / "cut"), small.library(tmp_path / "whole")
    assert all(small.close(ours[name], prompt) for name, prompt in theirs.items())


def test_rounds_of_an_older_version_have_no_counts(model):
    of = small.method("fedavg")
    members = small.clients(model, of)
    old = Round(1, 5, 5, {}, 10, 20, 0.5, 0.25)
    assert QueryBudget(of, small.first_state(of, members), members, [old], None).to_report()["forward"] == 0


def test_real_sites_do_not_tell_what_they_ask(tmp_path):
    with pytest.raises(ConfigError, match="max_queries is for simulations"):
        build_context_without_records(small.experiment(tmp_path, "fedavg", "federation.max_queries=10"))
