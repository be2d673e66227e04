"""Files are whole: written beside, flushed to disk, renamed. A reader sees the old one or the new one."""

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
    return target
