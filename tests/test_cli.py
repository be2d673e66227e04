"""The command line: what it prints, and that an error is a sentence and not a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import small
from ficpd import cli
from ficpd.library import PromptLibrary


@pytest.fixture
def ficpd(monkeypatch, capsys):
    """Run the command in this process: its exit status, what it printed, its errors."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ficpd", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


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


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["run", "evaluate", "adapt", "predict", "info"])
def test_every_command_has_help(ficpd, command):
    status, out, _ = ficpd(command, "--help")
    assert status == 0
    assert f"ficpd {command}" in out
    assert command in ficpd("--help")[1]


def test_it_tells_its_version(ficpd):
    assert ficpd("--version")[:2] == (0, "ficpd 0.1.0\n")


def test_without_a_command_it_shows_help(ficpd):
    status, out, err = ficpd()
    assert "Usage" in out + err
    assert status == 2


def test_an_unknown_option_is_a_usage_error(ficpd):
    status, _, err = ficpd("run", "--sett", "a=b")
    assert status == 2
    assert "--set" in err


def test_python_m_ficpd_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ficpd", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ficpd 0.1.0\n", "")


# ---------------------------------------------------------------- run


def test_run_leaves_a_run_and_prints_its_table(ficpd, folder, tmp_path):
    status, out, err = ficpd(
        "run", folder / "small.toml", "--set", "method.name=fedprox", "-s", "seed=3", "--out", tmp_path / "run"
    )
    assert (status, err) == (0, "")
    assert "small: fedprox on tiny, into" in out
    for words in ("zero_shot", "fedprox", "accuracy", "bytes up / client / round", "library:", "report:"):
        assert words in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["method"], result["seed"], result["num_rounds"]) == ("fedprox", 3, 2)


