"""What a prompt is worth: on everybody's test records, on each client's own. A simulation's view: nothing leaves."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ficpd.clients import Client, personal_prompt
from ficpd.compute import Compute, drive, drive_many
from ficpd.seams import Method, Task
from ficpd.types import Answer, Batch, Query, Score, State


def predictions(prompt_PD: Tensor, batch: Batch) -> Generator[Query, Answer, list]:
    """The task's predictions under one prompt, in the records' order."""
    answer = yield Query(prompt_PD[None], batch, outputs=True)
    assert answer.outputs_KB is not None
    return batch.task.predict(answer.outputs_KB, batch)


@dataclass(frozen=True)
class Evaluation:
    """`everyone`: one prompt on all test records (None if the method shares none). `own`: each client's prompt on its
    own test records; `mean` and `worst` are over clients that have any."""

    everyone: Score | None
    own: Mapping[str, Score]
    mean: Score
    worst: Score


def evaluate(method: Method, state: State, clients: Mapping[str, Client], model: Compute, round: int) -> Evaluation:
    """All of a method's prompts, in lock step."""
    tested = {name: client for name, client in clients.items() if client.test}
    orders = {name: method.assign(state, client.card, round) for name, client in tested.items()}
    personal = {name: personal_prompt(method, client, orders[name]) for name, client in tested.items()}
    shared = method.prompt(state)
    own = _predicted({name: (personal[name], tested[name].encoded("test")) for name in tested}, model)
    same = shared is not None and all(torch.equal(prompt, shared) for prompt in personal.values())
    if same:
        everyone = own
    elif shared is not None:
        everyone = _predicted({name: (shared, tested[name].encoded("test")) for name in tested}, model)
    else:
        everyone = None
    task = next(iter(tested.values())).task
    scores = {name: task.score(own[name], task.targets(client.test)) for name, client in tested.items()}
    return Evaluation(
        None if everyone is None else _pooled(task, everyone, tested), scores, summary(scores), worst_of(scores)
    )


def score_prompt(prompt_PD: Tensor, batch: Batch, targets: Sequence, model: Compute) -> Score:
    """One prompt on one batch."""
    return batch.task.score(drive(model, predictions(prompt_PD, batch)), targets)


def summary(scores: Mapping[str, Score]) -> Score:
    """The mean over clients, each client counting once."""
    names = sorted({name for score in scores.values() for name in score})
    return {name: sum(s[name] for s in scores.values() if name in s) / sum(name in s for s in scores.values())
            for name in names}  # fmt: skip


def worst_of(scores: Mapping[str, Score]) -> Score:
    """Each metric of the client that does worst in it (`rmse`: the highest)."""
    names = sorted({name for score in scores.values() for name in score})
    return {name: (max if name == "rmse" else min)(s[name] for s in scores.values() if name in s) for name in names}


def _predicted(work: Mapping[str, tuple[Tensor, Batch]], model: Compute) -> dict[str, list]:
    results = dict(drive_many(model, {name: predictions(*given) for name, given in work.items()}))
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]


def _pooled(task: Task, predicted: Mapping[str, list], clients: Mapping[str, Client]) -> Score:
    flat = [p for name in clients for p in predicted[name]]
    return task.score(flat, [t for client in clients.values() for t in task.targets(client.test)])
