"""Simulates all clients in this process, in lock step."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries_lockstep
from ficpd.errors import BudgetError, FicpdError, PrivacyError
from ficpd.federation.client import Client
from ficpd.federation.codec import decode_assignment, encode_assignment, encode_update
from ficpd.federation.execution import execute_assignment
from ficpd.federation.method import Method
from ficpd.federation.secure_sum import KEYS, PHASES, SIMULATED, VECTOR, terms
from ficpd.federation.secure_sum.member import Member
from ficpd.privacy.shared_gaussian import SharedGaussian
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Query, Reply

log = logging.getLogger(__name__)


class Config(FrozenConfig):
    """`lock_step`: number of clients that share a forward pass. More is faster and needs more memory.

    `masks`: terms of a secure sum are masked, as at real sites. Without masks the sum is the same, and faster.
    A share `lost` of the updates never arrives, and a share `late` arrives a round later. `seed` draws them.
    """

    lock_step: int = Field(default=64, ge=1)
    lost: float = Field(default=0.0, ge=0, lt=1)
    late: float = Field(default=0.0, ge=0, lt=1)
    masks: bool = False
    seed: int = 0


def build(
    config: Config, method: Method, clients: Mapping[str, Client], model: QueryEngine, *_: Any
) -> "SimulationEngine":  # fmt: skip
    return SimulationEngine(config, method, clients, model)


class SimulationEngine:
    """Holds the clients' generators and answers one query of each at a time."""

    def __init__(self, config: Config, method: Method, clients: Mapping[str, Client], model: QueryEngine):
        self.config, self.method, self.members, self.model = config, method, clients, model
        self.underway: list[Reply] = []
        self.invited: dict[int, list[str]] = {}
        if config.masks:
            self._give_keys()

    def _give_keys(self) -> None:
        """Gives every client a signing key and all public keys, if its mechanism is summed."""
        keys = {name: Ed25519PrivateKey.generate() for name in self.members}
        known = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
        for name, client in self.members.items():
            if isinstance(mechanism := client.mechanism, SharedGaussian):
                client.member = Member(
                    name, SIMULATED, keys[name], known, self.invited.__getitem__, mechanism.tolerance_of
                )

    def clients(self) -> Sequence[ClientCard]:
        return [client.card for client in self.members.values()]

    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]:
        """Yields the round's replies that are neither lost nor late, then the late ones of the round before.

        A client's error is its reply; the others continue. Raises `CodecError` for an assignment that cannot be decoded.
        """
        late, self.underway = self.underway, []
        names, fingerprint = list(assignments), self.model.backbone.fingerprint
        for first in range(0, len(names), self.config.lock_step):
            cohort = names[first : first + self.config.lock_step]
            decoded = {name: decode_assignment(assignments[name], fingerprint) for name in cohort}
            works = {
                name: self._phase(name, message, names)
                if message.method in PHASES
                else execute_assignment(self.method, self.members[name], message)
                for name, message in decoded.items()
            }
            for name, result in run_queries_lockstep(self.model, works):
                reply = self._reply(name, decoded[name].round, result)
                if self._arrives(decoded[name].round, reply):
                    yield reply
        yield from late

    def _arrives(self, round: int, reply: Reply) -> bool:
        """Draws whether a reply arrives now, a round later (`underway`), or never."""
        fate = float(torch.rand((), generator=rng.make_generator(self.config.seed, "fate", reply.client, round)))
        if self.config.lost <= fate < self.config.lost + self.config.late:
            self.underway.append(reply)
        return fate >= self.config.lost + self.config.late

    def _reply(self, name: str, round: int, result: ClientUpdate | bytes | Exception) -> Reply:
        """Encodes the result of a client's work; an exception becomes its public text."""
        if isinstance(result, ClientUpdate):
            try:
                result = encode_update(result, round, self.model.backbone.fingerprint)
            except Exception as error:
                result = error
        return Reply(name, result) if isinstance(result, bytes) else self._failed(name, result)

    def _failed(self, name: str, error: Exception) -> Reply:
        if not isinstance(error, FicpdError):
            log.info("client %s failed", name, exc_info=error)
        return Reply(name, None, public_error(self.members[name], error), isinstance(error, BudgetError))

    def _phase(self, name: str, message: Assignment, asked: list[str]) -> Generator[Query, Answer, bytes]:
        """Answers one phase of a secure sum."""
        client, fingerprint = self.members[name], self.model.backbone.fingerprint
        if message.method == KEYS:
            self.invited[message.round] = asked
        if message.method == VECTOR:
            order = terms.decode_order(message, fingerprint)
            work = execute_assignment(self.method, client, order.assignment, terms.releasing(client, order))
            return terms.encode_vector((yield from work), message.round, fingerprint)
        return encode_assignment(terms.answer(self.method.name, client, message), fingerprint)


def public_error(client: Client, error: Exception) -> str:
    """Returns the public part of a client's error. With privacy, no text may quote a record."""
    if client.mechanism.unit == "none" or isinstance(error, PrivacyError):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__} (its text stays at the client)"
