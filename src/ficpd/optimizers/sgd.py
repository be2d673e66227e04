"""Gradient descent in the units of public gradients: a step is as long as the records agree, not as the noise is.

Adam divides each direction by what it sees there, which under noise is the noise: every step is then a full one. Here the
divisor is `Coordinates.typical`, known before any record was seen, so that a step stays linear in the gradient and noise
averages out over clients and rounds (preconditioning by public data: Li et al., "Private Adaptive Optimization with Side
Information", ICML 2022, arXiv 2202.05963).
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ficpd.interfaces import ClientContext
from ficpd.types import Answer, Batch, Query

black_box = False
AGREEMENT = 4.0
"""Records agree to about a quarter of what is typical of one of them: with this factor, Adam's rates serve here too."""


def tune(
    client: ClientContext,
    start_PD: Tensor,
    batches: Iterator[Batch],
    *,
    learning_rate: float,
    l2_weight: float = 0.0,
    proximal_weight: float = 0.0,
    memory: dict[str, Tensor] | None = None,
) -> Generator[Query, Answer, Tensor]:
    """The tuned [P, D], or [k] in coordinates. Per step, the gradient is the records' mean plus `l2_weight * prompt` plus
    `proximal_weight * (prompt - start)`; the step is `AGREEMENT * learning_rate` times it over what is typical of one
    record. Meant for some tens of gradient directions: of the whole prompt nothing is known to be typical, and in the
    weakest of hundreds of directions noise over what is typical is large (70.6 % where Adam had 72.1 %: 256 directions,
    300 records a site, ε = 2)."""
    prompt = start_PD
    typical = client.subspace.grad_scale if client.subspace is not None else torch.ones(())
    for batch in batches:
        answer = yield Query(prompt[None], batch, grad=True)
        assert answer.grad_KBPD is not None
        gradient = client.private_mean(answer.grad_KBPD)[0] + l2_weight * prompt + proximal_weight * (prompt - start_PD)
        prompt = prompt - AGREEMENT * learning_rate * gradient / typical
    return prompt
