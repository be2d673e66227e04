"""Derives seeds and random generators from names. No random draw uses global state.

>>> derive_seed(7, "batches", "site-3", 2) == derive_seed(7, "batches", "site-3", 2)
True
>>> derive_seed(7, "batches", "site-3", 2) == derive_seed(7, "batches", "site-3", 3)
False
"""

import hashlib
from typing import Literal, Protocol

import torch
from torch import Tensor


def derive_seed(*names: object) -> int:
    """Derives a 63-bit seed from names and numbers; equal names give equal seeds on every machine."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(*names: object) -> torch.Generator:
    """Returns a CPU generator seeded by `derive_seed(*names)`."""
    return torch.Generator().manual_seed(derive_seed(*names))


class NoiseSource(Protocol):
    """A private random stream for sampling and noise. The server knows nothing that it could be derived from."""

    @property
    def kind(self) -> Literal["simulated", "cryptographic"]: ...
    def permutation(self, number: int) -> Tensor:
        """Returns 0..number-1 in a random order."""
        ...

    def poisson_sample(self, number: int, rate: float) -> Tensor:
        """Draws each of 0..number-1 independently with probability `rate`."""
        ...

    def add_gaussian(self, values: Tensor, deviation: float) -> Tensor:
        """Adds Gaussian noise of this standard deviation; the result is float32 on the CPU."""
        ...

    def add_discrete_gaussian(self, whole: Tensor, deviation: float) -> Tensor:
        """Adds discrete Gaussian noise (arXiv 2004.00010) to whole numbers, int64 on the CPU."""
        ...
