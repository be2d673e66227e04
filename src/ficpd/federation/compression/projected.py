"""Fewer virtual tokens travel: the update's L rows are mixed into L' by a random matrix with orthonormal rows.

A sketched update (Konečný et al., "Federated Learning: Strategies for Improving Communication Efficiency", 2016, arXiv
1610.05492, section 3): the matrix comes from a public seed, so that only the mixed rows are sent, and the server maps
back by the transpose. The seed is one for the run: what lies outside the L' directions is lost in every round.
"""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd import rng
from ficpd.errors import ConfigError
from ficpd.federation.compression.quantization import Bits, QuantizedCompression, projected_shape
from ficpd.types import Prompt


class Config(BaseModel):
    """`num_tokens` is L', how many rows travel for the virtual tokens; `bits` of each number, 32: float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_tokens: int = 5
    bits: Bits = 32


def build(config: Config, start: Prompt, seed: int, gradients: Any = None) -> QuantizedCompression:
    """Raises `ConfigError` unless the prompt has more virtual tokens than travel."""
    outer, given = projected_shape(start), config.num_tokens
    tokens = outer[0] - start.head_rows
    if not 1 <= given < tokens:
        raise ConfigError(
            f"compression.num_tokens = {given}, expected 1 to {tokens - 1}: the prompt has {tokens} virtual tokens and "
            "fewer than these travel; choose fewer, a longer prompt, or compression.name = none"
        )
    return QuantizedCompression(TokenProjection(tokens, given, outer, seed), outer, config.bits)


class TokenProjection:
    """W [L', L] on the virtual tokens; the head rows follow as they are.

    Guarantees: W's rows are orthonormal, so the projected update is never longer than the update: a clip norm, and with
    it a sensitivity, that holds before holds after.
    """

    def __init__(self, tokens: int, kept: int, outer: tuple[int, int], seed: int):
        self.tokens, self.kept = tokens, kept
        self.shape = (kept + outer[0] - tokens, outer[1])
        self.matrix = orthonormal_rows(kept, tokens, seed)

    def project(self, values: Tensor) -> Tensor:
        matrix, virtual, heads = self.matrix.to(values.device), *_split(values, self.tokens)
        return torch.cat([matrix @ virtual, heads], dim=-2)

    def lift(self, values: Tensor) -> Tensor:
        matrix, virtual, heads = self.matrix.to(values.device), *_split(values, self.kept)
        return torch.cat([matrix.T @ virtual, heads], dim=-2)


def orthonormal_rows(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns], float32: the rows of a Gaussian matrix made orthonormal (in float64, each sign that of the draw,
    so that the seed alone decides; Mezzadri, Notices of the AMS 2007, arXiv math-ph/0609050, section 5).

    >>> W = orthonormal_rows(2, 5, 0)
    >>> torch.allclose(W @ W.T, torch.eye(2), atol=1e-6)
    True
    """
    gaussian = torch.randn(columns, rows, generator=rng.make_generator(seed, "projected"), dtype=torch.float64)
    directions, upper = torch.linalg.qr(gaussian)
    return (directions * torch.where(upper.diagonal() < 0, -1.0, 1.0)).T.float().contiguous()


def _split(values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    return values[..., :tokens, :], values[..., tokens:, :]
