"""Whole private runs: what the result states, the ledger beside it, kills, walls, and what cannot be had."""

import json
import sqlite3
import warnings
from contextlib import closing
from itertools import permutations

import pytest
import torch

import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import LedgerError, PrivacyError, RunError
from ficpd.experiments import build
from ficpd.experiments.build import build_context
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation.privacy_plan import LEDGER, private_seed, public_seed
from ficpd.methods import ficpd
from ficpd.privacy import accountant
from ficpd.rng import derive_seed, make_generator
from ficpd.types import PrivacyCost

RECORD = ("privacy.name=record_gaussian", "privacy.clip_norm=0.1", "privacy.delta=1e-3")
TWO = (*RECORD, "privacy.epsilon=2")
CLIENT = ("privacy.name=client_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3", "privacy.clip_norm=0.1")


def lines(folder) -> list[tuple]:
    with closing(sqlite3.connect(folder / "run" / LEDGER)) as file:
        return file.execute("select site, round, name, sampling_rate, noise_multiplier, count from costs").fetchall()


def test_the_block_says_unit_relation_budget_and_each_lines_share(tmp_path):
    result = small.run(tmp_path, "fedavg", *TWO)
    block = result.privacy
    assert (block.unit, block.budget, block.delta, block.noise) == ("record", 2.0, 1e-3, "simulated")
    assert 1.9 < block.epsilon <= 2.0
    assert "one record more or less" in block.neighbouring
    assert block.accountant.startswith("dp-accounting")
    assert block.accountant.endswith("PLD")
    (line,) = block.lines
    assert (line.name, line.releases, line.share) == ("prompt", 6, 1.0)
    assert max(block.epsilon_of_sites.values()) == block.epsilon
    assert "simulated noise" in (tmp_path / "run" / "library" / "README.md").read_text()


@pytest.mark.parametrize(
    "setting", ["privacy.epsilon=1e9", "privacy.epsilon=1e-9", "privacy.delta=0.5", "privacy.delta=1e-13"]
)
@pytest.mark.parametrize("mechanism", ["record_gaussian", "shared_gaussian", "client_gaussian"])
def test_a_budget_that_cannot_be_computed_is_refused_before_weights_load(tmp_path, monkeypatch, mechanism, setting):
    def never(*parts, **more):
        raise AssertionError("the backbone was asked for")

    monkeypatch.setattr(build, "load_backbone", never)
    monkeypatch.setattr(QueryEngine, "answer", never)
    with pytest.raises(AssertionError, match="asked for"):
        small.run(tmp_path / "fits", "fedavg", f"privacy.name={mechanism}", "privacy.epsilon=2")
    name = setting.partition("=")[0]
    with pytest.raises(PrivacyError, match=f"{name} = .* is beyond what can be computed"):
        small.run(tmp_path, "fedavg", f"privacy.name={mechanism}", "privacy.epsilon=2", setting)
    assert not (tmp_path / "run").exists()


OPEN = ("privacy.name=record_gaussian", "privacy.delta=1e-3", "privacy.epsilon=2", "prompt.num_tokens=10")


@pytest.mark.parametrize(("method", "numbers"), [
    ("fedavg", 64), ("ficpd", 64), ("fpl", 64), ("local", None), ("dp_zo", None), ("dp_fpl", None), ("fedlora", None),
    ("analytic", None), ("zero_shot", None),
])  # fmt: skip
def test_an_open_compression_is_a_subspace_where_a_method_adds_noise_to_gradients(tmp_path, method, numbers):
    context = build_context(small.experiment(tmp_path, "fedavg", *OPEN))
    of_method = context.with_method(small.method(method, context.experiment.training))
    assert of_method.experiment.compression.get("dimension") == numbers
    assert getattr(of_method.compression.subspace, "size", None) == numbers
    free = context.with_method(small.method(method, context.experiment.training), private=False)
    assert free.experiment.compression["name"] == "none"
    assert free.compression.subspace is None


