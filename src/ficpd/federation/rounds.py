"""The round loop: orders out, updates in, checked, aggregated. It knows a method and an engine's one verb, no more."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ficpd import rng
from ficpd.errors import BudgetError, CodecError
from ficpd.federation import codec
from ficpd.interfaces import Compression, Engine, Model
from ficpd.method import Method
from ficpd.privacy.central_gaussian import CentralGaussian
from ficpd.types import ArraySpec, ClientUpdate, Reply, State

Wire = Mapping[str, ArraySpec]


@dataclass(frozen=True)
class Round:
    """One finished round, as `rounds.jsonl` has it. Bytes are those of the encoded messages; seconds are wall time.

    `dropped`: updates that did not pass the checks, by client, with the reason. `excluded_updates`: those that a robust rule
    left out or cut. `underfilled_means`: means of fewer updates than a robust rule needs. `queries`: in simulations, the
    forward queries and the gradients of each client."""

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


@dataclass(frozen=True)
class RoundSchedule:
    """How a run goes. `cohort` clients a round, drawn anew each round; `max_norm` bounds every update's L2 norm.

    `everyone_first`: all are asked in the first round. `accept_late`: how many rounds late an update may come; it counts
    with its weight over √(1 + rounds late) (Xie et al., 2019, arXiv 1903.03934).
    """

    num_rounds: int
    cohort: int
    seed: int
    max_norm: float = 1e6
    everyone_first: bool = False
    accept_late: int = 0


def sample_cohort(schedule: RoundSchedule, names: Sequence[str], round: int) -> list[str]:
    """The clients of a round: `cohort` of them, drawn without replacement from a seed of the round's own."""
    if round == 1 and schedule.everyone_first:
        return sorted(names)
    drawn = torch.randperm(len(names), generator=rng.make_generator(schedule.seed, "cohort", round)).tolist()
    return sorted(str(names[i]) for i in drawn[: schedule.cohort])


def run_rounds(
    method: Method,
    engine: Engine,
    model: Model,
    state: State,
    schedule: RoundSchedule,
    compression: Compression,
    first_round: int = 1,
    central: CentralGaussian | None = None,
    before: Callable[[int, Sequence[str]], None] = lambda round, cohort: None,
) -> Iterator[tuple[State, Round]]:
    """Yields the state after each round. An update that does not pass the checks is dropped, counted and named.

    A round without a single good update leaves the state as it was. With `central`, every round ends in one noised mean,
    also one to which nobody came. Raises `BudgetError` for a round that no member's, or the server's, budget allows, or that
    `before`, told its clients, does not want: it does not take place.
    """
    cards = {card.name: card for card in engine.clients()}
    fingerprint, asked = model.backbone.fingerprint, {}
    for round in range(first_round, schedule.num_rounds + 1):
        started = time.perf_counter()
        layout = method.update_spec(state)
        wire = compression.encoded_spec(layout)
        known = central.stored_mean(round, method.name) if central else None
        if central is None:
            cohort = sample_cohort(schedule, list(cards), round)
        else:
            cohort = [] if known else central.sample_cohort(sorted(cards), round)
        before(round, cohort)
        assignments = {
            name: codec.encode_assignment(method.make_assignment(state, cards[name], round), fingerprint)
            for name in cohort
        }
        asked = {r: names for r, names in asked.items() if round - r <= schedule.accept_late} | {
            round: set(assignments)
        }
        check = partial(_checked, asked, fingerprint, wire, schedule.max_norm)
        came = _collect(engine, assignments, asked, check)
        if assignments and len(came.refused) == len(assignments):
            raise BudgetError(f"round {round} does not take place: {came.refused[min(came.refused)]}")
        updates = [replace(update, arrays=compression.unpack(update.arrays)) for update in came.updates]
        answered = len(updates)
        if central:
            layout = method.cluster_sums(state)
            updates = [method.in_cluster_sum(state, update) for update in updates]
            mean = known or central.noisy_mean(updates, layout, round, method.name)
            arrays = compression.unpack(compression.project(mean.arrays))  # noise outside the subspace is dropped
            updates = [replace(mean, arrays=arrays)]
        trained = time.perf_counter()
        if updates:
            state = method.aggregate(state, sorted(updates, key=lambda u: u.client), round, model)
        noted = state.facts if updates else {}
        yield (
            state,
            Round(
                round,
                len(assignments),
                answered,
                came.dropped,
                came.bytes_up,
                sum(map(len, assignments.values())),
                trained - started,
                time.perf_counter() - trained,
                excluded_updates=dict(noted.get("excluded_updates", {})),
                underfilled_means=dict(noted.get("underfilled_means", {})),
            ),
        )


@dataclass
class RoundReplies:
    """What came back in a round. `refused` are those of `dropped` whose budget did not allow it."""

    updates: list[ClientUpdate] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0


def _collect(
    engine: Engine,
    assignments: Mapping[str, bytes],
    asked: Mapping[int, set[str]],
    checked: Callable[[Reply], ClientUpdate],
) -> RoundReplies:
    """Every reply counted; the first good update of each client that was asked, and why the others were dropped."""
    came = RoundReplies()
    for reply in engine.exchange(assignments):
        came.bytes_up += len(reply.body or b"")
        counted = any(update.client == reply.client for update in came.updates)
        if not counted and not any(reply.client in names for names in asked.values()):
            came.dropped[reply.client] = "answered without having been asked"
            continue
        try:
            update = checked(reply)
        except CodecError as error:
            if counted:
                continue  # a message that came twice counts once
            came.dropped[reply.client] = str(error)
            if reply.refused:
                came.refused[reply.client] = str(error)
            continue
        if counted:
            came.dropped[reply.client] = "two of its updates came together; the first one counts"
        else:
            came.updates.append(update)
    good = {update.client for update in came.updates}
    came.dropped |= {name: "no reply" for name in assignments if name not in good and name not in came.dropped}
    return came


def _checked(
    asked: Mapping[int, set[str]], fingerprint: str, wire: Wire, max_norm: float, reply: Reply
) -> ClientUpdate:
    """The update, of this round or of an earlier one that the client still owes; a late one weighs less."""
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
