"""The round loop: sends assignments, checks the returned updates, and aggregates them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ficpd import rng
from ficpd.errors import BudgetError, CodecError, RunError
from ficpd.federation import codec
from ficpd.federation.method import Method
from ficpd.federation.secure_sum.server import SecureSum
from ficpd.interfaces import Compression, Engine, Model
from ficpd.privacy.central_gaussian import CentralGaussian
from ficpd.types import ArraySpec, ClientUpdate, Reply, State

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
    cards = {card.name: card for card in engine.clients()}
    fingerprint, asked = model.backbone.fingerprint, {}
    try:
        for round in range(first_round, schedule.num_rounds + 1):
            started = time.perf_counter()
            layout = method.update_spec(state)
            wire = compression.encoded_spec(layout)
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
                if assignments and len(got.refused) == len(assignments):
                    raise BudgetError(f"round {round} does not take place: {got.refused[min(got.refused)]}")
                trained = time.perf_counter()
                if got.updates:
                    state = method.aggregate(state, got.updates, round, model)
                    state = State({**state.arrays, **got.moments}, state.facts)
                seconds = trained - started, time.perf_counter() - trained
                sent = got.bytes_up, got.bytes_down
                done = Round(round, len(cohort), got.answered, got.dropped, *sent, *seconds, items=got.items)
                hooks.after_round(state, done)
                yield state, done
                continue
            asked = {r: names for r, names in asked.items() if round - r <= schedule.accept_late}
            asked[round] = set(assignments)
            came, checked = RoundReplies(), partial(_checked, asked, fingerprint, wire, schedule.max_norm)
            for reply in engine.exchange(assignments):
                came.add(reply, asked, checked)
            good = {update.client for update in came.updates}
            came.dropped |= {name: NO_REPLY for name in cohort if name not in good and name not in came.dropped}
            if assignments and len(came.refused) == len(assignments):
                raise BudgetError(f"round {round} does not take place: {came.refused[min(came.refused)]}")
            updates = [replace(update, arrays=compression.unpack(update.arrays)) for update in came.updates]
            answered = len(updates)
            if central:
                layout = method.cluster_sums(state)
                updates = [method.in_cluster_sum(state, update) for update in updates]
                mean = known or central.noisy_mean(updates, layout, round, method.name)
                # drops noise outside the subspace
                updates = [replace(mean, arrays=compression.unpack(compression.project(mean.arrays)))]
            trained = time.perf_counter()
            if updates:
                state = method.aggregate(state, sorted(updates, key=lambda u: u.client), round, model)
            noted = state.facts if updates else {}
            bytes_down = sum(map(len, assignments.values()))
            seconds = trained - started, time.perf_counter() - trained
            items = {name: [math.prod(kind.shape), 8 * kind.dtype.itemsize] for name, kind in wire.items()}
            sent = came.bytes_up, bytes_down
            done = Round(round, len(assignments), answered, came.dropped, *sent, *seconds, items=items)
            done.excluded_updates.update(noted.get("excluded_updates", {}))
            done.underfilled_means.update(noted.get("underfilled_means", {}))
            hooks.after_round(state, done)
            yield state, done
    except BudgetError as error:
        hooks.stop(error)


@dataclass
class RoundReplies:
    """Collects the first valid update of each client in a round, and the reasons for dropped ones.

    `refused`: those of `dropped` whose budget is exhausted.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0

    def add(self, reply: Reply, asked: Mapping[int, set[str]], checked: Callable[[Reply], ClientUpdate]) -> None:
        """Checks one reply. `asked`: the clients of each round whose updates have not arrived."""
        self.bytes_up += len(reply.body or b"")
        counted = any(update.client == reply.client for update in self.updates)
        if not counted and not any(reply.client in names for names in asked.values()):
            self.dropped[reply.client] = "answered without an assignment"
            return
        try:
            update = checked(reply)
        except CodecError as error:
            if not counted:  # a message that arrives twice counts once
                self.dropped[reply.client] = str(error)
                if reply.refused:
                    self.refused[reply.client] = str(error)
            return
        if counted:
            self.dropped[reply.client] = "two of its updates came together; the first one counts"
        else:
            self.updates.append(update)


def require_updates(method: str, done: Round) -> None:
    """Raises `RunError` if all clients of a round answered, and no update is usable."""
    failed = {name: reason for name, reason in sorted(done.dropped.items()) if reason != NO_REPLY}
    if failed and not done.updates and len(failed) == done.clients:
        name = next(iter(failed))
        raise RunError(
            f"{method}, round {done.round}: no update of its {done.clients} clients can be used. {name}: {failed[name]}. "
            "Look at local_update and update_spec; `ficpd run -v` prints the traceback of an error"
        )


def _checked(
    asked: Mapping[int, set[str]], fingerprint: str, wire: Mapping[str, ArraySpec], max_norm: float, reply: Reply
) -> ClientUpdate:
    """Decodes an update of this round, or a late one of an earlier round with less weight."""
    if reply.body is None:
        raise CodecError(reply.error or "no update")
    newest, complaint = max(asked), CodecError("no update")
    for round in sorted((r for r, names in asked.items() if reply.client in names), reverse=True):
        expected = codec.ExpectedUpdate(reply.client, round, fingerprint, wire, max_norm)
        try:
            update = codec.decode_update(reply.body, expected)
        except CodecError as error:
            complaint = error if round == newest else complaint
            continue
        asked[round].discard(reply.client)
        return replace(update, weight=update.weight / (1 + newest - round) ** 0.5)
    raise complaint