def test_a_method_outside_the_subspace_has_a_clip_norm_of_whole_prompts(tmp_path):
    """Beside a method in the subspace as well as alone: gradients are longer in the one than in the other."""
    beside = build_context(small.experiment(tmp_path, "fedavg", *OPEN))
    alone = build_context(small.experiment(tmp_path, "dp_fpl", *OPEN))
    norms = {
        name: [
            context.with_method(small.method(name, context.experiment.training)).experiment.privacy["clip_norm"]
            for context in (beside, alone)
        ]
        for name in ("fedavg", "dp_fpl")
    }
    assert norms["fedavg"][0] == norms["fedavg"][1] != pytest.approx(norms["dp_fpl"][0], rel=0.01)
    assert norms["dp_fpl"][0] == norms["dp_fpl"][1]
    stated = build_context(small.experiment(tmp_path, "fedavg", *OPEN, "privacy.clip_norm=0.1"))
    assert stated.with_method(small.method("fedavg")).experiment.privacy["clip_norm"] == 0.1


def test_a_private_run_sends_64_numbers_a_round_and_says_so(tmp_path):
    result = small.run(tmp_path, "fedavg", *OPEN, 'baselines=["fedavg:none"]')
    assert (result.compression["name"], result.compression["dimension"]) == ("subspace", 64)
    assert result.bytes.up_per_client_round < 64 * 4 + 100
    _, free, own = FinishedRun.load(tmp_path / "run").results
    assert (free.compression["name"], own.compression["name"]) == ("none", "subspace")
    assert "dimension" in small.page(tmp_path)


@pytest.mark.slow
def test_a_library_tells_its_guarantee_and_no_sites_record_count(tmp_path):
    """A sampling rate is batch over records, and the noise and the exact epsilon follow from it: they stay out of what is
    handed on. So does a seed that the noise came from."""
    cases = {
        "budget": (TWO, 2.0, False),
        "open": ((*RECORD, "privacy.noise_multiplier=3.0"), None, False),
        "system": ((*TWO, "privacy.noise='cryptographic'"), 2.0, True),
    }
    for name, (changes, told, seeded) in cases.items():
        spent = small.run(tmp_path / name, "fedavg", *changes).privacy.epsilon
        card = json.loads((tmp_path / name / "run" / "library" / "card.json").read_text())
        privacy = card["privacy"]
        assert {"mechanism", "unit", "neighbouring", "epsilon", "delta", "noise"} <= privacy.keys()
        assert not {"lines", "noise_multiplier", "site_that_spent_most", "epsilon_of_sites"} & privacy.keys()
        assert spent < privacy["epsilon"] < 1.1 * spent + 0.1
        assert privacy["epsilon"] == told or (told is None and float(f"{privacy['epsilon']:.2g}") == privacy["epsilon"])
        assert ("seed" in card) == ("seed" in card["training"]) == seeded
    small.run(tmp_path / "none", "fedavg")
    assert "seed" in json.loads((tmp_path / "none" / "run" / "library" / "card.json").read_text())


@pytest.mark.slow
def test_the_ledger_has_what_the_block_counts(tmp_path):
    block = small.run(tmp_path, "ficpd", *TWO).privacy
    for site, epsilon in block.epsilon_of_sites.items():
        spends = [PrivacyCost(*rest) for name, _, *rest in lines(tmp_path) if name == site]
        assert accountant.epsilon(spends, 1e-3) == epsilon
    assert {round for _, round, *_ in lines(tmp_path)} == {1, 2, 3}


