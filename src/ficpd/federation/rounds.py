"""The round loop: sends assignments, checks the returned updates, and aggregates them."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ficpd import rng
from ficpd.errors import BudgetError, CodecError, RunError
from ficpd.federation import codec
from ficpd.federation.method import Method
from ficpd.federation.secure_sum.server import Collected, SecureSum
from ficpd.interfaces import Compression, Engine, Model
from ficpd.privacy.central_gaussian import CentralGaussian
from ficpd.types import ClientUpdate, Reply, State, UpdateSpec

NO_REPLY = "no reply"
"""The reason for a client whose update never arrived."""


@dataclass(frozen=True)
class Round:
    """One finished round, a line of `rounds.jsonl`. Bytes count encoded messages; seconds are wall time.

    dropped: reasons by client, for updates that failed the checks.
    excluded_updates: reasons by client, for updates that the method left out or clipped.
    underfilled_means: means of fewer updates than their rule needs (`aggregation/robust.py`).
    queries: in simulations, each client's forward queries and gradients.
    items: the arrays of each client's message, by name: the number of values, and the bits of each.
    """

    round: int
    clients: int
    updates: int
    dropped: dict[str, str]
    bytes_up: int
    bytes_down: int
    seconds_train: float
    seconds_aggregate: float
    metrics: dict[str, float] = field(default_factory=dict)
    excluded_updates: dict[str, str] = field(default_factory=dict)
    underfilled_means: dict[str, str] = field(default_factory=dict)
    queries: dict[str, list[int]] = field(default_factory=dict)
    items: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundSchedule:
    """The rounds of a run, with `cohort` clients sampled in each.

    max_norm: bound of every update's L2 norm.
    everyone_first, everyone_last: the first, or the last, round samples all clients.
    accept_late: the maximum delay of an update, in rounds. Its weight is divided by √(1 + rounds late) (Xie et al., 2019,
        arXiv 1903.03934).
    """

    num_rounds: int
    cohort: int
    seed: int
    max_norm: float = 1e6
    everyone_first: bool = False
    everyone_last: bool = False
    accept_late: int = 0


def sample_cohort(schedule: RoundSchedule, names: Sequence[str], round: int) -> list[str]:
    """Samples a round's clients without replacement, from a seed of the round."""
    if (round == 1 and schedule.everyone_first) or (round == schedule.num_rounds and schedule.everyone_last):
        return sorted(names)
    drawn = torch.randperm(len(names), generator=rng.make_generator(schedule.seed, "cohort", round)).tolist()
    return sorted(str(names[i]) for i in drawn[: schedule.cohort])


class RoundHooks:
    """Lets the caller of `run_rounds` act around each round. The defaults do nothing."""

    def before_round(self, round: int, cohort: Sequence[str]) -> None:
        """Raises `BudgetError` to end the run before a round."""

    def after_round(self, state: State, done: Round) -> None:
        """Receives the state, before the round is yielded."""

    def stop(self, error: BudgetError) -> None:
        """Is called when no budget allows another round. Raises the error, or ends the rounds."""
        raise error


NO_HOOKS = RoundHooks()


def run_rounds(
    method: Method, engine: Engine, model: Model, state: State, schedule: RoundSchedule, compression: Compression,
    first_round: int = 1, central: CentralGaussian | None = None, secure: SecureSum | None = None,
    hooks: RoundHooks = NO_HOOKS,
) -> Iterator[tuple[State, Round]]:  # fmt: skip
    """Yields the state after each round. Drops and reports updates that fail the checks.

    A round without a valid update leaves the state unchanged. With `central`, every round ends in one noised mean, even
    an empty one. With `secure`, the server learns only the sum of the clients' terms.
    Ends by `hooks.stop` before a round that no client's budget, the server's budget or `hooks.before_round` allows.
    """
    cards, fingerprint = {card.name: card for card in engine.clients()}, model.backbone.fingerprint
    replies = RoundReplies(schedule, compression, fingerprint)
    try:
        for round in range(first_round, schedule.num_rounds + 1):
            started = time.perf_counter()
            known = central.stored_mean(round, method.name) if central else None
            if central is None:
                cohort = sample_cohort(schedule, list(cards), round)
            else:
                cohort = [] if known else central.sample_cohort(sorted(cards), round)
            hooks.before_round(round, cohort)
            assignments = {
                name: codec.encode_assignment(method.make_assignment(state, cards[name], round), fingerprint)
                for name in cohort
            }
            if secure:
                got = secure.collect(engine, assignments, method, state, round, fingerprint, compression.subspace)
            else:
                replies.begin(round, assignments, method.update_spec(state))
                for reply in engine.exchange(assignments):
                    replies.add(reply)
                got = replies.end()
            if assignments and len(got.refused) == len(assignments):
                raise BudgetError(f"round {round} does not take place: {got.refused[min(got.refused)]}")
            updates = got.updates
            if central:
                updates = [_noised_sum(central, known, method, state, updates, round, compression)]
            trained, noted = time.perf_counter(), {}
            if updates:
                state = method.aggregate(state, updates, round, model)
                state, noted = State({**state.arrays, **got.moments}, state.facts), state.facts
            done = Round(
                round, len(assignments), got.answered, got.dropped, got.bytes_up, got.bytes_down,
                trained - started, time.perf_counter() - trained, items=got.items,
                excluded_updates=dict(noted.get("excluded_updates", {})),
                underfilled_means=dict(noted.get("underfilled_means", {})),
            )  # fmt: skip
            hooks.after_round(state, done)
            yield state, done
    except BudgetError as error:
        hooks.stop(error)


