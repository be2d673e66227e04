"""A run's directory: what is in it, and that it is never left half written.

experiment.toml   the whole experiment
resolved.toml     the same, with every "auto" replaced by what was chosen
run-id            which run this is; its ledger bears the same
ledger.sqlite     what was released, where privacy was asked for
sites.json        who takes part, where they are real sites
checkpoint        the state after the last finished round, what clients keep, the rounds so far
rounds.jsonl      one line a round
result.json       the outcome; its presence says that the run is finished
library/          the prompt library
report.html       the page
baselines/NAME/   the same for each baseline
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ficpd import storage
from ficpd.errors import CodecError, LedgerError, RunError
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.experiments.results import FILE, RunResult
from ficpd.federation.privacy_plan import LEDGER
from ficpd.federation.rounds import Round
from ficpd.privacy.ledger import Account
from ficpd.storage import atomic_write
from ficpd.types import State

SITES = "sites.json"
KEPT = "kept:"
ROUNDS = "rounds:"
"""The name, in a checkpoint, of the rounds so far: JSON as bytes. A header of more than 100 MB could not be saved."""


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder, which is made, until it is closed; None where the system has no such thing."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:
            return None
        try:
            number = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # taken away by a process that has just ended
            continue
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(folder) and os.path.samestat(os.fstat(number), os.stat(folder)):
                return number
        except BlockingIOError:
            os.close(number)
            raise RunError(
                f"another process is at work in {folder}; wait until it has ended, or choose another --out"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(number)
            return None
        os.close(number)


class RunDir:
    def __init__(self, path: Path):
        self.path = Path(path)

    def check(self, experiment_toml: str, resume: bool) -> None:
        """Whether the directory may be used. With another experiment, or one begun and not resumed, it may not."""
        file = self.path / "experiment.toml"
        if file.exists() and not resume:
            raise RunError(f"{self.path} already holds a run; go on with it (--resume) or choose another --out")
        if not file.exists() and self.path.exists() and any(f.suffix != ".writing" for f in self.path.iterdir()):
            raise RunError(f"{self.path} is not empty and holds no run; choose another --out")
        if file.exists() and file.read_text() != experiment_toml:
            raise RunError(
                f"{file} is another experiment than the one given; resume without changes, or choose another --out"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """This process alone works in the directory, which is made, and taken away again if nothing was put into it. Raises
        `RunError` if another process is at work there. The lock is the system's, on the directory itself: it goes with the
        process, and where a system or a network drive has none, nothing is held."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file, and a run leaves a directory; choose another --out")
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        number = _lock(self.path)
        try:
            yield
        finally:
            with suppress(OSError):
                for folder in made:
                    if any(folder.iterdir()):
                        break
                    folder.rmdir()
            if number is not None:
                os.close(number)

    def write(self, name: str, content: str | bytes) -> Path:
        return atomic_write(self.path / name, content)

    def run_id(self) -> str:
        """This run's own name, drawn when it begins."""
        file = self.path / "run-id"
        if not file.exists():
            self.write("run-id", uuid.uuid4().hex + "\n")
        return file.read_text().strip()

    def save(self, state: State, kept: Mapping[str, Tensor], rounds: list[Round], totals: Mapping[str, Any]) -> None:
        """The checkpoint is the truth; `rounds.jsonl` is written from it."""
        arrays = {**state.arrays, **{KEPT + name: array for name, array in kept.items()}}
        told = json.dumps([asdict(done) for done in rounds], allow_nan=False).encode()
        arrays[ROUNDS] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        self.write("checkpoint", storage.encode_state(State(arrays, state.facts), {"totals": dict(totals)}))
        self.write_rounds(rounds)

    def write_rounds(self, rounds: list[Round]) -> None:
        self.write("rounds.jsonl", "".join(json.dumps(asdict(done)) + "\n" for done in rounds))

    def load(self) -> tuple[State, dict[str, Tensor], list[Round], dict[str, Any]] | None:
        """What `save` saved last, or None if no round was finished."""
        file = self.path / "checkpoint"
        if not file.exists():
            return None
        try:
            state, extra = storage.decode_state(file.read_bytes(), own=True)
            told = state.arrays[ROUNDS].numpy().tobytes()
            rounds, totals = [Round(**line) for line in json.loads(told)], dict(extra["totals"])
        except (CodecError, KeyError, TypeError, ValueError) as error:
            released = any((self.path / name).exists() for name in (LEDGER, SITES))
            do = "Restore it from a copy, or begin in a new directory" if released else "Delete it to begin anew"
            raise RunError(f"{file} cannot be read: {error}. {do}") from error
        kept = {name.removeprefix(KEPT): a for name, a in state.arrays.items() if name.startswith(KEPT)}
        arrays = {name: array for name, array in state.arrays.items() if not name.startswith((KEPT, ROUNDS))}
        return State(arrays, state.facts), kept, rounds, totals

    def check_rounds_file(self, rounds: int) -> None:
        """Raises `RunError` if more rounds were written down than the checkpoint has: sites that carried them out do not
        answer them again, and the run would go on without their updates."""
        file = self.path / "rounds.jsonl"
        told = len(file.read_text().splitlines()) if file.exists() else 0
        if told > rounds:
            raise RunError(
                f"{file} tells of {told} rounds, and {self.path / 'checkpoint'} "
                + (f"ends with round {rounds}: it is an older copy" if rounds else "is gone")
                + ". Sites do not answer a round twice: restore the newest checkpoint, or begin in a new directory"
            )

    def check_ledgers(self, accounts: Iterable[Account], method: str, rounds: int) -> None:
        """Raises `LedgerError` if somebody has carried out more than the round after the checkpoint's `rounds`: earlier ones
        are not answered again, and the run would go on without them."""
        ahead = {account.site: newest for account in accounts if (newest := account.last_round(method)) > rounds + 1}
        if ahead:
            site = max(ahead, key=lambda name: ahead[name])
            raise LedgerError(
                f"{self.path / LEDGER} has round {ahead[site]} of {site}, and {self.path / 'checkpoint'} "
                + (f"ends with round {rounds}: it is an older copy" if rounds else "is gone")
                + ". What was released is not asked for again: restore the newest checkpoint, or begin in a new directory"
            )

    def begin(self, given: Experiment, resolved: Experiment) -> None:
        self.write("experiment.toml", to_toml(given))
        self.write("resolved.toml", to_toml(resolved))

    def resolved(self, given: Experiment, records: bool = True) -> Experiment:
        """The experiment with what was chosen when the run began; as given if it has not begun."""
        file = self.path / "resolved.toml"
        return parse(file.read_text(encoding="utf-8"), file.name, records=records) if file.exists() else given

    def rounds(self) -> list[Round]:
        """The rounds in `rounds.jsonl`. Raises `RunError` if it cannot be read."""
        file = self.path / "rounds.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        try:
            return [Round(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise RunError(f"{file} cannot be read: {error}. Resume the run: it is written anew") from error

    def result(self) -> RunResult | None:
        """The result; None while the run is not finished."""
        return RunResult.load(self.path) if (self.path / FILE).exists() else None
