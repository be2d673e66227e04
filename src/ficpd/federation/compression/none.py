"""No projection: sends the whole update, optionally at 8 or 16 bits a number."""

from typing import Any

from torch import Tensor

from ficpd.federation.compression.quantization import Bits, QuantizedCompression
from ficpd.registry import FrozenConfig
from ficpd.types import Prompt


class Config(FrozenConfig):
    """`bits`: bits per sent number; 32 means float32."""

    bits: Bits = 32


def build(config: Config, start: Prompt, seed: int, gradients: Any = None) -> QuantizedCompression:
    shape = tuple(start.vectors_PD.shape)
    return QuantizedCompression(IdentityProjection(shape), shape, config.bits)


class IdentityProjection:
    """The identity."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def project(self, values: Tensor) -> Tensor:
        return values

    def lift(self, values: Tensor) -> Tensor:
        return values
