"""A client's answers to the messages of a secure sum, and its term.

A term has one part for each group, and each part has the named sums of the method. A client's records are in the part of its
group. The other parts hold its share of the noise, so that each part has the noise of all clients.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ficpd.errors import CodecError, PolicyError
from ficpd.federation import codec
from ficpd.federation.client import Client, ClientSession
from ficpd.federation.secure_sum import CONSENT, KEYS, MASKED, REVEAL, SHARES, VECTOR, masks
from ficpd.federation.secure_sum.member import SIGNED
from ficpd.interfaces import ReleaseKind
from ficpd.privacy.shared_gaussian import GRADIENT, SharedGaussian
from ficpd.types import Assignment, ClientUpdate

MOST_NUMBERS = 1 << 24
"""Maximum size of a term."""


@dataclass(frozen=True)
class VectorOrder:
    """A request for a term. parts: groups. sizes: of each named sum. shares: from other clients, encrypted."""

    assignment: Assignment
    parts: Sequence[str]
    sizes: Mapping[str, int]
    shares: Mapping[str, str]

    @property
    def size(self) -> int:
        return len(self.parts) * sum(self.sizes.values())


def layout_of(parts: Sequence[str], sizes: Mapping[str, int]) -> str:
    """Names the sums of a vector. They must be the same for all clients of a round."""
    return masks.digest(masks.statement("layout", list(parts), dict(sizes)))


def own_part(client: str, parts: Sequence[str]) -> str:
    """Returns the group in a client's name; a federation of one task has only one part."""
    group = client.partition(".")[0]
    return group if group in parts else parts[0]


def decode_order(message: Assignment, backbone: str) -> VectorOrder:
    """Decodes a `VECTOR` message. Raises `CodecError` for an invalid one."""
    facts, inner = message.facts, message.arrays.get("assignment")
    given: list[Any] = [facts.get(name) for name in ("parts", "sizes", "shares")]
    parts, sizes, shares = given
    if inner is None or inner.dtype != torch.uint8 or inner.dim() != 1:
        raise CodecError("a request for a term has no assignment. Send the round's assignment with it")
    texts = isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts)
    whole = isinstance(sizes, dict) and sizes and all(type(size) is int and size > 0 for size in sizes.values())
    if not (texts and whole) or len(parts) * sum(sizes.values()) > MOST_NUMBERS or len(set(parts)) != len(parts):
        raise CodecError(
            f"a request for a term has parts {str(parts)[:80]} and sizes {str(sizes)[:80]}, expected different names and "
            f"positive numbers, together at most {MOST_NUMBERS} numbers"
        )
    assignment = codec.decode_assignment(inner.numpy().tobytes(), backbone)
    if assignment.round != message.round:
        raise CodecError(f"the assignment is of round {assignment.round}, expected {message.round}")
    return VectorOrder(assignment, parts, sizes, _texts(shares, "shares"))


def answer(method: str, client: Client, message: Assignment) -> Assignment:
    """Answers a message other than `VECTOR`. Raises `PolicyError` or `CodecError`; no record is read.

    `method`: the name of the run's assignments in the ledger.
    """
    member, round, facts = client.member, message.round, message.facts
    if member is None or not client.mechanism.summed:
        raise PolicyError(f"{client.name} takes part in no secure sum (privacy.name = 'shared_gaussian')")
    if message.method == KEYS:
        if client.account and client.account.last_round(method) >= round and not member.has_keys(round):
            raise PolicyError(f"{client.name} has released round {round} already. Send the next round")
        return _reply(message, advert=dict(member.advertise(round)))
    if message.method == SHARES:
        return _reply(message, shares=member.share(round, _adverts(facts.get("adverts"))))
    if message.method == CONSENT:
        survivors = facts.get("survivors")
        if not isinstance(survivors, list) or not all(isinstance(name, str) for name in survivors):
            raise CodecError(f"survivors are {str(survivors)[:80]}, expected a list of names")
        return _reply(message, consent={client.name: member.consent(round, survivors)})
    if message.method == REVEAL:
        return _reply(message, revealed=member.reveal(round, _texts(facts.get("signatures"), "signatures")))
    raise CodecError(f"the message is {message.method!r}, expected a phase of a secure sum")


def releasing(client: Client, order: VectorOrder) -> Callable[[ClientSession], ClientUpdate]:
    """Returns a function that packs an assignment's terms into one vector, masked if the client has a `member`.

    Only a simulation has clients without one.
    """

    def release(session: ClientSession) -> ClientUpdate:
        vector = _term(session, order)
        if client.member is not None:
            layout = layout_of(order.parts, order.sizes)
            vector = client.member.mask(order.assignment.round, order.shares, vector, layout)
        return ClientUpdate(client.name, {MASKED: torch.from_numpy(vector.view(np.int64).copy())})

    return release


def encode_vector(update: ClientUpdate, round: int, backbone: str) -> bytes:
    return codec.encode_assignment(Assignment(VECTOR, round, update.arrays), backbone)


def _term(session: ClientSession, order: VectorOrder) -> np.ndarray:
    """Makes this client's term, uint64 [N]. Raises `CodecError` for sums or sizes that are not the method's."""
    mechanism, own, pieces = session.client.mechanism, own_part(session.id, order.parts), []
    assert isinstance(mechanism, SharedGaussian), "only this mechanism makes terms"
    if missing := sorted(session.terms.keys() - order.sizes.keys()):
        raise CodecError(f"the sums asked for lack {', '.join(missing)}. Ask for all sums of the assignment")
    known = [n for n in order.sizes if n == GRADIENT or mechanism.cost(ReleaseKind.STATISTIC, n)]
    if unknown := sorted(order.sizes.keys() - known):
        raise CodecError(f"no sum of this run is {unknown[0][:80]!r}. Ask for {', '.join(sorted(known))}")
    for part in order.parts:
        for name, size in sorted(order.sizes.items()):
            known = session.terms.get(name) if part == own else None
            if known is None:
                pieces.append(mechanism.noise_share(name, size, session.noise))
            elif len(known) > size:
                raise CodecError(f"the sum {name!r} has {len(known)} numbers, and {size} were asked for. Ask for all")
            else:
                pieces.append(torch.cat([known, known.new_zeros(size - len(known))]))
    return torch.cat(pieces).numpy().view(np.uint64)


def _reply(message: Assignment, **facts: Any) -> Assignment:
    return Assignment(message.method, message.round, {}, facts)


def _texts(given: Any, what: str) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise CodecError(f"{what} are {str(given)[:80]}, expected a text for each client")
    return given


def _adverts(given: Any) -> dict[str, dict[str, str]]:
    """Checks the form of untrusted keys."""
    expected = {*SIGNED, "signature"}
    whole = isinstance(given, dict) and all(isinstance(a, dict) and a.keys() == expected for a in given.values())
    if not whole or not all(isinstance(value, str) for advert in given.values() for value in advert.values()):
        raise CodecError(f"adverts are {str(given)[:80]}, expected {', '.join(sorted(expected))} of each client")
    return given
