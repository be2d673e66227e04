"""Spreads a simulation's clients over Ray actors, on one machine or many.

Each actor is a lock-step engine (`simulation.SimulationEngine`) with the backbone loaded once. It keeps the records that it
was sent. States and the ledger stay in this process: an assignment goes to an actor with the client's state and account
(`privacy.account_snapshot`). The ledger commits the result before the reply is passed on to the server.

If an actor dies, the updates of its assignments are lost. They were not released, so nothing is charged. The next round uses
the remaining actors, and a new one as soon as Ray has room for it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError
from ficpd.federation import simulation
from ficpd.federation.client import Client
from ficpd.federation.codec import decode_assignment
from ficpd.federation.method import Method
from ficpd.federation.ray_actors import Actors, Handle, Room, connect
from ficpd.federation.secure_sum import VECTOR
from ficpd.federation.secure_sum.terms import decode_order
from ficpd.interfaces import Compression, Mechanism, Task
from ficpd.privacy.account_snapshot import AccountSnapshot
from ficpd.types import ClientCard, PrivacyCost, Prompt, Record, Reply


class Config(simulation.Config):
    """Settings of the simulation, without masks, and:

    address: a cluster ("HOST:PORT" or "ray://HOST:PORT"); None: `RAY_ADDRESS`, else a Ray on this machine for this process.
    actors: their number; None: as many as the cluster has room for.
    num_cpus, num_gpus: of an actor, the first also its threads. num_gpus None: one if `device` is cuda.
    device: of the actors; None: `engine.device`.
    wait_seconds: the longest wait of a round for its first actor.
    """

    address: str | None = None
    actors: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float | None = Field(default=None, ge=0)
    device: str | None = None
    wait_seconds: float = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _no_masks(self) -> "Config":
        if self.masks:
            raise ValueError("masks = true is for the engine in_process: the sum is the same without")
        return self


CURRENT: list[Actors] = []
"""The actors of this process. The methods of a run use them one after another."""


def build(
    config: Config, method: Method, clients: Mapping[str, Client], model: QueryEngine, backbone: BackboneConfig,
    engine: EngineConfig,
) -> "RayEngine":  # fmt: skip
    """Connects to Ray; the actors start with the first round. Raises `ConfigError` if there is no Ray."""
    ray, device = connect(config.address), config.device or engine.device
    gpus = float(device.startswith("cuda")) if config.num_gpus is None else config.num_gpus
    room = Room(config.actors, config.num_cpus, gpus, config.wait_seconds)
    here = ray.get_runtime_context()
    given = backbone, engine.model_copy(update={"device": device}), (here.get_job_id(), here.get_node_id())
    if not CURRENT or (CURRENT[0].room, CURRENT[0].given) != (room, given):
        close()
        CURRENT.append(Actors(ray, Actor, room, *given))
    return RayEngine(config, method, clients, model, CURRENT[0])


def close() -> None:
    """Ends the actors of this process."""
    while CURRENT:
        CURRENT.pop().close()


@dataclass(frozen=True)
class Shared:
    """Values that all clients share."""

    method: Method
    tasks: Sequence[Task]
    compression: Compression
    start: Prompt
    lock_step: int


@dataclass(frozen=True)
class Member:
    """An actor's facts of a client. `task`: its index in `Shared.tasks`."""

    card: ClientCard
    train: Sequence[Record]
    task: int
    mechanism: Mechanism
    private_seed: int


@dataclass
class RemoteAssignment:
    """A client's assignment to an actor, and its reply."""

    assignment: bytes
    client_state: Mapping[str, Tensor]
    pending_costs: Sequence[PrivacyCost]
    account: AccountSnapshot | None
    query_counts: dict[int, list[int]] = field(default_factory=dict)
    reply: Reply | None = None


class Actor:
    """Runs in the process of an actor: a lock-step engine and the clients that it has received."""

    model: QueryEngine
    shared: Shared
    engine: simulation.SimulationEngine

    def load(self, folders: list[str], backbone: BackboneConfig, engine: EngineConfig, session: Any) -> str:
        """Returns the fingerprint of the loaded backbone. `session`: distinguishes Ray's sessions of one process."""
        sys.path += [folder for folder in folders if folder not in sys.path]
        loaded, same = load_backbone(backbone, engine)[0], engine.reproducible
        self.model = QueryEngine(loaded, engine.keep_mb << 20, engine.chunk_tokens, reproducible=same)
        return self.model.backbone.fingerprint

    def run(
        self, shared: Shared | None, new: Mapping[str, Member], calls: Mapping[str, RemoteAssignment]
    ) -> dict[str, RemoteAssignment]:
        """Runs assignments. `shared`: given if the engine is another than before; its clients are then dropped."""
        if shared is not None:
            self.clients: dict[str, Client] = {}
            config = simulation.Config(lock_step=shared.lock_step)
            self.shared, self.engine = (
                shared,
                simulation.SimulationEngine(config, shared.method, self.clients, self.model),
            )
        for name, member in new.items():
            self.clients[name] = self._client(member, calls[name].account)
        for name, call in calls.items():
            client = self.clients[name]
            client.client_state, client.pending_costs = call.client_state, call.pending_costs
            client.account, client.query_counts = call.account, {}
        for reply in self.engine.exchange({name: call.assignment for name, call in calls.items()}):
            client, call = self.clients[reply.client], calls[reply.client]
            call.reply, call.assignment, call.query_counts = reply, b"", client.query_counts
            call.client_state, call.pending_costs = client.client_state, client.pending_costs
        return dict(calls)

    def _client(self, member: Member, account: AccountSnapshot | None) -> Client:
        shared = self.shared
        return Client(
            member.card, member.train, [], shared.tasks[member.task], self.model.backbone, member.mechanism,
            shared.compression, shared.start, member.private_seed, account,
        )  # fmt: skip


