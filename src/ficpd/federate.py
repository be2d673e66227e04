"""The round loop: orders out, updates in, checked, aggregated. It knows a method and an engine's one verb, no more."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ficpd import codec, seeds
from ficpd.errors import CodecError
from ficpd.seams import Engine, Method, Model
from ficpd.types import ClientUpdate, Reply, State

Layout = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Round:
    """One finished round, as `rounds.jsonl` has it. Bytes are those of the encoded messages; seconds are wall time."""

    round: int
    clients: int
    updates: int
    dropped: dict[str, str]
    bytes_up: int
    bytes_down: int
    seconds_train: float
    seconds_aggregate: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """How a run goes. `cohort` clients a round, drawn anew each round; `max_norm` bounds every update's L2 norm."""

    num_rounds: int
    cohort: int
    seed: int
    max_norm: float = 1e6


def cohort_of(schedule: Schedule, names: Sequence[str], round: int) -> list[str]:
    """The clients of a round: `cohort` of them, drawn without replacement from a seed of the round's own."""
    drawn = torch.randperm(len(names), generator=seeds.generator(schedule.seed, "cohort", round)).tolist()
    return sorted(str(names[i]) for i in drawn[: schedule.cohort])


def federate(
    method: Method, engine: Engine, model: Model, state: State, schedule: Schedule, first_round: int = 1
) -> Iterator[tuple[State, Round]]:
    """Yields the state after each round. An update that does not pass the checks is dropped, counted and named.

    A round without a single good update leaves the state as it was.
    """
    cards = {card.name: card for card in engine.clients()}
    fingerprint = model.backbone.fingerprint
    for round in range(first_round, schedule.num_rounds + 1):
        started = time.perf_counter()
        layout = method.layout(state)
        orders = {
            name: codec.encode_assignment(method.assign(state, cards[name], round), fingerprint)
            for name in cohort_of(schedule, list(cards), round)
        }
        updates: list[ClientUpdate] = []
        dropped: dict[str, str] = {}
        bytes_up = 0
        for reply in engine.exchange(orders):
            bytes_up += len(reply.body or b"")
            if reply.client not in orders:
                dropped[reply.client] = "answered without having been asked"
                continue
            if any(update.client == reply.client for update in updates):
                continue  # a message that came twice counts once
            try:
                updates.append(_checked(reply, round, fingerprint, layout, schedule.max_norm))
            except CodecError as error:
                dropped[reply.client] = str(error)
        dropped |= {name: "no reply" for name in orders if name not in dropped | {u.client: "" for u in updates}}
        trained = time.perf_counter()
        if updates:
            state = method.aggregate(state, sorted(updates, key=lambda u: u.client), round, model)
        yield (
            state,
            Round(
                round,
                len(orders),
                len(updates),
                dropped,
                bytes_up,
                sum(map(len, orders.values())),
                trained - started,
                time.perf_counter() - trained,
            ),
        )


def _checked(reply: Reply, round: int, fingerprint: str, layout: Layout, max_norm: float) -> ClientUpdate:
    if reply.body is None:
        raise CodecError(reply.error or "no update")
    return codec.decode_update(reply.body, codec.Expected(reply.client, round, fingerprint, layout, max_norm))
