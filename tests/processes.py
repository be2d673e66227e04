"""Real processes of sites and of the coordinator, forked from one warm process, each with the fault that a test plants."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

import torch

import grids
import small
from ficpd.privacy import accountant
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.privacy.noise import Cryptographic
from ficpd.serve import serve
from ficpd.site import check, settings
from ficpd.site.site import LEDGER
from ficpd.types import Spend

DELTA = 1e-3
PRIVACY = f'\n[privacy]\nname = "record_gaussian"\nnoise_multiplier = 2.0\nclip_norm = 0.5\ndelta = {DELTA}\n'
ORDER = Spend("prompt", 4 / 16, 2.0, 2)
"""What one order costs a site: two steps of four of its 16 training records."""


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
            coordinate(**asked["coordinate"])
        status = 0
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


# ---------------------------------------------------------------- a federation of them


@dataclass
class Place:
    """A site of the tiny backbone with 20 records: its file, and the process, if there is one."""

    warm: Warm
    file: Path
    node: int
    pid: int = 0

    @property
    def config(self) -> settings.SiteConfig:
        return settings.read(self.file)

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")

    def start(self, *faults: Mapping[str, Any]) -> None:
        """Returns when it answers. Raises `AssertionError` with its log if it ends before."""
        self.pid = self.warm.ask(site=self.file, faults=faults, log=self.log)
        while not self.answers():
            with suppress(ProcessLookupError):
                if "Z" not in Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2][:3]:
                    time.sleep(0.01)
                    continue
            raise AssertionError(self.log.read_text())

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.config.socket)) == 0

    def stop(self, how: int = signal.SIGKILL) -> int:
        """The exit status; 0 if there is no process."""
        if not self.pid:
            return 0
        os.kill(self.pid, how)
        return self.ended()

    def ended(self) -> int:
        pid, self.pid = self.pid, 0
        return self.warm.ended(pid)

    def restart(self, *faults: Mapping[str, Any]) -> None:
        self.stop()
        self.start(*faults)


def _site(folder: Path, name: str, seed: int) -> Path:
    table, file = folder / f"{name}.csv", folder / f"{name}.toml"
    rows = [f"{record.fields['text']},{record.fields['target']}\n" for record in small.records(20, seed)]
    table.write_text("text,target\n" + "".join(rows))
    shared = _parts(small.toml(table))
    file.write_text(
        f'name = "{name}"\nsocket = "{name}.sock"\nstate = "{name}"\n{shared["backbone"]}{shared["task"]}'
        f'[data]\nsource = "{table}"\n'
        f'[policy]\nepsilon = 1000.0\ndelta = {DELTA}\nmechanisms = ["record_gaussian"]\n'
    )
    return file


def recipe(method: str = "fedavg", rounds: int = 3, accept_late: int = 0) -> str:
    parts = _parts(small.toml(Path("none.csv"), method, rounds))
    kept = "".join(text for name, text in parts.items() if name not in ("data", "partition"))
    return f"{kept}accept_late = {accept_late}\n{PRIVACY}"


def _parts(text: str) -> dict[str, str]:
    """TOML text by table, its head under ""; the last table is the last."""
    head, *tables = re.split(r"(?m)^(?=\[)", text)
    return {"": head} | {table[1:].partition("]")[0]: table for table in tables}


@contextmanager
def places(warm: Warm, number: int = 3) -> Iterator[list[Place]]:
    """Sites, not yet started."""
    with grids.short_folder() as folder:
        found = [Place(warm, _site(folder, f"site-{place}", place), place + 1) for place in range(number)]
        try:
            yield found
        finally:
            for place in found:
                place.stop()


def coordinate(
    text: str, out: Path, sockets: Mapping[Any, Any], resume: bool = False, say: Callable[[str], None] = print,
    grid: grids.Loopback | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The server's half, over a grid of these nodes; `options` are the engine's."""
    from ficpd.engines.flower import Config, Flower

    out = Path(out)
    grid = grid or grids.Loopback({int(node): Path(path) for node, path in sockets.items()}, journal=journal(out))
    named = {"sites": [f"site-{place}" for place in range(len(sockets))]}
    config = Config.model_validate(
        {"poll_seconds": 0.01, "wait_seconds": 5.0, "deadline_seconds": 20.0} | named | options
    )
    return serve(text, "small.toml", out, Flower(config, grid, ""), resume, say)  # type: ignore[arg-type]


def journal(out: Path) -> Path:
    return out.with_suffix(".journal")


def left(out: Path, node: int) -> dict[int, set[str]]:
    """What a site let out in a run, by round."""
    found: dict[int, set[str]] = {}
    for line in journal(out).read_text().splitlines():
        whose, round, body = json.loads(line)
        if whose == node:
            found.setdefault(round, set()).add(body)
    return found


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def paid(place: Place, out: Path) -> list[int]:
    """The rounds that the ledger of a stopped site has paid for. Raises `AssertionError` if any that left is not among them,
    if one has left in two versions, or if the ledger says anything but one price for each."""
    assert not place.pid
    config = place.config
    ledger = Ledger(config.state / LEDGER, f"site {config.name}")
    try:
        orders = [round for (round,) in ledger.file.execute("select round from orders order by round")]
        lines = json.loads(ledger.book(config.name, Budget(None, DELTA)).lines())
    finally:
        ledger.close()
    spends = [(line["round"], Spend(*(line[name] for name in Spend._fields))) for line in lines]
    assert spends == [(round, ORDER) for round in orders], "a price for each order, and only one"
    gone = left(out, place.node)
    assert gone.keys() <= set(orders), "more has left than was paid for"
    assert all(len(bodies) == 1 for bodies in gone.values()), "one payment, two different updates"
    epsilon = accountant.epsilon([ORDER._replace(count=len(orders) * ORDER.count)], DELTA) if orders else 0.0
    assert check.status(place.file)["epsilon"]["spent"] == epsilon
    return orders


if __name__ == "__main__":
    for name in ("site.open", "site.service", "cli", "methods.fedavg", "methods.fpl", "privacy.record_gaussian"):
        importlib.import_module(f"ficpd.{name}")
    accountant.epsilon([ORDER], DELTA)
    Cryptographic().gaussian(torch.zeros(1), 1.0)
    grids.client_app()
    _forking()
