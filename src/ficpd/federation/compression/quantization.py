"""Compresses by a public linear map and quantization at the client; the server undoes both.

Only arrays of the prompt's shape are compressed. Other arrays of a method, such as token ids, are sent unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ficpd.errors import ConfigError
from ficpd.interfaces import Subspace
from ficpd.types import TOKEN_DTYPE, ArraySpec, UpdateSpec

Bits = Literal[8, 16, 32]
INTEGERS = {8: torch.int8, 16: torch.int16}
SMALLEST = torch.finfo(torch.float32).tiny
SCALE = ".scale"


def quantise(values: Tensor, bits: Literal[8, 16]) -> tuple[Tensor, Tensor]:
    """Rounds to integers of the same shape. Returns them and their step [1].

    The step is max |values| / (2^(bits - 1) - 1).

    Guarantees: `dequantise` restores each number to within half a step (and the rounding of a float32), zeros exactly.
    A step is at least the smallest normal float32, so arrays of zeros have one.

    >>> whole, scale = quantise(torch.tensor([127.0, -3.4, 0.0]), 8)
    >>> whole.tolist(), scale.tolist()
    ([127, -3, 0], [1.0])
    """
    top = torch.iinfo(INTEGERS[bits]).max
    scale = (values.abs().amax() / top).clamp(min=SMALLEST).reshape(1)
    return (values.double() / scale.double()).round().clamp(-top, top).to(INTEGERS[bits]), scale


def dequantise(whole: Tensor, scale: Tensor) -> Tensor:
    """Restores float32 values of the same shape.

    >>> dequantise(torch.tensor([127, -3], dtype=torch.int8), torch.tensor([0.5])).tolist()
    [63.5, -1.5]
    """
    return (whole.double() * scale.double()).float()


class LinearProjection(Protocol):
    """A public linear map of prompt-shaped arrays, with orthonormal rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of a projected [P, D]."""
        ...

    def project(self, values: Tensor) -> Tensor:
        """Maps [..., P, D] to [..., *shape]; never lengthens."""
        ...

    def lift(self, values: Tensor) -> Tensor:
        """Maps [..., *shape] to [..., P, D] by the transpose; `project(lift(z)) == z`."""
        ...


@dataclass(frozen=True)
class QuantizedCompression:
    """A projection W, then quantization to `bits` a number (none at 32 bits).

    A projected array `x` is sent as int8 or int16 with its step `x.scale`, float32 [1]. Quantization runs after the DP
    noise, so it costs no privacy.

    Guarantees: `project` never lengthens. Without noise, `unpack` returns Wᵀ W x, with an error of at most half a step
    per sent number.
    """

    projection: LinearProjection
    outer: tuple[int, ...]
    """The prompt's [P, D]."""
    bits: Bits = 32
    subspace: Subspace | None = None

    def project(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, numbers = _apart(arrays)
        self._check({name: tuple(array.shape) for name, array in numbers.items()})
        floats = {name: array.float() for name, array in numbers.items()}
        return ids | {name: self.projection.project(a) if a.shape == self.outer else a for name, a in floats.items()}

    def pack(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        packed = dict(arrays)
        if self.bits != 32:
            for name, array in _apart(arrays)[1].items():
                if array.shape == self.projection.shape:
                    packed[name], packed[name + SCALE] = quantise(array, self.bits)
        return packed

    def unpack(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, numbers = _apart(arrays)
        whole = {name for name, array in numbers.items() if not array.is_floating_point()}
        scales = {name + SCALE for name in whole}
        floats = {
            name: dequantise(array, arrays[name + SCALE]) if name in whole else array.float()
            for name, array in numbers.items()
            if name not in scales
        }
        inner = self.projection.shape
        return ids | {name: self.projection.lift(a) if a.shape == inner else a for name, a in floats.items()}

    def encoded_spec(self, layout: UpdateSpec) -> dict[str, ArraySpec]:
        """Returns the layout of an encoded update. Raises `ConfigError` for an ambiguous one."""
        kinds = {name: kind for name, kind in layout.items() if isinstance(kind, ArraySpec)}
        numbers = {name: shape for name, shape in layout.items() if not isinstance(shape, ArraySpec)}
        self._check(numbers)
        for name, shape in numbers.items():
            if tuple(shape) != self.outer:
                kinds[name] = ArraySpec(tuple(shape))
                continue
            kinds[name] = ArraySpec(self.projection.shape, INTEGERS.get(self.bits, torch.float32))
            if self.bits != 32:
                kinds[name + SCALE] = ArraySpec((1,))
        return kinds

    def _check(self, layout: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that names and shapes are unambiguous: the server recognises arrays by them."""
        inner = self.projection.shape
        for name, shape in layout.items():
            if tuple(shape) == inner != self.outer:
                raise ConfigError(
                    f"array {name!r} is {inner}, expected another shape: compressed prompts have this one; compress "
                    "to another size"
                )
            if tuple(shape) == self.outer and self.bits != 32 and name + SCALE in layout:
                raise ConfigError(
                    f"array {name + SCALE!r} has the name of the scale of {name!r} at {self.bits} bits; rename it, or "
                    "set compression.bits = 32"
                )


def _apart(arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separates token ids from numbers."""
    ids = {name: array for name, array in arrays.items() if array.dtype == TOKEN_DTYPE}
    return ids, {name: array for name, array in arrays.items() if name not in ids}
