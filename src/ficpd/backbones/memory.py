"""Estimates the memory of a frozen model, and the positions of one forward pass that fit on a device.

The memory that autograd keeps is measured on three short forwards, because it depends on the model's code: a fused
attention keeps nothing for a pair of positions, and one written in Python keeps each of its steps. `Footprint` has the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ficpd.backbones.devices import free_bytes
from ficpd.interfaces import Backbone
from ficpd.types import padded_length

LENGTHS = 8, 16, 24
"""The numbers of virtual tokens of the three forwards."""
WORK = 1.5
"""The working memory of a block, per kept number: its backward has a gradient for each."""
LOGITS = 4
"""The float32 numbers of a logit with its loss: the logit, its probability and their gradients."""
SCORED = 0.25
"""The maximum share of positions with logits: the language head reads answers, not texts."""
USABLE = 0.8
"""The share of the free memory that a forward may use. Allocators lose some between tensors."""

CHUNK_TOKENS = {"cpu": 512, "cuda": 131072, "mps": 16384}
"""The maximum positions of one forward pass, with padding, by device. With 16 bits a CPU has twice as many."""
LEAST_TOKENS = {torch.float32: (32, 64), torch.bfloat16: (448, 448)}
"""The minimum positions of one forward pass on a CPU, and of the layers below a prompt. With fewer, the processor has other
kernels, whose sums round differently. In bfloat16 with AMX the boundary is near 400 positions."""
FULL_TOKENS = {"cpu": 512, "cuda": 2048, "mps": 2048}
"""The positions that use a device fully. If fewer fit into memory, blocks are computed again in the backward."""
FEWEST_TOKENS = 64
HALVES = (torch.bfloat16, torch.float16)
ROUGH = 64, 8
"""An upper estimate of a block's kept numbers per position: multiples of the width, and of the row's length."""


class Footprint(NamedTuple):
    """The bytes of a frozen model.

    weights: parameters and buffers.
    position: values of all blocks that autograd keeps for one position.
    pair: the same for each pair of positions of a row.
    state: the input of a block at one position.
    logits: the logits of one scored position; 0 without a language head.
    blocks: the number of blocks (not bytes); 0 if none can be computed again.
    """

    weights: int
    position: float
    pair: float
    state: int
    logits: int
    blocks: int

    def forward_bytes(
        self, rows: int, length: int, enters_at: int = 0, grad: bool = True, checkpointed: bool = False, scored: int = 0
    ) -> float:
        """Returns the bytes of a forward and its backward, without weights. scored: a row's positions with logits."""
        kept = rows * (length * self.position + length**2 * self.pair)
        block = kept / max(self.blocks, 1)
        above = (self.blocks - enters_at) / self.blocks if self.blocks else 1.0
        logits = rows * scored * self.logits
        if not grad:
            return WORK * block + logits
        if checkpointed and self.blocks:
            return above * self.blocks * rows * length * self.state + (1 + WORK) * block + logits
        return above * kept + WORK * block + logits

    def positions(self, free: float, length: int, checkpointed: bool = False) -> float:
        """Returns the positions that fit into `free` bytes, with gradients from layer 0 and rows of `length`."""
        row = self.forward_bytes(1, length, checkpointed=checkpointed) + SCORED * length * self.logits
        return free / row * length


