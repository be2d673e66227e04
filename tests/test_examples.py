"""The examples run as they stand, and print what they promise."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ficpd

FOLDER = Path(__file__).parent.parent / "examples"
PRINTS = {
    "ask": "a loss per candidate and record: torch.Size([2, 3])",
    "federate": "<library: global; tiny; classification>",
    "method": "sign_avg",
    "own_data": "['cardio']",
}


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_an_example_runs(name, capsys, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert PRINTS[name] in capsys.readouterr().out


def test_every_example_is_tested_and_short():
    lines = {path.stem: sum(map(bool, path.read_text().splitlines())) for path in FOLDER.glob("[!_]*.py")}
    assert set(lines) == {*PRINTS, "plain_transformers"}
    assert lines.pop("plain_transformers") < 60  # encoders and decoders
    assert max(lines.values()) < 40


@pytest.mark.slow
def test_plain_transformers_agrees_with_predict(minilm_run):
    """Plain transformers give the same answers as the library."""
    out = subprocess.run(
        [sys.executable, str(FOLDER / "plain_transformers.py"), str(minilm_run / "library")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    answers = ficpd.load_library(minilm_run).predict(["a quiet, lovely film", "the battery died within a week"])
    assert [line.split(" -> ")[1].split(" {")[0] for line in out.splitlines()] == answers
