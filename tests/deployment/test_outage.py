"""A SuperLink that dies amid a run, and a cut line: with Flower's real processes, TLS and keys.

The line is cut between network namespaces, which wants root and `ip`; where they are not to be had that test is skipped.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("flwr")
from superlink import left_alone

import processes
from ficpd.deployment import demo, flower_cli, provision
from ficpd.deployment.site import config as settings
from ficpd.deployment.site.site import LEDGER
from ficpd.privacy.ledger import Budget, Ledger
from grids import short_folder

pytestmark = pytest.mark.slow

SITES = ["site-0", "site-1"]
SECONDS = 240.0
"""Until something is said to have failed: a round takes 7 to 20 on a busy machine."""
CUT = "ficpd-cut"
INSIDE, OUTSIDE = "10.231.77.2", "10.231.77.1"


@dataclass
class Federation:
    """Two sites of the tiny backbone, their SuperNodes, and a SuperLink that can be killed and started again."""

    folder: Path
    address: str
    port: int
    running: ExitStack = field(default_factory=ExitStack)
    read: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """By site, once all has ended: the rounds that its ledger carried out, and the round of each price."""

    def begin(self, inside: tuple[str, ...] = ()) -> None:
        """`inside`: the sites whose SuperNode is in the other namespace."""
        provision.init(self.folder / "deploy", SITES, f"{self.address}:{self.port}")
        self.home = demo._coordinator(self.folder, self.port, rounds=1)
        self.running.callback(left_alone, self.folder)
        self.start_link()
        for place, name in enumerate(SITES):
            file = processes._site(self.folder, name, place)
            command = [sys.executable, "-m", "ficpd", "site", "run", str(file)]
            site = self.running.enter_context(demo._started(f"ficpd-{name}", command, {}, self.folder))
            demo._wait(
                lambda name=name: (self.folder / f"{name}.sock").exists(), site, self.folder / f"ficpd-{name}.log"
            )
            public = self.folder / "deploy" / "coordinator" / "sites" / f"{name}.pub"
            demo._flwr(self.home, "supernode", "register", "--name", name, str(public), "ficpd")
            self.start_node(name, ["ip", "netns", "exec", CUT] if name in inside else [])
        self.until(lambda: demo._online(self.home) == len(SITES), "the sites are connected")

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
    def submitted(self, out: Path, rounds: int, resume: bool = False, **options: Any) -> Iterator[threading.Thread]:
        """A run under way; `status` of the thread is that of `flwr run` once it has ended."""
        engine = {"superlink": "ficpd", "sites": SITES, "wait_seconds": SECONDS, "deadline_seconds": 60.0} | options
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in engine.items())
        text = f'{processes.recipe(rounds)}\n[engine]\nname = "flower"\noptions = {{ {told} }}\n'
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
        config = settings.read(self.folder / f"{name}.toml")
        ledger = Ledger(config.state / LEDGER, f"site {name}")
        try:
            orders = [round for (round,) in ledger.file.execute("select round from assignments order by round")]
            lines = json.loads(ledger.account(name, Budget(None, processes.DELTA)).costs_json())
        finally:
            ledger.close()
        return orders, [line["round"] for line in lines]


@contextmanager
def federation(address: str = "127.0.0.1") -> Iterator[Federation]:
    with short_folder() as folder:
        (port,) = flower_cli.free_ports(1)
        made = Federation(folder, address, port)
        with made.running:
            yield made
        made.read = {name: made.ledger(name) for name in SITES}


def lines(out: Path) -> list[dict[str, Any]]:
    return processes.rounds(out) if (out / "rounds.jsonl").exists() else []


def test_a_superlink_that_is_killed_and_started_again(tmp_path):
    """The sites need not be touched: their SuperNodes come back by themselves. What was finished stays, and no ε is spent
    twice."""
    out, rounds = tmp_path / "out", 5
    with federation() as made:
        made.begin()
        with made.submitted(out, rounds):
            made.until(lambda: len(lines(out)) >= 2, "two rounds are done")
            made.kill_link()
        assert made.status != 0, "flwr run says that it lost the SuperLink"
        before = lines(out)
        assert 2 <= len(before) < rounds
        made.start_link()
        made.until(lambda: demo._online(made.home) == len(SITES), "the SuperNodes have come back")
        with made.submitted(out, rounds, resume=True):
            pass
        assert made.status == 0, made.logs()
        after = lines(out)
    assert after[: len(before)] == before
    assert [line["round"] for line in after] == list(range(1, rounds + 1))
    for name in SITES:
        orders, prices = made.read[name]
        assert prices == orders == sorted(set(orders)), "one price for each order"
        assert set(orders) == set(range(1, rounds + 1))


@contextmanager
def another_namespace() -> Iterator[Callable[[str], None]]:
    """A line between this machine's network and another's; yields what sets it "down" or "up"."""
    with ExitStack() as stack:
        _ip("netns", "add", CUT)
        stack.callback(_ip, "netns", "delete", CUT)
        _ip("link", "add", "ficpd0", "type", "veth", "peer", "name", "ficpd1", "netns", CUT)
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", "ficpd0")
        _ip("link", "set", "ficpd0", "up")
        _ip("-n", CUT, "addr", "add", f"{INSIDE}/24", "dev", "ficpd1")
        _ip("-n", CUT, "link", "set", "ficpd1", "up")
        _ip("-n", CUT, "link", "set", "lo", "up")
        yield lambda how: _ip("link", "set", "ficpd0", how)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def test_a_line_that_is_cut_and_mended(tmp_path):
    """The round ends without the site at its deadline; once the line is there again, the site is back by itself."""
    out, rounds = tmp_path / "out", 30
    with ExitStack() as stack:
        try:
            line = stack.enter_context(another_namespace())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        made = stack.enter_context(federation(OUTSIDE))
        made.begin(inside=("site-1",))
        with made.submitted(out, rounds, deadline_seconds=15.0):
            made.until(lambda: len(lines(out)) >= 2, "two rounds are done")
            line("down")
            made.until(lambda: any(one["updates"] == 1 for one in lines(out)), "a round has ended without the site")
            line("up")
            gone = len(lines(out))
            made.until(lambda: any(one["updates"] == 2 for one in lines(out)[gone:]), "the site is back")
            made.kill_link()
        found = lines(out)
    assert all(one["updates"] == 2 for one in found[:2])
    (first, *_) = [one for one in found if one["updates"] == 1]
    assert "site-1" in first["dropped"]
    for name in SITES:
        orders, prices = made.read[name]
        assert prices == orders == sorted(set(orders)), "one price for each order"
