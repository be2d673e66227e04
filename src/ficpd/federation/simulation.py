"""Simulates all clients in this process, in lock step."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries_lockstep
from ficpd.errors import BudgetError, PrivacyError
from ficpd.federation.client import Client
from ficpd.federation.codec import decode_assignment, encode_update
from ficpd.federation.execution import execute_assignment
from ficpd.federation.method import Method
from ficpd.types import ClientCard, ClientUpdate, Reply


class Config(BaseModel):
    """`lock_step`: clients that share a forward pass; more is faster and needs more memory.

    A share `lost` of the updates never arrives, and a share `late` arrives a round later. `seed` draws them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    lock_step: int = Field(default=64, ge=1)
    lost: float = Field(default=0.0, ge=0, lt=1)
    late: float = Field(default=0.0, ge=0, lt=1)
    seed: int = 0


def build(config: Config, method: Method, clients: Mapping[str, Client], model: QueryEngine) -> "SimulationEngine":
    return SimulationEngine(config, method, clients, model)


class SimulationEngine:
    """Holds the clients' generators and answers one query of each at a time."""

    def __init__(self, config: Config, method: Method, clients: Mapping[str, Client], model: QueryEngine):
        self.config, self.method, self.members, self.model = config, method, clients, model
        self.underway: list[Reply] = []

    def clients(self) -> Sequence[ClientCard]:
        return [client.card for client in self.members.values()]

    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]:
        """Yields the round's replies that are neither lost nor late, then the late ones of the round before.

        A client's error is its reply; the others go on. Raises `CodecError` for an assignment that cannot be decoded.
        """
        late, self.underway = self.underway, []
        names, fingerprint = list(assignments), self.model.backbone.fingerprint
        for first in range(0, len(names), self.config.lock_step):
            cohort = names[first : first + self.config.lock_step]
            decoded = {name: decode_assignment(assignments[name], fingerprint) for name in cohort}
            works = {name: execute_assignment(self.method, self.members[name], decoded[name]) for name in cohort}
            for name, result in run_queries_lockstep(self.model, works):
                round = decoded[name].round
                if isinstance(result, ClientUpdate):
                    reply = Reply(name, encode_update(result, round, fingerprint))
                else:
                    error = public_error(self.members[name], result)
                    reply = Reply(name, None, error, isinstance(result, BudgetError))
                fate = float(torch.rand((), generator=rng.make_generator(self.config.seed, "fate", name, round)))
                if fate >= self.config.lost + self.config.late:
                    yield reply
                elif fate >= self.config.lost:
                    self.underway.append(reply)
        yield from late


def public_error(client: Client, error: Exception) -> str:
    """Returns the part of a client's error that the server may see: with privacy, no text that may quote a record."""
    if client.mechanism.unit == "none" or isinstance(error, PrivacyError):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__} (its text stays at the client)"


def client_states(clients: Mapping[str, Client]) -> dict[str, Tensor]:
    """Flattens the clients' states to `client/name`, for a simulation's checkpoint."""
    return {f"{name}/{key}": value for name, client in clients.items() for key, value in client.client_state.items()}


def load_client_states(clients: Mapping[str, Client], arrays: Mapping[str, Tensor]) -> None:
    """Restores the clients' states from `client_states`."""
    for path, value in arrays.items():
        name, _, key = path.rpartition("/")
        clients[name].client_state[key] = value
