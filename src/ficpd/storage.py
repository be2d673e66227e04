"""Atomic files, the cache folder, and tensors with a JSON header as bytes.

A file is written beside its target, flushed and renamed. A reader sees the old file or the new one, also after a power cut.
The cache folder holds downloads, converted weights and measured speeds. All of it may be deleted.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.types import JSON, State

HEADER_LIMIT = 1 << 20
"""Of what comes from elsewhere: a header is read whole before anything in it is checked."""


def atomic_write(target: Path, content: str | bytes) -> Path:
    """The folder is made if it is not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".writing")
    with open(beside, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(target)
    fsync(target.parent)
    return target


def fsync(path: Path) -> None:
    """A file's content, or which names a folder has, to the disk. A folder that cannot be opened or flushed (on Windows, on
    some network drives) is left to the system."""
    folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except OSError:
        if folder:
            return
        raise
    try:
        os.fsync(number)
    except OSError as error:
        if not folder or error.errno != errno.EINVAL:
            raise
    finally:
        os.close(number)


def cache_dir() -> Path:
    """Returns the cache folder: `$FICPD_CACHE`, else `$XDG_CACHE_HOME/ficpd`, else `~/.cache/ficpd`."""
    if own := os.environ.get("FICPD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ficpd"


def encode_state(state: State, extra: Mapping[str, JSON]) -> bytes:
    """A server state with whatever else a checkpoint must know (`extra`, JSON)."""
    return pack_tensors(state.arrays, {"f": dict(state.facts), "x": dict(extra)})


def decode_state(body: bytes, own: bool = False) -> tuple[State, dict[str, JSON]]:
    """`own`: this machine wrote it and kept it itself (a checkpoint, an answer in the ledger), so that its header may be
    as long as the run made it."""
    arrays, header = unpack_tensors(body, ("f", "x"), own)
    return State(arrays, header["f"]), header["x"]


def pack_tensors(arrays: Mapping[str, Tensor], header: Mapping[str, JSON]) -> bytes:
    """Packs tensors and a JSON header as safetensors."""
    # Copied: safetensors refuses two names for one memory, as a global prompt and its only prototype may be.
    tensors = {
        name: array.detach().cpu().clone(memory_format=torch.contiguous_format) for name, array in arrays.items()
    }
    return save(tensors, {"ficpd": json.dumps(header, separators=(",", ":"), allow_nan=False)})


def unpack_tensors(body: bytes, keys: tuple[str, ...], own: bool = False) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Unpacks what `pack_tensors` packed. Raises `CodecError` for a broken message or a header without `keys`."""
    try:
        arrays = load(body)
        length = int.from_bytes(body[:8], "little")
        if length > HEADER_LIMIT and not own:
            raise CodecError(f"the header has {length} bytes, at most {HEADER_LIMIT} are read")
        header = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["ficpd"])
        if not isinstance(header, dict):
            raise TypeError("its header is no object")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CodecError(f"not a whole message of this version ({len(body)} bytes): {error}") from error
    if missing := [key for key in keys if key not in header]:
        raise CodecError(f"the message's header lacks {missing}; it is of another kind or version")
    return arrays, header
