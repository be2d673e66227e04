"""Runs the worker processes of a comparison. If a worker dies, only its current run fails."""

import os
import signal
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.errors import BackboneError, ConfigError, FicpdError, PrivacyError
from ficpd.experiments.comparison.run_cell import ContextCache, run_cell
from ficpd.experiments.comparison.schema import RunOutcome
from ficpd.experiments.config import parse
from ficpd.registry import SEARCHED

Event = Mapping[str, Any]
"""A round: {"key", "method", "done", "planned", "figures"}; a {"warning"}; or a run's end: {"key", "status", "reason"}."""
CANNOT = (ConfigError, PrivacyError, BackboneError)
"""Errors of a method that cannot run in its cell. The file itself is valid."""
SPAWN = get_context("spawn")


@dataclass(frozen=True)
class Job:
    """One missing run. Jobs with the same `ground` need the same records and backbone."""

    key: str
    experiment: str
    ground: str


class Worker:
    """A process that ignores Ctrl-C, its current job, and the ground in its memory."""

    def __init__(self, folder: Path, threads: int):
        self.job: Job | None = None
        self.ground: str | None = None
        self.end, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=work, args=(theirs, folder, threads, SEARCHED))
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        theirs.close()

    def give(self, job: Job) -> None:
        self.job, self.ground = job, job.ground
        with suppress(OSError):  # a dead worker is detected when its answer is read
            self.end.send(job)


def run_jobs(
    jobs: Sequence[Job], folder: Path, number: int, threads: int, seen: Callable[[Event], None]
) -> None:  # fmt: skip
    """Runs all jobs in `number` processes of `threads` threads each, and calls `seen` with every event.

    An exception, also `KeyboardInterrupt`, stops the processes.
    """
    left, workers = list(jobs), list[Worker]()
    try:
        while True:
            for _ in range(min(number - len(workers), len(left))):
                workers.append(Worker(folder, threads))
            for worker in workers:
                if left and worker.job is None:
                    job = next_job(left, worker.ground, {one.ground for one in workers})
                    left.remove(job)
                    worker.give(job)
            busy: dict[Any, Worker] = {worker.end: worker for worker in workers if worker.job}
            if not busy:
                return
            for end in wait(list(busy)):
                worker = busy[end]
                try:
                    event = worker.end.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    event = _died(worker, folder)
                if "status" in event:
                    worker.job = None
                seen(event)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(10)
            if worker.job:
                (folder / f"{worker.job.key}.log").unlink(missing_ok=True)


def next_job(left: Sequence[Job], own: str | None, taken: set[str | None]) -> Job:
    """Returns a worker's next job.

    It has the ground in the worker's memory, else the largest ground that no worker has, else the largest.

    >>> jobs = [Job("a", "", "1"), Job("b", "", "1"), Job("c", "", "2")]
    >>> [next_job(jobs, *who).key for who in (("2", {"2"}), (None, {"1"}), (None, set()), ("3", {"1", "2", "3"}))]
    ['c', 'c', 'a', 'a']
    """
    count = Counter(job.ground for job in left)
    ground = own if own in count else max(count, key=lambda g: (g not in taken, count[g]))
    return next(job for job in left if job.ground == ground)


def _died(worker: Worker, folder: Path) -> Event:
    """Writes the outcome of a dead process's current run; returns its event."""
    assert worker.job is not None
    worker.process.join()
    key, code = worker.job.key, worker.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if code == -signal.SIGKILL:
        how += "; most likely the memory ran out: try fewer --jobs"
    reason = f"its process {how} (see {key}.log)"
    return write_outcome(RunOutcome(ficpd=__version__, key=key, status="failed", reason=reason), folder)


def write_outcome(outcome: RunOutcome, folder: Path) -> Event:
    """Writes a run's outcome to the folder of the cells. Returns the event of its end."""
    outcome.write(folder / f"{outcome.key}.json")
    return outcome.model_dump(include={"key", "status", "reason"})


def work(jobs: Connection, folder: Path, threads: int, modules: list[str]) -> None:
    """Runs the received jobs and sends events, until the parent process ends.

    modules: the folders with the modules of dotted names.
    """
    import torch
    from threadpoolctl import threadpool_limits

    SEARCHED.extend(modules)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    @cache
    def warn(text: str) -> None:
        jobs.send({"warning": text})

    warnings.showwarning = lambda message, *where, **more: warn(str(message))
    contexts = ContextCache()
    while True:
        job = jobs.recv()
        log = folder / f"{job.key}.log"
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        outcome = run_job(job, folder, contexts, jobs.send)
        if "see " + log.name not in (outcome.reason or ""):
            log.unlink()
        jobs.send(write_outcome(outcome, folder))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def run_job(job: Job, folder: Path, contexts: ContextCache, send: Callable[[Event], None]) -> RunOutcome:
    """Returns the run's outcome, also if it raised. Prints the traceback of an unexpected error."""
    key = job.key

    def progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
        send({"key": key, "method": method, "done": done, "planned": planned, "figures": figures})

    try:
        return run_cell(parse(job.experiment, f"{key}.toml"), key, job.ground, folder, contexts, progress)
    except FicpdError as error:
        status, reason = "refused" if isinstance(error, CANNOT) else "failed", str(error)
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error} (see {key}.log)"
    return RunOutcome(ficpd=__version__, key=key, status=status, reason=reason)
