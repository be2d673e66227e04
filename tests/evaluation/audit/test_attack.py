"""`ficpd audit` on whole runs: it finds what an overfitted prompt tells, nothing where noise is enough, and a broken
mechanism; and it leaves its page, or one sentence of why not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import small
from ficpd import rng
from ficpd.data import loading
from ficpd.errors import LibraryError, PrivacyError, RunError
from ficpd.evaluation.audit import canaries
from ficpd.evaluation.audit.epsilon_bounds import one_run_bound
from ficpd.evaluation.audit.member_split import split_records
from ficpd.evaluation.audit.membership import ATTACKS, AttackData
from ficpd.evaluation.audit.report import Audit, LowerBound, verdict
from ficpd.evaluation.audit.shadow_prompts import losses, shadow_prompts
from ficpd.experiments import audit
from ficpd.experiments.audit import MECHANISM, PLANTED, SHADOWS, audit_run, inject_canaries
from ficpd.experiments.config import parse
from ficpd.experiments.runner import run as run_experiment
from ficpd.interfaces import ReleaseKind
from ficpd.tasks import generation
from ficpd.types import ClientData, Query, Readout, Record

OVERFITTED = ("backbone.options={ width = 64 }", "prompt.num_tokens=8", "task.tuned_head=true", "data.max_records=50",
              "training.local_steps=5", "training.batch_size=20", "training.learning_rate=0.3")  # fmt: skip
NOISED = ("privacy.epsilon=2", "privacy.clip_norm=0.1", "privacy.delta=1e-3")


def random_labels(path: Path, count: int = 500) -> Path:
    """Different sentences of one site, each with a label that nothing in it tells."""
    random, words, found = rng.make_generator("random labels"), small.OTHER + small.GOOD + small.BAD, {}
    while len(found) < count:
        text = " ".join(words[int(i)] for i in torch.randint(len(words), (6,), generator=random))
        found[text] = "good" if bool(torch.randint(2, (1,), generator=random)) else "bad"
    path.write_text("text,target,site\n" + "".join(f"{text},{label},one\n" for text, label in found.items()))
    return path


def federation(folder: Path, *changes: str, rounds: int) -> Path:
    """A run on random labels; its directory."""
    recipe = small.toml(random_labels(folder / "records.csv"), "fedavg", rounds)
    run_experiment(parse(recipe, "small.toml", [*OVERFITTED, *changes]), folder / "run")
    return folder / "run"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As many releases as a test has time for."""
    for kind, releases in {ReleaseKind.STEP: 2000, ReleaseKind.SUM: 1000, ReleaseKind.UPDATE: 1000}.items():
        monkeypatch.setitem(canaries.AFFORDED, kind, releases)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory) -> Path:
    return federation(tmp_path_factory.mktemp("overfitted"), rounds=40)


@pytest.fixture(scope="module")
def modest(tmp_path_factory) -> Path:
    """Three sites with labels that the sentences tell; two rounds."""
    folder = tmp_path_factory.mktemp("modest")
    small.run(folder, "ficpd", "data.max_records=48", rounds=2)
    return folder / "run"


@pytest.fixture
def unsound(monkeypatch) -> str:
    """The broken mechanism's dotted path."""
    monkeypatch.syspath_prepend(Path(small.__file__).parents[1])
    return "privacy.name=tests.broken"


@pytest.mark.slow
def test_an_overfitted_prompt_tells_its_members(overfitted):
    found = audit_run(overfitted, canaries=0, shadows=2)
    assert found.advantage >= 0.3
    assert found.advantage_interval[0] > 0.2
    assert max(attack.auc for attack in found.attacks.values()) > 0.7
    assert (found.num_members, found.prompt, found.epsilon) == (40, "global", None)
    assert not found.alarm
    assert "no stated ε to compare" in verdict(found)


