"""The state folder of a site: its owner, its lock and its seed."""

import fcntl
import os
import secrets
from pathlib import Path
from typing import TextIO

from ficpd.errors import SiteError
from ficpd.storage import atomic_write


def make_private(folder: Path) -> None:
    """Creates a folder that only its owner can read. Raises `SiteError` if another user owns it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.geteuid():
        raise SiteError(
            f"{folder} belongs to user {about.st_uid}, this process is user {os.geteuid()}; run as its owner, or set `state`"
        )
    if about.st_mode & 0o077:
        folder.chmod(0o700)


def lock(folder: Path) -> TextIO:
    """Locks the state folder until the file is closed. Raises `SiteError` if another process has the lock."""
    file = open(folder / "lock", "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise SiteError(f"another process uses {folder}; two would spend one budget. Stop the other one") from error
    return file


def read_seed(file: Path) -> int:
    """Returns the site's seed, which is drawn once, so that the holdout is the same after a restart."""
    if not file.exists():
        atomic_write(file, f"{secrets.randbits(62)}\n")
        file.chmod(0o600)
    return int(file.read_text(encoding="utf-8"))
