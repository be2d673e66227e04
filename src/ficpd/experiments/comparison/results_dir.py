"""A comparison's folder: one process at a time works in it, and results of another version are not mixed with new ones."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ficpd import __version__
from ficpd.errors import RunError
from ficpd.experiments.comparison.grid import Cell
from ficpd.experiments.comparison.schema import RunOutcome

CELLS = "cells"


@contextmanager
def lock_directory(folder: Path) -> Iterator[int]:
    """Hold the folder; the file descriptor is for workers to hold it, too. Raises `RunError` if another process does."""
    import fcntl

    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a comparison needs a folder: choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "lock").exists():
        raise RunError(f"{folder} is not empty and holds no comparison; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"another `ficpd compare` is at work in {folder} (process {file.read().strip() or 'unknown'}); wait until "
                "it has ended, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def run_keys(folder: Path, cells: Sequence[Cell]) -> dict[str, str]:
    """The run's KEY of each hash: that of the folder or outcome which is there, else the first cell's readable name."""
    entries = [entry for entry in (folder / CELLS).glob("*") if entry.is_dir() or entry.suffix == ".json"]
    there = {name.rsplit("-", 1)[-1]: name for name in sorted(entry.name.removesuffix(".json") for entry in entries)}
    found: dict[str, str] = {}
    for cell in cells:
        found.setdefault(cell.hash, there.get(cell.hash, cell.readable))
    return found


def load_result(folder: Path, key: str) -> RunOutcome | None:
    """Reads `KEY.json`; None if there is none. Raises `RunError` for one of another version: one table must not mix them."""
    file = folder / CELLS / f"{key}.json"
    found = RunOutcome.read(file) if file.exists() else None
    if found and found.ficpd != __version__:
        raise RunError(
            f"{file} is of ficpd {found.ficpd}, and this is {__version__}; choose another --out, or delete {folder}"
        )
    return found
