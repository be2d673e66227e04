"""A federation of Flower's real processes, with TLS and keys, in which any of them can be killed; for the slow tests."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from superlink import left_alone

import processes
from ficpd.deployment import demo, flower_cli, provision
from ficpd.deployment.site import config as settings
from grids import short_folder

SITES = ["site-0", "site-1"]
SECONDS = 240.0
"""Until something is said to have failed: a round takes 7 to 20 on a busy machine."""
CUT = "ficpd-cut"
INSIDE, OUTSIDE = "10.231.77.2", "10.231.77.1"


@dataclass
class Federation:
    """Sites of the tiny backbone, their SuperNodes, and a SuperLink that can be killed and started again."""

    folder: Path
    address: str
    port: int
    sites: list[str] = field(default_factory=lambda: SITES)
    secure: bool = False
    running: ExitStack = field(default_factory=ExitStack)
    read: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """By site, once all has ended: the rounds that its ledger carried out, and the round of each price."""

    def begin(self, inside: tuple[str, ...] = ()) -> None:
        """`inside`: the sites whose SuperNode is in the other namespace."""
        provision.init(self.folder / "deploy", self.sites, f"{self.address}:{self.port}", self.secure)
        self.home = demo._coordinator(self.folder, self.port, rounds=1)
        self.running.callback(left_alone, self.folder)
        self.start_link()
        for place, name in enumerate(self.sites):
            self.start_site(name, processes._site(self.folder, name, place))
            public = self.folder / "deploy" / "coordinator" / "sites" / f"{name}.pub"
            demo._flwr(self.home, "supernode", "register", "--name", name, str(public), "ficpd")
            self.start_node(name, ["ip", "netns", "exec", CUT] if name in inside else [])
        self.until(lambda: all((self.folder / f"{name}.sock").exists() for name in self.sites), "the sites answer")
        self.until(lambda: demo._online(self.home) == len(self.sites), "the sites are connected")

    def start_site(self, name: str, file: Path) -> None:
        command = [sys.executable, "-m", "ficpd", "site", "run", str(file)]
        self.running.enter_context(demo._started(f"ficpd-{name}", command, {}, self.folder))

    def start_link(self) -> None:
        command = demo._superlink(self.folder, self.port)
        command[command.index("--host") + 1] = "0.0.0.0" if self.address == OUTSIDE else "127.0.0.1"
        log = f"superlink-{time.monotonic_ns()}"
        self.link = self.running.enter_context(demo._started(log, command, {"FLWR_HOME": str(self.home)}, self.folder))
        demo._wait(lambda: demo._listens(self.port), self.link, self.folder / f"{log}.log")

    def start_node(self, name: str, before: list[str]) -> None:
        (port,) = flower_cli.free_ports(1)
        command = demo._supernode(self.folder, name, self.folder / "deploy" / "ca" / "ca.crt", self.port, port)
        command[command.index("--superlink") + 1] = f"{self.address}:{self.port}"
        here = {"FLWR_HOME": str(self.folder / f"flower-{name}")}
        self.running.enter_context(demo._started(f"supernode-{name}", [*before, *command], here, self.folder))

    def kill_link(self) -> None:
        """The coordinator's machine loses its power: SuperLink, and all that it started."""
        family = [self.link.pid, *demo._children(self.link.pid)]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        self.link.wait()

    @contextmanager
    def submitted(self, out: Path, rounds: int, resume: bool = False, recipe: str = "", **options: Any):
        """A run under way; `status` of the thread is that of `flwr run` once it has ended."""
        engine = {
            "superlink": "ficpd", "sites": self.sites, "wait_seconds": SECONDS, "deadline_seconds": 60.0,
        } | options  # fmt: skip
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in engine.items())
        text = f'{recipe or processes.recipe(rounds)}\n[engine]\nname = "flower"\noptions = {{ {told} }}\n'
        found: list[int] = []

        def work() -> None:
            found.append(flower_cli.flwr_run(text, "small.toml", out, resume, ["ficpd"], {"FLWR_HOME": str(self.home)}))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield thread
        thread.join(SECONDS)
        self.status = found[0] if found else None

    def until(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not ready():
            assert time.monotonic() < end, f"after {SECONDS:.0f} s it is not so that {what}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{demo._tail(log)}" for log in sorted(self.folder.glob("*.log")))

    def ledger(self, name: str) -> tuple[list[int], list[int]]:
        orders, lines = processes.ledger_of(settings.read(self.folder / f"{name}.toml"))
        return orders, [line["round"] for line in lines]


Made = TypeVar("Made", bound=Federation)


@contextmanager
def federation(
    address: str = "127.0.0.1",
    kind: type[Made] = Federation,  # type: ignore[assignment]
    sites: list[str] = SITES,
    secure: bool = False,
) -> Iterator[Made]:
    with short_folder() as folder:
        (port,) = flower_cli.free_ports(1)
        made = kind(folder, address, port, sites, secure)
        with made.running:
            yield made
        made.read = {name: made.ledger(name) for name in sites}


def lines(out: Path) -> list[dict[str, Any]]:
    return processes.rounds(out) if (out / "rounds.jsonl").exists() else []