def test_the_plan_counts_each_clients_own_rounds(tmp_path):
    result = small.run(tmp_path, "fedavg", *TWO, "federation.clients_per_round=2", rounds=5)
    named, sites = lines(tmp_path), result.privacy.epsilon_of_sites
    rounds = [{round for name, round, *_ in named if name == site} for site in sites]
    assert len({len(own) for own in rounds}) > 1
    assert all(1.95 < epsilon <= 2.0 for epsilon in result.privacy.epsilon_of_sites.values())
    assert result.dropped_updates == 0


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["record_gaussian", "client_gaussian", "shared_gaussian"])
def test_a_client_that_is_never_invited_stops_no_run_and_spends_nothing(tmp_path, mechanism):
    changes = [f"privacy.name={mechanism}", "privacy.delta=1e-3", "privacy.epsilon=2", "federation.clients_per_round=2"]
    alone = ["privacy.max_colluding=0", "privacy.max_lost=0"] if mechanism == "shared_gaussian" else []
    sites = small.run(tmp_path, "fedavg", *changes, *alone, rounds=1).privacy.epsilon_of_sites
    assert sorted(epsilon > 1.9 for epsilon in sites.values()) == [False] * (len(sites) - 2) + [True] * 2


def test_a_noise_multiplier_states_what_it_costs(tmp_path):
    block = small.run(tmp_path, "fedavg", *RECORD, "privacy.noise_multiplier=3.0").privacy
    assert block.budget is None
    assert block.noise_multiplier == (3.0, 3.0)
    (line,) = block.lines
    assert block.epsilon == accountant.epsilon([PrivacyCost("prompt", line.sampling_rate, 3.0, 6)], 1e-3)


@pytest.mark.slow
def test_a_run_ends_where_the_budget_does_and_says_so(tmp_path):
    """Two steps a round at multiplier 3: the budget pays for two rounds of three at the site that pays least."""
    fixed = (*RECORD, "privacy.noise_multiplier=3.0")
    small.run(tmp_path / "free", "fedavg", *fixed)
    least = min(rate for _, _, _, rate, _, _ in lines(tmp_path / "free"))
    two_rounds = accountant.epsilon([PrivacyCost("prompt", least, 3.0, 4)], 1e-3)
    result = small.run(tmp_path, "fedavg", *fixed, f"privacy.epsilon={two_rounds + 1e-6}")
    assert result.num_rounds == 2
    assert "round 3 does not take place" in result.stopped
    assert result.privacy.epsilon <= two_rounds + 1e-6
    assert {round for _, round, *_ in lines(tmp_path)} <= {1, 2}
    assert "Stopped early" in small.page(tmp_path)
    assert result.dropped_updates > 0  # sites with less to spend went home a round earlier


def test_a_run_that_its_budget_ends_before_the_first_release_says_so(tmp_path):
    result = small.run(tmp_path, "fedavg", *RECORD, "privacy.noise_multiplier=0.051", "privacy.epsilon=2")
    assert result.privacy.epsilon == 0
    assert "round 1 does not take place" in result.stopped


@pytest.mark.parametrize("name", ["record_gaussian", "client_gaussian", "shared_gaussian"])
def test_more_noise_than_can_be_accounted_is_refused_with_the_range(tmp_path, name):
    with pytest.raises(PrivacyError, match=r"privacy.noise_multiplier = 1e\+300 .* 0\.05 to 1e\+06"):
        small.run(tmp_path, "fedavg", *RECORD, f"privacy.name={name}", "privacy.noise_multiplier=1e300")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["fedavg", "centralized", "ficpd"])
