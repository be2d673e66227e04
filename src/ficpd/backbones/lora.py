"""LoRA, a change of the weights for every row: Hu et al., ICLR 2022, arXiv 2106.09685.

On the query and value projections of all blocks W x becomes W x + `SCALE` B A x, with A [rank, in] and B [out, rank]. All A
and B are one matrix of rows of the backbone's width, as a prompt is: module by module A and the transpose of B, flattened;
where that does not come out even, the last row ends in zeros that nothing reads. Every row of a batch may have weights of
its own, so that their gradients are per record after one ordinary backward.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ficpd import rng
from ficpd.backbones.projections import linear_sizes
from ficpd.errors import BackboneError
from ficpd.interfaces import Backbone
from ficpd.types import LORA

SCALE = 2.0
"""PEFT's `lora_alpha / r`, of which 16 and 8 are usual. To tune it is roughly to tune the learning rate (section 4.1)."""


class Adapters:
    """The linear modules of a model that LoRA changes: its query and value projections, in the model's order.

    find: gives the modules by name, on their first use.
    """

    def __init__(self, find: Callable[[], Mapping[str, nn.Module]], width: int):
        self.find, self.width, self.lock = find, width, threading.RLock()

    @cached_property
    def modules(self) -> Mapping[str, Any]:
        with self.lock:
            return self.find()

    @cached_property
    def per_rank(self) -> int:
        """The numbers of A and B together for each rank."""
        return sum(sum(linear_sizes(module)) for module in self.modules.values())

    def parameters(self, rank: int) -> int:
        """Counts the numbers of A and B together, as PEFT does: without the zeros at the end of rows."""
        return rank * self.per_rank

    def start(self, rank: int, seed: int) -> Tensor:
        """Makes weights [P, D] without effect, as PEFT does: A uniform within 1/√in (kaiming), B zero."""
        random, parts = rng.make_generator(seed, "lora"), []
        for module in self.modules.values():
            inputs, outputs = linear_sizes(module)
            drawn = 2 * torch.rand(rank, inputs, generator=random) - 1
            parts += [drawn.flatten() / inputs**0.5, torch.zeros(rank * outputs)]
        flat = torch.cat(parts)
        return F.pad(flat, (0, -len(flat) % self.width)).view(-1, self.width)

    def rank(self, rows: Tensor) -> int:
        """Returns the rank of weights [..., P, D]. Raises `BackboneError` if they are of another model."""
        P, D = rows.shape[-2:]
        rank = P * D // self.per_rank
        if self.width != D or -(-self.parameters(rank) // D) != P:
            raise BackboneError(
                f"{P} rows of {D} numbers are no LoRA weights of this backbone, which has {self.per_rank} for each rank, in "
                f"rows of {self.width}; use the backbone that they were tuned on"
            )
        return rank

    def split(self, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns A [..., rank, in] and the transpose of B, [..., rank, out], by module."""
        rank, flat, place, found = self.rank(rows), rows.flatten(-2), 0, {}
        for name, module in self.modules.items():
            parts = []
            for size in linear_sizes(module):
                parts.append(flat[..., place : place + rank * size].unflatten(-1, (rank, size)))
                place += rank * size
            found[name] = parts[0], parts[1]
        return found

    @contextmanager
    def applied(self, rows_SPD: Tensor) -> Iterator[None]:
        """Meanwhile each sequence of a forward runs with the weights of its own row; no rows at all change nothing. Other
        threads wait, because on one model they would add to each other's weights."""
        with self.lock, ExitStack() as hooks:
            if rows_SPD.shape[1]:
                for name, (down, up) in self.split(rows_SPD).items():
                    hooks.enter_context(self.modules[name].register_forward_hook(_adding(down, up)))
            yield


def _adding(down_SRN: Tensor, up_SRN: Tensor) -> Any:
    """Returns a forward hook that adds each sequence's own `SCALE` B A x."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output_STN: Tensor) -> Tensor:
        states = inputs[0]
        lower = states @ down_SRN.to(states.device, states.dtype).mT
        return output_STN + SCALE * (lower @ up_SRN.to(states.device, states.dtype))

    return hook


def short_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """Returns PEFT's `target_modules` for modules: the ends of their names, or whole names where others end so too."""
    ends = {name.rpartition(".")[2] for name in names}
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if alike == set(names) else names)


def lora_of(backbone: Backbone) -> Adapters:
    """Raises `BackboneError` for a kind of backbone whose weights cannot be changed."""
    if backbone.adapters is None or not backbone.adapters.modules:
        raise BackboneError(
            f"{backbone.name} has no LoRA: no linear layer of it is a query or value projection of each row. Use another "
            "backbone, or a method that tunes prompts (fedavg, ficpd, ...)."
        )
    return backbone.adapters


@contextmanager
def prompt_or_lora(backbone: Backbone, rows_SPD: Tensor, layer: int) -> Iterator[tuple[Tensor, int]]:
    """Yields the virtual tokens of each sequence and their layer. LoRA weights have none.

    With LoRA weights the layer is 0, and the backbone runs with them meanwhile.
    """
    if layer != LORA:
        yield rows_SPD, layer
        return
    with lora_of(backbone).applied(rows_SPD):
        yield rows_SPD[:, :0], 0
