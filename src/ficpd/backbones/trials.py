"""Compares a common forward pass with one pass for each row, on random numbers.

A server sends prompts, readouts and label priors, and could choose numbers that hide a difference: a readout of zeros makes
all losses equal and all gradients zero. So a trial replaces them by random numbers of the same shape.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ficpd.types import LABEL_PRIOR, ModelOutput, Query

Numbers = tuple[Tensor, Tensor | None, ModelOutput | None]
"""Losses [R], gradients [R, P, D] and outputs of R rows."""
SCALE = 0.05
"""The standard deviation of a trial's prompts, similar to word embeddings and LoRA weights."""


def with_random_numbers(query: Query) -> Query:
    """Replaces the prompts and the readout by random numbers, and removes the label prior."""
    random, batch, prompts_KPD = torch.Generator().manual_seed(0), query.batch, query.prompts_KPD

    def like(values: Tensor, scale: float) -> Tensor:
        return (scale * torch.randn(values.shape, generator=random)).to(values)

    if prompts_KPD.is_floating_point():
        prompts_KPD = like(prompts_KPD, SCALE)
    if (readout_CD := batch.readout_CD) is not None:
        readout_CD = like(readout_CD, readout_CD.shape[-1] ** -0.5)
    extra = {name: values for name, values in batch.extra.items() if name != LABEL_PRIOR}
    return query._replace(prompts_KPD=prompts_KPD, batch=replace(batch, readout_CD=readout_CD, extra=extra))


def same_bits(one: Numbers, other: Numbers) -> bool:
    """Tells whether losses, gradients and outputs have the same bits, and every row has a gradient other than zero."""

    def tensors(numbers: Numbers) -> list[Tensor]:
        loss_R, grad_RPD, outputs = numbers
        return [t for t in (loss_R, grad_RPD, *(outputs.parts() if outputs else ())) if t is not None]

    pairs = zip(tensors(one), tensors(other), strict=True)
    shown = one[1] is None or bool((one[1].abs().amax((1, 2)) > 0).all())
    return shown and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
