"""Secure sums in simulations: the masked arithmetic is the plain one, and the step is that of all records together."""

import json
from pathlib import Path

import pytest
import torch

import small
from ficpd.errors import ConfigError, PrivacyError
from ficpd.experiments.build import build_context
from ficpd.experiments.config import parse
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import Runner, SimulatedClients
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation.client import ClientSession
from ficpd.federation.method import group_card
from ficpd.library.library import PromptLibrary
from ficpd.privacy.noise import SeededNoise
from ficpd.privacy.shared_gaussian import GRADIENT, GRID
from ficpd.types import Query
from test_groups import toml

SHARED = ('privacy.name="shared_gaussian"', "privacy.epsilon=4.0", "privacy.delta=1e-3", "privacy.max_colluding=1")
MASKS = "engine.options.masks=true"


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return {n: p.vectors_PD for n, p in PromptLibrary.load(folder / "run").candidates().items()}


def grouped(folder: Path, *changes: str) -> RunResult:
    folder.mkdir(exist_ok=True)
    return run_experiment(parse(toml(folder, rounds=2), "groups.toml", (*SHARED, *changes)), folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedprox", "ficpd"])
def test_masked_and_plain_sums_are_equal_bit_for_bit(tmp_path, method):
    small.run(tmp_path / "plain", method, *SHARED, rounds=2)
    small.run(tmp_path / "masked", method, *SHARED, MASKS, rounds=2)
    plain, masked = (checkpoint(tmp_path / name) for name in ("plain", "masked"))
    assert all(torch.equal(plain[name], masked[name]) for name in plain)
    sizes = [RunResult.load(tmp_path / name / "run").bytes.up_total for name in ("plain", "masked")]
    assert sizes[1] > sizes[0], "keys and shares have travelled"


@pytest.mark.slow
def test_several_tasks_are_parts_of_one_sum_and_clusters_of_their_own(tmp_path):
    found = [grouped(tmp_path / name, *more) for name, more in (("plain", ()), ("masked", (MASKS,)))]
    plain, masked = (checkpoint(tmp_path / name) for name in ("plain", "masked"))
    assert all(torch.equal(plain[name], masked[name]) for name in plain)
    assert found[0].clusters is not None
    assert found[0].clusters.adjusted_rand["group"] == 1.0
    assert sorted(found[0].clusters.member) == [f"{g}.site-{i}" for g in ("opposed", "plain") for i in range(3)]
    assert not torch.equal(plain["prototype-0"], plain["prototype-1"])
    assert {line.name for line in found[0].privacy.lines} == {"prompt", "classes"}


@pytest.mark.slow
def test_every_client_adds_its_noise_to_every_part(tmp_path, monkeypatch):
    added: list[tuple[int, int]] = []
    original = SeededNoise.add_discrete_gaussian

    def noted(self, whole, deviation):
        added.append((len(whole), int(not whole.any())))
        return original(self, whole, deviation)

    monkeypatch.setattr(SeededNoise, "add_discrete_gaussian", noted)
    grouped(tmp_path, "method.class_totals=false", "training.local_steps=1", "federation.num_rounds=1")
    assert len(added) == 6 * 2, "six clients, two parts"
    assert sum(empty for _, empty in added) == 6


@pytest.mark.slow
def test_without_noise_the_step_is_that_of_the_mean_of_all_sites(tmp_path, monkeypatch):
    """The same samples, and batches of one expected size: what each site would send by itself, averaged."""
    monkeypatch.setattr(SeededNoise, "add_discrete_gaussian", lambda self, whole, deviation: whole)
    monkeypatch.setattr(SeededNoise, "add_gaussian", lambda self, values, deviation: values.float())
    one_step = ("training.local_steps=1", "training.batch_size=10", 'training.optimizer="sgd"')
    alone = ('privacy.name="record_gaussian"', "privacy.epsilon=4.0", "privacy.delta=1e-3")
    for subspace in ((), ('compression.name="subspace"', "compression.dimension=8")):
        folder = tmp_path / str(len(subspace))
        small.run(folder / "own", "fedavg", *alone, *one_step, *subspace, rounds=3)
        small.run(folder / "sum", "fedavg", *SHARED, *one_step, *subspace, rounds=3)
        own, summed = (checkpoint(folder / name)["global"] for name in ("own", "sum"))
        start = build_context(small.experiment(folder, "fedavg")).start.vectors_PD
        assert float((own - start).norm()) > 0.01
        assert small.close(own, summed, 1e-4)


def test_class_totals_without_noise_make_the_readout_of_all_records(tmp_path, monkeypatch):
    monkeypatch.setattr(SeededNoise, "add_discrete_gaussian", lambda self, whole, deviation: whole)
    found = small.run(tmp_path, "ficpd", *SHARED, rounds=2)
    learned = PromptLibrary.load(tmp_path / "run").learned
    assert found.privacy.epsilon <= 4.0
    (readout,) = learned.values()
    assert torch.isfinite(readout.rows_CD).all()
    truth = small.records(60, 1)
    share = sum(record.fields["target"] == "good" for record in truth) / len(truth)
    assert float(readout.shares_C.max()) == pytest.approx(max(share, 1 - share), abs=0.15)


def test_nothing_of_a_round_depends_on_an_earlier_step(tmp_path):
    """A step's mean is unprotected until it is summed: the prompt of the next step must not know it."""
    context = build_context(small.experiment(tmp_path, "fedavg", *SHARED, "training.local_steps=3"))
    runner = Runner(context, context.experiment.method, RunDir(tmp_path / "r"), SimulatedClients(None, True))
    runner.prepare()
    client = runner.clients.clients["site-0"]  # type: ignore[attr-defined]
    session = ClientSession(client, 1, "fedavg")
    assignment = runner.method.make_assignment(runner.state, client.card, 1)
    work, asked, answer = runner.method.local_update(session, assignment), [], None
    try:
        while True:
            query: Query = work.send(answer)  # type: ignore[arg-type]
            asked.append(query.prompts_KPD)
            answer = context.model.answer([query])[0]
    except StopIteration as end:
        update = end.value
    assert len(asked) == 3
    assert all(torch.equal(prompt, asked[0]) for prompt in asked)
    assert not update.arrays["delta"].any()
    assert float(session.terms[GRADIENT].double().abs().max()) > GRID / 10
    runner.plan.close()


@pytest.mark.parametrize(("method", "changes"), [
    ("fpl", ()), ("dp_zo", ()), ("dp_fpl", ()), ("fedhpl", ()), ("dp_cma_es", ()), ("analytic", ()),
    ("fedavg", ('training.optimizer="spsa"',)), ("fedavg", ('method.robust={rule="trimmed_mean",num_byzantine=1}',)),
    ("ficpd", ('method.space="metadata"',)), ("ficpd", ('method.server={kind="extrapolated"}',)),
    ("fedavg", ("federation.accept_late=1",)), ("ficpd", ("method.label_prior=true",)),
])  # fmt: skip
def test_what_needs_more_than_a_sum_is_refused(tmp_path, method, changes):
    with pytest.raises((PrivacyError, ConfigError)):
        small.run(tmp_path, method, *SHARED, *changes)
    assert not list(tmp_path.glob("run/rounds.jsonl")) or not (tmp_path / "run" / "rounds.jsonl").read_text()


@pytest.mark.slow
def test_baselines_that_share_nothing_run_beside(tmp_path):
    found = small.run(tmp_path, "ficpd", *SHARED, "baselines=['local','centralized','fedavg']", rounds=1)
    of = {name: RunResult.load(tmp_path / "run" / "baselines" / name) for name in ("local", "centralized", "fedavg")}
    assert found.privacy.mechanism.startswith("shared_gaussian")
    assert of["centralized"].privacy.mechanism == "record_gaussian"
    assert of["fedavg"].privacy.mechanism.startswith("shared_gaussian")


def test_lost_clients_are_left_out_of_the_sum(tmp_path):
    lost = ("engine.options.lost=0.3", "privacy.max_lost=1", "privacy.max_colluding=0")
    small.run(tmp_path, "fedavg", *SHARED[:3], *lost, MASKS, rounds=8)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert {line["updates"] for line in lines} >= {0, 2, 3}, "void, with one lost, and whole"
    assert all(len(line["dropped"]) == (3 if line["updates"] == 0 else 3 - line["updates"]) for line in lines)


def test_the_card_of_a_group_has_its_key():
    assert group_card("plain").metadata == {"group": "plain"}
    assert not group_card("").metadata
