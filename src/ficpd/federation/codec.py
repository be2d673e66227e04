"""Values as bytes and back. No pickle, so reading runs no code.

Orders and states are safetensors with a JSON header. An update, which travels most, is a short binary header (27 bytes,
with the client's name some 40) and its arrays, nothing else: both sides know the layout. All little-endian:

    2  "FU"          1  version         4  round, unsigned     4  weight, float32
    8  of the SHA-256 of the backbone's fingerprint            4  CRC-32 of the layout: names, shapes, types
    1  length of the client's name, then the name in UTF-8     then the arrays, in the order of their names

Whoever reads trusts nobody: `ExpectedUpdate` says which names, shapes, types, norm and backbone an update must have; what does
not fit raises `CodecError` with what was given and what was expected.
"""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from sys import byteorder

import torch
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.storage import HEADER_LIMIT, pack_tensors, unpack_tensors
from ficpd.types import TOKEN_DTYPE, ArraySpec, Assignment, ClientUpdate

UPDATE_HEADER = struct.Struct("<2sBIf8sIB")
UPDATE_KIND = (b"FU", 1)


@dataclass(frozen=True)
class ExpectedUpdate:
    """What an update has to look like. `max_norm` bounds the L2 norm over all its arrays."""

    client: str
    round: int
    backbone: str
    layout: Mapping[str, ArraySpec]
    max_norm: float = 1e6


def encode_assignment(assignment: Assignment, backbone: str) -> bytes:
    return pack_tensors(
        assignment.arrays, {"m": assignment.method, "r": assignment.round, "b": backbone, "f": dict(assignment.facts)}
    )


def decode_assignment(body: bytes, backbone: str) -> Assignment:
    """Raises `CodecError` for another backbone's order: its prompts would mean nothing here."""
    arrays, header = unpack_tensors(body, ("m", "r", "b", "f"))
    if header["b"] != backbone:
        raise CodecError(f"the order is for backbone {header['b']}, this client has {backbone}; load the same backbone")
    _check_finite(arrays)
    return Assignment(header["m"], header["r"], arrays, header["f"])


def encode_update(update: ClientUpdate, round: int, backbone: str) -> bytes:
    """The weight is rounded to float32. Raises `CodecError` for what the header cannot hold.

    >>> len(encode_update(ClientUpdate("site-1", {"delta": torch.zeros(256)}), 1, "tiny"))
    1054
    """
    name = _name(update.client)
    if not 0 <= round < 1 << 32:
        raise CodecError(f"the round is {round}, expected 0 to {(1 << 32) - 1}")
    if not math.isfinite(update.weight) or abs(update.weight) > 1e38:
        raise CodecError(f"the update's weight is {update.weight!r}, expected a finite number")
    layout = {n: ArraySpec(tuple(array.shape), array.dtype) for n, array in update.arrays.items()}
    header = UPDATE_HEADER.pack(*UPDATE_KIND, round, update.weight, _mark(backbone), _digest(layout), len(name))
    return b"".join([header, name, *(_raw(update.arrays[n]) for n in sorted(layout))])


def decode_update(body: bytes, expected: ExpectedUpdate) -> ClientUpdate:
    """A checked update. The size is checked before anything is read.

    >>> body = encode_update(ClientUpdate("a", {"x": torch.ones(2)}), 1, "tiny")
    >>> decode_update(body, ExpectedUpdate("a", 1, "tiny", {"x": ArraySpec((2,))}))
    ClientUpdate(client='a', arrays={'x': tensor([1., 1.])}, weight=1.0)
    """
    sizes = {name: math.prod(kind.shape) * kind.dtype.itemsize for name, kind in sorted(expected.layout.items())}
    place = UPDATE_HEADER.size + len(_name(expected.client))
    if len(body) != place + sum(sizes.values()):
        raise CodecError(
            f"the update has {len(body)} bytes, expected {place + sum(sizes.values())} "
            f"for client {expected.client!r} and {_words(expected.layout)}"
        )
    weight = _checked_header(body[:place], expected)
    arrays = {}
    for name, size in sizes.items():
        arrays[name] = _array(body[place : place + size], expected.layout[name])
        place += size
    _check_finite(arrays)
    norm = _norm(arrays)
    if norm > expected.max_norm:
        raise CodecError(f"the update's norm is {norm:.3g}, at most {expected.max_norm:.3g} was expected")
    return ClientUpdate(expected.client, arrays, weight)


@dataclass(frozen=True)
class SiteRequest:
    """What a server asks of a real site, whatever carries it: `what` is "hello", "train" or "evaluate". `terms` (what the
    run asks for, as bytes of `encode_state`) go along until the site has them."""

    what: str
    run: str = ""
    order: bytes = b""
    terms: bytes = b""


