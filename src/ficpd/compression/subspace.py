"""A prompt of `dimension` numbers: prompt = p0 + z A, with A's rows orthonormal and from a public seed; z is tuned.

Training in a random subspace: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv
1804.08838. A is made as in feature hashing (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning",
ICML 2009, arXiv 0902.2206): each of the prompt's P·D numbers falls into one of k buckets, with a random sign. Here a
random permutation is cut into k nearly equal pieces instead of a hash, so that no bucket is empty or crowded.
"""

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd import seeds
from ficpd.compression.quantised import Bits, Quantised, outer_shape
from ficpd.errors import ConfigError
from ficpd.types import Prompt


class Config(BaseModel):
    """`dimension` is k, the size of what is tuned and travels; `bits` of each number, 32: float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dimension: int = 256
    bits: Bits = 32


def build(config: Config, start: Prompt, seed: int) -> Quantised:
    """Raises `ConfigError` unless the prompt has at least as many numbers as the subspace has dimensions."""
    outer = outer_shape(start)
    if not 1 <= config.dimension <= outer[0] * outer[1]:
        raise ConfigError(
            f"compression.dimension = {config.dimension}, expected 1 to {outer[0] * outer[1]}: the prompt is "
            f"{outer[0]} x {outer[1]} numbers; choose a smaller subspace or a longer prompt"
        )
    buckets = Buckets(config.dimension, outer, seed)
    return Quantised(buckets, outer, config.bits, buckets)


class Buckets:
    """A [k, P·D], one entry a column: ±1/√n in the row of the number's bucket, where n numbers share that bucket.

    Guarantees: rows have disjoint supports and unit length, so they are orthonormal: `down` never lengthens, `up` keeps
    every length, and `down(up(z))` is z to within the rounding of a float32. No dense matrix and no factorisation:
    O(P·D) memory, and integers from the seed alone, so that A is identical on every machine.
    """

    def __init__(self, size: int, outer: tuple[int, int], seed: int):
        self.size, self.shape, self.outer = size, (size,), outer
        numbers, random = outer[0] * outer[1], seeds.generator(seed, "subspace")
        self.bucket = torch.empty(numbers, dtype=torch.long)
        self.bucket[torch.randperm(numbers, generator=random)] = torch.arange(numbers) * size // numbers
        sign = 1 - 2 * torch.randint(2, (numbers,), generator=random)
        self.entry = sign / self.bucket.bincount(minlength=size).double().sqrt()[self.bucket]

    def down(self, values: Tensor) -> Tensor:
        """A v. Summed in float64: on one bucket of a long prompt float32 would be seen to drift."""
        bucket, entry = self.bucket.to(values.device), self.entry.to(values.device)
        weighted = values.flatten(-2).double() * entry
        summed = weighted.new_zeros(*weighted.shape[:-1], self.size).index_add(-1, bucket, weighted)
        return summed.to(values.dtype)

    def up(self, values: Tensor) -> Tensor:
        """Aᵀ z."""
        bucket, entry = self.bucket.to(values.device), self.entry.to(values.device)
        spread = values.double()[..., bucket] * entry
        return spread.unflatten(-1, self.outer).to(values.dtype)
