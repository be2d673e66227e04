"""Stores the states of a simulation's clients in a SQLite file. The states used last are in memory as well."""

import os
import sqlite3
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ficpd import storage
from ficpd.errors import RunError
from ficpd.federation.client import Client

FILE = Path("not-released", "client-states.sqlite")
"""In the run directory."""
MEMORY = 64 << 20
"""Bytes of states in memory."""
SCHEMA = """
create table if not exists states (
    client text not null, round integer not null, body blob not null, primary key (client, round)) without rowid;
"""


class StoredState(Mapping[str, Tensor]):
    """A client's state, read from the file on demand."""

    def __init__(self, states: "ClientStates", client: str):
        self.states, self.client = states, client

    def __getitem__(self, name: str) -> Tensor:
        return self.states.load(self.client)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states.load(self.client))

    def __len__(self) -> int:
        return len(self.states.load(self.client))


class ClientStates:
    """The states of `number` clients after `rounds` finished rounds, in `folder`.

    `save` commits a round's states before the round's checkpoint is written. A run that is killed between the two repeats
    the round. The states of the round before are therefore kept, too. Raises `RunError` for a file that lacks states.
    """

    def __init__(self, folder: Path, rounds: int, number: int, memory: int = MEMORY):
        self.path, self.memory, self.bytes = folder / FILE, memory, 0
        self.recent: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.file = self._open() if self.path.exists() else None
        if self.file:
            self.file.execute("delete from states where round > ?", (rounds,))
            self.file.commit()
        self.names = {n for (n,) in self.file.execute("select distinct client from states")} if self.file else set()
        if len(self.names) != number:
            raise RunError(
                f"{self.path} has the states of {len(self.names)} clients after round {rounds}, expected {number}: the "
                "checkpoint is an older copy, or the file is. Restore both from one copy, or begin in a new directory"
            )

    def restore(self, clients: Mapping[str, Client]) -> None:
        for name in self.names:
            clients[name].client_state = StoredState(self, name)

    def save(self, clients: Mapping[str, Client], round: int) -> int:
        """Writes the changed states. Returns the number of clients with a state."""
        for name, client in clients.items():
            state = client.client_state
            if isinstance(state, StoredState) or not (state or name in self.names):
                continue
            self.file = self.file or self._open()
            body = storage.pack_tensors(state, {})
            self.file.execute("insert or replace into states values (?, ?, ?)", (name, round, body))
            self.file.execute(
                "delete from states where client = :client and round < "
                "(select max(round) from states where client = :client and round < :round)",
                {"client": name, "round": round},
            )
            self.names.add(name)
            self._keep(name, dict(state))
            client.client_state = StoredState(self, name)
        if self.file:
            self.file.commit()
        return len(self.names)

    def load(self, name: str) -> dict[str, Tensor]:
        """Returns a client's newest state."""
        if name not in self.recent:
            assert self.file is not None
            query = "select body from states where client = ? order by round desc limit 1"
            (body,) = self.file.execute(query, (name,)).fetchone()
            self._keep(name, storage.unpack_tensors(body, (), own=True)[0])
        self.recent.move_to_end(name)
        return self.recent[name]

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _keep(self, name: str, state: dict[str, Tensor]) -> None:
        """Keeps a state in memory, and drops the states used longest ago."""
        self.bytes += _size(state) - _size(self.recent.pop(name, {}))
        self.recent[name] = state
        while self.bytes > self.memory and len(self.recent) > 1:
            self.bytes -= _size(self.recent.popitem(last=False)[1])

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(self.path.parent, 0o700)
        file = sqlite3.connect(self.path, check_same_thread=False)
        weakref.finalize(self, file.close)  # after a run that ended with an error
        file.executescript("pragma synchronous=full;" + SCHEMA)
        return file


def _size(state: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in state.values())
