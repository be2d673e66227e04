"""A prompt of `dimension` numbers: prompt = p0 + z A, with A's rows orthonormal and from a public seed; z is tuned.

Training in a random subspace: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv
1804.08838. A is made as in feature hashing (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning",
ICML 2009, arXiv 0902.2206): each of the prompt's P·D numbers falls into one of k buckets, with a random sign. Here a
random permutation is cut into k nearly equal pieces instead of a hash, so that no bucket is empty or crowded.

With `directions = "gradient"`, A's rows are the leading directions of the prompt's gradients on made-up records (words
drawn from the vocabulary, every possible answer in turn): public, and far better aligned with what real records ask
for (Zhou, Wu and Banerjee, ICLR 2021, arXiv 2007.03813; Yu et al., ICLR 2021, arXiv 2102.12677, who use public data).
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd import rng
from ficpd.errors import ConfigError
from ficpd.federation.compression.quantization import Bits, QuantizedCompression, projected_shape
from ficpd.types import Prompt

Gradients = Callable[[int], Tensor]
"""How many, to that many public gradients [M, P, D]."""


class Config(BaseModel):
    """`dimension` is k, the size of what is tuned and travels; `bits` of each number, 32: float32.

    `directions`: "gradient", from the backbone's own gradients on made-up records, or "random".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    dimension: int = 256
    directions: Literal["gradient", "random"] = "gradient"
    bits: Bits = 32


def build(
    config: Config, start: Prompt, seed: int, gradients: "Gradients | GradientSubspace | None" = None
) -> QuantizedCompression:
    """`gradients`: where to get them, or directions that were found already. Raises `ConfigError` unless the prompt has at
    least as many numbers as the subspace has dimensions."""
    outer = projected_shape(start)
    if not 1 <= config.dimension <= outer[0] * outer[1]:
        raise ConfigError(
            f"compression.dimension = {config.dimension}, expected 1 to {outer[0] * outer[1]}: the prompt is "
            f"{outer[0]} x {outer[1]} numbers; choose a smaller subspace or a longer prompt"
        )
    if config.directions == "random":
        basis = SparseRandomSubspace(config.dimension, outer, seed)
    elif isinstance(gradients, GradientSubspace):
        basis = gradients
    elif gradients is None:
        raise ConfigError('compression.directions = "gradient" needs a backbone with gradients; use "random"')
    else:
        basis = GradientSubspace.of(gradients(max(256, 2 * config.dimension)), config.dimension)
    return QuantizedCompression(basis, outer, config.bits, basis)


class GradientSubspace:
    """The `size` leading right singular vectors of gradients [M, P, D], as A [k, P·D].

    One direction is often ten times longer than the rest together (for a classification: towards one answer). It would
    fill the clip norm, and the noise would drown the others; `typical`, the gradients' root mean square along each
    direction, tells how long each is, so that clipping and tuning can do justice to all.

    Guarantees: rows are orthonormal; none of it depends on a record. The factorisation may differ between machines in
    its last bits, and where singular values are equal: who starts a federation computes A once, and hands it to all.
    """

    def __init__(self, rows: Tensor, typical: Tensor, outer: tuple[int, ...]):
        self.size, self.shape, self.outer = len(rows), (len(rows),), outer
        self.rows, self.grad_scale = rows, typical

    @staticmethod
    def of(gradients_MPD: Tensor, size: int) -> "GradientSubspace":
        flat = gradients_MPD.flatten(1).double()
        _, sizes, rows = torch.linalg.svd(flat, full_matrices=False)
        sizes, rows = sizes[:size], rows[:size]
        sizes = torch.cat([sizes, sizes[-1:].expand(size - len(sizes))]).clamp(min=1e-3 * sizes[0])
        typical = (sizes / len(flat) ** 0.5).float()
        if len(rows) < size:  # fewer gradients than dimensions: a short prompt, all of whose directions are wanted
            rows = torch.linalg.qr(torch.cat([rows, torch.eye(flat.shape[1], dtype=rows.dtype)]).T)[0].T[:size]
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        return GradientSubspace((rows * largest.sign()).float(), typical, tuple(gradients_MPD.shape[1:]))

    def project(self, values: Tensor) -> Tensor:
        return values.flatten(-2) @ self.rows.T.to(values.device, values.dtype)

    def lift(self, values: Tensor) -> Tensor:
        return (values @ self.rows.to(values.device, values.dtype)).unflatten(-1, self.outer)


class SparseRandomSubspace:
    """A [k, P·D], one entry a column: ±1/√n in the row of the number's bucket, where n numbers share that bucket.

    Guarantees: rows have disjoint supports and unit length, so they are orthonormal: `down` never lengthens, `up` keeps
    every length, and `project(lift(z))` is z to within the rounding of a float32. No dense matrix and no factorisation:
    O(P·D) memory, and integers from the seed alone, so that A is identical on every machine.
    """

    def __init__(self, size: int, outer: tuple[int, int], seed: int):
        self.size, self.shape, self.outer, self.grad_scale = size, (size,), outer, torch.ones(size)
        numbers, random = outer[0] * outer[1], rng.make_generator(seed, "subspace")
        self.bucket = torch.empty(numbers, dtype=torch.long)
        self.bucket[torch.randperm(numbers, generator=random)] = torch.arange(numbers) * size // numbers
        sign = 1 - 2 * torch.randint(2, (numbers,), generator=random)
        self.entry = sign / self.bucket.bincount(minlength=size).double().sqrt()[self.bucket]

    def project(self, values: Tensor) -> Tensor:
        """A v. Summed in float64: on one bucket of a long prompt float32 would be seen to drift."""
        bucket, entry = self.bucket.to(values.device), self.entry.to(values.device)
        weighted = values.flatten(-2).double() * entry
        summed = weighted.new_zeros(*weighted.shape[:-1], self.size).index_add(-1, bucket, weighted)
        return summed.to(values.dtype)

    def lift(self, values: Tensor) -> Tensor:
        """Aᵀ z."""
        bucket, entry = self.bucket.to(values.device), self.entry.to(values.device)
        spread = values.double()[..., bucket] * entry
        return spread.unflatten(-1, self.outer).to(values.dtype)
