"""Values as bytes and back: safetensors with a JSON header. No pickle, so reading runs no code.

Whoever reads trusts nobody: `Expected` says which names, shapes, size, norm and backbone an update must have; what does
not fit raises `CodecError` with what was given and what was expected.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.types import JSON, Assignment, ClientUpdate, State

HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class Expected:
    """What an update has to look like. `max_norm` bounds the L2 norm over all its arrays."""

    client: str
    round: int
    backbone: str
    layout: Mapping[str, tuple[int, ...]]
    max_norm: float = 1e6


def encode_assignment(order: Assignment, backbone: str) -> bytes:
    return _pack(order.arrays, {"m": order.method, "r": order.round, "b": backbone, "f": dict(order.facts)})


def decode_assignment(body: bytes, backbone: str) -> Assignment:
    """Raises `CodecError` for another backbone's order: its prompts would mean nothing here."""
    arrays, header = _unpack(body, ("m", "r", "b", "f"))
    if header["b"] != backbone:
        raise CodecError(f"the order is for backbone {header['b']}, this client has {backbone}; load the same backbone")
    _check_finite(arrays)
    return Assignment(header["m"], header["r"], arrays, header["f"])


def encode_update(update: ClientUpdate, round: int, backbone: str) -> bytes:
    return _pack(update.arrays, {"c": update.client, "r": round, "b": backbone, "w": update.weight})


def decode_update(body: bytes, expected: Expected) -> ClientUpdate:
    """A checked update. The size is checked before anything is parsed."""
    numbers = sum(torch.Size(shape).numel() for shape in expected.layout.values())
    limit = 4 * numbers + 4096 + 256 * len(expected.layout)
    if len(body) > limit:
        raise CodecError(f"the update has {len(body)} bytes, at most {limit} were expected")
    arrays, header = _unpack(body, ("c", "r", "b", "w"))
    for what, given, wanted in (
        ("backbone", header["b"], expected.backbone),
        ("client", header["c"], expected.client),
        ("round", header["r"], expected.round),
    ):
        if given != wanted:
            raise CodecError(f"the update's {what} is {given!r}, expected {wanted!r}")
    if set(arrays) != set(expected.layout):
        raise CodecError(f"the update holds {sorted(arrays)}, expected {sorted(expected.layout)}")
    for name, shape in expected.layout.items():
        if tuple(arrays[name].shape) != tuple(shape) or arrays[name].dtype != torch.float32:
            given = f"{arrays[name].dtype} {tuple(arrays[name].shape)}"
            raise CodecError(f"array {name!r} is {given}, expected torch.float32 {tuple(shape)}")
    _check_finite(arrays)
    norm = sum(float(a.double().square().sum()) for a in arrays.values()) ** 0.5
    if norm > expected.max_norm:
        raise CodecError(f"the update's norm is {norm:.3g}, at most {expected.max_norm:.3g} was expected")
    weight = header["w"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e12:
        raise CodecError(f"the update's weight is {weight!r}, expected a positive number")
    return ClientUpdate(header["c"], arrays, float(weight))


def encode_state(state: State, extra: Mapping[str, JSON]) -> bytes:
    """A server state with whatever else a checkpoint must know (`extra`, JSON)."""
    return _pack(state.arrays, {"f": dict(state.facts), "x": dict(extra)})


def decode_state(body: bytes) -> tuple[State, dict[str, JSON]]:
    arrays, header = _unpack(body, ("f", "x"))
    return State(arrays, header["f"]), header["x"]


def _pack(arrays: Mapping[str, Tensor], header: Mapping[str, JSON]) -> bytes:
    # Copied: safetensors refuses two names for one memory, as a global prompt and its only prototype may be.
    tensors = {
        name: array.detach().cpu().clone(memory_format=torch.contiguous_format) for name, array in arrays.items()
    }
    return save(tensors, {"ficpd": json.dumps(header, separators=(",", ":"), allow_nan=False)})


def _unpack(body: bytes, keys: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    try:
        arrays = load(body)
        length = int.from_bytes(body[:8], "little")
        if length > HEADER_LIMIT:
            raise CodecError(f"the header has {length} bytes, at most {HEADER_LIMIT} are read")
        header = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["ficpd"])
        if not isinstance(header, dict):
            raise TypeError("its header is no object")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CodecError(f"not a whole message of this version ({len(body)} bytes): {error}") from error
    if missing := [key for key in keys if key not in header]:
        raise CodecError(f"the message's header lacks {missing}; it is of another kind or version")
    return arrays, header


def _check_finite(arrays: Mapping[str, Tensor]) -> None:
    for name, array in arrays.items():
        bad = int((~torch.isfinite(array)).sum()) if array.is_floating_point() else 0
        if bad:
            raise CodecError(f"array {name!r} has {bad} values that are not finite, expected none")