def test_a_readout_that_knows_its_members_is_attacked_through_the_librarys_answers(tmp_path):
    """The prompt is the start, and tells nothing. The readout fits the members' random labels without a penalty."""
    recipe = small.toml(random_labels(tmp_path / "records.csv"), "analytic", 1)
    changes = ("backbone.options={ width = 64 }", "data.max_records=50")
    run_experiment(parse(recipe, "small.toml", changes), tmp_path / "run")
    run = audit.open_run(tmp_path / "run", "cpu")
    (shard,), (task,) = run.context.shards.values(), run.context.tasks.values()
    vectors_PD = run.context.start.vectors_PD
    batch = task.encode(shard.train, run.context.model.backbone, run.context.start)
    (answer,) = run.context.model.answer([Query(vectors_PD[None], batch, outputs=True)])
    wanted = 4.0 * torch.nn.functional.one_hot(batch.targets, 2).double()
    rows_CD = torch.linalg.lstsq(answer.outputs_KB.features_RD.double(), wanted).solution.T.float()
    by_heart = {"classification": Readout(rows_CD, torch.zeros(2), torch.full((2,), 0.5))}
    replace(run.library, learned=by_heart).save(tmp_path / "run" / "library")
    found = audit_run(tmp_path / "run", canaries=0, shadows=1)
    assert max(found.attacks[name].auc for name in ATTACKS) < 0.65
    assert found.attacks["readout"].auc > 0.7
    assert found.advantage > 0.4


@pytest.mark.slow
def test_a_private_run_that_releases_sums_alone_is_audited(tmp_path):
    changes = (*NOISED, "task.tuned_head=false", "method.name=class_means")
    run = federation(tmp_path, "privacy.name=record_gaussian", *changes, rounds=1)
    found = audit_run(run, canaries=0, shadows=1)
    assert found.mechanism is not None
    assert not found.alarm


@pytest.mark.slow
def test_noise_hides_the_members_and_is_not_contradicted(tmp_path):
    run = federation(tmp_path, "privacy.name=record_gaussian", *NOISED, rounds=4)
    found = audit_run(run, canaries=30, shadows=2)
    assert abs(found.advantage) < 0.2
    assert found.mechanism is not None
    assert found.planted is not None
    assert found.mechanism.stated == found.epsilon <= 2.0
    assert found.planted.runs == 30
    assert not found.alarm
    assert "not a proof" in verdict(found)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["clips_the_mean", "noise_off_by_the_batch"])
def test_a_broken_mechanism_raises_the_alarm_and_status_3(tmp_path, unsound, ficpd, how):
    run = federation(tmp_path, unsound, f"privacy.how={how}", *NOISED, rounds=2)
    status, out, err = ficpd("audit", run, "--canaries", 0, "--shadows", 1)
    assert (status, err) == (3, "")
    assert "ALARM: the stated privacy does not hold" in out
    assert json.loads((run / "audit.json").read_text())["alarm"] is True


@pytest.mark.slow
def test_planted_records_are_noticed_where_they_are_learned_by_heart(tmp_path, monkeypatch):
    """No privacy, and a prompt that learns its records: those whose coin fell heads score higher."""
    folder, guessed = federation(tmp_path, "data.max_records=10", "training.batch_size=32", rounds=40), []
    run = audit.open_run(folder, "cpu")
    (shard,), start_SPD = run.context.shards.values(), run.context.start.vectors_PD[None]
    spare = [*shard.test, *loading.unsampled(run.context.experiment.data, 0)]
    pool = split_records(run.context.task, shard.train, spare, 1000, 0).pool

    def watched(score_M, coin_M, delta):
        guessed.append(float(roc_auc_score(coin_M, score_M)))
        return one_run_bound(score_M, coin_M, delta)

    monkeypatch.setattr("ficpd.experiments.audit.one_run_bound", watched)
    found = audit.planted_bound(run, "global", start_SPD, pool, 60, 0)
    assert found is not None
    assert (found.stated, found.runs) == (None, 60)
    assert 0 <= found.epsilon < found.reach
    assert min(guessed) > 0.62


