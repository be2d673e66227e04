"""Loads a finished run for Python, the screen, the page and the audit."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ficpd.errors import ConfigError, needs
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.report.summary import verdict
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.federation.rounds import Round
from ficpd.library.library import PromptLibrary
from ficpd.registry import validated_section
from ficpd.types import State

if TYPE_CHECKING:
    from pandas import DataFrame

FIRST = ("zero_shot", "local", "centralized")
"""Baselines at the head of every table; the others follow by name."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run and its result.

    baselines: the results of its baselines, zero-shot first.
    folders: the run directory of each label.
    """

    directory: Path
    result: RunResult = field(repr=False)
    baselines: Sequence[RunResult] = field(repr=False)
    folders: Mapping[str, Path] = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Raises `RunError` if there is no finished run, or if it cannot be read."""
        own = RunResult.load(directory)
        found = _baselines(directory, own)
        folders = {result.label: folder for folder, result in found} | {own.label: directory}
        return cls(directory, own, [result for _, result in found], folders)

    @property
    def results(self) -> list[RunResult]:
        """Returns the results of all methods in the tables' order, the run's last; empty among real sites."""
        return [*self.baselines, self.result] if self.result.metrics else []

    @cached_property
    def rounds(self) -> dict[str, list[Round]]:
        """Returns the rounds of each label."""
        return {label: RunDir(folder).rounds() for label, folder in self.folders.items()}

    @cached_property
    def library(self) -> PromptLibrary | None:
        return PromptLibrary.load(self.directory) if (self.directory / "library" / "card.json").exists() else None

    @cached_property
    def state(self) -> State | None:
        """Returns the server's state after the last round."""
        saved = RunDir(self.directory).load()
        return saved[0] if saved else None

    @property
    def recipe(self) -> str:
        return _recipe(self.directory)

    @property
    def main(self) -> Metric:
        return self.result.main

    @property
    def places(self) -> dict[str, int]:
        """Returns colour and symbol of each method in all figures, the run's method first."""
        return {label: i for i, label in enumerate(dict.fromkeys([self.result.label, *self.folders]))}

    @property
    def alone(self) -> RunResult | None:
        """Returns the baseline `local`, if it was run."""
        return next((r for r in self.baselines if r.method == "local"), None)

    @property
    def verdict(self) -> str:
        return " ".join(self.verdicts)

    @property
    def verdicts(self) -> list[str]:
        """Returns the verdict: sentences on the run's method against methods without the others.

        The last one says so if most updates were dropped, for then little was learned together.
        """
        received = sum(done.updates for done in self.rounds.get(self.result.label, []))
        return [*verdict(self.results), *([self.dropped] if self.result.dropped_updates > received else [])]

    @property
    def dropped(self) -> str:
        """Counts dropped updates, with the reason of the first; empty without any."""
        rounds = self.rounds.get(self.result.label, [])
        found = [(name, done.round, why) for done in rounds for name, why in sorted(done.dropped.items())]
        if not found:
            return ""
        (name, number, why), total = found[0], len(found) + sum(done.updates for done in rounds)
        return f"{len(found)} of {total} updates were dropped ({name}, round {number}: {why})."

    def to_frame(self) -> "DataFrame":
        """Makes a table with one line per method, the run's method last; unrounded, and empty where there is no figure.

        Columns of each metric: `global` (one prompt on all test records), `own` (each client's prompt on its test records,
        mean over clients) and `worst` (the worst client). `bytes_up` is of one client and round.
        """
        with needs("to_frame", "report"):
            import pandas as pd

        return pd.DataFrame(self.lines).set_index("method")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Returns the lines of `to_frame`, each a mapping."""
        return [_line(result) for result in self.results]


def _line(result: RunResult) -> dict[str, Any]:
    found, privacy = result.scores, result.privacy
    scores = {"global": found.global_prompt or {}, "own": found.per_client_mean, "worst": found.per_client_worst}
    return {
        "method": result.label, "privacy": privacy.guarantee, "epsilon": privacy.epsilon, "delta": privacy.delta,
        "unit": privacy.unit,
        **{f"{name}_{kind}": value for kind, score in scores.items() for name, value in score.items()},
        "bytes_up": result.bytes.up_per_client_round, "bytes_up_total": result.bytes.up_total,
        "bytes_down_total": result.bytes.down_total, "seconds": result.seconds.total, "rounds": result.num_rounds,
        "clients": result.num_clients, "seed": result.seed,
    }  # fmt: skip


def _baselines(directory: Path, own: RunResult) -> list[tuple[Path, RunResult]]:
    """Reads folder and result of each baseline.

    A repetition of the run's own method is left out. If the run changes settings of that method, the baseline's label
    says "default settings".
    """
    found = []
    for file in sorted(directory.glob("baselines/*/result.json")):
        result = RunResult.load(file.parent)
        name = result.method
        if name == own.method:
            if "-" not in file.parent.name and not _has_default_settings(directory, name):
                label = f"{name}, default settings{result.label.removeprefix(name)}"
                result = result.model_copy(update={"label": label})
            elif result.label == own.label:
                continue
        found.append((file.parent, result))
    order = {name: place for place, name in enumerate(FIRST)}
    return sorted(found, key=lambda pair: (order.get(pair[1].method, len(order)), pair[1].label))


def _has_default_settings(directory: Path, method: str) -> bool:
    """Tells whether a method has default settings; False if they cannot be read."""
    try:
        given = tomllib.loads(_recipe(directory)).get("method", {})
        return validated_section("methods", given, "") == validated_section("methods", {"name": method}, "")
    except ConfigError:
        return False


def _recipe(directory: Path) -> str:
    """Reads the whole experiment of a run; empty if there is none."""
    files = [directory / name for name in ("resolved.toml", "experiment.toml")]
    return next((file.read_text(encoding="utf-8") for file in files if file.exists()), "")
