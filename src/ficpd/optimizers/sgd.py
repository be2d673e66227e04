"""Gradient descent preconditioned by public gradient scales.

Adam normalises by the gradient history, which is mostly noise under DP. This optimizer divides by `Subspace.grad_scale`,
which is known before training. A step is linear in the gradient, so noise averages out over clients and rounds (Li et
al., "Private Adaptive Optimization with Side Information", ICML 2022, arXiv 2202.05963).
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ficpd.interfaces import ClientContext
from ficpd.types import Answer, Batch, Query

black_box = False
STEP_MULTIPLE = 4.0
"""Makes Adam's learning rates fit: a mean gradient is about a quarter as long as one record's gradient."""


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
    """Returns the tuned [P, D], or [k] in a subspace.

    The gradient of a step is the records' mean + `l2_weight * prompt` + `proximal_weight * (prompt - start)`. Suits some
    tens of gradient directions: in the weakest of hundreds, noise divided by the scale is large.
    """
    prompt = start_PD
    scale = client.subspace.grad_scale if client.subspace is not None else torch.ones(())
    for batch in batches:
        answer = yield Query(prompt[None], batch, grad=True)
        assert answer.grad_KBPD is not None
        gradient = client.private_mean(answer.grad_KBPD)[0] + l2_weight * prompt + proximal_weight * (prompt - start_PD)
        prompt = prompt - STEP_MULTIPLE * learning_rate * gradient / scale
    return prompt
