"""Reads and writes a run's directory. Every file is written atomically.

experiment.toml   the experiment with all defaults
resolved.toml     the same, with every "auto" resolved
run-id            a random id, also in the ledger
ledger.sqlite     with privacy: every release
NOT-RELEASED.md   with privacy: says what the guarantee does not cover; the directory has mode 0700
sites.json        real sites: the participants
checkpoint        the state after the last finished round, and the rounds
not-released/     the clients' states
rounds.jsonl      one line per round
result.json       the result; the run is finished if it exists
library/          the prompt library
report.html       the page
baselines/NAME/   the same for each baseline
"""

import json
import tomllib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ficpd import storage
from ficpd.errors import CodecError, LedgerError, RunError, describe_os_error
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.experiments.results import FILE, RunResult
from ficpd.federation.privacy_plan import LEDGER
from ficpd.federation.rounds import Round
from ficpd.privacy.ledger import Account
from ficpd.storage import atomic_write
from ficpd.types import State

SITES, LOCK = "sites.json", ".lock"
ROUNDS = "rounds:"
"""The array of a checkpoint that holds the rounds as JSON bytes, because headers are limited to 100 MB."""


class RunDir:
    def __init__(self, path: Path):
        self.path = Path(path)

    def baseline(self, name: str) -> Path:
        """Returns the directory of a baseline, such as "fedavg:none"."""
        return self.path / "baselines" / name.replace(":", "-")

    def check(self, experiment_toml: str, resume: bool) -> None:
        """Raises `RunError` for a directory with another experiment, other files, or a run that is not resumed."""
        file = self.path / "experiment.toml"
        if file.exists() and not resume:
            raise RunError(f"{self.path} already holds a run. Go on with it (--resume), or choose another --out")
        if not file.exists() and not self.is_empty:
            raise RunError(f"{self.path} is not empty and holds no run. Choose another --out")
        if file.exists() and (before := file.read_text(encoding="utf-8")) != experiment_toml:
            changes = changed_settings(before, experiment_toml)
            raise RunError(f"{file} is another experiment ({changes}). Resume without changes, or choose another --out")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the directory for this process; creates it, and deletes it if it stays empty.

        Raises `RunError` if another process holds the lock. The lock is the system's and ends with the process.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            if self.path.exists() and not self.path.is_dir():
                raise RunError(f"{self.path} is a file, expected a directory. Choose another --out")
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            storage.require_writable(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunError(
                f"another process is at work in {self.path}; wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:
            raise RunError(f"--out {describe_os_error(error)}") from error
        try:
            yield
        finally:
            with suppress(OSError):
                (self.path / LOCK).unlink()
            lock.release()
            with suppress(OSError):  # one that is not empty stays
                for folder in made:
                    folder.rmdir()

    @property
    def is_empty(self) -> bool:
        """Tells whether the directory holds nothing but its lock and unfinished files."""
        return not self.path.exists() or all(f.name == LOCK or f.suffix == ".writing" for f in self.path.iterdir())

    def write(self, name: str, content: str | bytes) -> Path:
        return atomic_write(self.path / name, content)

    def run_id(self) -> str:
        """Returns the run's random id, drawn at its start."""
        file = self.path / "run-id"
        if not file.exists():
            self.write("run-id", uuid.uuid4().hex + "\n")
        return file.read_text(encoding="utf-8").strip()

    def save(self, state: State, states: int, rounds: list[Round], totals: Mapping[str, Any]) -> None:
        """Writes the checkpoint, then `rounds.jsonl` from it. `states`: clients with a state."""
        arrays = dict(state.arrays)
        lines = json.dumps([asdict(done) for done in rounds], allow_nan=False).encode()
        arrays[ROUNDS] = torch.frombuffer(bytearray(lines), dtype=torch.uint8)
        extra = {"totals": dict(totals), "states": states}
        self.write("checkpoint", storage.encode_state(State(arrays, state.facts), extra))
        self.write_rounds(rounds)

    def write_rounds(self, rounds: list[Round]) -> None:
        self.write("rounds.jsonl", "".join(json.dumps(asdict(done)) + "\n" for done in rounds))

    def load(self) -> tuple[State, int, list[Round], dict[str, Any]] | None:
        """Returns the last checkpoint; None if no round is finished. Raises `RunError` if it cannot be read."""
        file = self.path / "checkpoint"
        if not file.exists():
            return None
        try:
            state, extra = storage.decode_state(file.read_bytes(), own=True)
            lines = json.loads(state.arrays[ROUNDS].numpy().tobytes())
            rounds, totals, states = [Round(**line) for line in lines], dict(extra["totals"]), int(extra["states"])
        except (CodecError, KeyError, TypeError, ValueError) as error:
            released = any((self.path / name).exists() for name in (LEDGER, SITES))
            do = "Restore it from a copy, or begin in a new directory" if released else "Delete it to begin anew"
            raise RunError(f"{file} cannot be read, or is of another version: {error}. {do}") from error
        arrays = {name: array for name, array in state.arrays.items() if not name.startswith(ROUNDS)}
        return State(arrays, state.facts), states, rounds, totals

    def check_rounds_file(self, rounds: int) -> None:
        """Raises `RunError` if `rounds.jsonl` has more rounds than the checkpoint.

        Sites do not repeat these rounds, so the run would lose their updates.
        """
        file = self.path / "rounds.jsonl"
        written = len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0
        if written > rounds:
            raise RunError(
                f"{file} has {written} rounds, and {self.path / 'checkpoint'} "
                + (f"ends with round {rounds}: it is an older copy" if rounds else "is gone")
                + ". Sites do not answer a round twice. Restore the newest checkpoint, or begin in a new directory"
            )

    def check_ledgers(self, accounts: Iterable[Account], method: str, rounds: int) -> None:
        """Raises `LedgerError` if a client has completed more than one round after the checkpoint's `rounds`.

        Only the newest round can be repeated, so the run would lose the updates of the others.
        """
        ahead = {account.site: newest for account in accounts if (newest := account.last_round(method)) > rounds + 1}
        if ahead:
            site = max(ahead, key=lambda name: ahead[name])
            raise LedgerError(
                f"{self.path / LEDGER} has round {ahead[site]} of {site}, and {self.path / 'checkpoint'} "
                + (f"ends with round {rounds}: it is an older copy" if rounds else "is gone")
                + ". Released updates are not requested again. Restore the newest checkpoint, or begin in a new directory"
            )

    def begin(self, given: Experiment, resolved: Experiment) -> None:
        if resolved.privacy["name"] != "none":
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            self.write(
                "NOT-RELEASED.md",
                "This directory is its owner's. The privacy guarantee does not cover its scores, counts, queries, personal "
                "prompts\nand baselines. `ficpd publish RUN OUT` copies what it covers.\n",
            )
        self.write("experiment.toml", to_toml(given))
        self.write("resolved.toml", to_toml(resolved))

    def resolved(self, given: Experiment, records: bool = True) -> Experiment:
        """Returns the experiment as resolved at the start of the run; as given if the run has not started."""
        file = self.path / "resolved.toml"
        return parse(file.read_text(encoding="utf-8"), file.name, records=records) if file.exists() else given

    def rounds(self) -> list[Round]:
        """Reads `rounds.jsonl`. Raises `RunError` if it cannot be read."""
        file = self.path / "rounds.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        try:
            return [Round(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise RunError(f"{file} cannot be read: {error}. Resume the run to write it again") from error

    def result(self) -> RunResult | None:
        """Returns the result; None if the run is not finished."""
        return RunResult.load(self.path) if (self.path / FILE).exists() else None


def changed_settings(before: str, now: str) -> str:
    """Names the settings in which two experiments differ, with both values."""
    try:
        old, new = (dict(_settings(tomllib.loads(text))) for text in (before, now))
    except tomllib.TOMLDecodeError as error:
        return f"it is not TOML: {error}"
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name, 'not set')}, is {new.get(name, 'not set')}" for name in differing)


def _settings(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each setting's dotted name and value."""
    if not isinstance(tree, dict):
        yield name.removeprefix("."), tree
        return
    for key, value in tree.items():
        yield from _settings(value, f"{name}.{key}")
