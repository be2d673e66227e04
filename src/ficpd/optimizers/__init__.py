"""Optimizers that tune a client's prompt. Each is a generator of `Query`s: `prompt = yield from tune(...)`.

An entry defines `tune` and `black_box`. A black box asks for losses only, takes other arguments and has `num_candidates`.
"""

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

from pydantic import Field
from torch import Tensor

from ficpd.interfaces import ClientContext, Subspace
from ficpd.registry import FrozenConfig, load
from ficpd.types import Answer, Assignment, Query

Result = TypeVar("Result")


class LocalTrainingConfig(FrozenConfig):
    """A client's training in one round.

    optimizer: "adam", "sgd", "spsa", "cma_es", or a dotted name.
    local_steps: steps of a client in a round.
    batch_size: records of a step (subjects, where the data name them); all records of a client that has fewer.
    learning_rate: None: the backbone's measured default times the RMS of the initial prompt.
    decay: final share of the learning rate (cosine over the rounds).
    l2_weight: pull to zero. A method's proximal weight pulls to the prompt of the round.
    directions: directions of an spsa step, two candidates each.
    population: candidates of a cma_es generation.
    perturbation: distance of black-box candidates, per number of the prompt; None: the rate of the round.
    search_dimension: size of the cma_es search space without a configured subspace.
    seed: seed of the public draws that clients share; None: the experiment's.
    """

    optimizer: str = "adam"
    local_steps: int = Field(default=5, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    decay: float = Field(default=0.1, gt=0, le=1)
    l2_weight: float = Field(default=0.0, ge=0)
    directions: int = Field(default=4, ge=1)
    population: int = Field(default=16, ge=4)
    perturbation: float | None = Field(default=None, gt=0)
    search_dimension: int = Field(default=500, ge=2)
    seed: int | None = None

    @property
    def candidates(self) -> int:
        """Candidates per record of a step."""
        optimizer = load("optimizers", self.optimizer)
        return optimizer.num_candidates(self) if optimizer.black_box else 1

    @property
    def public_seed(self) -> int:
        """Seed of the draws that all clients share. No private draw uses it."""
        return self.seed or 0

    def apart(self, assignment: Assignment) -> float:
        """Returns the distance of black-box candidates, per number of the prompt."""
        return self.perturbation or assignment.facts["rate"]

    def rate(self, round: int, num_rounds: int) -> float:
        """Returns the learning rate of round 1..num_rounds: a cosine down to `decay`.

        >>> LocalTrainingConfig(learning_rate=1.0, decay=0.2).rate(1, 1)
        1.0
        """
        assert self.learning_rate is not None, "resolved from the backbone's default before a method is built"
        done = (round - 1) / max(num_rounds, 1)
        return self.learning_rate * (self.decay + (1 - self.decay) * (1 + math.cos(math.pi * done)) / 2)


def tune(
    training: LocalTrainingConfig,
    client: ClientContext,
    assignment: Assignment,
    start_PD: Tensor,
    *,
    proximal_weight: float = 0.0,
    memory: dict[str, Tensor] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
) -> Generator[Query, Answer, Tensor]:
    """Returns the configured optimizer's work on the client's [P, D], at the assignment's rate.

    In a subspace the optimizer tunes coordinates z [k]. The rate grows by √(PD/k), which keeps the prompt's step length.
    proximal_weight: pull to `start_PD` (FedProx).
    memory: receives the optimizer's moments, and starts from them; None: from zero.
    steps, batch_size: in place of the recipe's. State them in `Method.local_workload` too.
    """
    optimizer, coordinates = load("optimizers", training.optimizer), client.subspace
    batches = client.batches(steps or training.local_steps, batch_size or training.batch_size)
    weights = {"l2_weight": training.l2_weight, "proximal_weight": proximal_weight}
    if optimizer.black_box:  # black-box optimizers handle the subspace themselves
        return optimizer.tune(client, start_PD, batches, training=training, assignment=assignment, **weights)
    begin = start_PD if coordinates is None else coordinates.project(start_PD)
    rate = assignment.facts["rate"] * (start_PD.numel() / begin.numel()) ** 0.5
    work = optimizer.tune(client, begin, batches, learning_rate=rate, memory=memory, **weights)
    if coordinates is None:
        return work
    rest_PD = start_PD - coordinates.lift(begin)
    return map_queries(
        work,
        lambda query: query._replace(prompts_KPD=rest_PD + coordinates.lift(query.prompts_KPD)),
        lambda query, answer: answer._replace(grad_KBPD=_project_each(coordinates, answer.grad_KBPD)),
        lambda tuned: rest_PD + coordinates.lift(tuned),
    )


def map_queries(
    work: Generator[Query, Answer, Result],
    on_query: Callable[[Query], Query],
    on_answer: Callable[[Query, Answer], Answer] = lambda query, answer: answer,
    on_result: Callable[[Result], Result] = lambda result: result,
) -> Generator[Query, Answer, Result]:
    """Runs `work`, rewriting each query before the model, each answer after it, and the result.

    `on_answer` is given the query as `work` made it. An exception of the model is raised in `work` at its query.
    """
    step = partial(next, work)
    while True:
        try:
            query = step()
        except StopIteration as end:
            return on_result(end.value)
        asked = on_query(query)
        try:
            answer = yield asked
        except Exception as error:
            step = partial(work.throw, error)
        else:
            step = partial(work.send, on_answer(query, answer))


def _project_each(coordinates: Subspace, grad_KBPD: Tensor | None) -> Tensor | None:
    """Maps [K, B, P, D] to [K, B, k], record by record, because rounding depends on the batch size."""
    if grad_KBPD is None:
        return None
    grad_KBN = grad_KBPD.new_zeros(*grad_KBPD.shape[:2], coordinates.size)
    for row_N, grad_PD in zip(grad_KBN.flatten(0, 1), grad_KBPD.flatten(0, 1), strict=True):
        row_N.copy_(coordinates.project(grad_PD.clone()))
    return grad_KBN