@pytest.mark.parametrize("when", ["after the ledger, before the checkpoint", "before the ledger"])
def test_a_killed_run_goes_on_and_pays_for_every_release_once(tmp_path, monkeypatch, when, method):
    """Between the noise and the sending, or after: the same library, the same ledger."""
    from ficpd.experiments.run_directory import RunDir
    from ficpd.privacy.ledger import Account

    whole = small.run(tmp_path / "whole", method, *TWO)
    experiment = small.experiment(tmp_path / "cut", method, *TWO)
    cut, calls = (Account, "commit") if when == "before the ledger" else (RunDir, "save"), []
    original = getattr(*cut)

    def dies(*given):
        calls.append(given)
        if len(calls) == 2:
            raise Killed
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(*cut, dies)
        with pytest.raises(Killed):
            run_experiment(experiment, tmp_path / "cut" / "run")
    result = run_experiment(experiment, tmp_path / "cut" / "run", resume=True)
    assert result.privacy == whole.privacy
    assert result.scores == whole.scores
    assert sorted(lines(tmp_path / "cut")) == sorted(lines(tmp_path / "whole"))
    ours, theirs = small.library(tmp_path / "cut"), small.library(tmp_path / "whole")
    assert all(small.close(ours[name], theirs[name]) for name in theirs)


def interrupted(tmp_path, monkeypatch, *changes):
    """A run that stopped after its first round."""
    from ficpd.experiments.run_directory import RunDir

    experiment, original = small.experiment(tmp_path, "fedavg", *changes), RunDir.save

    def once(*given):
        original(*given)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", once)
        with pytest.raises(Killed):
            run_experiment(experiment, tmp_path / "run")
    return experiment


def test_a_ledger_that_is_gone_is_no_clean_slate(tmp_path, monkeypatch):
    experiment = interrupted(tmp_path, monkeypatch, *TWO)
    for file in (tmp_path / "run").glob(LEDGER + "*"):
        file.unlink()
    with pytest.raises(LedgerError, match="1 rounds were run"):
        run_experiment(experiment, tmp_path / "run", resume=True)


def stopped_after(rounds: int, tmp_path, *changes):
    """A run of five rounds that was cut off after so many, and the checkpoint of the first."""
    experiment, checkpoints = small.experiment(tmp_path, "fedavg", *changes, rounds=5), []

    def stop(method, done, planned, figures):
        checkpoints.extend([(tmp_path / "run" / "checkpoint").read_bytes()] if method == "fedavg" and done else [])
        if (method, done) == ("fedavg", rounds):
            raise Killed

    with pytest.raises(Killed):
        run_experiment(experiment, tmp_path / "run", progress=stop)
    return experiment, checkpoints[0]


