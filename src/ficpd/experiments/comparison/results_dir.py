"""A comparison's folder: the names of its runs, and their outcomes."""

from collections.abc import Sequence
from pathlib import Path

from ficpd import __version__
from ficpd.errors import RunError
from ficpd.experiments.comparison.grid import Cell
from ficpd.experiments.comparison.schema import RunOutcome

CELLS = "cells"


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
