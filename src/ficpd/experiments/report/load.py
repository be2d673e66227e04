"""A finished run as a page shows it: its results, rounds, library and last state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.report.summary import load_baselines, load_recipe, load_results
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.federation.rounds import Round
from ficpd.library.library import PromptLibrary
from ficpd.types import State


@dataclass(frozen=True)
class Finished:
    """`own`: the result of the run's method. `results`: those of all methods in the order of the table, empty among real
    sites. `rounds`: by label. `state`: the server's after the last round, if there was one."""

    path: Path
    own: RunResult
    results: Sequence[RunResult]
    rounds: Mapping[str, Sequence[Round]]
    library: PromptLibrary | None
    state: State | None
    recipe: str

    @property
    def main(self) -> Metric:
        return self.own.main

    @property
    def place(self) -> int:
        """The place in `results` of the run's own method."""
        return len(self.results) - 1

    @property
    def places(self) -> dict[str, int]:
        """Colour and symbol of each method in every figure; those of the run's own method come first."""
        known = [*(result.label for result in self.results), *self.rounds]
        others = [label for label in dict.fromkeys(known) if label != self.own.label]
        return {label: place for place, label in enumerate([self.own.label, *others])}

    @property
    def alone(self) -> RunResult | None:
        """The baseline `local`, if it was run."""
        return next((r for r in self.results if r.method == "local" and r is not self.own), None)


def opened(path: Path) -> Finished:
    """Opens a finished run. Raises `RunError` if there is none, or if it cannot be read."""
    own = RunResult.load(path)
    results = load_results(path) if own.metrics else []
    folders = {result.label: folder for folder, result in load_baselines(path, own)} | {own.label: path}
    rounds = {label: RunDir(folder).rounds() for label, folder in folders.items()}
    library = PromptLibrary.load(path) if (path / "library" / "card.json").exists() else None
    saved, shown = RunDir(path).load(), results[-1] if results else own
    return Finished(path, shown, results, rounds, library, saved[0] if saved else None, load_recipe(path))