class RayEngine(simulation.SimulationEngine):
    """Runs the assignments of a lock-step engine in actors."""

    def __init__(
        self, config: Config, method: Method, clients: Mapping[str, Client], model: QueryEngine, actors: Actors
    ):
        super().__init__(config, method, clients, model)
        self.actors, self.tasks = actors, list({id(client.task): client.task for client in clients.values()}.values())

    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]:
        """See `SimulationEngine.exchange`. The clients of an actor that ends do not answer."""
        late, self.underway = self.underway, []
        for round, reply in self._replies(assignments):
            if self._arrives(round, reply):
                yield reply
        yield from late

    def _replies(self, assignments: Mapping[str, bytes]) -> Iterator[tuple[int, Reply]]:
        if not assignments:
            return
        fingerprint, ray, running = self.model.backbone.fingerprint, self.actors.ray, {}
        orders = {name: decode_assignment(body, fingerprint) for name, body in assignments.items()}
        inner = {n: decode_order(o, fingerprint).assignment if o.method == VECTOR else o for n, o in orders.items()}
        for handle, names in self._shares(list(assignments), self._ready()).items():
            calls = {
                name: self._remote_assignment(name, assignments[name], inner[name].round, inner[name].method)
                for name in names
            }
            running[self._call(handle, calls)] = handle, names
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            handle, names = running.pop(done)
            try:
                came = self.actors.get(done)
            except ray.exceptions.RayError:
                self.actors.drop(handle)
                came = {}
            for name in names:
                yield orders[name].round, self._settled(name, came.get(name))

    def _ready(self) -> list[Handle]:
        """Returns the actors. Raises `BackboneError` if one has loaded other weights."""
        found, expected = self.actors.ready(), self.model.backbone.fingerprint
        for given in found.values():
            if given != expected:
                raise BackboneError(
                    f"an actor has the backbone {given}, expected {expected}. Put the same weights there"
                )
        return list(found)

    def _shares(self, names: Sequence[str], handles: Sequence[Handle]) -> dict[Handle, list[str]]:
        """Divides clients evenly, if possible among actors that have their records."""
        most, shares = -(-len(names) // len(handles)), {handle: list[str]() for handle in handles}
        for name in names:
            free = [handle for handle in handles if len(shares[handle]) < most]
            met = {handle: handle.user is self and name in handle.met for handle in free}
            shares[min(free, key=lambda handle: (not met[handle], len(shares[handle])))].append(name)
        return {handle: share for handle, share in shares.items() if share}

    def _remote_assignment(self, name: str, assignment: bytes, round: int, method: str) -> RemoteAssignment:
        client = self.members[name]
        account = client.account and AccountSnapshot(client.account, round, method)
        return RemoteAssignment(assignment, dict(client.client_state), client.pending_costs, account)

    def _call(self, handle: Handle, calls: Mapping[str, RemoteAssignment]) -> Any:
        shared = None
        if handle.user is not self:
            first = next(iter(self.members.values()))
            shared = Shared(self.method, self.tasks, first.compression, first.start, self.config.lock_step)
            handle.user, handle.met = self, set()
        new = {name: self._member(self.members[name]) for name in calls if name not in handle.met}
        handle.met |= new.keys()
        return handle.actor.run.remote(shared, new, calls)

    def _member(self, client: Client) -> Member:
        place = next(place for place, task in enumerate(self.tasks) if task is client.task)
        return Member(client.card, client.train, place, client.mechanism, client.private_seed)

    def _settled(self, name: str, call: RemoteAssignment | None) -> Reply:
        """Commits an assignment's costs and update to the ledger. Returns its reply, or None if its actor is gone."""
        client = self.members[name]
        if call is None or call.reply is None:
            return Reply(name, None, "its actor ended before it answered")
        try:
            if client.account is not None and call.account is not None and call.account.kept is not None:
                client.account.commit(*call.account.kept)
        except Exception as error:
            return self._failed(name, error)
        client.client_state, client.pending_costs = call.client_state, call.pending_costs
        client.query_counts |= call.query_counts
        return call.reply
