"""Files are whole: written beside, flushed to disk, renamed, and the rename flushed as well. A reader sees the old one or
the new one, also after a power cut."""

import errno
import os
from pathlib import Path


def write(target: Path, content: str | bytes) -> Path:
    """The folder is made if it is not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".writing")
    with open(beside, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(target)
    flush(target.parent)
    return target


def flush(path: Path) -> None:
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
