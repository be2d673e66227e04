"""The process that carries out runs of a comparison, one after the other."""

import os
import threading
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.errors import BackboneError, ConfigError, FicpdError, PrivacyError
from ficpd.experiments.comparison.run_cell import ContextCache, run_cell
from ficpd.experiments.comparison.schema import RunOutcome
from ficpd.experiments.config import parse
from ficpd.registry import SEARCHED
from ficpd.storage import atomic_write

Event = Mapping[str, Any]
"""{"key", "method", "done", "planned", "figures"} of a round, {"warning"}, or {"key", "status", "reason"} of a run's end."""
CANNOT = (ConfigError, PrivacyError, BackboneError)
"""The whole file was checked before. Such an error says that this method cannot do what the cell asks."""


@dataclass(frozen=True)
class Job:
    """One missing run. Jobs of equal `ground` need the same records and backbone."""

    key: str
    experiment: str
    ground: str


def work(jobs: Connection, folder: Path, log: Path, threads: int, lock: Connection, modules: list[str]) -> None:
    """Runs the jobs that arrive, writes `folder/KEY.json`, and sends events. `lock` stays open as long as this process.

    `modules`: the folders in which dotted names are found.
    The process ends with its parent. Its standard output and error go to `log`.
    """
    import torch

    SEARCHED.extend(modules)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)

    @cache
    def warn(text: str) -> None:
        jobs.send({"warning": text})

    warnings.showwarning = lambda message, *where, **more: warn(str(message))
    contexts = ContextCache()
    while True:
        job = jobs.recv()
        outcome = run_job(job, folder, contexts, jobs)
        outcome.write(folder / f"{job.key}.json")
        jobs.send(outcome.model_dump(include={"key", "status", "reason"}))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def run_job(job: Job, folder: Path, contexts: ContextCache, events: Connection) -> RunOutcome:
    """Returns the run's outcome, also of a run that raised. The traceback of an unexpected error goes to `KEY.log`."""
    key, log = job.key, folder / f"{job.key}.log"

    def progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
        events.send({"key": key, "method": method, "done": done, "planned": planned, "figures": figures})

    try:
        outcome = run_cell(parse(job.experiment, f"{key}.toml"), key, job.ground, folder, contexts, progress)
    except FicpdError as error:
        status = "refused" if isinstance(error, CANNOT) else "failed"
        return RunOutcome(ficpd=__version__, key=key, status=status, reason=str(error))
    except Exception as error:
        atomic_write(log, traceback.format_exc())
        reason = f"{type(error).__name__}: {error} (see {key}.log)"
        return RunOutcome(ficpd=__version__, key=key, status="failed", reason=reason)
    log.unlink(missing_ok=True)
    return outcome
