"""Chooses the compression of a method if the recipe leaves it open.

A method that adds noise to gradients gets a subspace of 64 public directions. Any other method gets the whole prompt. Noise
grows with the square root of the number of sent values (docs/design.md).
"""

from typing import Any

from ficpd.federation.compression import none
from ficpd.federation.compression.quantization import Bits, QuantizedCompression
from ficpd.registry import FrozenConfig
from ficpd.types import Prompt

DIMENSION, SUBSPACE_BITS, WHOLE_BITS = 64, 8, 32


class Config(FrozenConfig):
    """`bits`: bits per sent number; 32 means float32. None: 8 in the subspace, else 32."""

    bits: Bits | None = None


def build(config: Config, start: Prompt, seed: int, gradients: Any = None) -> QuantizedCompression:
    """Returns the compression without a method: the whole prompt."""
    return none.build(none.Config(bits=config.bits or WHOLE_BITS), start, seed)


def choose(part: dict[str, Any], start: Prompt, in_subspace: bool) -> dict[str, Any]:
    """Replaces the settings of an open compression by the chosen ones. Returns others unchanged."""
    if part["name"] != "auto":
        return part
    if not in_subspace or start.vectors_PD.numel() <= DIMENSION:
        return {"name": "none", "bits": part.get("bits") or WHOLE_BITS}
    found = {"name": "subspace", "dimension": DIMENSION, "directions": "gradient"}
    return found | {"bits": part.get("bits") or SUBSPACE_BITS}
