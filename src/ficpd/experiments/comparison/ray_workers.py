"""Runs the cells of a comparison on Ray actors. If an actor dies, only its current run fails.

A run's directory is sent to the actor and back as an archive, so machines need no common folder.
"""

import io
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.errors import ConfigError
from ficpd.experiments.comparison.run_cell import ContextCache
from ficpd.experiments.comparison.schema import RunOutcome
from ficpd.experiments.comparison.workers import Event, Job, next_job, run_job, write_outcome
from ficpd.federation.ray_actors import Actors, Handle, Room, connect

WAIT_SECONDS = 300.0
"""The maximum time to wait for the first actor."""
LOOK = 0.5
"""The seconds between two polls of the events."""


class Cells:
    """The process of an actor. It keeps one backbone and one set of records, like a worker process."""

    def load(self, folders: list[str]) -> None:
        sys.path += [folder for folder in folders if folder not in sys.path]
        self.contexts = ContextCache()

    def run(self, job: Job, before: bytes, events: Any) -> tuple[RunOutcome, bytes]:
        """Runs or continues a cell. Returns its outcome and its directory as an archive. `events`: a queue."""
        warnings.showwarning = lambda message, *where, **more: events.put({"warning": str(message)})
        with tempfile.TemporaryDirectory(prefix="ficpd-cell-") as name:
            folder = Path(name)
            unpack(before, folder)
            log = folder / f"{job.key}.log"
            with log.open("w") as output, redirect_stdout(output), redirect_stderr(output):
                outcome = run_job(job, folder, self.contexts, events.put)
            if log.name not in (outcome.reason or ""):
                log.unlink()
            return outcome, pack(folder)


def run_jobs_on_ray(
    jobs: Sequence[Job], folder: Path, address: str | None, gpus: float, seen: Callable[[Event], None]
) -> None:
    """Runs all jobs, one on each CPU (or GPU) of the cluster, and calls `seen` with every event.

    An exception, also `KeyboardInterrupt`, ends the actors.
    """
    if not jobs:
        return
    ray = connect(address)
    from ray.util.queue import Queue

    events, left, running = Queue(actor_options={"num_cpus": 0}), list(jobs), dict[Any, tuple[Handle, Job]]()
    actors, ground = Actors(ray, Cells, Room(None, 1.0, gpus, WAIT_SECONDS), most=len(jobs)), dict[Handle, str]()
    try:
        while left or running:
            busy = {handle for handle, _ in running.values()}
            for handle in [handle for handle in (actors.ready() if left else ()) if handle not in busy]:
                if left:
                    job = next_job(left, ground.get(handle), set(ground.values()))
                    left.remove(job)
                    ground[handle] = job.ground
                    running[handle.actor.run.remote(job, pack(folder, job.key), events)] = handle, job
            done, _ = ray.wait(list(running), timeout=LOOK)
            for ref in done:
                handle, job = running.pop(ref)
                try:
                    outcome, files = actors.get(ref)
                    unpack(files, folder)
                except ray.exceptions.RayError as error:
                    actors.drop(handle)
                    ground.pop(handle)
                    reason = f"its actor ended: {str(error).strip().splitlines()[0]}"
                    outcome = RunOutcome(ficpd=__version__, key=job.key, status="failed", reason=reason)
                _show(events, seen)
                seen(write_outcome(outcome, folder))
            _show(events, seen)
    finally:
        actors.close()
        events.shutdown(force=True)


def ray_address(jobs: str) -> str | None:
    """Returns the cluster of `--jobs` (None: `RAY_ADDRESS`, else this machine). Raises `ConfigError`.

    >>> ray_address("ray://10.0.0.1:10001"), ray_address("ray")
    ('ray://10.0.0.1:10001', None)
    """
    if jobs != "ray" and not jobs.startswith("ray://"):
        raise ConfigError(f"--jobs {jobs!r}: expected a number, ray, or ray://HOST:PORT")
    return None if jobs == "ray" else jobs


def _show(events: Any, seen: Callable[[Event], None]) -> None:
    for event in events.get_nowait_batch(events.qsize()):
        seen(event)


def pack(folder: Path, key: str | None = None) -> bytes:
    """Returns a run's directory (`key`), or a whole folder, as a compressed archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if key is None or path.name == key:
                archive.add(path, path.name)
    return content.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Writes an archive's files with their modes. Its directories replace those in the folder."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in {member.name.partition("/")[0] for member in archive}:
            shutil.rmtree(folder / name, ignore_errors=True)
        archive.extractall(folder, filter="tar")
