"""Runs experiments and comparisons from Python: `ficpd.run` and `ficpd.compare`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ficpd.errors import ConfigError, needs
from ficpd.experiments import runner
from ficpd.experiments.comparison.compare import compare as run_grid
from ficpd.experiments.comparison.grid import read_plan
from ficpd.experiments.comparison.schema import ComparisonResult
from ficpd.experiments.comparison.workers import Event
from ficpd.experiments.config import Experiment, parse, read, to_toml
from ficpd.experiments.finished import FinishedRun

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class FinishedComparison:
    """A finished comparison and its result."""

    directory: Path
    result: ComparisonResult = field(repr=False)

    def to_frame(self) -> "DataFrame":
        """Makes a table with one line per method and condition (task, partition, budget, sweep)."""
        with needs("to_frame", "report"):
            import pandas as pd

        lines = [
            {**one.model_dump(exclude={"methods"}), "method": name, **summary.model_dump(exclude={"against"})}
            for one in self.result.conditions
            for name, summary in one.methods.items()
        ]
        return pd.DataFrame(lines)


def run(
    recipe: str | Path | Experiment, out: str | Path | None = None, *, changes: Iterable[str] = (), resume: bool = False,
    progress: runner.Progress | None = None,
) -> FinishedRun:  # fmt: skip
    """Runs an experiment and its baselines among simulated clients.

    recipe: the name of a recipe, a TOML file, or an `Experiment`.
    out: the run directory; None: `runs/NAME-METHOD-SEED`.
    changes: settings to change, such as "method.name=fedavg".
    resume: continues after the last finished round.
    progress: called as (method, rounds done, rounds planned, figures).

    >>> run = ficpd.run("notes.toml", "runs/prox", changes=["method.name=fedprox", "baselines=[]"])
    >>> run.directory.name
    'prox'
    >>> run.to_frame()[["privacy", "rounds", "clients"]]
                      privacy  rounds  clients
    method
    zero_shot  nothing leaves       0        4
    fedprox              none       3        4

    Raises a `FicpdError` that names the setting to change.
    """
    if isinstance(recipe, Experiment):
        experiment = parse(to_toml(recipe), recipe.name, changes)
    else:
        experiment = read(str(recipe), changes)
    if experiment.engine.name == "flower":
        raise ConfigError('engine.name = "flower": real sites are not simulated. Start the run with `ficpd run`')
    directory = Path(out) if out else default_directory(experiment)
    runner.run(experiment, directory, resume, progress or runner.no_progress)
    return FinishedRun.load(directory)


def default_directory(experiment: Experiment) -> Path:
    return Path("runs") / f"{experiment.name}-{experiment.method['name']}-{experiment.seed}"


def compare(
    recipe: str | Path, out: str | Path | None = None, *, ablate: Sequence[str] = (), jobs: int | str | None = None,
    progress: Callable[[Event], None] = lambda event: None,
) -> FinishedComparison:  # fmt: skip
    """Runs the unfinished cells of a comparison in worker processes.

    A script that calls this needs the guard `if __name__ == "__main__":`.

    recipe: a TOML file, or a comparison of the package.
    out: the folder; None: `runs/compare-NAME`.
    ablate: settings to sweep over, such as "privacy.epsilon=1,2,4".
    jobs: parallel runs; None: one for each core, one on a GPU. "ray" or "ray://HOST:PORT": on Ray actors.
    progress: called with each event of a worker.

    >>> compared = ficpd.compare("two.toml", "runs/two", jobs=1)  # doctest: +SKIP
    >>> compared.to_frame()[["method", "mean", "bytes_up"]]  # doctest: +SKIP
            method  mean  bytes_up
    0    zero_shot   1.0       0.0
    1        local   1.0     408.0
    2  centralized   1.0    3936.0
    3       fedavg   1.0   15768.0
    4        ficpd   1.0   29656.0
    """
    plan = read_plan(str(recipe), ablate)
    directory = Path(out) if out else Path("runs") / f"compare-{plan.spec.name}"
    return FinishedComparison(directory, run_grid(plan, directory, jobs, seen=progress))
