"""A client's half of a secure sum: keys, shares and masks of one round. It trusts neither the server nor other clients."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ficpd.errors import CodecError, PolicyError
from ficpd.federation.secure_sum import masks
from ficpd.privacy.shared_gaussian import Tolerance

Advert = Mapping[str, str]
"""A client's public part of a round, hexadecimal: keys `channel` and `mask`, the digest of its `seed`, its `signature`."""
SIGNED = ("channel", "mask", "seed")


def advert_statement(run: str, spec: str, round: int, name: str, advert: Advert) -> bytes:
    return masks.statement("keys", run, spec, round, name, [advert[part] for part in SIGNED])


def consent_statement(run: str, round: int, adverts: Mapping[str, Advert], survivors: Sequence[str]) -> bytes:
    """Encodes the present clients and all keys. An honest client signs one such statement in a round."""
    return masks.statement("consent", run, round, {n: dict(a) for n, a in adverts.items()}, sorted(survivors))


@dataclass(eq=False)
class _Round:
    """The secrets and the progress of one round."""

    number: int
    allowed: Tolerance
    channel: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    mask: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(masks.SECRET))
    adverts: Mapping[str, Advert] = field(default_factory=dict)
    answered: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Request and answer of each phase. Another request in the same phase is refused."""
    held: Mapping[str, bytes] = field(default_factory=dict)
    """Shares of other clients' secrets, by client."""


