"""Scores each level of a method's prompts on a client's own records and on other clients' records.

A personal prompt that fits only its own client has low scores on other clients' records. For simulations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine
from ficpd.evaluation.evaluate import client_mean, local_models, predictions_of, run_all, shared_batches
from ficpd.federation.client import Client
from ficpd.federation.execution import personal_prompt
from ficpd.federation.method import Method
from ficpd.types import Batch, Predictor, Record, Score, State

PERSONAL = "personal"
ELSEWHERE = 64
"""The maximum number of other clients' test records to score a client's prompts on."""

Levels = dict[str, dict[str, Score | None]]
Work = tuple[Sequence[Predictor], Batch, Sequence[Record]]
"""A model, and its test records, encoded and raw."""


def personalization_levels(
    method: Method, state: State, clients: Mapping[str, Client], model: QueryEngine, round: int, seed: int,
    personal: Mapping[str, Sequence[Predictor]] | None = None,
) -> Levels:  # fmt: skip
    """Scores `personal`, `cluster` and `global` prompts on `own` test records and on those of `others`.

    `others` are clients of the same task in other clusters (with fewer than two clusters, all others of the task). Values
    are means over the same clients at each level; None without clients. `personal`: the clients' mixtures, if known.
    """
    tested = {name: client for name, client in clients.items() if client.test}
    member = state.facts.get("clusters") or {}
    if personal is None:
        assignments = {name: method.make_assignment(state, client.card, round) for name, client in tested.items()}
        personal = local_models(method, tested, assignments, model)
    away = {name: _others_batch(name, tested, member, seed) for name in tested}
    found: Levels = {}
    for level, models in _levels(method, state, tested, personal, member).items():
        read = {name: None if level == PERSONAL else method.readout(state, tested[name].card) for name in tested}
        own = {
            n: (given, tested[n].encoded("test").with_readout(read[n]), tested[n].test) for n, given in models.items()
        }
        others = {
            name: (given, elsewhere[0].with_readout(read[name]), elsewhere[1])
            for name, given in models.items()
            if (elsewhere := away[name])
        }
        found[level] = {"own": _mean(own, tested, model), "others": _mean(others, tested, model)}
    return found


def unseen_client_scores(
    method: Method, state: State, unseen: Mapping[str, Client], model: QueryEngine, round: int
) -> dict[str, Score | None]:
    """Scores clients that did not participate, under the `global` prompt and the prompt `assigned` to their card."""
    tested = {name: client for name, client in unseen.items() if client.test}
    assignments = {name: method.make_assignment(state, client.card, round) for name, client in tested.items()}
    shared = method.global_prompt(state)
    prompts = {
        "global": {} if shared is None else dict.fromkeys(tested, shared),
        "assigned": {name: personal_prompt(method, client, assignments[name]) for name, client in tested.items()},
    }
    batches = shared_batches(method, state, tested)
    return {
        level: _mean({n: ([Predictor(prompt)], batches[n], tested[n].test) for n, prompt in of.items()}, tested, model)
        for level, of in prompts.items()
    }


def _levels(
    method: Method, state: State, tested: Mapping[str, Client], personal: Mapping[str, Sequence[Predictor]],
    member: Mapping[str, int],
) -> dict[str, dict[str, Sequence[Predictor]]]:  # fmt: skip
    """Returns the clients' models by level. Leaves out a level that equals the next.

    A client without a cluster uses the global prompt at the cluster level.
    """
    basis, shared = method.library_prompts(state), method.global_prompt(state)
    found: dict[str, dict[str, Tensor]] = {}
    if member and "prototype-0" in basis:
        of_clusters = {name: basis[f"prototype-{member[name]}"] for name in tested if name in member}
        found["cluster"] = ({} if shared is None else dict.fromkeys(tested, shared)) | of_clusters
    if shared is not None:
        found["global"] = dict.fromkeys(tested, shared)
    for above, below in pairwise(list(found)):
        if all(torch.equal(found[above][name], prompt) for name, prompt in found[below].items()):
            del found[above]
    levels: dict[str, dict[str, Sequence[Predictor]]] = {
        level: {n: [Predictor(prompt)] for n, prompt in of.items()} for level, of in found.items()
    }
    nearest = next(iter(levels.values()), {})
    if all(name in nearest and _alike(given, nearest[name]) for name, given in personal.items()):
        return levels
    return {PERSONAL: dict(personal)} | levels


def _alike(one: Sequence[Predictor], other: Sequence[Predictor]) -> bool:
    """Tells whether two models read one prompt by its task's readout."""
    return len(one) == 1 and one[0].logits is None and torch.equal(one[0].prompt_PD, other[0].prompt_PD)


def _others_batch(
    name: str, tested: Mapping[str, Client], member: Mapping[str, int], seed: int
) -> tuple[Batch, list[Record]] | None:
    """Returns up to `ELSEWHERE` test records of a client's `others`, encoded and raw; None if it has none."""
    apart = len({member[other] for other in tested if other in member}) > 1
    others = [
        client
        for other, client in sorted(tested.items())
        if other != name and client.task is tested[name].task and not (apart and member.get(other) == member.get(name))
    ]
    if not others:
        return None
    places = [(client, place) for client in others for place in range(len(client.test))]
    drawn = torch.randperm(len(places), generator=rng.make_generator(seed, "elsewhere", name))[:ELSEWHERE].tolist()
    chosen = [places[i] for i in drawn]
    batches = [client.encoded("test").select([place]) for client, place in chosen]
    return concat_batches(batches), [client.test[place] for client, place in chosen]


def concat_batches(batches: list[Batch]) -> Batch:
    """Concatenates batches of one task."""
    first = batches[0]
    return replace(
        first,
        items=tuple(items for batch in batches for items in batch.items),
        targets=None if first.targets is None else torch.cat([b.targets for b in batches if b.targets is not None]),
        extra={name: torch.cat([batch.extra[name] for batch in batches]) for name in first.extra},
    )


def _mean(work: Mapping[str, Work], clients: Mapping[str, Client], model: QueryEngine) -> Score | None:
    predicted = run_all(
        model, {n: predictions_of(clients[n].task, given, batch) for n, (given, batch, _) in work.items()}
    )
    scores = {}
    for name, (_, _, records) in work.items():
        task = clients[name].task
        scores[name] = task.score(predicted[name], task.targets(records))
    return client_mean(scores) if scores else None
