"""Mixes an update's L virtual tokens into L' by a random matrix with orthonormal rows.

A sketched update (Konečný et al., "Federated Learning: Strategies for Improving Communication Efficiency", 2016, arXiv
1610.05492, section 3). The matrix comes from a public seed, and the server maps back by its transpose. One seed serves
the run, so the part outside the L' directions is lost in every round.
"""

from typing import Any

import torch
from torch import Tensor

from ficpd import rng
from ficpd.errors import ConfigError
from ficpd.federation.compression.quantization import Bits, QuantizedCompression
from ficpd.registry import FrozenConfig
from ficpd.types import Prompt


class Config(FrozenConfig):
    """num_tokens: L', the rows sent for the virtual tokens.
    bits: bits per sent number; 32 means float32."""

    num_tokens: int = 5
    bits: Bits = 32


def build(config: Config, start: Prompt, seed: int, gradients: Any = None) -> QuantizedCompression:
    """Raises `ConfigError` unless the prompt has more than `num_tokens` virtual tokens."""
    outer, given = tuple(start.vectors_PD.shape), config.num_tokens
    tokens = outer[0] - start.head_rows
    if not 1 <= given < tokens:
        raise ConfigError(
            f"compression.num_tokens = {given}, expected 1 to {tokens - 1}: the prompt has {tokens} virtual tokens and "
            "fewer are sent; choose fewer, a longer prompt, or compression.name = none"
        )
    return QuantizedCompression(TokenProjection(tokens, given, outer, seed), outer, config.bits)


class TokenProjection:
    """Applies W [L', L] to the virtual tokens and leaves the head rows unchanged.

    Guarantees: W's rows are orthonormal, so projection never lengthens an update, and the sensitivity bound stays valid.
    """

    def __init__(self, tokens: int, kept: int, outer: tuple[int, ...], seed: int):
        self.tokens, self.kept = tokens, kept
        self.shape = (kept + outer[0] - tokens, outer[1])
        self.matrix = orthonormal_rows(kept, tokens, seed)

    def project(self, values: Tensor) -> Tensor:
        virtual, heads = values[..., : self.tokens, :], values[..., self.tokens :, :]
        return torch.cat([self.matrix.to(values.device) @ virtual, heads], dim=-2)

    def lift(self, values: Tensor) -> Tensor:
        virtual, heads = values[..., : self.kept, :], values[..., self.kept :, :]
        return torch.cat([self.matrix.to(values.device).T @ virtual, heads], dim=-2)


def orthonormal_rows(rows: int, columns: int, seed: int) -> Tensor:
    """Draws [rows, columns] in float32 with orthonormal rows, from a Gaussian matrix.

    Computes in float64 and fixes the signs, so that the seed alone decides (Mezzadri, Notices of the AMS 2007, arXiv
    math-ph/0609050, section 5).

    >>> W = orthonormal_rows(2, 5, 0)
    >>> torch.allclose(W @ W.T, torch.eye(2), atol=1e-6)
    True
    """
    gaussian = torch.randn(columns, rows, generator=rng.make_generator(seed, "projected"), dtype=torch.float64)
    directions, upper = torch.linalg.qr(gaussian)
    return (directions * torch.where(upper.diagonal() < 0, -1.0, 1.0)).T.float().contiguous()
