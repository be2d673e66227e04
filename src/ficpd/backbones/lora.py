"""LoRA with separate weights for every row: Hu et al., ICLR 2022, arXiv 2106.09685.

On the query and value projections of all blocks W x becomes W x + `SCALE` B A x, with A [rank, in] and B [out, rank]. All A
and B are stored as one matrix of the backbone's width, like a prompt: module by module A and the transpose of B, flattened.
The last row is padded with zeros. Every row of a batch has a copy of the weights, so that one backward gives gradients per
record.
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
"""PEFT's `lora_alpha / r`, usually 16 / 8. Tuning it is roughly the same as tuning the learning rate (section 4.1)."""


class Adapters:
    """The linear modules that LoRA changes: the query and value projections, in the model's order.

    find: returns the modules by name. It is called at the first use.
    """

    def __init__(self, find: Callable[[], Mapping[str, nn.Module]], width: int):
        self.find, self.width, self.lock = find, width, threading.RLock()

    @cached_property
    def modules(self) -> Mapping[str, Any]:
        with self.lock:
            return self.find()

    @cached_property
    def per_rank(self) -> int:
        """Returns the number of parameters of all A and B for each rank."""
        return sum(sum(linear_sizes(module)) for module in self.modules.values())

    def parameters(self, rank: int) -> int:
        """Returns the number of parameters of all A and B, without padding, as PEFT counts them."""
        return rank * self.per_rank

    def start(self, rank: int, seed: int) -> Tensor:
        """Makes initial weights [P, D] like PEFT: A uniform within 1/√in (kaiming), B zero. They have no effect."""
        random, parts = rng.make_generator(seed, "lora"), []
        for module in self.modules.values():
            inputs, outputs = linear_sizes(module)
            drawn = 2 * torch.rand(rank, inputs, generator=random) - 1
            parts += [drawn.flatten() / inputs**0.5, torch.zeros(rank * outputs)]
        flat = torch.cat(parts)
        return F.pad(flat, (0, -len(flat) % self.width)).view(-1, self.width)

    def rank(self, rows: Tensor) -> int:
        """Returns the rank of weights [..., P, D]. Raises `BackboneError` for weights of another model."""
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
        """Runs each sequence of a forward inside the context with its row's weights; without rows it changes nothing.

        Other threads wait, because the hooks change the model."""
        with self.lock, ExitStack() as hooks:
            if rows_SPD.shape[1]:
                for name, (down, up) in self.split(rows_SPD).items():
                    hooks.enter_context(self.modules[name].register_forward_hook(_adding(down, up)))
            yield


def _adding(down_SRN: Tensor, up_SRN: Tensor) -> Any:
    """Returns a forward hook that adds `SCALE` B A x, with each sequence's A and B."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output_STN: Tensor) -> Tensor:
        states = inputs[0]
        lower = states @ down_SRN.to(states.device, states.dtype).mT
        return output_STN + SCALE * (lower @ up_SRN.to(states.device, states.dtype))

    return hook


def short_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """Returns PEFT's `target_modules`: the last parts of the names, or whole names if other modules share them."""
    ends = {name.rpartition(".")[2] for name in names}
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if alike == set(names) else names)


def lora_of(backbone: Backbone) -> Adapters:
    """Returns a backbone's adapters. Raises `BackboneError` if it has no query and value projections."""
    if backbone.adapters is None or not backbone.adapters.modules:
        raise BackboneError(
            f"{backbone.name} has no LoRA: no linear layer of it is a query or value projection of each row. Use another "
            "backbone, or a method that tunes prompts (fedavg, ficpd, ...)."
        )
    return backbone.adapters


@contextmanager
def prompt_or_lora(backbone: Backbone, rows_SPD: Tensor, layer: int) -> Iterator[tuple[Tensor, int]]:
    """Yields the virtual tokens [S, P, D] of each sequence, and their layer.

    LoRA weights have no virtual tokens: the layer is 0, and the backbone runs with the weights inside the context.
    """
    if layer != LORA:
        yield rows_SPD, layer
        return
    with lora_of(backbone).applied(rows_SPD):
        yield rows_SPD[:, :0], 0
