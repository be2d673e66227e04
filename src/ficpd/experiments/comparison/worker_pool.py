"""The workers: each a process of its own, so that one that dies takes no other with it, and all cores are used."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ficpd.experiments.comparison.worker import result_event
from ficpd.registry import SEARCHED
from ficpd.storage import atomic_write

WORKER = "ficpd.experiments.comparison.worker"

Event = Mapping[str, Any]
LAST_WORDS = 4000


@dataclass(frozen=True)
class Job:
    """One run that is missing. Jobs of equal `ground` need the same records and backbone."""

    key: str
    experiment: str
    ground: str


class WorkerPool:
    """`jobs` worker processes of `threads` threads each, on the runs of `folder`. `seen` gets every event, one at a time;
    an event with a status is the end of its run. `lock`: a file descriptor that the processes hold too, as long as they
    live."""

    def __init__(self, folder: Path, jobs: int, threads: int, lock: int, seen: Callable[[Event], None]):
        self.folder, self.jobs, self.threads, self.lock, self.seen = folder, jobs, threads, lock, seen
        self._left: list[Job] = []
        self._grounds: dict[int, str] = {}
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._guard, self._stopped = threading.Lock(), False

    def work(self, jobs: Sequence[Job]) -> None:
        """Return when all are done. A `KeyboardInterrupt` stops the processes, and is raised again."""
        self._left = list(jobs)
        hands = [
            threading.Thread(target=self._hand, args=(place,), daemon=True)
            for place in range(min(self.jobs, len(jobs)))
        ]
        try:
            for hand in hands:
                hand.start()
            for hand in hands:
                while hand.is_alive():
                    hand.join(0.2)
        finally:
            self._stop()
            for hand in hands:
                hand.join(10)
            for words in self.folder.glob(".worker-*.log"):
                words.unlink(missing_ok=True)

    def _stop(self) -> None:
        with self._guard:
            self._stopped, self._left = True, []
            for process in self._processes.values():
                process.terminate()

    def _hand(self, place: int) -> None:
        """One worker's life: while there are jobs, a process that takes them; a new one where it died."""
        process = None
        while (job := self._next(place)) is not None:
            if process is None:
                process = self._started(place)
                if process is None:
                    return
            if not self._carried_out(process, job):
                self._grounds.pop(place, None)
                process = None
        if process is not None:
            _ended(process)

    def _next(self, place: int) -> Job | None:
        with self._guard:
            job = next_job(self._left, self._grounds.get(place), set(self._grounds.values()))
            if job is not None:
                self._left.remove(job)
                self._grounds[place] = job.ground
            return job

    def _started(self, place: int) -> subprocess.Popen[str] | None:
        """Starts a process that finds the same modules as this one.

        It has a session of its own: the terminal's Ctrl-C is for the one process that can stop them all in order.
        """
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), **paths}
        with self._guard:
            if self._stopped:
                return None
            with open(self._words(place), "wb") as words:
                self._processes[place] = subprocess.Popen(
                    [sys.executable, "-m", WORKER, str(self.folder), *SEARCHED], text=True, env=environment,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, start_new_session=True,
                    pass_fds=(self.lock,),
                )  # fmt: skip
            return self._processes[place]

    def _words(self, place: int) -> Path:
        return self.folder / f".worker-{place}.log"

    def _carried_out(self, process: subprocess.Popen[str], job: Job) -> bool:
        """Whether the process is alive after it. If it is not, the run has failed, unless we ended it ourselves."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(vars(job)) + "\n")
            process.stdin.flush()
        except OSError:
            return self._died(process, job)
        return self._followed(process.stdout, job) or self._died(process, job)

    def _followed(self, events: IO[str], job: Job) -> bool:
        for line in events:
            event = json.loads(line)
            with self._guard:
                self.seen(event)
            if event.get("key") == job.key and "status" in event:
                return True
        return False

    def _died(self, process: subprocess.Popen[str], job: Job) -> bool:
        code = _ended(process)
        with self._guard:
            if self._stopped:
                return False
            place = next(place for place, one in self._processes.items() if one is process)
            words = self._words(place).read_bytes()[-LAST_WORDS:].decode(errors="replace")
            atomic_write(self.folder / f"{job.key}.log", words)
            outcome = result_event(job.key, "failed", f"its process {describe_exit(code)} (see {job.key}.log)")
            atomic_write(self.folder / f"{job.key}.json", json.dumps(outcome, indent=1) + "\n")
            self.seen(outcome)
        return False


def _ended(process: subprocess.Popen[str]) -> int:
    """The end of its input is the end of a worker; its exit status."""
    with suppress(BrokenPipeError), process:
        pass
    return process.wait()


def next_job(left: Sequence[Job], own: str | None, taken: set[str]) -> Job | None:
    """What a worker does next: of the ground that it has in memory; else of one that nobody has, the largest first; else
    help where most is left.

    >>> jobs = [Job("a", "", "1"), Job("b", "", "1"), Job("c", "", "2")]
    >>> [chosen(jobs, *who).key for who in (("2", {"2"}), (None, {"1"}), (None, set()), ("3", {"1", "2", "3"}))]
    ['c', 'c', 'a', 'a']
    """
    if not left:
        return None
    count: dict[str, int] = {}
    for job in left:
        count[job.ground] = count.get(job.ground, 0) + 1
    ground = own if own in count else max(count, key=lambda g: (g not in taken, count[g]))
    return next(job for job in left if job.ground == ground)


def describe_exit(code: int) -> str:
    """
    >>> how_it_ended(3), how_it_ended(-9)
    ('ended with status 3', 'was killed by SIGKILL; most often the machine had no memory left: try fewer --jobs')
    """
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    hint = "; most often the machine had no memory left: try fewer --jobs" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