class Member:
    """Guarantees (`tests/federation/secure_sum/`):

    - a client's vector is uniform in the ring for the server, if at most `colluding` clients help the server;
    - shares are revealed only for a list of at least `least` clients that at least `least` clients have signed;
    - a client answers each phase of a round once: the same request gets the same answer, another request is refused;
    - keys are accepted only with the signature of the site's long-lived key, for this run, its spec and this round;
    - masks cancel only between clients that were asked for the same sums (`layout`).

    run: the run's id, part of every signature.
    spec: digest of the run spec. All clients plan their noise by it; clients with another spec are not in one sum.
    identity: the site's long-lived key.
    known: every site's public key, 32 bytes, never taken from the server.
    invited: the clients of a round, computed from the public schedule.
    allowed: the `Tolerance` for their number.
    """

    def __init__(
        self, name: str, run: str, identity: Ed25519PrivateKey, known: Mapping[str, bytes],
        invited: Callable[[int], Sequence[str]], allowed: Callable[[int], Tolerance], spec: str = "",
    ):  # fmt: skip
        self.name, self.run, self.spec, self.identity, self.known = name, run, spec, identity, known
        self.invited, self.allowed = invited, allowed
        self._round: _Round | None = None

    def has_keys(self, round: int) -> bool:
        """Returns whether this client holds keys for a round."""
        return self._round is not None and self._round.number == round

    def advertise(self, round: int) -> Advert:
        """Returns this client's signed keys. Raises `PolicyError` for an old round, or sites without a known key."""
        invited = self.invited(round)
        if self._round and round < self._round.number:
            raise PolicyError(
                f"{self.name} got a secure sum of round {round} after round {self._round.number}: nothing was spent on it. "
                "Send the next round"
            )
        if strangers := sorted(set(invited) - self.known.keys()):
            raise PolicyError(
                f"{self.name} knows no signing key of {', '.join(strangers)}. Give every site the keys of all others"
            )
        if self.name not in invited:
            raise PolicyError(f"{self.name} is not invited to round {round} of this run's schedule. Leave it out")
        if self._round is None or self._round.number != round:
            self._round = _Round(round, self.allowed(len(invited)))
        return self._once("keys", None, self._made)

    def _made(self) -> Advert:
        state = self._now()
        advert = {
            "channel": state.channel.public_key().public_bytes_raw().hex(),
            "mask": state.mask.public_key().public_bytes_raw().hex(),
            "seed": masks.digest(state.seed),
        }
        signature = masks.sign(self.identity, advert_statement(self.run, self.spec, state.number, self.name, advert))
        return advert | {"signature": signature.hex()}

    def share(self, round: int, adverts: Mapping[str, Advert]) -> dict[str, str]:
        """Returns the shares of this client's secrets for each of the others, encrypted, hexadecimal."""
        self._now(round)
        return self._once("shares", {n: dict(a) for n, a in adverts.items()}, lambda: self._shared(adverts))

    def _shared(self, adverts: Mapping[str, Advert]) -> dict[str, str]:
        state = self._now()
        self._check_clients(adverts, self.invited(state.number))
        for name, advert in adverts.items():
            content = advert_statement(self.run, self.spec, state.number, name, advert)
            if not masks.is_signed(self.known[name], _bytes(advert["signature"]), content):
                raise PolicyError(
                    f"the keys of {name} for round {state.number} are not signed by {name}: another key, run, spec or "
                    f"round. Send all sites one spec, and what {name} has signed"
                )
        if adverts[self.name] != state.answered["keys"][1]:
            raise PolicyError(f"the keys of {self.name} are not those that it made for round {state.number}")
        names, parts = sorted(adverts), (state.mask.private_bytes_raw(), state.seed)
        shares = zip(*(masks.split(part, state.allowed.least, len(names)) for part in parts), strict=True)
        own = dict(zip(names, (b"".join(pair) for pair in shares), strict=True))
        state.adverts, state.held = adverts, {self.name: own.pop(self.name)}
        return {peer: masks.encrypt(self._channel(self.name, peer), share).hex() for peer, share in own.items()}

    def mask(self, round: int, shares: Mapping[str, str], vector: np.ndarray, layout: str = "") -> np.ndarray:
        """Adds the masks of the clients whose `shares` arrived to a term, uint64 [N]. Masks once in a round.

        layout: names the sums in the term. Another client's noise covers this term only if it was asked for the same.
        """
        self.check_vector(round, shares)
        state, others = self._now(round), sorted(shares)
        state.answered["vector"] = (others, None)
        opened = {n: masks.decrypt(self._channel(n, self.name), _bytes(shares[n])) for n in others}
        right = {n: share for n, share in opened.items() if share is not None and len(share) == 2 * masks.SECRET}
        state.held = {**state.held, **right}
        masked = vector + masks.mask(own_key(self.run, round, state.seed), len(vector))
        for peer in others:
            public = _bytes(state.adverts[peer]["mask"])
            key = pair_key(self.run, round, state.mask, self.name, peer, public, layout)
            pair = masks.mask(key, len(vector))
            masked = masked + pair if self.name < peer else masked - pair
        return masked

    def check_vector(self, round: int, shares: Mapping[str, str]) -> None:
        """Raises `PolicyError` unless a vector of this round can be masked now, for clients whose `shares` arrived."""
        state = self._now(round)
        if "vector" in state.answered:
            raise PolicyError(f"{self.name} has masked its vector of round {round} already. Send the next round")
        self._check_clients([self.name, *shares], state.adverts)

    def consent(self, round: int, survivors: Sequence[str]) -> str:
        """Signs the list of clients whose vectors arrived."""
        self._now(round)
        return self._once("consent", sorted(survivors), lambda: self._consented(survivors))

    def _consented(self, survivors: Sequence[str]) -> str:
        state = self._now()
        self._check_clients(survivors, [self.name, *self._answered("vector")[0]])
        return masks.sign(self.identity, consent_statement(self.run, state.number, state.adverts, survivors)).hex()

    def reveal(self, round: int, signatures: Mapping[str, str]) -> dict[str, str]:
        """Returns this client's shares: of present clients' seeds, and of lost clients' mask keys.

        Raises `PolicyError` unless at least `least` clients signed the list that this client signed.
        """
        state, survivors = self._now(round), self._answered("consent")[0]
        content = consent_statement(self.run, state.number, state.adverts, survivors)
        agreed = [
            n for n in survivors if n in signatures and masks.is_signed(self.known[n], _bytes(signatures[n]), content)
        ]
        if len(agreed) < state.allowed.least:
            raise PolicyError(
                f"{len(agreed)} sites have agreed to one list of round {round}, expected {state.allowed.least}: nothing is "
                "revealed, and the round is void. Send the next one"
            )
        half = masks.SECRET
        return {n: (s[half:] if n in survivors else s[:half]).hex() for n, s in state.held.items()}

    def _now(self, round: int | None = None) -> _Round:
        if self._round is None or round not in (None, self._round.number):
            raise PolicyError(
                f"{self.name} has no keys of round {round}: it restarted, or the round is over. It is lost for this round"
            )
        return self._round

    def _answered(self, phase: str) -> tuple[Any, Any]:
        if phase not in self._now().answered:
            raise PolicyError(f"{self.name} has not done the phase {phase!r} of this round. Send the phases in order")
        return self._now().answered[phase]

    def _once(self, phase: str, question: Any, answer: Callable[[], Any]) -> Any:
        """Answers a phase. The same request gets the same answer again."""
        done = self._now().answered
        if phase not in done:
            done[phase] = (question, answer())
        elif done[phase][0] != question:
            raise PolicyError(
                f"{self.name} has answered another {phase!r} of round {self._now().number}. Send the next round"
            )
        return done[phase][1]

    def _check_clients(self, given: Sequence[str] | Mapping[str, Any], expected: Sequence[str] | Mapping) -> None:
        """Raises `PolicyError` for a list without this client, with an unknown one, or shorter than `least`."""
        names, allowed = set(given), self._now().allowed
        if self.name not in names or not names <= set(expected) or len(names) != len(given):
            raise PolicyError(
                f"{self.name} got the clients {', '.join(sorted(names))}, expected some of "
                f"{', '.join(sorted(expected))}, each once and {self.name} among them"
            )
        if len(names) < allowed.least:
            raise PolicyError(
                f"{len(names)} of {allowed.invited} sites are left, expected {allowed.least} (privacy.max_lost = "
                f"{allowed.lost}): the round is void. Send the next one"
            )

    def _channel(self, sender: str, receiver: str) -> bytes:
        state = self._now()
        public = _bytes(state.adverts[receiver if sender == self.name else sender]["channel"])
        return masks.agreed_key(state.channel, public, "share", self.run, state.number, sender, receiver)


def own_key(run: str, round: int, seed: bytes) -> bytes:
    """Derives the key of a client's own mask from its seed."""
    return masks.derived(seed, "own mask", run, round)


def pair_key(
    run: str, round: int, private: X25519PrivateKey, name: str, peer: str, public: bytes, layout: str = ""
) -> bytes:
    """Derives the key of two clients' mask. The first by name adds the mask, the other subtracts it."""
    return masks.agreed_key(private, public, "pair mask", run, round, *sorted((name, peer)), layout)


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (ValueError, TypeError) as error:
        raise CodecError(f"expected hexadecimal text: {error}") from error