@pytest.mark.parametrize("placement", ["local", "central"])
def test_client_level_runs_are_audited_by_their_own_kind_of_release(tmp_path, placement):
    changes = ("privacy.name=client_gaussian", f"privacy.placement={placement}", "privacy.epsilon=4")
    small.run(tmp_path, "fedavg", *changes, "privacy.delta=1e-3", "privacy.clip_norm=0.1", rounds=2)
    found = audit_run(tmp_path / "run", canaries=8, shadows=1)
    assert found.mechanism is not None
    assert found.planted is not None
    assert 0 < found.mechanism.epsilon <= 4
    times = 2 if placement == "central" else 1
    assert found.planted.stated == pytest.approx(times * found.epsilon, rel=1e-6)
    assert found.planted.delta == pytest.approx(1e-3 if times == 1 else 1e-3 * (1 + np.exp(found.epsilon)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_of_a_secure_sum_is_attacked_by_who_sees_the_sum(tmp_path, steps):
    changes = (
        "privacy.name=shared_gaussian", "privacy.max_colluding=1", "privacy.max_lost=0",
        f"training.local_steps={steps}",
    )  # fmt: skip
    small.run(tmp_path, "fedavg", *changes, "privacy.epsilon=6", *NOISED[1:], rounds=2)
    found = audit_run(tmp_path / "run", canaries=8, shadows=1)
    assert found.mechanism is not None
    assert found.planted is not None
    assert 0 < found.mechanism.epsilon <= found.mechanism.stated <= 6
    assert found.mechanism.stated == pytest.approx(found.epsilon, rel=1e-6)
    assert not found.alarm


@pytest.mark.slow
def test_a_run_that_ended_early_is_held_to_what_it_released(tmp_path):
    changes = ("privacy.name=record_gaussian", "privacy.noise_multiplier=2", "privacy.epsilon=3", *NOISED[1:])
    run = audit.open_run(federation(tmp_path, *changes, rounds=8), "cpu")
    assert run.result.stopped
    (line,) = run.result.privacy.lines
    bound = audit.mechanism_bound(run, 0, trials=200)
    assert line.releases < 40
    assert bound is not None
    assert bound.stated == run.result.privacy.epsilon


ATTACKED = {
    "record": ("privacy.name=record_gaussian", "training.local_steps=4", "training.batch_size=64"),
    "client": ("privacy.name=client_gaussian",),
    # one step: the steps of a round are paid one by one and seen as one sum, which tells less
    "shared": (
        "privacy.name=shared_gaussian",
        "training.local_steps=1",
        "training.batch_size=64",
        "privacy.max_colluding=1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ATTACKED)
def test_an_attack_does_not_contradict_the_ledger(tmp_path, kind, monkeypatch):
    """Faults of the package make this test fail, `tests/mutations/faults.toml` says which."""
    monkeypatch.undo()
    small.run(tmp_path, "fedavg", *ATTACKED[kind], "privacy.epsilon=4", *NOISED[1:], rounds=2)
    bound = audit.mechanism_bound(audit.open_run(tmp_path / "run", "cpu"), 0, trials=5000)
    assert bound is not None
    assert not bound.contradicts
    assert bound.epsilon > 1.5, "or the attack is too weak to find anything"


def test_a_regression_is_attacked_without_labels(tmp_path, monkeypatch):
    likelihood = []
    monkeypatch.setattr(
        "ficpd.experiments.audit.AttackData", lambda *given: likelihood.append(given[-1]) or AttackData(*given)
    )
    rows = "".join(f"{r.fields['text']},{r.fields['target']},one\n" for r in small.records(60, 1, real=True))
    (tmp_path / "records.csv").write_text("text,target,site\n" + rows)
    task = 'task={ name = "regression", anchors = { "bad dull" = 1.0, "good fine" = 5.0 } }'
    recipe = small.toml(tmp_path / "records.csv", "fedavg", 2)
    run_experiment(parse(recipe, "small.toml", [task, "data.max_records=40"]), tmp_path / "run")
    found = audit_run(tmp_path / "run", canaries=6, shadows=1)
    assert found.planted is not None
    assert likelihood == [False]


def test_nobody_trained_on_the_outside_and_the_halves_do_not_meet(modest):
    run = audit.open_run(modest, "cpu")
    train = [record for shard in run.context.shards.values() for record in shard.train]
    spare = [record for shard in run.context.shards.values() for record in shard.test]
    split = split_records(run.context.task, train, [*spare, *train, *small.records(60, 7)], 1000, 0)

    def contents(records):
        return {(r.fields["text"], r.fields["target"]) for r in records}

    mine = [*split.population, *split.pool]
    assert {r.key for r in split.members} == {r.key for r in train}
    assert not contents(train) & contents([*mine, *split.outside])
    assert not contents(mine) & contents(split.outside)
    share = [np.mean([r.fields["target"] == "good" for r in part]) for part in (split.members, split.outside)]
    assert share[0] == pytest.approx(share[1], abs=0.5 / len(split.outside) + 1e-9)
    assert len(split_records(run.context.task, train, spare, 5, 0).members) == 5


def test_mislabelled_records_have_another_label_and_numbers_are_mirrored():
    records = small.records(30)
    shards = {"one": ClientData(records, [], {})}
    wrong = audit.make_mislabelled_canaries(small.classes(), records, shards, 0)
    assert all(a.fields["target"] != b.fields["target"] for a, b in zip(records, wrong, strict=True))
    assert all(record.fields["target"] in small.LABELS for record in wrong)
    real = small.records(30, real=True)
    mirrored = audit.make_mislabelled_canaries(small.numbers(), real, {"one": ClientData(real, [], {})}, 0)
    low, high = min(r.fields["target"] for r in real), max(r.fields["target"] for r in real)
    pairs = zip(real, mirrored, strict=True)
    assert all(a.fields["target"] + b.fields["target"] == pytest.approx(low + high) for a, b in pairs)
    one = [record for record in records if record.fields["target"] == "good"]
    assert audit.make_mislabelled_canaries(small.classes(), records, {"one": ClientData(one, [], {})}, 0) == []


def test_where_texts_are_written_another_records_target_is_the_wrong_one():
    records = [Record(f"row {i}", {"text": f"colour {i}", "target": f"it is {i}"}) for i in range(4)]
    task, one = generation.build(generation.Config()), {"one": ClientData(records, [], {})}
    wrong = audit.make_mislabelled_canaries(task, records, one, 0)
    assert [r.fields["text"] for r in wrong] == [r.fields["text"] for r in records]
    assert [r.fields["target"] for r in wrong] == ["it is 1", "it is 2", "it is 3", "it is 0"]
    assert audit.make_mislabelled_canaries(task, records[:1], one, 0) == []


def test_planting_adds_and_takes_nothing_away():
    shards = {name: ClientData(small.records(5, i, name), small.records(2), {}) for i, name in enumerate("abc")}
    planted = inject_canaries(shards, small.records(20, 9, "canaries"), 0)
    assert sum(len(shard.train) for shard in planted.values()) == 35
    assert all(planted[name].train[:5] == shard.train for name, shard in shards.items())
    assert all(len(shard.train) > 5 for shard in planted.values())


def tuned(model, number: int, size: int = 12, seed: int = 0, batch_size: int = 8) -> torch.Tensor:
    task = small.classes()
    start, pool = small.start(model, task), small.records(20)
    given = (model, task, start, small.whole(start), small.TRAINING, pool)
    return shadow_prompts(*given, size, 4, batch_size, number, seed)


def test_each_shadow_has_records_and_a_stream_of_its_own(model):
    three = tuned(model, 3)
    assert three.shape == (3, *small.start(model, small.classes()).vectors_PD.shape)
    assert not small.close(three[0], three[1])
    assert all(small.close(three[s], tuned(model, s + 1)[s]) for s in range(3))
    assert small.close(three, tuned(model, 3))
    assert not small.close(three, tuned(model, 3, seed=1))
    assert not small.close(*tuned(model, 2, size=12, batch_size=12)), "other records, in whatever order"
    assert small.close(*tuned(model, 2, size=20, batch_size=20)), "all records in one batch"


def test_no_shadows_or_too_large_ones_are_refused(model):
    for number, size in ((0, 12), (2, 21), (2, 0)):
        with pytest.raises(PrivacyError, match="shadow prompts ="):
            tuned(model, number, size)


def test_losses_are_the_same_in_batches_of_any_size(model):
    task, records = small.classes(), small.records(10)
    start = small.start(model, task)
    prompts_SPD = torch.stack([start.vectors_PD, start.vectors_PD * 1.5])
    whole, parts = (losses(model, task, prompts_SPD, records, start, at_once) for at_once in (256, 3))
    assert whole.shape == (2, 10)
    assert whole == pytest.approx(parts, abs=1e-5)
    batch = task.encode(records, model.backbone, start)
    (answer,) = model.answer([Query(prompts_SPD, batch)])
    assert whole == pytest.approx(answer.loss_KB.numpy(), abs=1e-5)
    assert losses(model, task, prompts_SPD, [], start).shape == (2, 0)


def test_the_command_prints_the_table_and_leaves_the_result(ficpd, modest):
    before = {file.name for file in modest.iterdir()}
    status, out, err = ficpd("audit", modest, "--prompt", "prototype-0", "--shadows", 1, "--canaries", 6, "--seed", 3)
    assert (status, err) == (0, "")
    for words in (
        "prototype-0 of", "yeom", "lira", "rmia", "best of them", "planted records: ε is at least", "audit.json",
        "few non-members",
    ):  # fmt: skip
        assert words in out
    assert {file.name for file in modest.iterdir()} - before == {"audit.json"}
    kept = json.loads((modest / "audit.json").read_text())
    assert (kept["prompt"], kept["seed"], kept["alarm"], kept["mechanism"]) == ("prototype-0", 3, False, None)


def test_a_seed_fixes_the_audit(modest):
    one, same = (audit_run(modest, canaries=6, shadows=1, seed=1) for _ in range(2))
    assert one == same
    assert one != audit_run(modest, canaries=6, shadows=1, seed=2)


@pytest.mark.slow
def test_progress_counts_shadow_prompts_rounds_with_canaries_and_runs_of_the_mechanism(tmp_path):
    run, heard = federation(tmp_path, "privacy.name=record_gaussian", *NOISED, rounds=4), {}

    def progress(part, done, planned, figures):
        heard.setdefault(part, []).append((done, planned))

    found = audit_run(run, canaries=30, shadows=2, progress=progress)
    assert heard[SHADOWS] == [(0, 2), (2, 2)]
    assert heard[PLANTED][:5] == [(done, 4) for done in range(5)]
    trials = 2 * found.mechanism.runs
    assert heard[MECHANISM] == [(done, trials) for done in range(trials // 20, trials + 1, trials // 20)]
    assert list(heard) == [SHADOWS, PLANTED, MECHANISM]


def test_an_audit_that_breaks_leaves_the_old_result(modest, monkeypatch):
    audit_run(modest, canaries=0, shadows=1)
    old = (modest / "audit.json").read_bytes()
    files = {file.name for file in modest.iterdir()}
    monkeypatch.setattr("ficpd.experiments.audit.planted_bound", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        audit_run(modest, shadows=1, seed=9)
    assert (modest / "audit.json").read_bytes() == old
    assert {file.name for file in modest.iterdir()} == files


@pytest.fixture(scope="module")
def given_away(overfitted, tmp_path_factory) -> Path:
    """The overfitted run's library alone, with its members in `in.csv` and as good others in `out.csv`."""
    folder, context = tmp_path_factory.mktemp("given away"), audit.open_run(overfitted, "cpu").context
    shutil.copytree(overfitted / "library", folder / "library")
    members = [record for shard in context.shards.values() for record in shard.train]
    for name, records in (("in", members), ("out", loading.unsampled(context.experiment.data, 0))):
        lines = [f"{r.fields['text']},{r.fields['target']}" for r in records]
        (folder / f"{name}.csv").write_text("\n".join(["sentence,target", *lines]) + "\n")
    return folder


@pytest.mark.slow
def test_a_library_is_attacked_by_its_members(given_away, ficpd):
    words = ("audit", given_away / "library", "--trained", given_away / "in.csv", "--others", given_away / "out.csv")
    status, out, err = ficpd(*words, "-c", "text=sentence", "--shadows", 2)
    assert (status, err) == (0, "")
    kept = json.loads((given_away / "library-audit" / "audit.json").read_text())
    assert kept["advantage"] >= 0.3
    assert (kept["num_members"], kept["mechanism"], kept["planted"]) == (40, None, None)
    assert "no stated ε to compare" in out
    assert "library-audit/audit.json" in out
    files = {file.name for file in (given_away / "library").iterdir()}
    assert files == {"README.md", "card.json", "prompts.safetensors"}


def test_members_and_others_come_together_and_differ(given_away, ficpd):
    one = ("audit", given_away / "library", "-c", "text=sentence", "--trained", given_away / "in.csv")
    assert "--trained and --others together" in ficpd(*one).said(2)
    assert "0 distinct non-members" in ficpd(*one, "--others", given_away / "in.csv").said(1)


def test_only_a_finished_run_is_audited(tmp_path, modest, ficpd):
    with pytest.raises(RunError, match="holds no run"):
        audit_run(tmp_path)
    (tmp_path / "experiment.toml").write_bytes((modest / "experiment.toml").read_bytes())
    with pytest.raises(RunError, match="has not finished"):
        audit_run(tmp_path)
    assert ficpd("audit", tmp_path).said(1).startswith(f"error: {tmp_path} has not finished")


@pytest.mark.parametrize("method", ["local", "zero_shot"])
def test_where_nothing_leaves_nothing_is_attacked(tmp_path, method):
    small.run(tmp_path, method, rounds=1)
    with pytest.raises(PrivacyError, match="nothing was left to attack"):
        audit_run(tmp_path / "run")


def test_an_unknown_prompt_and_too_few_records_are_said(modest, tmp_path):
    with pytest.raises(LibraryError, match="no prompt 'globl'"):
        audit_run(modest, "globl")
    lines = [f"{word} film,{label},a" for word, label in (("good", "good"), ("bad", "bad")) for _ in range(10)]
    (tmp_path / "records.csv").write_text("\n".join(["text,target,site", *lines]) + "\n")
    run_experiment(parse(small.toml(tmp_path / "records.csv", "fedavg", 1), "small.toml"), tmp_path / "run")
    with pytest.raises(PrivacyError, match="0 distinct non-members"):
        audit_run(tmp_path / "run")


def bound(epsilon: float, stated: float | None) -> LowerBound:
    return LowerBound(epsilon, stated, 1e-5, 5.0, 2000)


def page(mechanism: LowerBound | None, planted: LowerBound | None, epsilon: float | None) -> Audit:
    return Audit("run", "fedavg", "global", "ε = 2.00 per record", epsilon, 1e-5, 1000, 1000, 4, 500, {}, 0.0,
                 (-0.1, 0.1), mechanism, planted, 0)  # fmt: skip


def test_the_verdict_is_what_the_bounds_say():
    assert not page(bound(1.9, 2.0), bound(0.0, 2.0), 2.0).alarm
    assert page(bound(2.1, 2.0), None, 2.0).alarm
    assert page(bound(0.0, 2.0), bound(2.1, 2.0), 2.0).alarm
    assert "mechanism alone: ε is at least 2.10, 2.00 was stated" in verdict(page(bound(2.1, 2.0), None, 2.0))
    assert not page(None, bound(4.0, None), None).alarm
    assert "was not tested" in verdict(page(None, None, 2.0))
    assert "not a proof" in verdict(page(bound(0.0, 2.0), None, 2.0))
