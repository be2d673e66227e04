"""Sends the figures of every round to TensorBoard, MLflow or Weights & Biases (`--track`).

Figures come from `rounds.jsonl` and `result.json`: the runs of a comparison, and those of Flower, are in other processes.
"""

import os
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ficpd.errors import ConfigError, PackageError, needs

if TYPE_CHECKING:  # the command line imports this module, and has to start at once
    from ficpd.experiments.results import RunResult

Track = Annotated[
    str | None, typer.Option("--track", help="tensorboard, mlflow or wandb: every round's figures there, too")
]
FIGURES = ("clients", "updates", "bytes_up", "bytes_down", "seconds_train", "seconds_aggregate")
LONGEST, TAKEN = 500, r"[^\w\-. /]"
"""MLflow's limits: the length of a parameter's value, and the characters that a name may not have."""

Writer = tuple[Callable[[str, float, int], Any], Callable[[], Any]]
"""Sends one figure (tag, value, round), and ends the run at the tracker."""
Begin = Callable[[str, Path, Mapping[str, str]], Writer]
"""Begins a run at the tracker: its name, its directory and its settings."""


def _tensorboard(folder: Path) -> Begin:
    """Writes event files into `track/` of each run's directory."""
    from torch.utils.tensorboard import SummaryWriter

    def begin(name: str, run: Path, settings: Mapping[str, str]) -> Writer:
        writer = SummaryWriter(str(run / "track"), flush_secs=2)
        lines = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{lines}")
        return writer.add_scalar, writer.close

    return begin


def _mlflow(folder: Path) -> Begin:
    """Sends to `MLFLOW_TRACKING_URI`, else to `track/mlflow.db` of the folder, into an experiment named after it.

    A folder of cells is named after its comparison, which also holds the file.
    """
    from mlflow.tracking import MlflowClient, is_tracking_uri_set  # pyright: ignore[reportMissingImports]

    @cache
    def store() -> tuple[MlflowClient, str]:
        """Returns the client, and the experiment's number. A file is made once there is a run, whose folder is new."""
        address = None
        if not is_tracking_uri_set():
            place = _whole(folder) / "track"
            place.mkdir(exist_ok=True)
            address = f"sqlite:///{place / 'mlflow.db'}"
        client, named = MlflowClient(address), f"ficpd {_whole(folder).name}"
        known = client.get_experiment_by_name(named)
        return client, known.experiment_id if known else client.create_experiment(named)

    if is_tracking_uri_set():
        store()  # an error before the work

    def begin(name: str, run: Path, settings: Mapping[str, str]) -> Writer:
        client, experiment = store()
        handle = client.create_run(experiment, run_name=name).info.run_id
        for key, value in settings.items():
            client.log_param(handle, re.sub(TAKEN, "_", key), value[:LONGEST])

        def send(tag: str, value: float, step: int) -> None:
            client.log_metric(handle, re.sub(TAKEN, "_", tag), float(value), step=step)

        return send, lambda: client.set_terminated(handle)

    return begin


def _wandb(folder: Path) -> Begin:
    """Writes Weights & Biases runs into `track/` of each run's directory, which `wandb sync` sends.

    They are sent at once if `WANDB_MODE` or the settings file of wandb says `online`. Facts of the machine are left out.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
    import wandb  # pyright: ignore[reportMissingImports]

    user = wandb.setup().settings
    mode = user.mode if "mode" in user.model_fields_set else "offline"
    if mode == "online":
        wandb.login()
    private = wandb.Settings(
        console="off", disable_code=True, disable_git=True, disable_job_creation=True, host="", mode=mode, program="",
        silent=True, x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True, x_save_requirements=False,
    )  # fmt: skip
    project = user.project or "ficpd-" + re.sub(r"[^\w-]", "-", _whole(folder).name)

    def begin(name: str, run: Path, settings: Mapping[str, str]) -> Writer:
        place = run / "track"
        place.mkdir(exist_ok=True)
        handle = wandb.init(
            project=project,
            name=name,
            dir=place,
            config=dict(settings),
            reinit="create_new",
            settings=private,
        )
        return lambda tag, value, step: handle.log({tag: float(value)}, step=step), handle.finish

    return begin


def _whole(folder: Path) -> Path:
    """Returns a run's folder, or that of the comparison that holds the cells."""
    return folder.resolve().parent if folder.name == "cells" else folder.resolve()


TRACKERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}


@contextmanager
def followed(kind: str | None, folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a callback per round, which sends the new figures below `folder`; the rest is sent at the end.

    Without `kind` it does nothing. Raises `ConfigError` for a tracker that is unknown, not installed or not reachable.
    """
    if kind is None:
        yield lambda: None
        return
    if kind not in TRACKERS:
        raise ConfigError(f"--track {kind!r} is not known; write one of {', '.join(TRACKERS)}")
    try:
        with needs(f"--track {kind}", "track"):
            follower = Follower(kind, TRACKERS[kind](folder), folder)
    except PackageError:
        raise
    except Exception as error:  # any error of the tracker's own code
        raise ConfigError(f"--track {kind} cannot begin: {error}") from error
    try:
        yield follower.look
    finally:
        follower.look()
        for _, end in follower.writers.values():
            with suppress(Exception):
                end()


class Follower:
    """Sends each round once. A run that was finished before the start is not sent again."""

    def __init__(self, kind: str, begin: Begin, folder: Path):
        self.kind, self.begin, self.folder, self.failed = kind, begin, folder, False
        self.writers: dict[Path, Writer] = {}
        self.sent: Counter[Path] = Counter()
        self.ended = {file.parent for file in folder.rglob("result.json")}

    def look(self) -> None:
        """Sends new figures. An error ends the sending."""
        try:
            for file in () if self.failed else sorted(self.folder.rglob("rounds.jsonl")):
                if file.parent not in self.ended:
                    self._send(file.parent)
        except Exception as error:  # any error of the tracker's own code
            self.failed = True
            warnings.warn(f"--track {self.kind}: {error}; nothing more is sent, and the run goes on", stacklevel=2)

    def _send(self, run: Path) -> None:
        from ficpd.experiments.run_directory import RunDir

        rounds, result = RunDir(run).rounds(), RunDir(run).result()
        if run not in self.writers:
            name = "/".join(run.relative_to(self.folder).parts) or self.folder.resolve().name
            self.writers[run] = self.begin(name, run, settings_of(run))
        send, end = self.writers[run]
        for done in rounds[self.sent[run] :]:
            figures = {tag: getattr(done, tag) for tag in FIGURES}
            for tag, value in {**figures, "dropped": len(done.dropped), **done.metrics}.items():
                send(tag, value, done.round)
        self.sent[run] = len(rounds)
        if result:
            for tag, value in end_of(result).items():
                send(tag, value, len(rounds))
            self.ended.add(run)
            del self.writers[run]
            end()


def end_of(result: "RunResult") -> dict[str, float]:
    """Returns a finished run's figures: on everyone's test, on each client's own (mean and worst), and ε."""
    parts: dict[str, Mapping[str, float]] = {}
    if scores := result.metrics:
        parts = {"global": scores.global_prompt or {}, "own": scores.per_client_mean, "worst": scores.per_client_worst}
    found = {f"{part}_{name}": value for part, score in parts.items() for name, value in score.items()}
    return found | ({} if result.privacy.epsilon is None else {"epsilon": result.privacy.epsilon})


def settings_of(run: Path) -> dict[str, str]:
    """Maps `part.key` to its value in the run's experiment. A baseline has that of the run that holds it."""
    from pandas import json_normalize

    files = (folder / "resolved.toml" for folder in (run, *run.parents[:2]))
    trees = [tomllib.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return {key: str(value) for tree in trees[:1] for key, value in json_normalize(tree).to_dict("records")[0].items()}
