"""The examples run as they stand, and print what they promise."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SAYS = {
    "ask": "a loss per candidate and record: torch.Size([2, 3])",
    "federate": "prompts.safetensors",
    "method": "round 3: 5 updates",
    "own_data": "['cardio']",
}


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs(name, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_no_example_is_forgotten_or_long():
    found = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert set(found) == {*SAYS, "plain_transformers"}
    assert max(found.values()) < 60


@pytest.mark.slow
def test_plain_transformers_agrees_with_predict(minilm_run):
    """A prompt in a dozen lines of transformers gives what our own loader gives."""
    from ficpd.library.session import open_library, predicted, texts_as_records

    out = subprocess.run(
        [sys.executable, str(FOLDER / "plain_transformers.py"), str(minilm_run / "library")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    texts = ["a quiet, lovely film", "the battery died within a week"]
    answers = predicted(open_library(minilm_run), texts_as_records(texts), "global")
    assert [line.split(" -> ")[1].split(" {")[0] for line in out.splitlines()] == answers
