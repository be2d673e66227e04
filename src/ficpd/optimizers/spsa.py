"""Estimates gradients from losses by SPSA with K directions a step (Spall, IEEE Trans. Automatic Control 1992).

    s_k = (L(y + c u_k) - L(y - c u_k)) / 2c,    g = mean_k s_k u_k,    u_k of ±1

All clients of a round draw the same directions from public names (seed, method, round, step): common random numbers.
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ficpd.interfaces import ClientContext
from ficpd.optimizers import LocalTrainingConfig
from ficpd.optimizers.search_space import SearchSpace, regularizer
from ficpd.types import Answer, Assignment, Batch, Query

black_box = True
STEP_MULTIPLE = 4.0
"""Lengthens steps: the loss bends less along few random directions than along its gradient."""


def num_candidates(training: LocalTrainingConfig) -> int:
    """Returns the candidates per record of a step."""
    return 2 * training.directions


def tune(
    client: ClientContext,
    start_PD: Tensor,
    batches: Iterator[Batch],
    *,
    training: LocalTrainingConfig,
    assignment: Assignment,
    l2_weight: float = 0.0,
    proximal_weight: float = 0.0,
) -> Generator[Query, Answer, Tensor]:
    """Returns the tuned [P, D].

    A step has the length of Adam's at this rate, times the share of the gradient that K directions show: about K/D
    (`step_scale`). The root mean square of all derivatives so far estimates the gradient's length.
    """
    space, K = SearchSpace(tuple(start_PD.shape), client.subspace), training.directions
    rate, apart = assignment.facts["rate"] * space.unit, training.apart(assignment) * space.unit
    y, squares = torch.zeros(space.size), []
    for step, batch in enumerate(batches):
        signs_KN = space.signs(K, training.public_seed, assignment.method, assignment.round, step)
        prompts_KPD = start_PD + space.lift(torch.cat([y + apart * signs_KN, y - apart * signs_KN]))
        answer = yield Query(prompts_KPD, batch)
        penalty_K1 = regularizer(prompts_KPD, start_PD, l2_weight, proximal_weight)[:, None]
        slope_K = client.private_mean(directional_derivatives(answer.loss_KB, apart)) * K**0.5
        slope_K = slope_K + directional_derivatives(penalty_K1, apart)[:, 0] * K**0.5
        squares.append(slope_K.square().mean())
        length = torch.stack(squares).mean().sqrt().clamp(min=1e-12)
        y = y - rate * step_scale(K, space.size) / length * (slope_K @ signs_KN)
    return start_PD + space.lift(y)


def directional_derivatives(loss_KB: Tensor, apart: float) -> Tensor:
    """Turns losses on both sides, [2K, B], into derivatives over √K, [K, B].

    A record's K derivatives together are in expectation as long as its gradient, so one clip norm fits both.
    """
    up, down = loss_KB.chunk(2)
    return (up - down) / (2 * apart * len(up) ** 0.5)


def step_scale(directions: int, size: int) -> float:
    """Scales the sum of derivatives to a step, where a step along the gradient has length √size."""
    return STEP_MULTIPLE * size**0.5 / (STEP_MULTIPLE * directions + size - 1)
