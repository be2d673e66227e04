"""Whole runs, sites and audits whose data name subjects, and what is said where they name none."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import small
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.data import loading
from ficpd.deployment.site import policy
from ficpd.deployment.site.preflight import preflight_lines
from ficpd.errors import ConfigError, DataError, LedgerError, PolicyError, PrivacyWarning
from ficpd.evaluation.audit.canaries import lower_bound
from ficpd.evaluation.audit.canary_injection import inject_canaries
from ficpd.evaluation.audit.member_split import split_records
from ficpd.experiments.audit import audit_run
from ficpd.experiments.config import parse
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation.execution import local_model
from ficpd.library.card import ONE_RECORD
from ficpd.library.records import draw_shots, read_records
from ficpd.privacy import accountant, record_gaussian
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.types import ClientData, ClientWorkload, PrivacyCost, Query, Record
from site_of import NOISED, POLICY, begun, context, recipe, site, train

PRIVATE = (
    "privacy.name=record_gaussian", "privacy.clip_norm=0.1", "privacy.delta=1e-3", "privacy.epsilon=2",
)  # fmt: skip
BY_PATIENT = 'data.columns={ text = "text", target = "target", subject = "patient" }'


def table(path: Path, count: int = 90) -> Path:
    """Three sites, each with patients of its own: every third patient of ten has many records."""
    lines = ["text,target,site,patient"]
    for i, r in enumerate(small.records(count, 1)):
        patient = i % 10 if i % 2 else 3 * (i % 4)
        lines.append(f"{r.fields['text']},{r.fields['target']},site-{i % 3},{1000 * (i % 3) + patient}")
    path.write_text("\n".join(lines) + "\n")
    return path


def experiment(folder: Path, method: str = "fedavg", *changes: str, rounds: int = 3):
    folder.mkdir(parents=True, exist_ok=True)
    return parse(small.toml(table(folder / "records.csv"), method, rounds), "small.toml", changes)


def run(folder: Path, method: str = "fedavg", *changes: str):
    return run_experiment(experiment(folder, method, *changes), folder / "run")


@pytest.mark.parametrize("method", ["fedavg", "ficpd", "centralized"])
def test_a_run_with_subjects_states_them_as_the_unit(tmp_path, method):
    block = run(tmp_path, method, BY_PATIENT, *PRIVATE).privacy
    assert block.unit == "subject"
    assert block.max_records_per_subject == 8
    assert "all records of one subject more or less" in block.neighbouring
    assert 1.9 < block.epsilon <= 2.0
    assert block.group_epsilon == {}
    assert block.epsilon < block.replace_epsilon < 2.5 * block.epsilon
    spent = [PrivacyCost(line.name, line.sampling_rate, line.noise_multiplier, line.releases) for line in block.lines]
    assert block.replace_epsilon == accountant.epsilon_replaced(spent, 1e-3)
    card = (tmp_path / "run" / "library" / "README.md").read_text()
    assert "- unit: one subject, all of its records at one site together" in card
    assert ONE_RECORD not in card
    page = (tmp_path / "run" / "report.html").read_text()
    assert "for one subject replaced by another" in page
    assert ONE_RECORD not in page


@pytest.mark.slow
def test_the_sampling_rate_is_of_subjects(tmp_path):
    """Sites of about ten patients and thirty records: a batch of four is a much larger share of the patients."""
    rates = [run(tmp_path / name, "fedavg", *changes, *PRIVATE).privacy.lines[0].sampling_rate
             for name, changes in (("subject", (BY_PATIENT,)), ("record", ()))]  # fmt: skip
    assert 4 / rates[0] <= 10
    assert 4 / rates[1] > 20


def test_a_run_without_subjects_says_what_somebody_with_several_records_costs(tmp_path):
    block = run(tmp_path, "fedavg", *PRIVATE).privacy
    assert block.unit == "record"
    spent = [PrivacyCost(line.name, line.sampling_rate, line.noise_multiplier, line.releases) for line in block.lines]
    assert block.group_epsilon == accountant.group_costs(spent, 1e-3)
    assert all(cost > 0.99 * size * block.epsilon for size, cost in block.group_epsilon.items())
    page = (tmp_path / "run" / "report.html").read_text()
    assert ONE_RECORD in page
    assert f"{block.group_epsilon[10]:.2f} with 10" in page
    card = json.loads((tmp_path / "run" / "library" / "card.json").read_text())["privacy"]
    for size, cost in card["group_epsilon"].items():
        exact = block.group_epsilon[int(size)]
        assert exact < cost < 1.11 * exact  # rounded up, as the exact cost tells how many records there are
        assert float(f"{cost:.2g}") == cost
    told = (tmp_path / "run" / "library" / "README.md").read_text()
    assert f"- unit: {ONE_RECORD} (ε = " in told


def test_a_run_without_privacy_divides_no_subject_and_names_no_unit(tmp_path):
    result = run(tmp_path, "fedavg", BY_PATIENT)
    assert (result.privacy.unit, result.privacy.replace_epsilon, result.privacy.group_epsilon) == ("none", None, {})
    assert "unit:" not in (tmp_path / "run" / "library" / "README.md").read_text()


def test_subjects_at_several_clients_are_warned_of(tmp_path):
    with pytest.warns(PrivacyWarning, match=r"\d+ subjects have records at several clients"):
        run(tmp_path, "fedavg", BY_PATIENT.replace("patient", "target"), *PRIVATE, "data.test_fraction=0.6")


def test_no_records_of_a_subject_are_an_error_before_any_data_are_read(tmp_path):
    said = r"privacy\.max_records_per_subject = 0: Input should be greater than or equal"
    with pytest.raises(ConfigError, match=said):
        experiment(tmp_path, "fedavg", *PRIVATE, "privacy.max_records_per_subject=0")


def test_a_gap_is_an_error_that_names_the_row_before_the_run_has_a_directory(tmp_path):
    one = experiment(tmp_path, "fedavg", BY_PATIENT, *PRIVATE)
    lines = (tmp_path / "records.csv").read_text().splitlines()
    lines[5] = lines[5].rpartition(",")[0] + ","
    (tmp_path / "records.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"records\.csv row 5, column 'patient': is empty"):
        run_experiment(one, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def site_file(folder: Path, subject: bool, more: str = "") -> Path:
    file, columns = folder / "site.toml", BY_PATIENT.removeprefix("data.") if subject else ""
    file.write_text(
        f'name = "site-0"\nsocket = "s.sock"\nstate = "state"\n[backbone]\nname = "tiny"\noptions = {{ width = 16 }}\n'
        '[task]\nname = "classification"\ninstruction = "it was"\nlabels = { good = "good fine", bad = "bad dull" }\n'
        f'[data]\nsource = "{table(folder / "records.csv")}"\n{columns}\n[policy]\nepsilon = 8.0\ndelta = 1e-3\n{more}'
    )
    return file


@pytest.mark.slow
def test_site_check_says_the_unit_and_what_several_records_cost(tmp_path):
    (tmp_path / "recipe.toml").write_text(recipe(context(tmp_path, "fedavg", *NOISED)))
    without = "\n".join(preflight_lines(site_file(tmp_path, False), tmp_path / "recipe.toml", 3))
    assert f"unit      {ONE_RECORD}" in without
    assert "for somebody with 2 records" in without
    assert "where one record is replaced by another" in without
    with_ = "\n".join(preflight_lines(site_file(tmp_path, True), tmp_path / "recipe.toml", 3))
    assert "unit      one subject (column 'patient'), all records together: " in with_
    assert "where one subject is replaced by another" in with_
    assert "somebody" not in with_


def test_a_site_trains_on_subjects_and_its_policy_limits_their_records(tmp_path):
    one = context(tmp_path, "fedavg", *NOISED)
    orders, said = begun(one)
    shard = loading.load(loading.Config(source=str(table(tmp_path / "by.csv")), columns={
        "text": "text", "target": "target", "subject": "patient"}), 0)  # fmt: skip
    home = site(one, "site-0", tmp_path)
    home.shard = ClientData(shard.train, shard.test, {})
    columns = loading.Config(source="x", columns={"text": "text", "subject": "patient"})
    home.config = home.config.model_copy(update={"data": columns})
    assert home.handle(train(orders[0], said))
    (current,) = home.runs.values()
    assert current.client.mechanism.subjects
    subjects = len({record.subject for record in shard.train})
    assert current.client.mechanism.planned_costs()[0].sampling_rate == pytest.approx(4 / subjects)
    home.close()
    fewer = home.config.policy.model_copy(update={"max_records_per_subject": 7})
    low = home.config.model_copy(update={"policy": fewer})
    spec = current.spec
    with pytest.raises(PolicyError, match=r"privacy\.max_records_per_subject = 8; .* at most 7"):
        policy.check(low, "", "site.toml", spec, one.model.backbone)
    bare = low.model_copy(update={"data": loading.Config(source="x")})
    policy.check(bare, "", "site.toml", spec, one.model.backbone)
    assert POLICY["epsilon"] == 10.0


def test_a_sites_ledger_has_one_unit(tmp_path):
    """What was spent for records covers no subject, and the other way round: the site does not go on."""
    one = context(tmp_path, "fedavg", *NOISED)
    orders, said = begun(one)
    bare = one.shards["site-0"]
    named = ClientData([replace(r, subject=str(i // 3)) for i, r in enumerate(bare.train)], bare.test, bare.metadata)
    for first, second, unit in ((bare, named, "record"), (named, bare, "subject")):
        folder = tmp_path / unit
        home = site(replace(one, shards={**one.shards, "site-0": first}), "site-0", folder)
        assert home.status()["epsilon"]["unit"] is None
        assert home.handle(train(orders[0], said))
        spent = home.status()["epsilon"]
        most = " (at most 8 of its records in a step)" if unit == "subject" else ""
        assert spent["unit"] == unit + most
        home.shard = second  # a run that plans by the other unit
        with pytest.raises(PolicyError, match=f"spent for one {unit}, and this is for one .*data.columns.subject"):
            home.handle(train(orders[0], said, run="b" * 32))
        assert home.status()["epsilon"] == spent
        home.close()
        with pytest.raises(LedgerError, match=f"spent for one {unit}, and this is for one "):
            site(replace(one, shards={**one.shards, "site-0": second}), "site-0", folder)
        site(replace(one, shards={**one.shards, "site-0": first}), "site-0", folder).close()


def people(count: int, first: int, each: int = 3):
    records = enumerate(small.records(count, first))
    return [replace(r, key=f"{first} {i}", subject=f"{first + i // each}") for i, r in records]


def test_members_and_non_members_share_no_subject(tmp_path):
    known, spare = people(30, 0), people(90, 1000)
    mixed = [*spare, *people(30, 5)]
    split = split_records(small.classes(), known, mixed, 1000, 0)
    sides = [{r.subject for r in part} for part in (known, split.outside, [*split.population, *split.pool])]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def test_shots_are_of_different_subjects_as_long_as_there_are_some():
    records = [*people(12, 0, each=4), *people(3, 100, each=1), *people(9, 200, each=3)]
    for seed in range(5):
        for shots in (3, 9):
            chosen = draw_shots(records, shots, False, seed)
            assert len({record.subject for record in chosen}) == shots
        most = Counter(record.subject for record in draw_shots(records, 13, False, seed))
        assert sorted(most.values()) == [1] * 5 + [2] * 4
        by_class = draw_shots(records, 2, True, seed)
        assert len({record.subject for record in by_class}) == len(by_class) == 4
        assert len(draw_shots(records, 0, False, seed)) == len(records)
    bare = [replace(record, subject=None) for record in records]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist()
    assert draw_shots(bare, 7, False, 3) == [bare[place] for place in order[:7]]


@pytest.mark.parametrize("method", ["ficpd", "linear_probe"])
def test_a_members_own_model_is_chosen_by_whole_subjects(tmp_path, method):
    """Everybody's notes are the same text with one label, drawn by chance: only their own other notes tell it."""
    model, used = QueryEngine(small.backbone(width=32)), small.method(method)
    coins = torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    words = [f"note {word} {i}" for i, word in enumerate(("a the film", "of a story", "it was twice") * 4)]
    told = [{"text": words[i // 4], "target": ["bad", "good"][coins[i // 4]]} for i in range(48)]
    notes = [Record(f"r{i}", fields, f"p{i // 4}") for i, fields in enumerate(told)]

    def confidence(records):
        client = small.clients(model, used, 1)["site-0"]
        client = replace(client, train=records, test=[replace(r, subject="new") for r in notes], encodings={})
        state = small.first_state(used, {"site-0": client})
        order = used.make_assignment(state, client.card, 1)
        own = run_queries(model, local_model(used, client, order))
        batch = client.encoded("test")
        truth_B, told_B = batch.targets, torch.zeros(48)
        for predictor in own:
            answer = model.answer([Query(predictor.prompt_PD[None], batch, outputs=True)])[0]
            logits_BC = predictor.logits(answer.outputs_KB, batch)
            told_B += predictor.weight * logits_BC.softmax(1)[torch.arange(48), truth_B]
        return float(told_B.mean())

    assert confidence([replace(r, subject=None) for r in notes]) > 0.8, "copies of a record tell its label"
    assert confidence(notes) < 0.65


def test_all_records_of_a_planted_subject_come_to_one_client():
    shards = {name: ClientData([], [], {}) for name in "abcde"}
    for seed in range(5):
        found = inject_canaries(shards, people(30, 0), seed)
        owners = [{r.subject for r in shard.train} for shard in found.values()]
        assert sum(map(len, owners)) == 10 == len(set().union(*owners))
        assert sum(len(shard.train) for shard in found.values()) == 30


OF_SUBJECTS = ClientWorkload(90, 0.2, 2, 3, 6, 0.5, 4, num_subjects=60)


class EachByItself(record_gaussian.RecordGaussian):
    """Clips a subject's records one by one."""

    def noisy_mean(self, values_KB, expected_batch, noise, grad_scale=None, subject_B=None):
        return super().noisy_mean(values_KB, expected_batch, noise, grad_scale, torch.arange(values_KB.shape[1]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_canary_with_many_records_finds_a_mechanism_that_clips_records(seed):
    config = record_gaussian.Config(epsilon=2.0, delta=1e-3, clip_norm=0.1)
    (one,) = small.clients(QueryEngine(small.backbone()), small.method("fedavg"), 1).values()
    mechanism = record_gaussian.build(config, OF_SUBJECTS)
    account = Ledger(":memory:", "a run").account("one", Budget(None, 1e-3))
    attacked = replace(one, mechanism=mechanism, account=account, train=people(9, 0))
    assert not lower_bound(attacked, OF_SUBJECTS, trials=200, seed=seed).contradicts
    mechanism.__class__ = EachByItself
    assert lower_bound(attacked, OF_SUBJECTS, trials=200, seed=seed).contradicts


@pytest.mark.slow
def test_an_audit_of_a_run_with_subjects_counts_them_as_canaries(tmp_path):
    run(tmp_path, "fedavg", BY_PATIENT, *PRIVATE, "data.test_fraction=0.5")
    found = audit_run(tmp_path / "run", shadows=2, members=20, canaries=30)
    assert found.mechanism is not None
    assert found.mechanism.epsilon <= 2.0
    assert found.planted is not None
    tested = {r.subject for r in read_records(str(tmp_path / "records.csv"), {"subject": "patient"})}
    assert 6 <= found.planted.runs < len(tested) / 2 + 1


def test_records_to_adapt_on_may_name_subjects(tmp_path):
    roles = {"subject": "patient"}
    of_file = read_records(str(table(tmp_path / "a.csv")), roles)
    rows = [{"text": "a", "target": "good", "patient": 7}, {"text": "b", "target": "bad", "patient": 7.0}]
    assert {r.subject for r in of_file} > {"0", "1003"}
    assert [r.subject for r in read_records(rows, roles)] == ["7", "7"]
    with pytest.raises(DataError, match="record 1, column 'patient': is empty"):
        read_records([{"text": "a", "target": "good", "patient": ""}], roles)
