"""Evaluates prompts on all test records and on each client's own. For simulations: it reads every client's records."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ficpd.backbones.query_engine import QueryEngine, run_queries, run_queries_lockstep
from ficpd.evaluation.metrics import less_is_better
from ficpd.federation.client import Client, calibrated_batch, personal_prompt
from ficpd.federation.method import Method
from ficpd.interfaces import Task
from ficpd.types import Answer, Batch, Query, Score, State

Result = TypeVar("Result")


def predictions(task: Task, prompt_PD: Tensor, batch: Batch) -> Generator[Query, Answer, list]:
    """Predicts a batch under one prompt, in the records' order."""
    writes = task.max_new_tokens
    answer = yield Query(prompt_PD[None], batch, outputs=not writes, max_new_tokens=writes)
    return task.predict(answer, batch)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a method's prompts.

    everyone: one prompt on all test records, the mean over tasks; None if the method shares no prompt.
    own: each client's prompt on its own test records.
    mean, worst: over the clients with test records.
    predicted: each client's predictions.
    """

    everyone: Score | None
    own: Mapping[str, Score]
    mean: Score
    worst: Score
    predicted: Mapping[str, list]


def evaluate(method: Method, state: State, clients: Mapping[str, Client], model: QueryEngine, round: int) -> Evaluation:
    """Evaluates all of a method's prompts, in lock step."""
    tested = {name: client for name, client in clients.items() if client.test}
    assignments = {name: method.make_assignment(state, client.card, round) for name, client in tested.items()}
    personal = {name: personal_prompt(method, client, assignments[name]) for name, client in tested.items()}
    shared = method.global_prompt(state)
    batches = {name: client.encoded("test") for name, client in tested.items()}
    local_batches = {
        name: _test_batch(method, tested[name], personal[name], batch, model) for name, batch in batches.items()
    }
    own = predict_all({n: (tested[n].task, personal[n], batch) for n, batch in local_batches.items()}, model)
    everyone = None
    if shared is not None:
        same = all(torch.equal(prompt, shared) and local_batches[n] is batches[n] for n, prompt in personal.items())
        everyone = (
            own if same else predict_all({n: (tested[n].task, shared, batch) for n, batch in batches.items()}, model)
        )
    scores = {name: c.task.score(own[name], c.task.targets(c.test)) for name, c in tested.items()}
    return Evaluation(
        None if everyone is None else _pooled(everyone, tested), scores, client_mean(scores), worst_client(scores), own
    )


def _test_batch(method: Method, client: Client, prompt_PD: Tensor, batch: Batch, model: QueryEngine) -> Batch:
    """Returns a client's test batch with the method's calibration or demonstrations."""
    prompt = client.start.with_vectors(prompt_PD)
    work = method.demonstrate(client.task, client.train, client.encoded, prompt, client.backbone)
    if work is None:
        return calibrated_batch(method, client, batch)
    return run_queries(model, work).encode(client.task, client.test, client.backbone, prompt, batch)


def score_everyone(prompt_PD: Tensor, clients: Mapping[str, Client], model: QueryEngine) -> Score:
    """Scores one prompt on all clients' test records; each task counts once."""
    tested = {name: client for name, client in clients.items() if client.test}
    work = {n: (client.task, prompt_PD, client.encoded("test")) for n, client in tested.items()}
    return _pooled(predict_all(work, model), tested)


def score_prompt(task: Task, prompt_PD: Tensor, batch: Batch, targets: Sequence, model: QueryEngine) -> Score:
    """Scores one prompt on one batch."""
    return task.score(run_queries(model, predictions(task, prompt_PD, batch)), targets)


def client_mean(scores: Mapping[str, Score]) -> Score:
    """Returns the mean over clients; each counts once."""
    names = sorted({name for score in scores.values() for name in score})
    return {name: sum(s[name] for s in scores.values() if name in s) / sum(name in s for s in scores.values())
            for name in names}  # fmt: skip


def worst_client(scores: Mapping[str, Score]) -> Score:
    """Returns each metric's worst value over clients: the minimum, or the maximum of an error."""
    names = sorted({name for score in scores.values() for name in score})
    return {
        name: (max if less_is_better(name) else min)(s[name] for s in scores.values() if name in s) for name in names
    }


def predict_all(work: Mapping[str, tuple[Task, Tensor, Batch]], model: QueryEngine) -> dict[str, list]:
    """Predicts each batch under its prompt, in lock step."""
    return run_all(model, {name: predictions(*given) for name, given in work.items()})


def run_all(model: QueryEngine, works: Mapping[str, Generator[Query, Answer, Result]]) -> dict[str, Result]:
    """Runs generators in lock step; raises the first exception of any of them."""
    results = dict(run_queries_lockstep(model, works))
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]


def _pooled(predicted: Mapping[str, list], clients: Mapping[str, Client]) -> Score:
    """Scores all test records of a task together; each task counts once."""
    scores: dict[str, Score] = {}
    for place, task in enumerate(dict.fromkeys(client.task for client in clients.values())):
        own = {name: client for name, client in clients.items() if client.task is task}
        truth = [target for client in own.values() for target in task.targets(client.test)]
        scores[str(place)] = task.score([p for name in own for p in predicted[name]], truth)
    return client_mean(scores)
