"""What all tests share; this file's folder on the path makes `small` (small federations) importable from below it."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import decoders
import small
from ficpd import cli
from ficpd.backbones.query_engine import QueryEngine, set_single_threaded_forward
from ficpd.experiments.config import read
from ficpd.experiments.runner import run

set_single_threaded_forward()  # as every run does: threads of two test processes would spin on the same cores


@pytest.fixture
def model() -> QueryEngine:
    return QueryEngine(small.backbone())


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """The folder of a random decoder, which tests only read."""
    return decoders.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def decoder(llama) -> QueryEngine:
    return QueryEngine(decoders.load(llama))


@pytest.fixture(scope="session")
def minilm_run(tmp_path_factory) -> Path:
    """A short quick start on the real encoder: the centralised line, and FICPD with its privacy."""
    folder = tmp_path_factory.mktemp("minilm") / "run"
    changes = [
        "method.name=ficpd", 'baselines=["centralized:none"]', "data.max_records=2000", "data.test_fraction=0.2",
        "partition.num_clients=8", "partition.kind=column_dirichlet", "partition.column=domain",
        "partition.concentration=1.0", "partition.min_records=100",
        "training.local_steps=2", "training.batch_size=10", "training.learning_rate=0.035",
        "federation.num_rounds=10", "federation.clients_per_round=8", "backbone.dtype=float32",
        "privacy.name=record_gaussian", "privacy.epsilon=2",
    ]  # fmt: skip
    run(read("quickstart", changes), folder)
    return folder


class Outcome(NamedTuple):
    """A command's exit status, what it printed, and its errors."""

    status: int
    out: str
    err: str

    def said(self, status: int = 0) -> str:
        """What it printed, or its error, if it ended with this status."""
        assert self.status == status, self.err
        return self.err if status else self.out


@pytest.fixture
def ficpd(monkeypatch, capsys):
    """Runs the command in this process."""

    def call(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ficpd", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return Outcome(status, said.out, said.err)

    return call
