"""Processes forked from one that has imported everything, each with the faults that a test plants in it."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from itertools import count
from typing import Any


def kill(at: str, call: int = 1, after: bool = False) -> dict[str, Any]:
    """SIGKILL before (or after) the `call`-th call of `module:name`."""
    return {"at": at, "call": call, "after": after, "seconds": None}


def slow(at: str, seconds: float, call: int = 1) -> dict[str, Any]:
    return {"at": at, "call": call, "after": False, "seconds": seconds}


def clock(seconds: float) -> dict[str, Any]:
    """All that this process can read of the calendar is so much ahead."""
    return {"clock": seconds}


def _planted(fault: Mapping[str, Any]) -> None:
    if "clock" in fault:
        return _shifted(fault["clock"])
    module, _, path = fault["at"].partition(":")
    *outer, name = path.split(".")
    owner = reduce(getattr, outer, importlib.import_module(module))
    whole, calls = getattr(owner, name), count(1)

    def faulty(*args: Any, **named: Any) -> Any:
        mine = next(calls) == fault["call"]
        if mine and not fault["after"]:
            _befalls(fault["seconds"])
        found = whole(*args, **named)
        if mine and fault["after"]:
            _befalls(fault["seconds"])
        return found

    return setattr(owner, name, faulty)


def _befalls(seconds: float | None) -> None:
    if seconds is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        time.sleep(seconds)


def _shifted(seconds: float) -> None:
    from datetime import datetime, timedelta

    from ficpd.privacy import ledger

    now, written = time.time, time.strftime

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=seconds)

    time.time = lambda: now() + seconds
    time.strftime = lambda form, when=None: written(form, when or time.localtime(now() + seconds))
    ledger.datetime = Shifted  # type: ignore[misc]


# ---------------------------------------------------------------- the warm process


class Warm:
    """Forks processes that have imported everything: 0.1 s instead of 3 s each. They end with it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], **pipes, text=True, env=environment)
        assert self.process.stdout
        assert self.process.stdout.readline() == "warm\n"

    def ask(self, **what: Any) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(what, default=str) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self, pid: int) -> int:
        """The exit status, or the negative signal, once the process has ended."""
        return os.waitstatus_to_exitcode(self.ask(wait=pid))

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _forking() -> None:
    children: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitpid(asked["wait"], 0)[1]
            children.discard(asked["wait"])
        elif not (answer := os.fork()):
            _child(asked)
        else:
            children.add(answer)
        print(answer, flush=True)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _child(asked: Mapping[str, Any]) -> None:
    """Never returns."""
    with open(asked["log"], "a") as log, open(os.devnull) as nothing:
        for place, file in enumerate((nothing, log, log)):
            os.dup2(file.fileno(), place)
    status: Any = 1
    try:
        for fault in asked["faults"]:
            _planted(fault)
        if "site" in asked:
            from ficpd.cli import main

            sys.argv = ["ficpd", "site", "run", asked["site"]]
            main()
        else:
            importlib.import_module("processes").coordinate(**asked["coordinate"])
        status = 0
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _imported() -> None:
    """All that a site and a server need, and the first use of what is slow only then."""
    import torch

    from ficpd.privacy import accountant
    from ficpd.privacy.noise import SecureNoise

    processes = importlib.import_module("processes")
    for name in ("deployment.site.load", "deployment.site.http", "cli", "methods.fedavg", "privacy.record_gaussian"):
        importlib.import_module(f"ficpd.{name}")
    for num_rounds in (3, 4):
        accountant.epsilon([processes.order(num_rounds)], processes.DELTA)
    SecureNoise().add_gaussian(torch.zeros(1), 1.0)
    processes.grids.client_app()


if __name__ == "__main__":
    _imported()
    print("warm", flush=True)
    _forking()
