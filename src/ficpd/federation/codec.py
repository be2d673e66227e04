"""Encodes assignments, updates and calls as bytes, and decodes them. No pickle, so decoding runs no code.

Assignments and states are safetensors with a JSON header. An update is a binary header (27 bytes and the client's name)
and its arrays. Both sides know the layout. All numbers are little-endian:

    2  "FU"          1  version         4  round, unsigned     4  weight, float32
    8  of the SHA-256 of the backbone's fingerprint            4  CRC-32 of the layout: names, shapes, types
    1  length of the client's name, then the name in UTF-8     then the arrays, in the order of their names

The decoder trusts no sender: `ExpectedUpdate` fixes names, shapes, types, norm and backbone. Any difference raises
`CodecError` with the given and the expected value.
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
    """The update that a decoder accepts. `max_norm` bounds the L2 norm over all its arrays."""

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
    """Decodes an assignment. Raises `CodecError` for that of another backbone."""
    arrays, header = unpack_tensors(body, ("m", "r", "b", "f"))
    if header["b"] != backbone:
        raise CodecError(
            f"the assignment is for backbone {header['b']}, this client has {backbone}; load the same backbone"
        )
    _check_finite(arrays)
    return Assignment(header["m"], header["r"], arrays, header["f"])


def encode_update(update: ClientUpdate, round: int, backbone: str) -> bytes:
    """Encodes an update; rounds its weight to float32. Raises `CodecError` for values that the header cannot hold.

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
    """Decodes an update and checks it. The size is checked first.

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
        raise CodecError(
            f"the update's norm is {norm:.3g}, at most {expected.max_norm:.3g} was expected; lower training.learning_rate, "
            "or raise federation.max_update_norm"
        )
    return ClientUpdate(expected.client, arrays, weight)


@dataclass(frozen=True)
class SiteRequest:
    """A server's request to a real site. `what` is "hello", "train" or "evaluate".

    `spec`: the encoded `RunSpec`, sent until the site has it.
    """

    what: str
    run: str = ""
    assignment: bytes = b""
    spec: bytes = b""


def encode_call(call: SiteRequest) -> bytes:
    """Encodes a call: the header's length (4 bytes), the JSON header, the assignment, the spec."""
    header = json.dumps({"w": call.what, "r": call.run, "a": len(call.assignment), "s": len(call.spec)}).encode()
    return b"".join([struct.pack("<I", len(header)), header, call.assignment, call.spec])


def decode_call(body: bytes) -> SiteRequest:
    """Decodes a call. Raises `CodecError` for an incomplete one, or one of another version."""
    try:
        (length,) = struct.unpack_from("<I", body)
        if length > HEADER_LIMIT:
            raise ValueError(f"its header has {length} bytes")
        header = json.loads(body[4 : 4 + length])
        what, run, assignment, spec = header["w"], header["r"], int(header["a"]), int(header["s"])
        if not isinstance(what, str) or not isinstance(run, str) or min(assignment, spec) < 0:
            raise ValueError("a header field has another type")
        if len(body) != 4 + length + assignment + spec:
            raise ValueError(f"the header announces {4 + length + assignment + spec} bytes")
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CodecError(f"not a whole call of this version ({len(body)} bytes): {error}") from error
    place = 4 + length
    return SiteRequest(what, run, body[place : place + assignment], body[place + assignment :])


def _check_finite(arrays: Mapping[str, Tensor]) -> None:
    for name, array in arrays.items():
        bad = int((~torch.isfinite(array)).sum()) if array.is_floating_point() else 0
        if bad:
            raise CodecError(
                f"array {name!r} has {bad} values that are not finite, expected none; lower training.learning_rate"
            )


def _checked_header(header: bytes, expected: ExpectedUpdate) -> float:
    """Checks the header and returns the weight."""
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
    # frombuffer needs a writable buffer that is not empty
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return _little(flat, kind.dtype.itemsize).clone().view(kind.dtype).reshape(kind.shape)


def _little(flat: Tensor, size: int) -> Tensor:
    """Converts between this machine's byte order and little-endian, `size` bytes a number."""
    return flat.view(len(flat) // size, size).flip(1).reshape(-1) if byteorder == "big" else flat


def _norm(arrays: Mapping[str, Tensor]) -> float:
    """Returns the L2 norm over all arrays but token ids, with integers times their scale.

    Raises `CodecError` for a negative scale.
    """
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