def test_run_names_its_directory_itself(ficpd, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ficpd("run", folder / "small.toml", "-s", "federation.num_rounds=1")[0] == 0
    assert (tmp_path / "runs" / "small-fedavg-0" / "result.json").exists()


def test_run_again_is_refused_and_resume_is_not(ficpd, folder, tmp_path):
    call = ("run", folder / "small.toml", "--out", tmp_path / "run")
    assert ficpd(*call)[0] == 0
    assert "already holds a run; go on with it (--resume)" in failed(ficpd(*call))
    status, out, _ = ficpd(*call, "--resume")
    assert status == 0
    assert "fedavg" in out
    assert "is another experiment" in failed(ficpd(*call, "--resume", "--set", "seed=4"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("method.name=fedavgg", "unknown method 'fedavgg'; did you mean 'fedavg'? Known: "),
        ("trainin.local_steps=2", "unknown part 'trainin'; did you mean 'training'?"),
        ("data.source=nowhere.csv", "there is no file or folder 'nowhere.csv'"),
        ("prompt.enters_at=2", "prompt.enters_at = 2: tiny has 2 layers, so 0 to 1"),
        ("prompt.num_tokens=64", "a prompt of 64 virtual tokens leaves 0 of tiny's 64 positions"),
        ("engine.device=abacus", "engine.device = 'abacus' is no device"),
        ("engine.device=meta", "engine.device = 'meta' is not available here"),
        ("engine.name=steam", "unknown engine 'steam'"),
        ("engine.options.lockstep=3", "unknown key 'lockstep'; did you mean 'lock_step'?"),
        ("training.tuner=adma", "unknown tuner 'adma'; did you mean 'adam'?"),
        ("backbone.options.witdh=8", "unknown key 'witdh'; did you mean 'width'?"),
        ("task.labels={good='good', bad=''}", "has no tokens"),
        ("partition.column=town", "town"),
        ("seed", "expected part.key=value"),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_to_do(ficpd, folder, tmp_path, change, words):
    assert words in failed(ficpd("run", folder / "small.toml", "--set", change, "--out", tmp_path / "run"))


@pytest.mark.parametrize("value", ["[bold]fedavg", "[/fedavg]", "x[red]y", "[/]"])
def test_brackets_in_a_message_are_printed_as_they_are(ficpd, folder, tmp_path, value):
    assert f"'{value}'" in failed(ficpd("run", folder / "small.toml", "--set", f"backbone.dtype={value}"))
    out = tmp_path / f"a{value}".replace("/", "")
    status, said, _ = ficpd(
        "run", folder / "small.toml", "--set", "federation.num_rounds=0", "-s", "method.name=zero_shot", "--out", out
    )
    assert status == 0
    assert f"into {out}" in said.replace("\n", "")


def test_an_unknown_recipe_lists_the_known(ficpd):
    assert "unknown recipe 'quickstar'; did you mean 'quickstart'?" in failed(ficpd("run", "quickstar"))


def test_interrupting_says_how_to_go_on(ficpd, folder, tmp_path, monkeypatch):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ficpd.run.run", interrupted)
    status, _, err = ficpd("run", folder / "small.toml", "--out", tmp_path / "run")
    assert status == 130
    assert "`--resume` goes on from the last finished round" in err


# ---------------------------------------------------------------- using a library


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
    status, out, _ = ficpd("evaluate", folder / "run", "--data", other, "-c", "text=review", "-c", "target=stars")
    assert status == 0
    assert "60 records" in out
    assert ficpd("evaluate", folder / "run", "--data", other, "-c", "text")[0] == 2


def test_adapt_saves_a_library_with_one_prompt_more(ficpd, folder, tmp_path):
    call = ("adapt", folder / "run", "--data", folder / "records.csv", "--out", tmp_path / "mine", "--shots", 24)
    status, out, err = ficpd(*call, "--steps", 10, "--seed", 1)
    assert (status, err) == (0, "")
    assert "began from" in out
    assert "24 records" in out
    mine, old = PromptLibrary.load(tmp_path / "mine"), PromptLibrary.load(folder / "run")
    assert mine.prompts.keys() == {*old.prompts, "adapted"}
    assert mine.card["adapted"]["shots"] == 24
    assert all(torch.equal(mine.prompts[name].vectors_PD, prompt.vectors_PD) for name, prompt in old.prompts.items())
    assert "exists already; choose another --out" in failed(ficpd(*call))
    assert "'shots': 24" in ficpd("info", tmp_path / "mine")[1]


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
    status, out, _ = ficpd("predict", folder / "run", "--data", tmp_path / "new.csv")
    assert status == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["the film was good", "[bold] dull"]


def test_predict_and_evaluate_agree(ficpd, folder, tmp_path):
    lines = (folder / "records.csv").read_text().splitlines()[1:]
    truths = [line.split(",")[1] for line in lines]
    out = ficpd("predict", folder / "run", "--data", folder / "records.csv", "--prompt", "global")[1]
    right = [json.loads(line)["prediction"] == truth for line, truth in zip(out.splitlines(), truths, strict=True)]
    table = ficpd("evaluate", folder / "run", "--data", folder / "records.csv", "--prompt", "global")[1]
    (row,) = [line for line in table.splitlines() if "global" in line]
    assert float(row.split("│")[2]) == pytest.approx(sum(right) / len(right), abs=6e-4)


@pytest.mark.parametrize("words", [(), ("--text", "x", "--data", "y.csv")])
def test_predict_wants_texts_or_a_file(ficpd, folder, words):
    status, _, err = ficpd("predict", folder / "run", *words)
    assert status == 2
    assert "give --text or --data" in err


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_prompt_that_is_not_there_is_said_not_to_be(ficpd, folder, command):
    told = failed(ficpd(command, folder / "run", "--data", folder / "records.csv", "--prompt", "globl"))
    assert "no prompt 'globl' in this library; it has global, prototype-0" in told


def test_a_folder_without_a_library_is_refused(ficpd, tmp_path):
    for call in (("info", tmp_path), ("predict", tmp_path, "--text", "x")):
        assert "holds no prompt library" in failed(ficpd(*call))


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
    status, out, _ = ficpd("info", folder / "run")
    assert status == 0
    for words in (
        "global, prototype-0",
        "tiny:16x2",
        "3 virtual tokens x 16, entering at layer 1",
        "ficpd, 3 clients, 6 rounds",
    ):
        assert words in out
    status, out, _ = ficpd("info")
    assert status == 0
    for words in ("fedavg", "classification", "causal_lm", "in_process", "adam", "quickstart", "minilm"):
        assert words in out