def _noised_sum(
    central: CentralGaussian, known: ClientUpdate | None, method: Method, state: State, updates: Sequence[ClientUpdate],
    round: int, compression: Compression,
) -> ClientUpdate:  # fmt: skip
    """Returns the noisy mean of a round's updates as one update. `known`: that of an earlier attempt at the round."""
    if known is None:
        terms = [method.in_cluster_sum(state, update) for update in updates]
        known = central.noisy_mean(terms, method.cluster_sums(state), round, method.name)
    # drops noise outside the subspace
    return replace(known, arrays=compression.unpack(compression.project(known.arrays)))


class RoundReplies:
    """Collects the first valid update of each client in a round, late ones of earlier rounds too."""

    def __init__(self, schedule: RoundSchedule, compression: Compression, backbone: str):
        self.schedule, self.compression, self.backbone = schedule, compression, backbone
        self.asked: dict[int, set[str]] = {}
        """The clients of each round whose updates have not arrived."""

    def begin(self, round: int, assignments: Mapping[str, bytes], layout: UpdateSpec) -> None:
        """Begins a round with its assignments. `layout`: the method's arrays of an update."""
        self.found = Collected(bytes_down=sum(map(len, assignments.values())))
        self.wire = self.compression.encoded_spec(layout)
        self.found.items |= {name: [math.prod(kind.shape), 8 * kind.dtype.itemsize] for name, kind in self.wire.items()}
        self.asked = {r: names for r, names in self.asked.items() if round - r <= self.schedule.accept_late}
        self.asked[round], self.cohort = set(assignments), list(assignments)

    def add(self, reply: Reply) -> None:
        """Checks one reply and counts its bytes. A message that arrives twice counts once."""
        found = self.found
        found.bytes_up += len(reply.body or b"")
        counted = any(update.client == reply.client for update in found.updates)
        if not counted and not any(reply.client in names for names in self.asked.values()):
            found.dropped[reply.client] = "answered without an assignment"
            return
        try:
            update = self._decoded(reply)
        except CodecError as error:
            if not counted:
                found.dropped[reply.client] = str(error)
                if reply.refused:
                    found.refused[reply.client] = str(error)
            return
        if counted:
            found.dropped[reply.client] = "two of its updates came together; the first one counts"
        else:
            found.updates.append(update)

    def end(self) -> Collected:
        """Returns the updates in the method's layout, by client, and the reasons for dropped ones."""
        found = self.found
        good = {update.client for update in found.updates}
        found.dropped |= {name: NO_REPLY for name in self.cohort if name not in good and name not in found.dropped}
        ordered = sorted(found.updates, key=lambda update: update.client)
        found.updates = [replace(update, arrays=self.compression.unpack(update.arrays)) for update in ordered]
        found.answered = len(found.updates)
        return found

    def _decoded(self, reply: Reply) -> ClientUpdate:
        """Decodes an update of this round, or a late one of an earlier round with less weight."""
        if reply.body is None:
            raise CodecError(reply.error or "no update")
        newest, complaint = max(self.asked), CodecError("no update")
        for round in sorted((r for r, names in self.asked.items() if reply.client in names), reverse=True):
            expected = codec.ExpectedUpdate(reply.client, round, self.backbone, self.wire, self.schedule.max_norm)
            try:
                update = codec.decode_update(reply.body, expected)
            except CodecError as error:
                complaint = error if round == newest else complaint
                continue
            self.asked[round].discard(reply.client)
            return replace(update, weight=update.weight / (1 + newest - round) ** 0.5)
        raise complaint


def require_updates(method: str, done: Round, advice: str) -> None:
    """Raises `RunError` with this advice if all clients of a round answered, and no update is usable."""
    failed = {name: reason for name, reason in sorted(done.dropped.items()) if reason != NO_REPLY}
    if failed and not done.updates and len(failed) == done.clients:
        name = next(iter(failed))
        raise RunError(
            f"{method}, round {done.round}: no update of its {done.clients} clients can be used. {name}: {failed[name]}. "
            + advice
        )