def left(folder) -> dict[str, bytes]:
    """The files of a run; of its ledger what it says."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in (folder / "run").rglob("*") if f.is_file()}
    said = {name: content for name, content in found.items() if LEDGER not in name}
    return said | {LEDGER: repr(sorted(lines(folder))).encode()}


@pytest.mark.parametrize("privacy", [TWO, (*CLIENT, "privacy.placement=central")], ids=["each", "central"])
@pytest.mark.parametrize("older", [False, True], ids=["gone", "older"])
def test_a_checkpoint_that_is_behind_its_ledger_is_not_gone_on_with(tmp_path, privacy, older):
    """What is paid for is not answered again: the first rounds would pass without a single update."""
    experiment, first = stopped_after(3, tmp_path, *privacy)
    checkpoint = tmp_path / "run" / "checkpoint"
    newest = checkpoint.read_bytes()
    checkpoint.unlink()
    # as if nobody had been drawn: the server pays all the same
    with closing(sqlite3.connect(tmp_path / "run" / LEDGER)) as file, file:
        file.execute(
            "delete from assignments where site <> 'server' and exists (select 1 from assignments where site = 'server')"
        )
    if older:
        checkpoint.write_bytes(first)
    before, said = left(tmp_path), "ends with round 1: it is an older copy" if older else "checkpoint is gone"
    said = rf"has round 3 of .*{said}.*Restore the newest checkpoint, or begin in a new"
    with pytest.raises(LedgerError, match=said):
        run_experiment(experiment, tmp_path / "run", resume=True)
    assert left(tmp_path) == before
    checkpoint.write_bytes(newest)
    result = run_experiment(experiment, tmp_path / "run", resume=True)
    assert (result.num_rounds, result.dropped_updates) == (5, 0)


def test_a_checkpoint_that_cannot_be_read_is_not_to_be_deleted_where_rounds_are_paid_for(tmp_path):
    experiment, _ = stopped_after(3, tmp_path, *TWO)
    (tmp_path / "run" / "checkpoint").write_bytes(b"half")
    with pytest.raises(RunError, match="Restore it from a copy, or begin in a new directory"):
        run_experiment(experiment, tmp_path / "run", resume=True)


def test_another_runs_ledger_is_refused(tmp_path, monkeypatch):
    experiment = interrupted(tmp_path, monkeypatch, *TWO)
    (tmp_path / "run" / "run-id").write_text("0123456789abcdef\n")
    with pytest.raises(LedgerError, match="this is run 0123456789abcdef"):
        run_experiment(experiment, tmp_path / "run", resume=True)


def test_cryptographic_noise_is_never_the_same_twice_and_resumes_with_what_was_sent(tmp_path):
    secure = (*TWO, "privacy.noise=cryptographic")
    block = small.run(tmp_path / "a", "fedavg", *secure).privacy
    small.run(tmp_path / "b", "fedavg", *secure)
    assert block.noise == "cryptographic"
    assert not small.same(small.library(tmp_path / "a"), small.library(tmp_path / "b"))


def test_central_noise_takes_only_methods_that_sum(tmp_path):
    result = small.run(tmp_path / "sum", "fedavg", *CLIENT, "privacy.placement=central")
    assert result.privacy.mechanism == "client_gaussian (central)"
    assert result.privacy.epsilon_of_sites.keys() == {"server"}
    assert 7.8 < result.privacy.epsilon <= 8
    with pytest.raises(PrivacyError, match="ficpd aggregates each client's update by itself"):
        small.run(tmp_path / "each", "ficpd", *CLIENT, "privacy.placement=central")


def test_local_client_noise_takes_every_method(tmp_path):
    block = small.run(tmp_path, "ficpd", *CLIENT).privacy
    assert (block.unit, [line.name for line in block.lines]) == ("client", ["update"])
    assert block.lines[0].releases == 3


@pytest.mark.parametrize("name", ["subspace", "projected"])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_private_and_compressed(tmp_path, name, bits):
    size = "compression.dimension=8" if name == "subspace" else "compression.num_tokens=2"
    changes = (*TWO, f"compression.name={name}", size, f"compression.bits={bits}")
    result = small.run(tmp_path, "ficpd", *changes)
    numbers = 8 if name == "subspace" else 2 * 16
    totals = 4 * 2 * (1 + 16) / 3  # whole numbers, in the first round of three
    assert result.bytes.up_per_client_round < numbers * bits / 8 + totals + 50
    assert result.dropped_updates == 0
    assert not torch.equal(*list(small.library(tmp_path).values())[:2])


def test_the_table_has_the_row_without_privacy_and_what_never_leaves(tmp_path):
    small.run(tmp_path, "fedavg", *TWO, 'baselines=["local", "fedavg:none"]')
    found = {row.label: row.privacy for row in FinishedRun.load(tmp_path / "run").results}
    assert found.keys() == {"zero_shot", "local", "fedavg, no privacy", "fedavg"}
    assert found["fedavg, no privacy"].epsilon is None
    assert found["local"].epsilon == 0
    text = small.page(tmp_path)
    assert "Simulated noise: it comes from the experiment's seed" in text
    assert "ε alone" in text


@pytest.mark.slow
def test_a_statistic_has_its_own_line(tmp_path):
    block = small.run(tmp_path, "fedavg", *TWO, "privacy.statistics={ weight = 0.2 }").privacy
    found = {line.name: line for line in block.lines}
    assert found.keys() == {"prompt", "weight"}
    assert found["weight"].releases == 1
    assert sum(line.share for line in found.values()) == pytest.approx(1)
    assert block.epsilon <= 2


@pytest.mark.slow
def test_a_warning_names_the_reason(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small.run(tmp_path, "fedavg", "privacy.name=record_gaussian", "privacy.epsilon=4", "privacy.delta=0.2")
    assert any("publishes one of them whole" in str(warning.message) for warning in caught)


def test_nothing_that_the_server_knows_leads_to_the_private_stream(tmp_path):
    """The server's half sees a seed of its own. From it, and all other numbers it sees, no noise can be had again."""
    from ficpd.experiments.run_directory import RunDir

    small.run(tmp_path, "ficpd", *TWO, seed=7)
    state, _, _, _ = RunDir(tmp_path / "run").load()
    known: set[int] = {public_seed(7), *range(-3, 4)}
    known |= {value for value in state.facts.values() if isinstance(value, int)}
    text = (tmp_path / "run" / "rounds.jsonl").read_text()
    known |= {int(json.loads(line)["round"]) for line in text.splitlines()}
    assert 7 not in known
    assert not finds(known, private_seed(7, "site-0"))


