"""Machines as they come: places that cannot be written, no home, other encodings, signals. No run ends in a traceback."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import small
from ficpd import cli, storage
from ficpd.backbones.autotune import ExecutionConfig, autotune
from ficpd.backbones.weights import _kept
from ficpd.errors import BackboneError, LibraryError, RunError, describe_os_error
from ficpd.experiments.config import read
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import run as run_experiment
from ficpd.library.library import require_new

LONG = "a" * 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run, and a file that stands where a folder is expected."""
    folder = tmp_path_factory.mktemp("odd")
    small.run(folder, rounds=1)
    (folder / "file").write_text("")
    return folder


def said(monkeypatch, capsys, *words: object) -> str:
    """The one paragraph of an error of the command."""
    monkeypatch.setattr(sys, "argv", ["ficpd", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("place", ["file/x", LONG, "file"])
@pytest.mark.parametrize("command", ["run", "report", "adapt", "audit"])
def test_a_place_that_cannot_be_written_is_one_sentence(folder, monkeypatch, capsys, place, command):
    out = folder / place
    recipe, data = folder / "small.toml", folder / "records.csv"
    recipe.write_text(small.toml(data))
    words = {
        "run": ("run", recipe),
        "report": ("report", folder / "run"),
        "adapt": ("adapt", folder / "run", "--data", data),
        "audit": ("audit", folder / "run", "--trained", data, "--others", data),
    }[command]
    if (command, place) == ("report", "file"):
        out = folder / "run"  # a folder, where the page is a file
    assert str(out)[:200] in said(monkeypatch, capsys, *words, "--out", out)


def test_out_is_tried_before_the_work(folder, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr("ficpd.experiments.runner.build_context", lambda *_: pytest.fail("the work began"))
    with pytest.raises(RunError, match=r"new: Read-only file system; choose a place"):
        run_experiment(small.experiment(folder), folder / "new")
    with pytest.raises(LibraryError, match=r"new: Read-only file system; choose a place"):
        require_new(folder / "new")
    assert not (folder / "new").exists()


def test_a_full_disk_names_the_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"result\.json") as caught:
            storage.atomic_write(tmp_path / "result.json", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path / 'result.json'}: File too large; raise" in describe_os_error(caught.value)


def test_trying_a_folder_leaves_nothing(tmp_path):
    storage.require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["none", "unwritable"])
def no_home(request, monkeypatch, tmp_path) -> None:
    for name in ("FICPD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "none":
        monkeypatch.setattr(os, "getuid", lambda: 12_345)  # has no entry in the password file
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))


def test_without_a_home_only_time_is_lost(no_home):
    tried = []

    def load(choice: ExecutionConfig):
        tried.append(choice)
        return small.backbone()

    found, _ = autotune(load, "tiny", small.CPU, ExecutionConfig("float32", "auto"))
    assert found.dtype in {choice.dtype for choice in tried}


def test_without_a_home_weights_name_the_setting(no_home):
    with pytest.raises(BackboneError, match="FICPD_CACHE"):
        _kept("some", lambda folder: None)


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "ficpd", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_output_replaces_what_its_encoding_cannot_hold(tmp_path):
    """The locale is ASCII, the recipe has a byte order mark, and ε is printed."""
    rows = "".join(f"{word} Tag ☀,gut,Süd\n{word} Tag ☁,bad,Nord\n" for word in small.GOOD * 3)
    (tmp_path / "records.csv").write_text("text,target,site\n" + rows, encoding="utf-8")
    text = small.toml(tmp_path / "records.csv", rounds=1).replace('good = "good fine"', 'gut = "schön ☀"')
    text += '[privacy]\nname = "record_gaussian"\nepsilon = 4.0\ndelta = 1e-3\n'
    (tmp_path / "small.toml").write_text(text, encoding="utf-8-sig")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    process = start("run", tmp_path / "small.toml", "--out", tmp_path / "run", **ascii_only)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "? = 4" in out
    assert "☀" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "odd.jsonl").write_text('{"text": "fine \\ud83d day"}\n{"text": "日本語"}\n')
    process = start("predict", tmp_path / "run", "--data", tmp_path / "odd.jsonl", **ascii_only)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [json.loads(line)["prediction"] in ("gut", "bad") for line in out.splitlines()] == [True, True]


def test_a_byte_that_is_no_text_is_replaced(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ficpd", "predict", str(folder / "run"), "--text", "caf\udce9", "--text", "fine"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert len(capsys.readouterr().out.splitlines()) == 2
    (folder / "small.toml").write_text(small.toml(folder / "records.csv"))
    words = ("run", folder / "small.toml", "--set", "task.instruction=caf\udce9", "--out", folder / "new")
    assert "UTF-8" in said(monkeypatch, capsys, *words)


@pytest.mark.slow
def test_sigterm_stops_a_run_that_resumes(tmp_path):
    (tmp_path / "small.toml").write_text(small.toml(small.table(tmp_path / "records.csv"), rounds=10_000))
    out = tmp_path / "run"
    process = start("run", tmp_path / "small.toml", "--out", out)
    while not (out / "rounds.jsonl").exists() or not (out / "rounds.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    with RunDir(out).lock():
        assert len(RunDir(out).rounds()) >= 1


def test_resuming_with_other_settings_names_them(folder, tmp_path):
    (tmp_path / "small.toml").write_text(small.toml(folder / "records.csv", rounds=1))
    changes = ["federation.num_rounds=2", 'privacy={name="record_gaussian",epsilon=2}']
    changed = read(str(tmp_path / "small.toml"), changes)
    with pytest.raises(RunError) as caught:
        run_experiment(changed, folder / "run", resume=True)
    for words in ("federation.num_rounds was 1, is 2", "privacy.name was none, is record_gaussian", "Resume without"):
        assert words in str(caught.value)