def choose_chunk(
    backbone: Backbone, workers: int, keep_bytes: int, checkpoint: bool | None = None
) -> tuple[int, bool | None]:
    """Chooses the positions of one forward pass, and whether blocks are computed again in the backward.

    The positions are a power of two, so that small differences of free memory change nothing. A CPU with enough memory
    gets `CHUNK_TOKENS` without a measurement.

    workers: the number of parallel forwards.
    keep_bytes: the bytes of cached hidden states.
    checkpoint: None: chosen here.
    """
    kind = backbone.device.type
    most, full = most_tokens(backbone), FULL_TOKENS[kind]
    if not isinstance(getattr(backbone, "model", None), nn.Module):  # it runs elsewhere
        return most, checkpoint
    free = free_bytes(backbone.device)
    free = USABLE * (free - min(keep_bytes, free // 2)) / workers
    rough = ROUGH[0] * backbone.width + ROUGH[1] * backbone.max_tokens
    if kind == "cpu" and most * rough * 4 * max(backbone.num_blocks, 1) < free:
        return most, checkpoint
    found, tokens = footprint(backbone), FEWEST_TOKENS
    for again in (False, True) if checkpoint is None else (checkpoint,):
        tokens, checkpoint = fitting_tokens(found, free, backbone, again), again
        if tokens >= full:
            break
    return tokens, checkpoint


def fitting_tokens(found: Footprint, free: float, backbone: Backbone, checkpointed: bool) -> int:
    """Returns the largest power of two of positions that fits into `free` bytes, within the device's bounds."""
    fits = int(found.positions(free, longest_row(backbone), checkpointed))
    return max(FEWEST_TOKENS, min(1 << max(fits.bit_length() - 1, 0), most_tokens(backbone)))


def most_tokens(backbone: Backbone) -> int:
    """Returns the positions of one forward pass at most."""
    most = CHUNK_TOKENS[backbone.device.type]
    return 2 * most if backbone.device.type == "cpu" and _dtype(backbone) in HALVES else most


def least_tokens(backbone: Backbone) -> tuple[int, int]:
    """Returns the positions of one forward pass at least, and of the layers below a prompt.

    Both are 0 on a GPU, and for a model that runs elsewhere.
    """
    dtype = _dtype(backbone)
    return LEAST_TOKENS.get(dtype, (0, 0)) if dtype and backbone.device.type == "cpu" else (0, 0)


def _dtype(backbone: Backbone) -> torch.dtype | None:
    """Returns the dtype of a model's weights; None for a model that runs elsewhere."""
    model = getattr(backbone, "model", None)
    return next((part.dtype for part in model.parameters()), None) if isinstance(model, nn.Module) else None


def longest_row(backbone: Backbone) -> int:
    """Returns the positions of the longest row. For images this is an image with a short prompt."""
    image = backbone.modality == "image"
    return padded_length(backbone.max_tokens if not image else getattr(backbone, "length", 0) + LENGTHS[-1])


def weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of parameters and buffers. Shared ones count once."""
    return sum(part.nbytes for part in {id(part): part for part in (*model.parameters(), *model.buffers())}.values())


def footprint(backbone: Backbone) -> Footprint:
    """Measures a backbone by three forwards of one synthetic record."""
    (record,) = backbone.synthetic_inputs(1, 0)
    if backbone.modality == "image":
        item = backbone.preprocess_image(record, LENGTHS[-1])
    else:
        item = backbone.tokenize(record, None, "", None, LENGTHS[-1])
    hidden = backbone.encode_prefix([item], 0)

    def run(virtual: int) -> Tensor:
        rows_SPD = torch.zeros(1, virtual, backbone.width, device=backbone.device, requires_grad=True)
        return backbone.forward(rows_SPD, hidden, [item], 0).features_RD

    return measure(run, backbone.model, padded_length(item.length), backbone.num_blocks, backbone.width)


@torch.enable_grad()
def measure(run: Callable[[int], Tensor], model: nn.Module, text: int, blocks: int, width: int) -> Footprint:
    """Measures a model, also on the meta device. run: the forward of one row, by its number of virtual tokens.

    text: the row's other positions."""
    own = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}
    first, second, third = (_kept_bytes(lambda n=n: run(n), own) for n in LENGTHS)
    step, lengths = LENGTHS[1] - LENGTHS[0], [text + n for n in LENGTHS]
    pair = max((third - 2 * second + first) / (2 * step**2), 0.0)
    position = max((second - first) / step - pair * (lengths[0] + lengths[1]), 0.0)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    logits = LOGITS * 4 * len(head.weight) if head is not None else 0
    state = width * next(model.parameters()).dtype.itemsize
    return Footprint(weight_bytes(model), position, pair, state, logits, blocks)


def _kept_bytes(run: Callable[[], Tensor], own: set[int]) -> int:
    """Returns the bytes that autograd keeps for the backward of a forward, without the storages in `own`."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)
