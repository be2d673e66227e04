"""The examples run as they stand, and print what they promise."""

import ast
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import ficpd
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.types import Record

FOLDER = Path(__file__).parent.parent / "examples"
TEXTS = ["a quiet, lovely film", "the battery died within a week", "an itching rash on both arms"]
NOTES = [
    ("a red rash on the arm", "skin"), ("itching and dry skin", "skin"), ("an irregular pulse", "heart"),
    ("chest pain and palpitations", "heart"),
]  # fmt: skip
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


def answers_of_plain_transformers(folder: Path) -> list[tuple[str, dict[str, float]]]:
    command = [sys.executable, str(FOLDER / "plain_transformers.py"), str(folder), *TEXTS]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [line.split(" -> ")[1].split(" ", 1) for line in out.splitlines()]
    return [(label, ast.literal_eval(shares)) for label, shares in found]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "head", "ensemble", "mixture", "tune"])
def test_plain_transformers_agrees_with_predict(minilm_run, how, tmp_path):
    """Plain transformers give the same answers and probabilities as the library, adapted to another task or not."""
    folder = minilm_run
    if how:
        records = [Record(f"row {n}", {"text": text, "target": label}) for n, (text, label) in enumerate(NOTES * 3)]
        labels = {"skin": "the skin", "heart": "the heart"}
        library = ficpd.load_library(minilm_run).adapt(records, labels=labels, how=how)
        library.save(folder := tmp_path / "adapted")
    exact = load_backbone(BackboneConfig(name="minilm", dtype="float32"), EngineConfig())[0]
    frame = replace(ficpd.load_library(folder, weights=False), engine=QueryEngine(exact)).predict(TEXTS, scores=True)
    for (label, shares), row in zip(answers_of_plain_transformers(folder), frame.to_dict("records"), strict=True):
        assert label == row.pop("label")
        assert shares == pytest.approx(row, abs=1e-4)
