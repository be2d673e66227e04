"""The worker processes of a comparison. A worker that dies costs the run that it is at, and no other."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from ficpd import __version__
from ficpd.experiments.comparison.schema import RunOutcome
from ficpd.experiments.comparison.worker import Event, Job, work
from ficpd.registry import SEARCHED
from ficpd.storage import atomic_write

LOG_TAIL = 4000
SPAWN = get_context("spawn")


class Worker:
    """A process and the job that it is at."""

    def __init__(self, folder: Path, place: int, threads: int, lock: int):
        self.folder, self.log, self.threads = folder, folder / f".worker-{place}.log", threads
        self.job: Job | None = None
        self.end, self._theirs = SPAWN.Pipe()
        held = Connection(os.dup(lock))
        self.process = SPAWN.Process(target=work, args=(self._theirs, folder, self.log, threads, held, SEARCHED))

    def start(self) -> None:
        """Starts the process without Ctrl-C: only the main process reacts to it, and stops all workers."""
        before = dict(os.environ)
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.environ |= {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        try:
            self.process.start()
            self._theirs.close()
        finally:
            os.environ.clear()
            os.environ.update(before)
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def give(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # a dead worker is seen when its answer is read
            self.end.send(job)

    def died(self) -> Event:
        """Writes the outcome of the run that the dead process was at."""
        assert self.job is not None
        self.process.join()
        code, key = self.process.exitcode or 0, self.job.key
        log = self.log.read_bytes() if self.log.exists() else b""
        atomic_write(self.folder / f"{key}.log", log[-LOG_TAIL:].decode(errors="replace"))
        reason = f"its process {describe_exit(code)} (see {key}.log)"
        outcome = RunOutcome(ficpd=__version__, key=key, status="failed", reason=reason)
        outcome.write(self.folder / f"{key}.json")
        return outcome.model_dump(include={"key", "status", "reason"})


def run_jobs(
    jobs: Sequence[Job], folder: Path, number: int, threads: int, lock: int, seen: Callable[[Event], None]
) -> None:
    """Runs all jobs in `number` processes of `threads` threads each, and calls `seen` with every event.

    The processes hold the file descriptor `lock` as long as they live. An exception, also `KeyboardInterrupt`, stops them.
    """
    left, workers, grounds = list(jobs), dict[int, Worker](), dict[int, str]()
    try:
        while True:
            for place in range(number):
                if left and (place not in workers or workers[place].job is None):
                    job = next_job(left, grounds.get(place), set(grounds.values()))
                    left.remove(job)
                    grounds[place] = job.ground
                    if place not in workers:
                        workers[place] = Worker(folder, place, threads, lock)
                        workers[place].start()
                    workers[place].give(job)
            busy = {worker.end: place for place, worker in workers.items() if worker.job}
            if not busy:
                return
            for end, place in [(end, busy[end]) for end in wait(list(busy)) if isinstance(end, Connection)]:
                try:
                    event = end.recv()
                except (EOFError, OSError):
                    event = workers.pop(place).died()
                    del grounds[place]
                seen(event)
                if "status" in event and place in workers:
                    workers[place].job = None
    finally:
        started = [worker.process for worker in workers.values() if worker.process.pid]
        for process in started:
            process.terminate()
        for process in started:
            process.join(10)
        for log in folder.glob(".worker-*.log"):
            log.unlink(missing_ok=True)


def next_job(left: Sequence[Job], own: str | None, taken: set[str]) -> Job:
    """Chooses a worker's next job: of the ground in its memory, else of the largest ground that no worker has, else of the
    largest.

    >>> jobs = [Job("a", "", "1"), Job("b", "", "1"), Job("c", "", "2")]
    >>> [next_job(jobs, *who).key for who in (("2", {"2"}), (None, {"1"}), (None, set()), ("3", {"1", "2", "3"}))]
    ['c', 'c', 'a', 'a']
    """
    count = Counter(job.ground for job in left)
    ground = own if own in count else max(count, key=lambda g: (g not in taken, count[g]))
    return next(job for job in left if job.ground == ground)


def describe_exit(code: int) -> str:
    """
    >>> describe_exit(3), describe_exit(-9)
    ('ended with status 3', 'was killed by SIGKILL; most often the machine had no memory left: try fewer --jobs')
    """
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    hint = "; most often the machine had no memory left: try fewer --jobs" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
