"""The server's half of a secure sum: five exchanges, the sum, and each group's optimizer step."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.federation import codec
from ficpd.federation.method import Method, group_card
from ficpd.federation.secure_sum import CONSENT, KEYS, MASKED, REVEAL, SHARES, VECTOR, masks
from ficpd.federation.secure_sum.member import SIGNED, own_key, pair_key
from ficpd.federation.secure_sum.terms import layout_of, own_part
from ficpd.interfaces import Engine, Subspace
from ficpd.optimizers import tune
from ficpd.privacy.clipping import clip_scale
from ficpd.privacy.shared_gaussian import GRADIENT, GRID, SharedGaussian
from ficpd.types import Answer, Assignment, ClientUpdate, Query, State

MOMENTS = "secure_sum/"
"""Prefix of the optimizers' moments in a state."""


class VoidRoundError(Exception):
    """Too few clients are left, or shares restore no secret. The sum is not known."""


@dataclass
class Collected:
    """The result of a round's exchanges.

    updates: one of each client; in a secure sum, one of each group. answered: clients whose values they hold. moments:
    the optimizers' state.
    dropped: reasons by client. refused: those whose budget is exhausted. Bytes are of all exchanges. items: the parts of a
    client's vector, by name: the number of values, and the bits of each.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    answered: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    items: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class SecureSum:
    """Collects the rounds of one run.

    run: its id, part of every mask. mechanisms: by group; they are built from public settings.
    masked: false only in simulations, whose clients send terms without masks.
    """

    run: str
    mechanisms: Mapping[str, SharedGaussian]
    masked: bool = True

    @property
    def groups(self) -> list[str]:
        return sorted(self.mechanisms)

    def noise_variance(self, name: str, size: int, clients: int) -> float:
        """Returns the variance of the noise on each number of a statistic's sum. A record's row has norm 1."""
        first = self.mechanisms[self.groups[0]]
        return clients * (first.deviation_of(name, size) / GRID) ** 2

    def collect(
        self, engine: Engine, assignments: Mapping[str, bytes], method: Method, state: State, round: int, backbone: str,
        subspace: Subspace | None,
    ) -> Collected:  # fmt: skip
        """Runs a round's exchanges and makes one update of each group. A void round has no update."""
        messages = _Messages(engine, round, backbone)
        sizes = _sizes(method, state, subspace)
        messages.found.items |= {name: [len(self.groups) * size, 64] for name, size in sizes.items()}
        try:
            summed, survivors = self._summed(messages, assignments, sizes)
        except VoidRoundError as void:
            messages.found.dropped |= {
                n: f"the round is void: {void}" for n in assignments if n not in messages.found.dropped
            }
            return messages.found
        found, place = messages.found, 0
        found.answered = len(survivors)
        for group in self.groups:
            sums = {}
            for name, size in sorted(sizes.items()):
                sums[name] = torch.from_numpy(summed[place : place + size].view(np.int64)).double() / GRID
                place += size
            members = [n for n in survivors if own_part(n, self.groups) == group]
            if members:
                update, moments = self._update(group, len(members), sums, method, state, round, subspace)
                found.updates.append(update)
                found.moments |= {f"{MOMENTS}{group}/{name}": value for name, value in moments.items()}
        return found

    def _update(
        self, group: str, members: int, sums: Mapping[str, Tensor], method: Method, state: State, round: int,
        subspace: Subspace | None,
    ) -> tuple[ClientUpdate, dict[str, Tensor]]:  # fmt: skip
        """Makes the group's update by one step of the method's optimizer. Returns it, and the optimizer's moments."""
        arrays = {name: value.float() for name, value in sums.items() if name != GRADIENT}
        prefix, card = f"{MOMENTS}{group}/", group_card(group)
        moments = {n.removeprefix(prefix): a for n, a in state.arrays.items() if n.startswith(prefix)}
        if GRADIENT in sums:
            mechanism, assignment = self.mechanisms[group], method.make_assignment(state, card, round)
            start_PD = assignment.arrays[method.array]
            shape = (subspace.size,) if subspace else tuple(start_PD.shape)
            records = members * mechanism.expected_batch * mechanism.plan.steps
            mean = (sums[GRADIENT] * mechanism.clip_norm / records).view(shape)
            mean = (mean / clip_scale(subspace.grad_scale) if subspace else mean).float()
            work = tune(method.training, SummedGradient(mean, subspace), assignment, start_PD, memory=moments, steps=1)  # type: ignore[arg-type]
            arrays["delta"] = _finished(work, subspace) - start_PD
        return ClientUpdate(card.name, arrays, float(members)), moments

    def _summed(
        self, messages: "_Messages", assignments: Mapping[str, bytes], sizes: Mapping[str, int]
    ) -> tuple[np.ndarray, list[str]]:
        """Returns the sum, uint64 [N], and the clients in it. Raises `VoidRoundError`."""
        allowed = next(iter(self.mechanisms.values())).tolerance_of(len(assignments))
        adverts, shares = {}, {}
        if self.masked:
            adverts = messages.texts(
                KEYS, {n: {} for n in assignments}, "advert", allowed.least, {*SIGNED, "signature"}
            )
            shares = messages.texts(SHARES, {n: {"adverts": adverts} for n in adverts}, "shares", allowed.least)
        senders = list(shares) if self.masked else list(assignments)
        facts = {"parts": self.groups, "sizes": dict(sizes)}
        given = {
            n: {**facts, "shares": {peer: shares[peer].get(n, "") for peer in shares if peer != n}} for n in senders
        }
        inner = {n: torch.frombuffer(bytearray(assignments[n]), dtype=torch.uint8) for n in senders}
        numbers = len(self.groups) * sum(sizes.values())
        vectors = messages.vectors({n: ({"assignment": inner[n]}, given[n]) for n in senders}, numbers, allowed.least)
        survivors = sorted(vectors)
        summed = np.stack([vectors[n] for n in survivors]).sum(0, dtype=np.uint64)
        if not self.masked:
            return summed, survivors
        consents = messages.texts(CONSENT, {n: {"survivors": survivors} for n in survivors}, "consent", allowed.least)
        signatures = {name: signed[name] for name, signed in consents.items() if name in signed}
        asked = {n: {"signatures": signatures} for n in consents}
        revealed = messages.texts(REVEAL, asked, "revealed", allowed.least)
        unmask = _Unmasking(self.run, messages.round, adverts, sorted(shares), survivors, revealed, allowed.least)
        return summed - unmask.masks(numbers, layout_of(self.groups, sizes)), survivors


