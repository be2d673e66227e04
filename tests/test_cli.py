"""The command line: what it prints, and that an error is a sentence and not a traceback."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import small
from ficpd.experiments.results import RunResult
from ficpd.library.library import PromptLibrary


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table, a recipe and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    small.run(folder, "ficpd", "federation.num_rounds=6")
    (folder / "small.toml").write_text(small.toml(folder / "records.csv", "fedavg", 2))
    return folder


def failed(outcome: tuple[int, str, str]) -> str:
    """The one paragraph of an error that a user can mend."""
    status, out, err = outcome
    assert status == 1
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert len(err) < 1000
    return err


def test_it_tells_its_version(ficpd):
    assert ficpd("--version")[:2] == (0, "ficpd 0.1.0\n")


def test_without_a_command_it_shows_help(ficpd):
    status, out, err = ficpd()
    assert "Usage" in out + err
    assert status == 2


def test_an_unknown_option_is_a_usage_error(ficpd):
    assert "--set" in ficpd("run", "--sett", "a=b").said(2)


def test_python_m_ficpd_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ficpd", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ficpd 0.1.0\n", "")


def test_run_leaves_a_run_and_prints_its_table(ficpd, folder, tmp_path):
    changes = ("--set", "method.name=fedprox", "-s", "seed=3")
    status, out, err = ficpd("run", folder / "small.toml", *changes, "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert "small: fedprox on tiny, 2 rounds" in out
    for words in ("zero_shot", "fedprox", "accuracy", "everyone's", "library:", "page:"):
        assert words in out
    result = RunResult.load(tmp_path / "run")
    assert (result.method, result.seed, result.num_rounds) == ("fedprox", 3, 2)


def test_run_names_its_directory_itself(ficpd, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ficpd("run", folder / "small.toml", "-s", "federation.num_rounds=1")[0] == 0
    assert (tmp_path / "runs" / "small-fedavg-0" / "result.json").exists()


def test_run_again_is_refused_and_resume_is_not(ficpd, folder, tmp_path):
    call = ("run", folder / "small.toml", "--out", tmp_path / "run")
    assert ficpd(*call)[0] == 0
    assert "already holds a run. Go on with it (--resume), or choose another --out" in failed(ficpd(*call))
    assert "fedavg" in ficpd(*call, "--resume").said()
    assert "is another experiment" in failed(ficpd(*call, "--resume", "--set", "seed=4"))


@pytest.mark.parametrize(("change", "words"), [
    ("method.name=fedavgg", "unknown method 'fedavgg'; did you mean 'fedavg'? Known: "),
    ("trainin.local_steps=2", "unknown part 'trainin'; did you mean 'training'?"),
    ("data.source=nowhere.csv", "there is no file or folder 'nowhere.csv'"),
    ("prompt.enters_at=2", "prompt.enters_at = 2: tiny has 2 layers, so 0 to 1"),
    ("prompt.num_tokens=64", "a prompt of 64 virtual tokens leaves 0 of tiny's 64 positions"),
    ("engine.device=abacus", "engine.device = 'abacus' is no device"),
    ("engine.device=meta", "engine.device = 'meta' is not available here"),
    ("engine.name=steam", "unknown engine 'steam'"),
    ("engine.options.lockstep=3", "unknown key 'lockstep'; did you mean 'lock_step'?"),
    ("training.optimizer=adma", "unknown optimizer 'adma'; did you mean 'adam'?"),
    ("backbone.options.witdh=8", "unknown key 'witdh'; did you mean 'width'?"),
    ("task.labels={good='good', bad=''}", "has no tokens"),
    ("partition.column=town", "town"),
    ("seed", "expected part.key=value"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_that_says_what_to_do(ficpd, folder, tmp_path, change, words):
    assert words in failed(ficpd("run", folder / "small.toml", "--set", change, "--out", tmp_path / "run"))


@pytest.mark.parametrize("value", ["[bold]fedavg", "[/fedavg]", "x[red]y", "[/]"])
def test_brackets_in_a_message_are_printed_as_they_are(ficpd, folder, tmp_path, value):
    assert f"'{value}'" in failed(ficpd("run", folder / "small.toml", "--set", f"backbone.dtype={value}"))
    out = tmp_path / f"a{value}".replace("/", "")
    changes = ("--set", "federation.num_rounds=0", "-s", "method.name=zero_shot")
    assert f"into: {out}" in ficpd("run", folder / "small.toml", *changes, "--out", out).said().replace("\n", "")


def test_an_unknown_recipe_lists_the_known(ficpd):
    assert "unknown recipe 'quickstar'; did you mean 'quickstart'?" in failed(ficpd("run", "quickstar"))


def test_interrupting_says_how_to_go_on(ficpd, folder, tmp_path, monkeypatch):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ficpd.experiments.runner.run", interrupted)
    err = ficpd("run", folder / "small.toml", "--out", tmp_path / "run").said(130)
    assert f"`ficpd run --resume --out {tmp_path / 'run'}` continues after the last finished round" in err


def test_evaluate_scores_every_prompt_and_none(ficpd, folder):
    status, out, err = ficpd("evaluate", folder / "run", "--data", folder / "records.csv")
    assert (status, err) == (0, "")
    lines = {line.split("│")[1].strip(): line.split("│")[2:4] for line in out.splitlines() if "│" in line}
    names = set(PromptLibrary.load(folder / "run").prompts)
    assert lines.keys() == {"zero-shot", *names}
    assert all(0 <= float(cell) <= 1 for line in lines.values() for cell in line)
    assert "60 records from" in out
    status, out, _ = ficpd("evaluate", folder / "run", "--data", folder / "records.csv", "--prompt", "global")
    assert "prototype-0" not in out
    assert "global" in out


def test_evaluate_reads_the_columns_that_are_named(ficpd, folder, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text((folder / "records.csv").read_text().replace("text,target,site", "review,stars,site"))
    assert "text" in failed(ficpd("evaluate", folder / "run", "--data", other))
    out = ficpd("evaluate", folder / "run", "--data", other, "-c", "text=review", "-c", "target=stars").said()
    assert "60 records" in out
    assert ficpd("evaluate", folder / "run", "--data", other, "-c", "text")[0] == 2


def test_adapt_saves_a_library_with_one_prompt_more(ficpd, folder, tmp_path):
    call = ("adapt", folder / "run", "--data", folder / "records.csv", "--out", tmp_path / "mine", "--shots", 12)
    status, out, err = ficpd(*call, "--seed", 1)
    assert (status, err) == (0, "")
    for words in ("task classification, because it fits all targets", "on records held back", "leave", "12 records"):
        assert words in out
    mine, old = PromptLibrary.load(tmp_path / "mine"), PromptLibrary.load(folder / "run")
    assert mine.prompts.keys() == {*old.prompts, "adapted"}
    assert mine.card["tasks"] == old.card["tasks"]
    facts = mine.card["adapted"]
    assert (facts["shots"], facts["task"], facts["how"]) == (12, "classification", "auto")
    assert facts["table"][facts["way"]]["loss"] <= facts["table"]["leave"]["loss"]
    assert all(torch.equal(mine.prompts[name].vectors_PD, prompt.vectors_PD) for name, prompt in old.prompts.items())
    assert small.same({n: k for n, k in mine.keys.items() if n != "adapted"}, dict(old.keys))
    assert "mine exists already" in failed(ficpd(*call))
    shown = ficpd("info", tmp_path / "mine")[1]
    told = f"to 12 records of classification by {facts['way']}: {facts['why']}"
    assert "".join(told.split()) in "".join(shown.split())  # in lines of 80 columns
    told = json.loads(ficpd("info", tmp_path / "mine", "--json")[1])["adapted"]
    assert (told["shots"], "table" in told) == (12, False)


@pytest.fixture(scope="module")
def moods(folder) -> Path:
    """Twelve sentences with labels that the library has never seen, in JSON Lines."""
    path = folder / "moods.jsonl"
    names = {"good": "very_happy", "bad": "sad"}
    lines = [{"text": r.fields["text"], "target": names[r.fields["target"]]} for r in small.records(40, 5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def adapted(ficpd, folder, moods, out, *words: str) -> tuple[str, PromptLibrary]:
    status, told, err = ficpd("adapt", folder / "run", "--data", moods, "--out", out, *words)
    assert (status, err) == (0, "")
    return told, PromptLibrary.load(out)


def test_adapt_makes_a_task_of_labels_it_has_never_seen(ficpd, folder, moods, tmp_path):
    how = ("--how", "demonstrations", "--shots", "4", "--per-class")
    told, mine = adapted(ficpd, folder, moods, tmp_path / "mine", *how)
    assert "a new task, own: which of sad, very_happy" in told
    assert "8 records" in told
    assert "it holds your records" in told
    assert mine.card["tasks"]["own"]["labels"] == {"sad": "sad", "very_happy": "very happy"}
    assert mine.card["adapted"]["shots"] == 8
    assert mine.readouts["adapted"].rows_CD.shape == (2, 16)
    assert "demonstrations, head or mixture that come with it" in (tmp_path / "mine" / "README.md").read_text()
    answer = json.loads(ficpd("predict", tmp_path / "mine", "--text", "the film was lovely")[1])
    assert answer["prediction"] in ("very_happy", "sad")
    known = ficpd("predict", tmp_path / "mine", "--text", "the film was lovely", "--task", "classification")[1]
    assert json.loads(known)["prediction"] in small.LABELS
    assert known == ficpd("predict", folder / "run", "--text", "the film was lovely", "--prompt", "global")[1]


@pytest.mark.parametrize("how", ["demonstrations", "head", "ensemble", "mixture"])
def test_an_adapted_library_scores_and_predicts_as_it_was_fitted(ficpd, folder, moods, tmp_path, how):
    """The readout made of the records is saved and used, and beside the adapted prompt only."""
    from ficpd.backbones.query_engine import run_queries
    from ficpd.evaluation.evaluate import predictions_of
    from ficpd.library.records import draw_shots, read_records
    from ficpd.library.selection import adapt
    from ficpd.library.session import load_library, local_training_config

    opened, records = load_library(folder / "run"), read_records(moods)
    labels = {"sad": "one", "very_happy": "two"}
    mine = opened.adapt(moods, shots=0, how=how, labels=labels)
    mine.save(tmp_path / "mine")
    task, shots, training = mine.task, draw_shots(records, 0, False, 0), local_training_config(opened.library)
    found = adapt(opened.library, shots, task, opened.model, training, how)
    batch = found.fitted.encode(task, records, opened.model.backbone)
    given = run_queries(opened.model, predictions_of(task, found.fitted.predictors(), batch))
    fitted = task.score(given, task.targets(records))
    assert mine.evaluate(records) == fitted
    _, out, _ = ficpd("evaluate", tmp_path / "mine", "--data", moods)
    lines = {line.split("│")[1].strip(): float(line.split("│")[2]) for line in out.splitlines() if "│" in line}
    assert lines["adapted"] == pytest.approx(fitted["accuracy"], abs=6e-4)
    lines = ficpd("predict", tmp_path / "mine", "--data", moods)[1].splitlines()
    answers = [json.loads(line)["prediction"] for line in lines]
    right = sum(answer == record.fields["target"] for answer, record in zip(answers, records, strict=True))
    assert right / len(records) == pytest.approx(fitted["accuracy"], abs=6e-4)


def test_a_label_that_no_record_has_stays_possible(ficpd, folder, moods, tmp_path):
    labels = [word for name in ("sad=sad", "very_happy=glad", "bored=it was dull") for word in ("--label", name)]
    how = (*labels, "--instruction", "it was", "--how", "tune")
    told, mine = adapted(ficpd, folder, moods, tmp_path / "mine", *how)
    assert "none of the 16 records is: bored" in told
    about = mine.card["tasks"]["own"]
    assert (about["labels"]["very_happy"], about["instruction"]) == ("glad", "it was")
    assert list(about["labels"]) == ["sad", "very_happy", "bored"]
    assert ficpd("evaluate", tmp_path / "mine", "--data", moods)[0] == 0
    unknown = (
        "adapt", folder / "run", "--data", moods, "--out", tmp_path / "other", "--label", "sad=a", "--label", "glad=b",
    )  # fmt: skip
    assert "unknown label 'very_happy'" in failed(ficpd(*unknown))


def test_adapting_again_takes_the_place_of_the_first(ficpd, folder, moods, tmp_path):
    adapted(ficpd, folder, moods, tmp_path / "one", "--how", "demonstrations")
    two = (
        "adapt", tmp_path / "one", "--data", moods, "--out", tmp_path / "two", "--how", "nearest", "--instruction",
        "it is",
    )  # fmt: skip
    assert ficpd(*two)[0] == 0
    mine = PromptLibrary.load(tmp_path / "two")
    assert list(mine.card["tasks"]) == ["classification", "own"]
    assert mine.card["tasks"]["own"]["instruction"] == "it is"
    assert mine.readouts == {}
    given = ("--data", folder / "records.csv", "--out", tmp_path / "three", "--how", "leave")
    told = ficpd("adapt", tmp_path / "one", *given)[1]
    assert "task classification" in told


def test_a_library_without_data_goes_by_what_the_task_is(ficpd, folder, tmp_path):
    call = ("adapt", folder / "run", "--label", "a=good fine", "--label", "b=bad dull", "--out", tmp_path / "mine")
    out = ficpd(*call).said()
    assert "0 records are too few" in out
    assert "no prompt was tuned for a similar task" in out
    assert "took the start" in out
    assert json.loads(ficpd("predict", tmp_path / "mine", "--text", "dull")[1])["prediction"] in "ab"
    assert "no records for --how tune" in failed(ficpd(*call[:-1], tmp_path / "other", "--how", "tune"))


def test_a_single_record_of_one_label_needs_the_others(ficpd, folder, tmp_path):
    (tmp_path / "one.csv").write_text("text,target\nthe film was dull,sad\n")
    call = ("adapt", folder / "run", "--data", tmp_path / "one.csv", "--out", tmp_path / "mine")
    assert "all targets are 'sad', and one label makes no classification" in failed(ficpd(*call))
    out = ficpd(*call, "--label", "sad=sad", "--label", "glad=glad").said()
    assert "1 records are too few" in out
    (tmp_path / "real.csv").write_text("text,target\na,0.5\nb,1.5\n")
    real = ("adapt", folder / "run", "--data", tmp_path / "real.csv", "--out", tmp_path / "other")
    assert "the targets are real numbers, and the library has no regression" in failed(ficpd(*real))


@pytest.mark.parametrize(("words", "told"), [
    (("--task", "classification", "--label", "a=b"), "--task names a task of the library"),
    (("--label", "sad"), "--label takes label=text"),
    (("--shots", "-1"), "--shots"),
])  # fmt: skip
def test_options_of_adapt_that_do_not_go_together(ficpd, folder, moods, tmp_path, words, told):
    assert told in ficpd("adapt", folder / "run", "--data", moods, "--out", tmp_path / "mine", *words).said(2)


@pytest.fixture(scope="module")
def several(folder, tmp_path_factory) -> Path:
    """The same library, said to be of two tasks."""
    library = PromptLibrary.load(folder / "run")
    about = library.card["tasks"]["classification"]
    other = {**about, "labels": {"good": "good", "bad": "bad", "odd": "odd"}}
    path = tmp_path_factory.mktemp("several") / "lib"
    replace(library, card={**library.card, "tasks": {"mood": about, "moods": other}}, learned={}).save(path)
    return path


def test_of_several_tasks_one_is_named(ficpd, folder, several, tmp_path):
    for call in (("predict", several, "--text", "fine"), ("evaluate", several, "--data", folder / "records.csv")):
        assert "this library has several tasks; name one of them with --task: mood, moods" in failed(ficpd(*call))
        assert "unknown task 'mod'; did you mean 'mood'" in failed(ficpd(*call, "--task", "mod"))
        assert ficpd(*call, "--task", "moods")[0] == 0
    assert "mood (classification, 2 labels), moods (classification, 3 labels)" in ficpd("info", several)[1]
    call = ("adapt", several, "--data", folder / "records.csv", "--how", "nearest", "--out")
    assert "task mood, because it fits all targets" in ficpd(*call, tmp_path / "a")[1]
    assert "task moods" in ficpd(*call, tmp_path / "b", "--task", "moods")[1]
    assert ficpd("predict", tmp_path / "b", "--text", "fine")[0] == 0  # what it was adapted to needs no name
    assert "unknown task 'mod'" in failed(ficpd(*call, tmp_path / "c", "--task", "mod"))


def test_a_library_without_a_global_prompt_answers_by_the_nearest_key(ficpd, folder, tmp_path):
    library = PromptLibrary.load(folder / "run")
    apart = dict.fromkeys(("east", "west"), library.prompts["global"])
    key = library.keys["global"]
    given = replace(library, prompts=apart, keys={"east": -key, "west": key})
    given.save(tmp_path / "lib")
    from ficpd.library.session import default_prompt, load_library

    assert default_prompt(load_library(tmp_path / "lib")) == "west"
    assert ficpd("predict", tmp_path / "lib", "--text", "fine")[0] == 0
    replace(given, keys={}).save(tmp_path / "old")
    said = failed(ficpd("predict", tmp_path / "old", "--text", "fine"))
    assert "no prompt None in this library; it has east, west" in said


def test_predict_answers_texts_in_their_order(ficpd, folder):
    texts = ["the film was lovely and bright", "awful and grey", 'a "quoted" story, ü']
    status, out, err = ficpd("predict", folder / "run", *[word for text in texts for word in ("--text", text)])
    assert (status, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    assert {answer["prediction"] for answer in answers} <= set(small.LABELS)
    alone = ficpd("predict", folder / "run", "--text", texts[1], "--prompt", "global")[1]
    assert json.loads(alone) == answers[1]


def test_predict_reads_a_file_without_labels(ficpd, folder, tmp_path):
    (tmp_path / "new.csv").write_text("text\nthe film was good\n[bold] dull\n")
    out = ficpd("predict", folder / "run", "--data", tmp_path / "new.csv").said()
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["the film was good", "[bold] dull"]


def test_predict_and_evaluate_agree(ficpd, folder, tmp_path):
    lines = (folder / "records.csv").read_text().splitlines()[1:]
    truths = [line.split(",")[1] for line in lines]
    out = ficpd("predict", folder / "run", "--data", folder / "records.csv", "--prompt", "global")[1]
    right = [json.loads(line)["prediction"] == truth for line, truth in zip(out.splitlines(), truths, strict=True)]
    table = ficpd("evaluate", folder / "run", "--data", folder / "records.csv", "--prompt", "global")[1]
    (row,) = [line for line in table.splitlines() if "global" in line]
    assert float(row.split("│")[2]) == pytest.approx(sum(right) / len(right), abs=6e-4)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_prompt_that_is_not_there_is_said_not_to_be(ficpd, folder, command):
    told = failed(ficpd(command, folder / "run", "--data", folder / "records.csv", "--prompt", "globl"))
    assert "no prompt 'globl' in this library; it has global, prototype-0" in told


def test_a_folder_without_a_library_is_refused(ficpd, tmp_path):
    for call in (("info", tmp_path), ("predict", tmp_path, "--text", "x")):
        assert "holds no prompt library" in failed(ficpd(*call))
    assert "x holds no prompt library (there is no such folder)" in failed(ficpd("info", tmp_path / "x"))


@pytest.mark.parametrize("card", ["{}", "[]", '{"backbone": {"name": "tiny"}}', '{"backbone": 3, "task": 4}'])
def test_a_library_whose_card_is_damaged_is_refused(ficpd, folder, tmp_path, card):
    PromptLibrary.load(folder / "run").save(tmp_path / "lib")
    (tmp_path / "lib" / "card.json").write_text(card)
    for call in (("info", tmp_path / "lib"), ("predict", tmp_path / "lib", "--text", "x")):
        assert "damaged" in failed(ficpd(*call))


def test_a_library_of_another_backbone_is_refused(ficpd, folder, tmp_path):
    PromptLibrary.load(folder / "run").save(tmp_path / "lib")
    file = tmp_path / "lib" / "card.json"
    card = json.loads(file.read_text())
    card["backbone"]["options"] = {"width": 32}
    file.write_text(json.dumps(card))
    assert "Load the backbone that the card names" in failed(ficpd("predict", tmp_path / "lib", "--text", "x"))


def test_info_tells_what_a_run_and_an_installation_are(ficpd, folder):
    out = ficpd("info", folder / "run").said()
    for words in (
        "global, prototype-0",
        "tiny:16x2",
        "3 virtual tokens of width 16, entering at layer 1",
        "ficpd, 3 clients, 6 rounds",
    ):
        assert words in out
    out = ficpd("info").said()
    for words in ("fedavg", "classification", "causal_lm", "in_process", "adam", "quickstart", "minilm"):
        assert words in out
