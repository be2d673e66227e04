"""What all commands share: help, quiet, verbose, JSON, exit statuses; and `info`, which loads nothing heavy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import small
from ficpd.cli import app
from ficpd.experiments.run_directory import RunDir

COMMANDS = [
    *([command.name or command.callback.__name__.strip("_")] for command in app.registered_commands),
    *(
        [group.name, command.name or command.callback.__name__]
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recipe, a finished run of it, and one that ended after two of three rounds."""
    folder = tmp_path_factory.mktemp("manners")
    small.run(folder, "fedavg")
    (folder / "small.toml").write_text(small.toml(folder / "records.csv", "fedavg", 3))
    return folder


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch) -> Path:
    """A run that was stopped after its second round."""
    from ficpd.experiments.runner import run

    save = RunDir.save

    def interrupted(self, state, kept, rounds, totals) -> None:
        save(self, state, kept, rounds, totals)
        if len(rounds) == 2:
            raise KeyboardInterrupt

    experiment = small.experiment(folder, "fedavg")
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "stopped")
    return tmp_path / "stopped"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_in_short_and_its_options(ficpd, command):
    status, out, _ = ficpd(*command, "--help")
    assert (status, out) == (0, ficpd(*command, "-h")[1])
    assert f"ficpd {' '.join(command)}" in out
    assert command[0] in ficpd("--help")[1]
    assert "--quiet" in out
    assert "--verbose" in out


def test_arguments_have_help(ficpd):
    assert "a TOML file or a recipe's name" in ficpd("run", "-h")[1]
    assert "a library's folder" in ficpd("predict", "-h")[1]


def test_short_version(ficpd):
    assert ficpd("-V") == ficpd("--version")


def test_quiet_prints_results_alone(ficpd, folder, tmp_path):
    status, out, err = ficpd("run", folder / "small.toml", "--out", tmp_path / "run", "-q")
    assert (status, err) == (0, "")
    assert "fedavg" in out
    assert "rounds" not in out
    assert "library:" not in out
    assert ficpd("-q", "run", folder / "small.toml", "--out", tmp_path / "two")[1] == out
    assert "library:" in ficpd("run", folder / "small.toml", "--out", tmp_path / "three")[1]  # it holds for one call


def test_verbose_prints_the_traceback_of_an_error(ficpd, tmp_path):
    err = ficpd("info", tmp_path, "-v").said(1)
    assert "Traceback" in err
    assert "holds no prompt library" in err
    assert "Traceback" not in ficpd("info", tmp_path)[2]


def test_json_of_a_run_is_all_that_standard_output_has(ficpd, folder, tmp_path):
    status, out, err = ficpd("run", folder / "small.toml", "--out", tmp_path / "run", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["directory"] == str(tmp_path / "run")
    assert [line["method"] for line in found["methods"]] == ["zero_shot", "fedavg"]
    assert found["methods"][1]["accuracy_own"] >= 0
    assert found["verdict"]
    assert "3/3 rounds" in err


def test_without_a_terminal_a_method_without_rounds_counts_none(ficpd, folder, tmp_path):
    lines = ficpd("run", folder / "small.toml", "--out", tmp_path / "run").said(0).splitlines()
    begun = lines.index("   zero_shot begins")
    assert lines[begun + 1].startswith("   zero_shot done  accuracy 0.")
    assert lines[begun + 2] == "      fedavg 0/3 rounds"


def test_json_of_evaluate_and_info(ficpd, folder):
    scores = json.loads(ficpd("evaluate", folder / "run", "--data", folder / "records.csv", "--json")[1])
    assert (scores["records"], scores["task"]) == (60, "classification")
    assert scores["prompts"]["global"]["accuracy"] >= 0
    facts = json.loads(ficpd("info", folder / "run", "--json")[1])
    assert (facts["finished"], facts["prompts"]) == (True, ["global"])
    assert facts["scores"]["own"].keys() == {"accuracy", "f1"}
    assert facts["tasks"]["classification"]["labels"] == small.LABELS
    here = json.loads(ficpd("info", "--json")[1])
    assert "fedavg" in here["methods"]
    assert "quickstart" in here["recipes"]


def test_info_and_help_load_no_torch(folder):
    code = (
        "import sys; sys.argv = ['ficpd', *{words}]\n"
        "from ficpd.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('loaded:', [n for n in ('torch', 'transformers', 'pandas', 'sklearn') if n in sys.modules])"
    )
    for words in (
        ["info"], ["info", str(folder / "run")], ["info", str(folder / "run" / "library")], ["run", "--help"],
    ):  # fmt: skip
        command = [sys.executable, "-c", code.format(words=words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("loaded: []"), words
        assert len(done.stdout) > 300


def test_info_of_an_unfinished_run_says_how_to_continue(ficpd, stopped):
    out = ficpd("info", stopped).said()
    assert "2 of 3, not finished" in out
    assert f"ficpdrun--resume--out{stopped}" in "".join(out.split())  # in lines of 80 columns
    assert json.loads(ficpd("info", stopped, "--json")[1])["rounds"] == 2


def test_info_of_a_damaged_run_is_an_error(ficpd, stopped):
    (stopped / "experiment.toml").write_text("name = 'x'")
    assert "cannot be read as a run" in ficpd("info", stopped).said(1)


def test_resume_needs_no_recipe(ficpd, stopped, tmp_path):
    assert "small: fedavg on tiny" in ficpd("run", "--resume", "--out", stopped).said()
    assert "3 of 3, finished" in ficpd("info", stopped)[1]
    assert "holds no run to resume" in ficpd("run", "--resume", "--out", tmp_path / "nowhere").said(1)


def test_a_leak_and_wrong_usage_have_different_statuses(ficpd, folder, monkeypatch):
    from ficpd.evaluation.audit.report import LowerBound

    broken = LowerBound(epsilon=9.0, stated=1.0, delta=1e-5, reach=12.0, runs=100)
    monkeypatch.setattr("ficpd.experiments.audit.mechanism_bound", lambda *given, **more: broken)
    call = ("audit", folder / "run", "--shadows", "1", "--members", "20", "--canaries", "0")
    status, out, _ = ficpd(*call, "--json")
    found = json.loads(out)
    assert (status, found["alarm"]) == (3, True)
    assert found["mechanism"]["epsilon"] == 9.0
    assert ficpd(*call, "--shadowz")[0] == 2


def test_an_audit_of_a_run_takes_no_other_place(ficpd, folder):
    assert "--out goes with --trained" in ficpd("audit", folder / "run", "--out", folder / "audit").said(2)


@pytest.mark.parametrize("asked", [(), ("--json",), ("--quiet",)])
def test_an_audit_counts_its_runs_as_a_run_counts_its_rounds(ficpd, folder, asked):
    call = ("audit", folder / "run", "--shadows", "2", "--members", "20", "--canaries", "0")
    status, out, err = ficpd(*call, *asked)
    assert status == 0
    assert ("shadow prompts 2/2" in out, "shadow prompts 2/2" in err) == (not asked, asked == ("--json",))


def test_flower_without_its_package_is_one_sentence(ficpd, folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "flwr" or "flower_engine" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    err = ficpd("run", folder / "small.toml", "--engine", "flower", "--out", tmp_path / "run").said(1)
    assert "pip install 'ficpd[flower]'" in err
    assert err.count("\n") == 1