class _Messages:
    """Sends the messages of one round, and keeps the reasons for dropped clients."""

    def __init__(self, engine: Engine, round: int, backbone: str):
        self.engine, self.round, self.backbone, self.found = engine, round, backbone, Collected()

    def texts(
        self, phase: str, facts: Mapping[str, Any], wanted: str, least: int, keys: Iterable[str] = ()
    ) -> dict[str, dict[str, str]]:
        """Returns the fact `wanted` of each reply: hexadecimal texts by name, with `keys` (empty: with any)."""
        found, needed = {}, set(keys)
        for name, reply in self._ask(phase, {name: ({}, given) for name, given in facts.items()}):
            given: Any = reply.facts.get(wanted)
            if _are_hex(given) and needed in (set(), given.keys()):
                found[name] = given
            else:
                self.found.dropped[name] = f"its {wanted} is of another form"
        return self._enough(facts, found, least)

    def vectors(
        self, asked: Mapping[str, tuple[Mapping[str, Tensor], Any]], size: int, least: int
    ) -> dict[str, np.ndarray]:
        found = {}
        for name, reply in self._ask(VECTOR, asked):
            vector = reply.arrays.get(MASKED)
            if vector is None or vector.dtype != torch.int64 or tuple(vector.shape) != (size,):
                self.found.dropped[name] = f"its vector is not int64 [{size}]"
            else:
                found[name] = vector.numpy().view(np.uint64)
        return self._enough(asked, found, least)

    def _ask(
        self, phase: str, asked: Mapping[str, tuple[Mapping[str, Tensor], Any]]
    ) -> Iterator[tuple[str, Assignment]]:
        sent = {
            name: codec.encode_assignment(Assignment(phase, self.round, arrays, facts), self.backbone)
            for name, (arrays, facts) in asked.items()
        }
        self.found.bytes_down += sum(map(len, sent.values()))
        heard: set[str] = set()
        for reply in self.engine.exchange(sent):
            self.found.bytes_up += len(reply.body or b"")
            if reply.client not in sent or reply.client in heard:
                continue
            try:
                if reply.body is None:
                    raise CodecError(reply.error or "no reply")
                message = codec.decode_assignment(reply.body, self.backbone)
            except CodecError as error:
                self.found.dropped[reply.client] = str(error)
                if reply.refused and phase in (KEYS, VECTOR):  # other refusals are of this round alone
                    self.found.refused[reply.client] = str(error)
                continue
            if (message.method, message.round) == (phase, self.round):  # else a late reply of an earlier exchange
                heard.add(reply.client)
                self.found.dropped.pop(reply.client, None)
                yield reply.client, message

    def _enough(self, asked: Iterable[str], found: dict[str, Any], least: int) -> dict[str, Any]:
        """Returns the replies. Raises `VoidRoundError` if fewer than `least` clients are left."""
        self.found.dropped |= {n: "no reply" for n in asked if n not in found and n not in self.found.dropped}
        if len(found) < least:
            raise VoidRoundError(f"{len(found)} sites are left, {least} were expected (privacy.max_lost)")
        return found


