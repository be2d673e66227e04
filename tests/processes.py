"""A federation of real processes on the tiny backbone: sites, the server's half, and what each ledger says afterwards."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grids
import small
from ficpd.deployment.coordinator import run_coordinator
from ficpd.deployment.site import config as settings
from ficpd.deployment.site import preflight
from ficpd.deployment.site.site import LEDGER
from ficpd.privacy import accountant
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.types import PrivacyCost
from warm import Warm

EPSILON, DELTA = 4.0, 1e-3
PRIVACY = f'\n[privacy]\nname = "record_gaussian"\nepsilon = {EPSILON}\nclip_norm = 0.5\ndelta = {DELTA}\n'


@cache
def order(num_rounds: int) -> PrivacyCost:
    """What one order costs a site: two steps of four of its 16 training records, noised for a run of so many rounds."""
    planned = PrivacyCost("prompt", 4 / 16, 1.0, 2 * num_rounds)
    noise = accountant.calibrate(EPSILON, DELTA, lambda multiplier: [planned._replace(noise_multiplier=multiplier)])
    return planned._replace(noise_multiplier=noise, count=2)


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


def recipe(rounds: int = 3, accept_late: int = 0) -> str:
    """As a coordinator has it: `tests/small`'s experiment without records, with noise at record level."""
    parts = _parts(small.toml(Path("none.csv"), rounds=rounds))
    kept = "".join(text for name, text in parts.items() if name not in ("data", "partition"))
    return f"{kept}accept_late = {accept_late}\n{PRIVACY}"


def _parts(text: str) -> dict[str, str]:
    """TOML text by table, its head under ""; the last table is the last."""
    head, *tables = re.split(r"(?m)^(?=\[)", text)
    return {"": head} | {table[1:].partition("]")[0]: table for table in tables}


@contextmanager
def places(warm: Warm, number: int) -> Iterator[list[Place]]:
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
    from ficpd.deployment.flower_engine import Config, Flower

    out = Path(out)
    grid = grid or grids.Loopback({int(node): Path(path) for node, path in sockets.items()}, journal=journal(out))
    named = {"sites": [f"site-{place}" for place in range(len(sockets))]}
    waits = {"poll_seconds": 0.01, "wait_seconds": 60.0, "deadline_seconds": 60.0}
    config = Config.model_validate(waits | named | options)
    return run_coordinator(text, "small.toml", out, Flower(config, grid, ""), resume, say)  # type: ignore[arg-type]


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


def served(
    places: list[Place], out: Path, at: Mapping[str, Callable[[], object]] | None = None, num_rounds: int = 3,
    accept_late: int = 0, fates: Mapping[tuple[int, int], str] | None = None, gone: set[int] | None = None,
    **options: float,
) -> dict[str, Any]:  # fmt: skip
    """A whole run in this process. `at`: what to do at the server's line that begins so; all have to come."""
    sockets = {place.node: place.config.socket for place in places}
    grid = grids.Loopback(sockets, fates or {}, gone if gone is not None else set(), journal(out))
    doing = dict(at or {})

    def say(line: str) -> None:
        for begins in [begins for begins in doing if line.startswith(begins)]:
            doing.pop(begins)()

    text = recipe(rounds=num_rounds, accept_late=accept_late)
    result = coordinate(text, out, sockets, say=say, grid=grid, **options)
    assert not doing, f"never said: {', '.join(doing)}"
    return result


@dataclass
class Account:
    """A site's ledger after a run: rounds carried out, the round of every price, and what left by round, in how many
    versions."""

    orders: list[int]
    prices: list[tuple[int, PrivacyCost]]
    left: dict[int, int]

    @property
    def twice(self) -> int:
        """Prices beyond one for each order, and updates beyond one for each price."""
        return len(self.prices) - len(self.orders) + sum(self.left.values()) - len(self.left)

    @property
    def missing(self) -> set[int]:
        """Rounds whose update left, and that the ledger knows nothing of."""
        return self.left.keys() - set(self.orders)


def ledger_of(config: settings.SiteConfig) -> tuple[list[int], list[dict[str, Any]]]:
    """The rounds that a stopped site has completed, and its costs."""
    ledger = Ledger(config.state / LEDGER, f"site {config.name}")
    try:
        orders = [round for (round,) in ledger.file.execute("select round from assignments order by round")]
        return orders, json.loads(ledger.account(config.name, Budget(None, DELTA)).costs_json())
    finally:
        ledger.close()


def account(place: Place, out: Path) -> Account:
    """Of a site that is stopped."""
    assert not place.pid
    orders, lines = ledger_of(place.config)
    prices = [(line["round"], PrivacyCost(*(line[name] for name in PrivacyCost._fields))) for line in lines]
    gone = left(out, place.node)
    return Account(orders, prices, {round: len(bodies) for round, bodies in gone.items()})


def paid(place: Place, out: Path) -> list[int]:
    """The rounds that the ledger of a stopped site has paid for. Raises `AssertionError` if it lacks any that left, if one
    has left in two versions, or if it says, or adds up, anything but one price for each."""
    found, price = account(place, out), order(len(rounds(out)))
    assert found.prices == [(round, price) for round in found.orders], "a price for each order, and only one"
    assert not found.missing, "more has left than was paid for"
    assert not found.twice, "one payment, two different updates"
    count = len(found.orders) * price.count
    epsilon = accountant.epsilon([price._replace(count=count)], DELTA) if count else 0.0
    assert preflight.site_status(place.file)["epsilon"]["spent"] == epsilon
    return found.orders
