"""Atomic files, the cache folder, and tensors with a JSON header as bytes.

A temporary file is written, flushed and renamed, so a reader sees the old file or the new one, even after a power cut.
The cache folder holds downloads, converted weights and measured speeds. It may be deleted.
"""

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.types import JSON, State

HEADER_LIMIT = 1 << 20
"""Largest header of a received message in bytes. A header is read whole before its content is checked."""


def atomic_write(target: Path, content: str | bytes) -> Path:
    """Writes a file atomically; creates its folder if necessary. Raises `OSError` that names the file."""
    body = content.encode() if isinstance(content, str) else content
    temporary = target.with_name(target.name + ".writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:  # of a full disk the system names no file
        raise OSError(error.errno, error.strerror, str(target)) from error
    fsync(target.parent)
    return target


def require_writable(folder: Path) -> None:
    """Tries to write in a folder, before the work whose result goes there. Leaves nothing. Raises `OSError`."""
    made: list[Path] = []
    try:
        made += [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk.

    Ignores folders that cannot be opened or flushed (on Windows, on some network drives).
    """
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
    """Returns the cache folder: `$FICPD_CACHE`, else `$XDG_CACHE_HOME/ficpd`, else `~/.cache/ficpd`.

    Raises `OSError` for a user without a home directory.
    """
    try:
        if own := os.environ.get("FICPD_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ficpd"
    except RuntimeError as error:
        raise OSError("this user has no home directory for a cache; set FICPD_CACHE to a folder to write in") from error


def encode_state(state: State, extra: Mapping[str, JSON]) -> bytes:
    """Encodes a server state with further JSON (`extra`) for a checkpoint."""
    return pack_tensors(state.arrays, {"f": dict(state.facts), "x": dict(extra)})


def decode_state(body: bytes, own: bool = False) -> tuple[State, dict[str, JSON]]:
    """Decodes a state and its `extra`. `own`: this machine wrote it, so that its header may have any length."""
    arrays, header = unpack_tensors(body, ("f", "x"), own)
    return State(arrays, header["f"]), header["x"]


def pack_tensors(arrays: Mapping[str, Tensor], header: Mapping[str, JSON]) -> bytes:
    """Packs tensors and a JSON header as safetensors."""
    # Copies, because safetensors refuses two names for one memory (a global prompt and its only prototype).
    tensors = {
        name: array.detach().cpu().clone(memory_format=torch.contiguous_format) for name, array in arrays.items()
    }
    return save(tensors, {"ficpd": json.dumps(header, separators=(",", ":"), allow_nan=False)})


def unpack_tensors(body: bytes, keys: tuple[str, ...], own: bool = False) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Unpacks the bytes of `pack_tensors`. Raises `CodecError` for a broken message or a header without `keys`."""
    try:
        arrays = load(body)
        length = int.from_bytes(body[:8], "little")
        if length > HEADER_LIMIT and not own:
            raise CodecError(f"the header has {length} bytes, expected at most {HEADER_LIMIT}")
        header = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["ficpd"])
        if not isinstance(header, dict):
            raise TypeError("its header is not an object")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CodecError(f"not a whole message of this version ({len(body)} bytes): {error}") from error
    if missing := [key for key in keys if key not in header]:
        raise CodecError(f"the message's header lacks {missing}; it is of another kind or version")
    return arrays, header