@dataclass(frozen=True)
class _Unmasking:
    """The server's values at the end of a round. senders: clients that sent shares. survivors: that sent vectors."""

    run: str
    round: int
    adverts: Mapping[str, Mapping[str, str]]
    senders: Sequence[str]
    survivors: Sequence[str]
    revealed: Mapping[str, Mapping[str, str]]
    threshold: int

    def masks(self, size: int, layout: str = "") -> np.ndarray:
        """Returns the masks in the sum of the survivors' vectors, uint64 [size]. Raises `VoidRoundError`."""
        total = np.zeros(size, np.uint64)
        for name in self.survivors:
            seed = self._opened(name, lambda secret, n=name: masks.digest(secret) == self.adverts[n]["seed"])
            total = total + masks.mask(own_key(self.run, self.round, seed), size)
        for lost in sorted(set(self.senders) - set(self.survivors)):
            public = self.adverts[lost]["mask"]
            private = X25519PrivateKey.from_private_bytes(
                self._opened(lost, lambda secret, public=public: masks.public_of(secret).hex() == public)
            )
            for name in self.survivors:
                other = bytes.fromhex(self.adverts[name]["mask"])
                pair = masks.mask(pair_key(self.run, self.round, private, lost, name, other, layout), size)
                total = total + pair if name < lost else total - pair
        return total

    def _opened(self, name: str, is_right: Any) -> bytes:
        """Restores a secret from its revealed shares."""
        number = {peer: place for place, peer in enumerate(sorted(self.adverts), 1)}
        shares = {}
        for peer, given in self.revealed.items():
            share = bytes.fromhex(given.get(name, ""))
            if len(share) == masks.SECRET:
                shares[number[peer]] = share
        secret = masks.combine(shares, self.threshold, is_right)
        if secret is None:
            raise VoidRoundError(f"the shares of {name} do not open its mask: a site sent wrong ones")
        return secret


class SummedGradient:
    """Stands for all clients in an optimizer. Its one step has the mean gradient of all clients."""

    def __init__(self, mean: Tensor, subspace: Subspace | None):
        self.mean, self.subspace = mean, subspace

    def batches(self, steps: int, batch_size: int) -> Iterator[None]:
        return iter([None] * steps)

    def private_mean(self, values_KB: Tensor) -> Tensor:
        return self.mean[None]


def _are_hex(given: Any) -> bool:
    try:
        return isinstance(given, dict) and all(bytes.fromhex(value) is not None for value in given.values())
    except (TypeError, ValueError):
        return False


def _finished(work: Any, subspace: Subspace | None) -> Tensor:
    """Runs an optimizer without a model. `SummedGradient` gives the gradient."""
    try:
        query: Query = next(work)
        while True:
            prompts_KPD = query.prompts_KPD
            query = work.send(Answer(torch.zeros(1, 0), prompts_KPD.new_zeros(1, 0, *prompts_KPD.shape[1:])))
    except StopIteration as end:
        return end.value


def _sizes(method: Method, state: State, subspace: Subspace | None) -> dict[str, int]:
    """Returns the size of each named sum of a round."""
    found = {}
    for name, shape in method.update_spec(state).items():
        numbers = int(np.prod(tuple(shape)))  # type: ignore[arg-type]
        found[GRADIENT if name == "delta" else name] = subspace.size if name == "delta" and subspace else numbers
    return found
