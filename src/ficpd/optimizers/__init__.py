"""Tuners: how a client moves a prompt. Each is a generator, `prompt = yield from tune(...)`, that asks `Query`s."""

import math
from collections.abc import Callable, Generator
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.interfaces import ClientContext, Subspace
from ficpd.registry import load
from ficpd.types import Answer, Assignment, Query

Result = TypeVar("Result")


class LocalTrainingConfig(BaseModel):
    """A client's share of one round. `learning_rate` None: the backbone's measured default times the start's RMS.

    `decay` ends the run at this share of the learning rate (cosine over the rounds). `l2_weight` pulls to zero,
    a method's own proximal weight to where the round began.

    The rest is for optimizers and methods that see losses alone. `directions`: how many a step of spsa tries (two candidates
    each). `population`: candidates of a generation of cma_es. `perturbation`: how far from where they are they try, per
    number of the prompt, as in `learning_rate`; None: the rate of the round. `search_dimension`: so many numbers cma_es
    searches in where no subspace is configured. `seed`: of the public draws that clients share; None: the experiment's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
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
        """How many candidates the optimizer asks about each record of a step."""
        optimizer = load("optimizers", self.optimizer)
        return optimizer.num_candidates(self) if getattr(optimizer, "black_box", False) else 1

    @property
    def public_seed(self) -> int:
        """Of what all clients draw alike. Nothing private is derived from it."""
        return self.seed or 0

    def apart(self, order: Assignment) -> float:
        """How far away candidates are tried, per number of the prompt."""
        return self.perturbation or order.facts["rate"]

    def rate(self, round: int, num_rounds: int) -> float:
        """The learning rate of round 1..num_rounds: a cosine from all of it to `decay` of it.

        >>> LocalTrainingConfig(learning_rate=1.0, decay=0.2).rate(1, 1)
        1.0
        """
        assert self.learning_rate is not None, "resolved from the backbone's default before a method is built"
        done = (round - 1) / max(num_rounds, 1)
        return self.learning_rate * (self.decay + (1 - self.decay) * (1 + math.cos(math.pi * done)) / 2)


def tune(
    training: LocalTrainingConfig,
    client: ClientContext,
    order: Assignment,
    start_PD: Tensor,
    *,
    proximal_weight: float = 0.0,
    memory: dict[str, Tensor] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
) -> Generator[Query, Answer, Tensor]:
    """The client's tuned [P, D], by the configured optimizer, at the rate the order states.

    Where the client tunes in coordinates z of a subspace, the optimizer sees z [k] for the prompt, and the rate grows by
    √(PD/k): a step then moves the prompt as far as one in all its numbers would.
    """
    optimizer, coordinates = load("optimizers", training.optimizer), client.subspace
    batches = client.batches(steps or training.local_steps, batch_size or training.batch_size)
    weights = {"l2_weight": training.l2_weight, "proximal_weight": proximal_weight}
    if getattr(optimizer, "black_box", False):  # it asks for losses alone, and knows coordinates by itself
        tuned = yield from optimizer.tune(client, start_PD, batches, training=training, order=order, **weights)
        return tuned
    begin = start_PD if coordinates is None else coordinates.project(start_PD)
    rate = order.facts["rate"] * (start_PD.numel() / begin.numel()) ** 0.5
    work = optimizer.tune(client, begin, batches, learning_rate=rate, memory=memory, **weights)
    if coordinates is None:
        return (yield from work)
    rest_PD = start_PD - coordinates.lift(begin)
    tuned = yield from map_queries(
        work,
        lambda query: query._replace(prompts_KPD=rest_PD + coordinates.lift(query.prompts_KPD)),
        lambda query, answer: answer._replace(grad_KBPD=_project_each(coordinates, answer.grad_KBPD)),
    )
    return rest_PD + coordinates.lift(tuned)


def map_queries(
    work: Generator[Query, Answer, Result],
    on_query: Callable[[Query], Query],
    on_answer: Callable[[Query, Answer], Answer] = lambda query, answer: answer,
) -> Generator[Query, Answer, Result]:
    """Runs `work`, rewriting each query before the model and each answer after it.

    `on_answer` is given the query as `work` made it. An exception of the model is raised in `work` at its query.
    """
    try:
        query = next(work)
        while True:
            asked = on_query(query)
            try:
                answer = yield asked
            except Exception as error:
                query = work.throw(error)
            else:
                query = work.send(on_answer(query, answer))
    except StopIteration as end:
        return end.value


def _project_each(coordinates: Subspace, grad_KBPD: Tensor | None) -> Tensor | None:
    """[K, B, P, D] to [K, B, k], record by record: one product of all records rounds each by how many there are."""
    if grad_KBPD is None:
        return None
    grad_KBN = grad_KBPD.new_zeros(*grad_KBPD.shape[:2], coordinates.size)
    for row_N, grad_PD in zip(grad_KBN.flatten(0, 1), grad_KBPD.flatten(0, 1), strict=True):
        row_N.copy_(coordinates.project(grad_PD.clone()))
    return grad_KBN
