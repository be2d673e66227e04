"""Evaluates prompts on all test records and on each client's own. Only simulations can read all clients' records."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries, run_queries_lockstep
from ficpd.evaluation.metrics import less_is_better
from ficpd.federation.client import Client
from ficpd.federation.execution import local_model, personal_prompt
from ficpd.federation.method import Method
from ficpd.interfaces import Task
from ficpd.types import Answer, Assignment, Batch, Predictor, Query, Score, State

Result = TypeVar("Result")


def predictions(task: Task, prompt_PD: Tensor, batch: Batch) -> Generator[Query, Answer, list]:
    """Predicts a batch under one prompt, in the records' order."""
    writes = task.max_new_tokens
    answer = yield Query(prompt_PD[None], batch, outputs=not writes, max_new_tokens=writes)
    return task.predict(answer, batch)


def mixture_probabilities(predictors: Sequence[Predictor], batch: Batch) -> Generator[Query, Answer, Tensor]:
    """Returns [B, C], the predictors' weighted probabilities of the labels."""
    total_BC = torch.zeros(())
    for predictor in predictors:
        answer = yield Query(predictor.prompt_PD[None], batch, outputs=True)
        assert answer.outputs_KB is not None
        logits_BC = (predictor.logits or batch.task.logits)(answer.outputs_KB, batch)
        assert logits_BC is not None, "a mixture is over labels"
        total_BC = total_BC + predictor.weight * logits_BC.float().softmax(-1).cpu()
    return total_BC / sum(predictor.weight for predictor in predictors)


def predictions_of(task: Task, predictors: Sequence[Predictor], batch: Batch) -> Generator[Query, Answer, list]:
    """Predicts a batch by one prompt or by a mixture."""
    if len(predictors) == 1 and predictors[0].logits is None:
        return (yield from predictions(task, predictors[0].prompt_PD, batch))
    found_BC = yield from mixture_probabilities(predictors, batch)
    return [task.label_space[place] for place in found_BC.argmax(-1).tolist()]


@dataclass(frozen=True)
class Evaluation:
    """The scores of a method's prompts.

    everyone: the global prompt on all test records, the mean over tasks; None if the method shares no prompt.
    own: each client's prompt on its own test records.
    mean, worst: over the clients with test records.
    predicted: each client's predictions.
    models: each client's mixture.
    """

    everyone: Score | None
    own: Mapping[str, Score]
    mean: Score
    worst: Score
    predicted: Mapping[str, list]
    models: Mapping[str, Sequence[Predictor]]


def evaluate(method: Method, state: State, clients: Mapping[str, Client], model: QueryEngine, round: int) -> Evaluation:
    """Evaluates all of a method's prompts, in lock step."""
    tested = {name: client for name, client in clients.items() if client.test}
    assignments = {name: method.make_assignment(state, client.card, round) for name, client in tested.items()}
    personal = local_models(method, tested, assignments, model)
    shared = method.global_prompt(state)
    batches = {name: client.encoded("test") for name, client in tested.items()}
    local_batches = {
        name: _test_batch(method, tested[name], personal[name], batch, model) for name, batch in batches.items()
    }
    own = run_all(model, {n: predictions_of(tested[n].task, personal[n], b) for n, b in local_batches.items()})
    everyone = None
    if shared is not None:
        read = shared_batches(method, state, tested)
        same = all(
            local_batches[name] is read[name] and len(found) == 1 and found[0].logits is None
            and torch.equal(found[0].prompt_PD, shared)
            for name, found in personal.items()
        )  # fmt: skip
        everyone = own if same else predict_all({n: (tested[n].task, shared, b) for n, b in read.items()}, model)
    scores = {name: c.task.score(own[name], c.task.targets(c.test)) for name, c in tested.items()}
    return Evaluation(
        None if everyone is None else _pooled(everyone, tested),
        scores,
        client_mean(scores),
        worst_client(scores),
        own,
        personal,
    )


def local_models(
    method: Method, clients: Mapping[str, Client], assignments: Mapping[str, Assignment], model: QueryEngine
) -> dict[str, Sequence[Predictor]]:
    """Builds each client's mixture, in lock step."""
    return run_all(model, {n: local_model(method, client, assignments[n]) for n, client in clients.items()})


def shared_batches(method: Method, state: State, clients: Mapping[str, Client]) -> dict[str, Batch]:
    """Returns each client's test records with the readout of the state's shared prompts."""
    return {
        name: client.encoded("test").with_readout(method.readout(state, client.card))
        for name, client in clients.items()
    }


def _test_batch(
    method: Method, client: Client, predictors: Sequence[Predictor], batch: Batch, model: QueryEngine
) -> Batch:
    """Returns a client's test batch, with the method's demonstrations if it has any."""
    prompt = client.start.with_vectors(predictors[0].prompt_PD)
    work = method.demonstrate(client.task, client.train, client.encoded, prompt, client.backbone)
    if work is None:
        return batch
    return run_queries(model, work).encode(client.task, client.test, client.backbone, prompt, batch)


def score_everyone(
    prompt_PD: Tensor, method: Method, state: State, clients: Mapping[str, Client], model: QueryEngine
) -> Score:
    """Scores one prompt on all clients' test records, with the state's readouts. Each task counts once."""
    tested = {name: client for name, client in clients.items() if client.test}
    batches = shared_batches(method, state, tested)
    work = {n: (client.task, prompt_PD, batches[n]) for n, client in tested.items()}
    return _pooled(predict_all(work, model), tested)


def draw_sample(clients: Mapping[str, Client], number: int, seed: int) -> dict[str, list[int]]:
    """Draws `number` test records from all clients together; returns their indices by client.

    The draw has a separate random stream.
    """
    every = [(name, place) for name, client in sorted(clients.items()) for place in range(len(client.test))]
    order = torch.randperm(len(every), generator=rng.make_generator(seed, "curve records"))[:number].tolist()
    drawn: dict[str, list[int]] = {}
    for name, place in sorted(every[i] for i in order):
        drawn.setdefault(name, []).append(place)
    return drawn


def score_sample(
    method: Method, state: State, clients: Mapping[str, Client], model: QueryEngine, round: int,
    sample: Mapping[str, Sequence[int]],
) -> Score:  # fmt: skip
    """Scores the prompt that each client would receive on a sample of its test records. Each task counts once.

    Tunes nothing and uses no random numbers. `sample`: the records' indices, by client.
    """
    members = {name: clients[name] for name in sample}
    work, batches = {}, shared_batches(method, state, members)
    for name, client in members.items():
        prompt_PD = personal_prompt(method, client, method.make_assignment(state, client.card, round))
        work[name] = client.task, prompt_PD, batches[name].select(sample[name])
    tested = {name: replace(client, test=[client.test[i] for i in sample[name]]) for name, client in members.items()}
    return _pooled(predict_all(work, model), tested)


def score_prompt(task: Task, prompt_PD: Tensor, batch: Batch, targets: Sequence, model: QueryEngine) -> Score:
    """Scores one prompt on one batch."""
    return task.score(run_queries(model, predictions(task, prompt_PD, batch)), targets)


def client_mean(scores: Mapping[str, Score]) -> Score:
    """Returns the mean over clients; each client counts once."""
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
