"""Adam on the prompt's vectors (Kingma and Ba, ICLR 2015, arXiv 1412.6980, algorithm 1)."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ficpd.interfaces import ClientContext
from ficpd.types import Answer, Batch, Query

black_box = False


def tune(
    client: ClientContext,
    start_PD: Tensor,
    batches: Iterator[Batch],
    *,
    learning_rate: float,
    l2_weight: float = 0.0,
    proximal_weight: float = 0.0,
    memory: dict[str, Tensor] | None = None,
    betas: tuple[float, float] = (0.9, 0.99),
) -> Generator[Query, Answer, Tensor]:
    """Returns the tuned [P, D]. `memory` carries the moments from one call to the next.

    The gradient of a step is the records' mean + `l2_weight * prompt` + `proximal_weight * (prompt - start)` (FedProx).
    """
    memory = {} if memory is None else memory
    zero = torch.zeros_like(start_PD)
    mean, square = memory.get("adam_mean", zero), memory.get("adam_square", zero)
    step = int(memory.get("adam_step", torch.tensor(0)))
    prompt = start_PD
    for batch in batches:
        answer = yield Query(prompt[None], batch, grad=True)
        assert answer.grad_KBPD is not None
        gradient = client.private_mean(answer.grad_KBPD)[0] + l2_weight * prompt + proximal_weight * (prompt - start_PD)
        step += 1
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        unbiased_mean, unbiased_square = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
        prompt = prompt - learning_rate * unbiased_mean / (unbiased_square.sqrt() + 1e-8)
    memory |= {"adam_mean": mean, "adam_square": square, "adam_step": torch.tensor(step)}
    return prompt