def encode_call(call: SiteRequest) -> bytes:
    """4 bytes: the header's length; the header, JSON; the order; the terms."""
    header = json.dumps({"w": call.what, "r": call.run, "o": len(call.order), "t": len(call.terms)}).encode()
    return b"".join([struct.pack("<I", len(header)), header, call.order, call.terms])


def decode_call(body: bytes) -> SiteRequest:
    """Raises `CodecError` for anything but a whole call."""
    try:
        (length,) = struct.unpack_from("<I", body)
        if length > HEADER_LIMIT:
            raise ValueError(f"its header has {length} bytes")
        header = json.loads(body[4 : 4 + length])
        what, run, assignment, terms = header["w"], header["r"], int(header["o"]), int(header["t"])
        if not isinstance(what, str) or not isinstance(run, str) or min(assignment, terms) < 0:
            raise ValueError("its header says something else")
        if len(body) != 4 + length + assignment + terms:
            raise ValueError(f"{4 + length + assignment + terms} bytes were announced")
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CodecError(f"not a whole call of this version ({len(body)} bytes): {error}") from error
    place = 4 + length
    return SiteRequest(what, run, body[place : place + assignment], body[place + assignment :])


def _check_finite(arrays: Mapping[str, Tensor]) -> None:
    for name, array in arrays.items():
        bad = int((~torch.isfinite(array)).sum()) if array.is_floating_point() else 0
        if bad:
            raise CodecError(f"array {name!r} has {bad} values that are not finite, expected none")


def _checked_header(header: bytes, expected: ExpectedUpdate) -> float:
    """The weight, once all else is as expected."""
    magic, version, round, weight, mark, digest, length = UPDATE_HEADER.unpack_from(header)
    if (magic, version) != UPDATE_KIND:
        raise CodecError(
            f"the message begins with {header[:3]!r}, expected b'FU\x01': it is of another kind or version"
        )
    client = header[UPDATE_HEADER.size :].decode(errors="backslashreplace")
    for what, given, wanted, meaning in (
        ("backbone", mark.hex(), _mark(expected.backbone).hex(), f" ({expected.backbone})"),
        ("layout", f"{digest:08x}", f"{_digest(expected.layout):08x}", f" ({_words(expected.layout)})"),
        ("client", client, expected.client, ""),
        ("client's length", length, len(_name(expected.client)), ""),
        ("round", round, expected.round, ""),
    ):
        if given != wanted:
            raise CodecError(f"the update's {what} is {given!r}, expected {wanted!r}{meaning}")
    if not 0 < weight < 1e12:
        raise CodecError(f"the update's weight is {weight!r}, expected a positive number below 1e12")
    return weight


def _name(client: str) -> bytes:
    try:
        name = client.encode()
    except UnicodeEncodeError as error:
        raise CodecError(f"the client's name {client!r} is no Unicode text: {error}") from error
    if len(name) > 255:
        raise CodecError(f"the client's name {client[:20]!r}... has {len(name)} bytes, at most 255 can be sent")
    return name


def _mark(backbone: str) -> bytes:
    return hashlib.sha256(backbone.encode()).digest()[:8]


def _digest(layout: Mapping[str, ArraySpec]) -> int:
    kinds = [[name, list(kind.shape), str(kind.dtype)] for name, kind in sorted(layout.items())]
    return zlib.crc32(json.dumps(kinds, separators=(",", ":")).encode())


def _words(layout: Mapping[str, ArraySpec]) -> str:
    kinds = [f"{name} {kind.dtype} {tuple(kind.shape)}" for name, kind in sorted(layout.items())]
    return ", ".join(kinds) or "no arrays"


def _raw(array: Tensor) -> bytes:
    flat = array.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    return _little(flat, array.dtype.itemsize).numpy().tobytes()


def _array(raw: bytes, kind: ArraySpec) -> Tensor:
    # Of a copy that may be written to; torch makes no tensor of an empty buffer.
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return _little(flat, kind.dtype.itemsize).clone().view(kind.dtype).reshape(kind.shape)


def _little(flat: Tensor, size: int) -> Tensor:
    """Between this machine's order of bytes and little-endian: `size` bytes a number."""
    return flat.view(len(flat) // size, size).flip(1).reshape(-1) if byteorder == "big" else flat


def _norm(arrays: Mapping[str, Tensor]) -> float:
    """L2 over all arrays, integers times their scale; token ids are no lengths. `CodecError` for a scale below zero."""
    scales = {name: f"{name}.scale" for name, array in arrays.items() if not array.is_floating_point()}
    total = 0.0
    for name in arrays.keys() - scales.values():
        if arrays[name].dtype == TOKEN_DTYPE:
            continue
        values = arrays[name].double()
        if (scale := arrays.get(scales.get(name, ""))) is not None:
            if bool((scale < 0).any()):
                raise CodecError(f"array {scales[name]!r} has a scale of {float(scale.min()):.3g}, expected 0 or more")
            values = values * scale.double()
        total += float(values.square().sum())
    return total**0.5
