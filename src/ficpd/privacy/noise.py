"""Noise sources: a derived seed in simulations, the operating system at real sites."""

import math
import os
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ficpd import rng
from ficpd.errors import needs

GRID_BITS = 40
"""Cryptographic noise lies on a grid of 2^-GRID_BITS deviations (rounded down to a power of two)."""
MARGIN = 1 + 1e-4
"""Factor on the deviation, for the sensitivity that rounding to the grid adds."""


class SeededNoise:
    """A stream from a seed, so that a simulation reproduces. The owner of the seed can subtract the noise."""

    kind: Literal["simulated"] = "simulated"

    def __init__(self, *names: object):
        self.generator = rng.make_generator(*names)

    def permutation(self, number: int) -> Tensor:
        return torch.randperm(number, generator=self.generator)

    def poisson_sample(self, number: int, rate: float) -> Tensor:
        return torch.nonzero(torch.rand(number, generator=self.generator, dtype=torch.float64) < rate).flatten()

    def add_gaussian(self, values: Tensor, deviation: float) -> Tensor:
        values = values.detach().cpu().double()  # rounded to float32 only after the noise, as post-processing
        return (values + deviation * torch.randn(values.shape, generator=self.generator)).float()

    def add_discrete_gaussian(self, whole: Tensor, deviation: float) -> Tensor:
        """Adds rounded Gaussian noise. On a fine grid it is nearly a discrete Gaussian."""
        noise = deviation * torch.randn(whole.shape, generator=self.generator, dtype=torch.float64)
        return whole + noise.round().to(torch.int64)


class SecureNoise:
    """The operating system's cryptographic source, with Gaussian noise from OpenDP's sampler.

    OpenDP rounds the values to a grid and adds an exact discrete Gaussian (Canonne, Kamath and Steinke, NeurIPS 2020,
    arXiv 2004.00010), so that the low bits of a floating-point sum reveal nothing (Mironov, CCS 2012).

    Guarantees: no seed repeats the stream; a value of sensitivity s released with deviation z·s costs at most the zCDP of
    a Gaussian of multiplier z, 1/(2z²) (`tests/privacy/test_noise.py`).
    """

    kind: Literal["cryptographic"] = "cryptographic"

    def __init__(self) -> None:
        opendp()

    def permutation(self, number: int) -> Tensor:
        return torch.from_numpy(np.argsort(_words(number)))

    def poisson_sample(self, number: int, rate: float) -> Tensor:
        chosen = np.ones(number, bool) if rate >= 1 else _words(number) < np.uint64(math.floor(rate * 2.0**64))
        return torch.from_numpy(np.flatnonzero(chosen))

    def add_gaussian(self, values: Tensor, deviation: float) -> Tensor:
        flat = values.detach().cpu().double().flatten()
        noised = gaussian_measurement(len(flat), deviation)(flat.tolist())
        return torch.tensor(noised, dtype=torch.float64).view(values.shape).float()

    def add_discrete_gaussian(self, whole: Tensor, deviation: float) -> Tensor:
        noised = discrete_gaussian_measurement(whole.numel(), deviation)(whole.flatten().tolist())
        return torch.tensor(noised, dtype=torch.int64).view(whole.shape)


def opendp() -> Any:
    """Returns OpenDP. Raises `PackageError` if it is missing."""
    with needs('privacy.noise = "cryptographic"', "secure-noise"):
        import opendp.prelude as prelude

    dp: Any = prelude  # its names are not typed as exported
    dp.enable_features("contrib")
    return dp


@lru_cache(maxsize=64)
def gaussian_measurement(size: int, deviation: float) -> Any:
    """Builds OpenDP's Gaussian measurement for `size` numbers; its `map` gives the zCDP for an L2 sensitivity."""
    dp = opendp()
    domain = dp.vector_domain(dp.atom_domain(T=float, nan=False), size=size)
    grid = math.floor(math.log2(deviation)) - GRID_BITS
    return dp.m.make_gaussian(domain, dp.l2_distance(T=float), scale=deviation * MARGIN, k=grid)


@lru_cache(maxsize=64)
def discrete_gaussian_measurement(size: int, deviation: float) -> Any:
    """Builds OpenDP's discrete Gaussian for `size` whole numbers; its `map` gives the zCDP for an L2 sensitivity."""
    dp = opendp()
    domain = dp.vector_domain(dp.atom_domain(T="i64"), size=size)
    return dp.m.make_gaussian(domain, dp.l2_distance(T=float), scale=deviation)


def _words(number: int) -> np.ndarray:
    """Draws uniform 64-bit numbers."""
    return np.frombuffer(os.urandom(8 * number), np.uint64)