@pytest.mark.parametrize("faulty", [
    lambda seed: private_seed(public_seed(seed), "site-0"),
    lambda seed: derive_seed(public_seed(seed), "private", "site-0"),
    lambda seed: derive_seed(public_seed(seed), "site-0"),
    lambda seed: derive_seed(public_seed(seed), "site-0", "noise"),
    public_seed,
    lambda seed: private_seed(1, "site-0"),
])  # fmt: skip
def test_a_private_seed_that_comes_from_what_the_server_knows_is_found(faulty):
    assert finds({public_seed(7), 1, 2, 3}, faulty(7))


def finds(known: set[int], private: int) -> bool:
    """Whether the numbers known, with names that everybody knows, lead to the noise of this private seed."""
    names = ["private", "public", "noise", "site-0", "cohort", "server", 1, 2]
    noise = torch.randn(8, generator=make_generator(private, "noise", "ficpd", 1))
    paths = [path for length in range(4) for path in permutations(names, length)]
    for seed in known:
        for guess in (seed, private_seed(seed, "site-0"), *(derive_seed(seed, *path) for path in paths)):
            streams = (make_generator(guess), make_generator(guess, "noise", "ficpd", 1))
            for stream in (torch.Generator().manual_seed(guess), *streams):
                if torch.equal(torch.randn(8, generator=stream), noise):
                    return True
    return False


def test_no_two_sites_share_their_noise():
    names = [f"site-{place}" for place in range(20)]
    streams = [make_generator(private_seed(7, name), "noise", "ficpd", 1) for name in names]
    assert len({tuple(torch.randn(8, generator=stream).tolist()) for stream in streams}) == 20


def test_noise_on_a_rounds_sum_takes_no_late_updates(tmp_path):
    central = ("privacy.name=client_gaussian", "privacy.placement=central", "privacy.noise_multiplier=1")
    with pytest.raises(PrivacyError, match="a late update joins another"):
        small.run(tmp_path, "fedavg", *central, "federation.accept_late=1", rounds=1)
    small.run(tmp_path / "local", "fedavg", *central[:1], *central[2:], "federation.accept_late=1", rounds=1)


@pytest.mark.parametrize(("settings", "known"), [
    (("privacy.name=none",), 0.0),
    (TWO, None),
    ((*CLIENT, "privacy.noise_multiplier=0.5", "privacy.epsilon=1000"), 16 * (2 * 0.5 * 0.1) ** 2),
])  # fmt: skip
def test_prototypes_are_drawn_back_by_the_noise_that_the_server_knows(tmp_path, monkeypatch, settings, known):
    told, true = [], ficpd.shrinkage

    def heard(members, noise):
        told.append(noise)
        return true(members, noise)

    monkeypatch.setattr(ficpd, "shrinkage", heard)
    small.run(tmp_path, "ficpd", *settings, "compression.name=subspace", "compression.dimension=16")
    assert told == [known if known is None else pytest.approx(known)] * len(told)
    assert told
