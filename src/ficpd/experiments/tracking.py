"""`--track`: the figures of every round to TensorBoard or MLflow as well, read from what runs leave in their directories.

Nothing of it is needed to run: a tracker reads `rounds.jsonl` and `result.json` below a folder, whoever writes them.
"""

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from ficpd.errors import ConfigError

Track = Annotated[str | None, typer.Option("--track", help="tensorboard or mlflow: every round's figures there, too")]
KINDS = ("tensorboard", "mlflow")
PAUSE = 2.0
FIGURES = ("clients", "updates", "bytes_up", "bytes_down", "seconds_train", "seconds_aggregate")


class TrackWarning(UserWarning):
    """A tracker that failed while a run went on."""


class Writer(Protocol):
    """One run at a tracker."""

    def settings(self, settings: Mapping[str, str]) -> None: ...
    def figures(self, figures: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


@contextmanager
def followed(kind: str | None, folder: Path) -> Iterator[Callable[[], None]]:
    """A function to call now and then: it sends what is new below `folder`, every other second at most, and all that is left
    at the end. No `kind`: it does nothing. Raises `ConfigError` for a tracker that is not known or not installed,
    before anything runs."""
    if kind is None:
        yield lambda: None
        return
    follower, last = Follower(opener(kind, folder), folder), [0.0]

    def look(pause: float = PAUSE) -> None:
        if time.monotonic() - last[0] <= pause:
            return
        try:
            follower.look()
            last[0] = time.monotonic()
        except Exception as error:  # whatever a tracker's own code raises: a run is worth more than its picture
            last[0] = math.inf
            warnings.warn(
                f"--track {kind}: {error}; nothing more is sent, and the run goes on", TrackWarning, stacklevel=2
            )

    try:
        yield look
    finally:
        look(-1.0)
        follower.close()


def opener(kind: str, folder: Path) -> Callable[[str, Path], Writer]:
    """A function that opens a writer for a run of this name, given the run's directory."""
    if kind not in KINDS:
        raise ConfigError(f"--track {kind!r} is not known; write {' or '.join(KINDS)}")
    try:
        return _tensorboard() if kind == "tensorboard" else _mlflow(folder)
    except ImportError as error:
        raise ConfigError(
            f"--track {kind} needs {kind}, which is not installed ({error}); pip install {kind}, or leave --track out"
        ) from error
    except Exception as error:  # a server that is not there, a store that is refused
        raise ConfigError(f"--track {kind} cannot begin: {error}") from error


class Follower:
    """Knows how many rounds of which run were sent. A run that was finished before the first look is not sent again."""

    def __init__(self, opened: Callable[[str, Path], Writer], folder: Path):
        self.opened, self.folder = opened, folder
        self.writers: dict[Path, Writer] = {}
        self.sent: dict[Path, int] = {}
        self.ended = {file.parent for file in folder.rglob("result.json")}

    def look(self) -> None:
        for file in sorted(self.folder.rglob("rounds.jsonl")):
            run = file.parent
            if run not in self.ended:
                self._send(run, [json.loads(line) for line in file.read_text().splitlines()])

    def _send(self, run: Path, rounds: list[dict[str, Any]]) -> None:
        writer = self.writers.get(run) or self._begun(run)
        for line in rounds[self.sent.get(run, 0) :]:
            figures = {name: line[name] for name in FIGURES if line.get(name) is not None}
            writer.figures({**figures, "dropped": len(line["dropped"]), **line["metrics"]}, line["round"])
        self.sent[run] = len(rounds)
        result = run / "result.json"
        if result.exists():
            writer.figures(end_of(json.loads(result.read_text())), len(rounds))
            self.ended.add(run)
            self.writers.pop(run).close()

    def _begun(self, run: Path) -> Writer:
        name = "/".join(run.relative_to(self.folder).parts) or self.folder.resolve().name
        writer = self.opened(name, run)
        writer.settings(settings_of(run))
        self.writers[run] = writer
        return writer

    def close(self) -> None:
        for writer in self.writers.values():
            with suppress(Exception):
                writer.close()


def end_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a finished run: on everyone's test, on each client's own (mean and worst), and what was spent."""
    metrics = result["metrics"]
    parts = {"global": metrics["global"] or {}, "own": metrics["per_client_mean"], "worst": metrics["per_client_worst"]}
    found = {f"{part}_{name}": value for part, score in parts.items() for name, value in score.items()}
    epsilon = result["privacy"].get("epsilon")
    return found | ({"epsilon": epsilon} if epsilon is not None else {})


def settings_of(run: Path) -> dict[str, str]:
    """`part.key` to value, of the experiment that the run is of (a baseline's is that of the run it stands beside)."""
    import tomllib

    file = next(
        (folder / "resolved.toml" for folder in (run, *run.parents[:2]) if (folder / "resolved.toml").exists()), None
    )
    return flat(tomllib.loads(file.read_text())) if file else {}


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """
    >>> flat({"seed": 1, "method": {"name": "fpl", "contrast": {"weight": 0.1}}})
    {'seed': '1', 'method.name': 'fpl', 'method.contrast.weight': '0.1'}
    """
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": str(value)}
    return found


# ---------------------------------------------------------------- TensorBoard


def _tensorboard() -> Callable[[str, Path], Writer]:
    from torch.utils.tensorboard import SummaryWriter

    return lambda name, run: TensorBoard(SummaryWriter(str(run / "track")))


class TensorBoard:
    """Event files in the run's own directory, `track/`: `tensorboard --logdir` finds them below any folder above."""

    def __init__(self, writer: Any):
        self.writer = writer

    def settings(self, settings: Mapping[str, str]) -> None:
        lines = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{lines}")

    def figures(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


# ---------------------------------------------------------------- MLflow


def _mlflow(folder: Path) -> Callable[[str, Path], Writer]:
    """Where `MLFLOW_TRACKING_URI` says, else where MLflow keeps runs by default; an experiment named after the folder."""
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    client, name = (
        MlflowClient(),
        f"ficpd {folder.resolve().parent.name if folder.name == 'cells' else folder.resolve().name}",
    )
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    return lambda run, path: Mlflow(client, client.create_run(experiment, run_name=run).info.run_id)


class Mlflow:
    LONGEST = 500
    """Of a parameter's value, in characters, that every MLflow server takes."""

    def __init__(self, client: Any, run: str):
        self.client, self.run = client, run

    def settings(self, settings: Mapping[str, str]) -> None:
        for name, value in settings.items():
            self.client.log_param(self.run, self._name(name), value[: self.LONGEST])

    def figures(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.run, self._name(name), float(value), step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)

    @staticmethod
    def _name(name: str) -> str:
        """MLflow takes letters, digits, and `_-. /` in a name.

        >>> Mlflow._name("accuracy, own test")
        'accuracy_ own test'
        """
        return re.sub(r"[^\w\-. /]", "_", name)
