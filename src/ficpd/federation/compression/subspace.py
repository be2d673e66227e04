"""Tunes z of `dimension` numbers: prompt = p0 + z A, where A is public and has orthonormal rows.

Training in a random subspace: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv
1804.08838. A is built as in feature hashing (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning",
ICML 2009, arXiv 0902.2206): each of the prompt's P·D numbers falls into one of k buckets with a random sign. A random
permutation cut into k nearly equal pieces replaces the hash, so that no bucket is empty.

With `directions = "gradient"`, A's rows are the leading directions of the prompt's gradients on synthetic records (words
from the vocabulary, every answer in turn). They are public and align better with real gradients (Zhou, Wu and Banerjee,
ICLR 2021, arXiv 2007.03813; Yu et al., ICLR 2021, arXiv 2102.12677, who use public data).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ficpd import rng
from ficpd.errors import ConfigError
from ficpd.federation.compression.quantization import Bits, QuantizedCompression
from ficpd.registry import FrozenConfig
from ficpd.types import Prompt

Gradients = Callable[[int], Tensor]
"""Returns M public gradients [M, P, D] for a number M."""


class Config(FrozenConfig):
    """dimension: k, the numbers tuned and sent.
    directions: "gradient", from the backbone's gradients on synthetic records, or "random".
    bits: bits per sent number; 32 means float32.
    """

    dimension: int = 256
    directions: Literal["gradient", "random"] = "gradient"
    bits: Bits = 32


def build(
    config: Config, start: Prompt, seed: int, gradients: "Gradients | GradientSubspace | None" = None
) -> QuantizedCompression:
    """Raises `ConfigError` if the prompt has fewer than `dimension` numbers.

    `gradients`: their source, or a subspace computed before.
    """
    outer = tuple(start.vectors_PD.shape)
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
    """The leading right singular vectors of gradients [M, P, D], as A [k, P·D].

    One direction is often ten times longer than all others. It would fill the clip norm, and noise would hide the others.
    `grad_scale`, the gradients' RMS along each direction, lets clipping and tuning rescale each direction.

    Guarantees: rows are orthonormal and depend on no record. The factorisation may differ in its last bits between
    machines, so the server computes A once and sends it to all clients.
    """

    def __init__(self, rows: Tensor, grad_scale: Tensor, outer: tuple[int, ...]):
        self.size, self.shape, self.outer = len(rows), (len(rows),), outer
        self.rows, self.grad_scale = rows, grad_scale

    @staticmethod
    def of(gradients_MPD: Tensor, size: int) -> "GradientSubspace":
        flat = gradients_MPD.flatten(1).double()
        _, sizes, rows = torch.linalg.svd(flat, full_matrices=False)
        sizes, rows = sizes[:size], rows[:size]
        sizes = torch.cat([sizes, sizes[-1:].expand(size - len(sizes))]).clamp(min=1e-3 * sizes[0])
        grad_scale = (sizes / len(flat) ** 0.5).float()
        if len(rows) < size:  # fewer gradients than dimensions: completes the basis
            rows = torch.linalg.qr(torch.cat([rows, torch.eye(flat.shape[1], dtype=rows.dtype)]).T)[0].T[:size]
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        return GradientSubspace((rows * largest.sign()).float(), grad_scale, tuple(gradients_MPD.shape[1:]))

    def project(self, values: Tensor) -> Tensor:
        return values.flatten(-2) @ self.rows.T.to(values.device, values.dtype)

    def lift(self, values: Tensor) -> Tensor:
        return (values @ self.rows.to(values.device, values.dtype)).unflatten(-1, self.outer)


class SparseRandomSubspace:
    """A [k, P·D] with one entry a column: ±1/√n in the row of the number's bucket, which n numbers share.

    Guarantees: rows have disjoint supports and unit length, so they are orthonormal. `project` never lengthens, `lift`
    keeps every length, and `project(lift(z))` is z to within the rounding of a float32. A needs O(P·D) memory and is
    identical on every machine.
    """

    def __init__(self, size: int, outer: tuple[int, ...], seed: int):
        self.size, self.shape, self.outer, self.grad_scale = size, (size,), outer, torch.ones(size)
        numbers, random = outer[0] * outer[1], rng.make_generator(seed, "subspace")
        self.bucket = torch.empty(numbers, dtype=torch.long)
        self.bucket[torch.randperm(numbers, generator=random)] = torch.arange(numbers) * size // numbers
        sign = 1 - 2 * torch.randint(2, (numbers,), generator=random)
        self.entry = sign / self.bucket.bincount(minlength=size).double().sqrt()[self.bucket]

    def project(self, values: Tensor) -> Tensor:
        """Returns A v, summed in float64 because float32 drifts on the large buckets of long prompts."""
        bucket, entry = self.bucket.to(values.device), self.entry.to(values.device)
        weighted = values.flatten(-2).double() * entry
        summed = weighted.new_zeros(*weighted.shape[:-1], self.size).index_add(-1, bucket, weighted)
        return summed.to(values.dtype)

    def lift(self, values: Tensor) -> Tensor:
        """Returns Aᵀ z."""
        bucket, entry = self.bucket.to(values.device), self.entry.to(values.device)
        spread = values.double()[..., bucket] * entry
        return spread.unflatten(-1, self.outer).to(values.dtype)
