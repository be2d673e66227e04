"""A run directory as a page sees it: read once, and said clearly where it cannot be read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficpd.errors import FicpdError, RunError
from ficpd.evaluation.metrics import Metric, main_metric
from ficpd.experiments.report.summary import load_baselines, load_recipe, load_results
from ficpd.experiments.run_directory import RunDir
from ficpd.library.library import PromptLibrary
from ficpd.types import State

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """`own` is the method's result, `results` those of all methods in the order of the table (empty where clients' scores
    stay with them: among real sites). `rounds` by label. `state` is the server's after the last round, where one was."""

    path: Path
    own: Result
    results: Sequence[Result]
    rounds: Mapping[str, list[dict[str, Any]]]
    library: PromptLibrary | None
    state: State | None
    recipe: str

    @property
    def main(self) -> Metric:
        return main_metric(self.own["metrics"]["per_client_mean"])

    @property
    def place(self) -> int:
        """Which of `results` the page is about: the last."""
        return len(self.results) - 1

    @property
    def places(self) -> dict[str, int]:
        """Which colour and symbol each method has in every figure: the first is that of the page's own."""
        known = [*(result["label"] for result in self.results), *self.rounds]
        others = [label for label in dict.fromkeys(known) if label != self.own["label"]]
        return {label: place for place, label in enumerate([self.own["label"], *others])}

    @property
    def alone(self) -> Result | None:
        """The clients that never share anything, if they were run."""
        return next((r for r in self.results if r["method"] == "local" and r is not self.own), None)


def opened(path: Path) -> Finished:
    """Raises `RunError` for a directory that holds no finished run, or one that cannot be read."""
    directory = RunDir(path)
    own = directory.result()
    if own is None:
        what = "has not finished; go on with it (--resume)" if (path / "experiment.toml").exists() else "holds no run"
        raise RunError(
            f"{path} {what}. A report is made of a finished run, or of a directory that `ficpd compare` wrote"
        )
    if missing := [key for key in ("label", "method", "bytes", "seconds", "privacy", "versions") if key not in own]:
        raise RunError(
            f"{path / 'result.json'} has no {missing[0]!r}: it is of another version of ficpd; run the experiment again"
        )
    results = load_results(path) if "metrics" in own else []
    folders = {result["label"]: folder for folder, result in load_baselines(path, own)} | {own["label"]: path}
    rounds = {label: _lines(folder / "rounds.jsonl") for label, folder in folders.items()}
    return Finished(
        path, results[-1] if results else own, results, rounds, _library(path), _state(directory), load_recipe(path)
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """Raises `RunError` for a line that is no JSON."""
    if not file.exists():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise RunError(f"{file} cannot be read: {error}. Resume the run: it is written anew") from error


def _library(path: Path) -> PromptLibrary | None:
    return PromptLibrary.load(path) if (path / "library" / "card.json").exists() else None


def _state(directory: RunDir) -> State | None:
    """None too where the checkpoint is of another version: the page then draws less."""
    try:
        saved = directory.load()
    except FicpdError:
        return None
    return saved[0] if saved else None
