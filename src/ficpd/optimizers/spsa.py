"""Two-point estimates of the gradient from losses alone: SPSA (Spall, "Multivariate Stochastic Approximation Using a
Simultaneous Perturbation Gradient Approximation", IEEE Trans. Automatic Control 1992), with K directions a step.

    s_k = (L(y + c u_k) - L(y - c u_k)) / 2c,    g = mean_k s_k u_k,    u_k of ±1

The directions come from public names (seed, method, round, step), so that all clients of a round try the same ones (common
random numbers): what their records differ in is then all that their estimates differ in.
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ficpd.interfaces import ClientContext
from ficpd.optimizers import LocalTrainingConfig
from ficpd.optimizers.search_space import SearchSpace, regularizer
from ficpd.types import Answer, Assignment, Batch, Query

black_box = True
FARTHER = 4.0
"""Few directions of many bend less than the gradient's own, and bear a longer step: on the tiny backbone (48 numbers, 30
steps of 4 directions, Adam's rate; loss at the start 0.883) 0.813 at 1, 0.757 at 2, 0.672 at 4; of 8 numbers 0.760, 0.737,
0.728."""


def num_candidates(training: LocalTrainingConfig) -> int:
    """Candidates about each record of a step."""
    return 2 * training.directions


def tune(
    client: ClientContext,
    start_PD: Tensor,
    batches: Iterator[Batch],
    *,
    training: LocalTrainingConfig,
    order: Assignment,
    l2_weight: float = 0.0,
    proximal_weight: float = 0.0,
) -> Generator[Query, Answer, Tensor]:
    """The tuned [P, D]. A step goes by what one of Adam's at the same rate would, as far as the directions that were tried
    show it: of D numbers' gradient K of them show a share of about K/D (`stride`). How long the gradient is, the slopes so
    far tell."""
    space, K = SearchSpace(tuple(start_PD.shape), client.subspace), training.directions
    rate, apart = order.facts["rate"] * space.unit, training.apart(order) * space.unit
    y, squares = torch.zeros(space.size), []
    for step, batch in enumerate(batches):
        signs_KN = space.signs(K, training.public_seed, order.method, order.round, step)
        prompts_KPD = start_PD + space.lift(torch.cat([y + apart * signs_KN, y - apart * signs_KN]))
        answer = yield Query(prompts_KPD, batch)
        slope_K = client.private_mean(directional_derivatives(answer.loss_KB, apart)) * K**0.5
        slope_K = (
            slope_K
            + directional_derivatives(regularizer(prompts_KPD, start_PD, l2_weight, proximal_weight)[:, None], apart)[
                :, 0
            ]
            * K**0.5
        )
        squares.append(slope_K.square().mean())
        y = y - rate * step_scale(K, space.size) / root_mean(squares) * (slope_K @ signs_KN)
    return start_PD + space.lift(y)


def directional_derivatives(loss_KB: Tensor, apart: float) -> Tensor:
    """[2K, B], the losses on both sides, to [K, B]: slopes over √K, so that a record's K numbers together are as long as
    its gradient (in expectation), and a clip norm for gradients fits them."""
    up, down = loss_KB.chunk(2)
    return (up - down) / (2 * apart * len(up) ** 0.5)


def step_scale(directions: int, size: int) -> float:
    """Times the sum of slopes in units of the gradient's length: the step, where one along the gradient has length √n. With
    `FARTHER` = 1 it would be that one's projection."""
    return FARTHER * size**0.5 / (FARTHER * directions + size - 1)


def root_mean(squares: list[Tensor]) -> Tensor:
    """Of the squares so far; never zero."""
    return torch.stack(squares).mean().sqrt().clamp(min=1e-12)
