"""A comparison's folder: one process at a time works in it, and results of another version are not mixed with new ones."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.errors import RunError
from ficpd.experiments.build import load_and_partition
from ficpd.experiments.comparison import SCHEMA
from ficpd.experiments.comparison.grid import Cell
from ficpd.experiments.comparison.results import NOTHING
from ficpd.experiments.comparison.run_cell import Outcome, data_of
from ficpd.storage import atomic_write

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
    there = {name.rsplit("-", 1)[-1]: name for name in _names(folder / CELLS)}
    found: dict[str, str] = {}
    for cell in cells:
        found.setdefault(cell.hash, there.get(cell.hash, cell.readable))
    return found


def _names(cells: Path) -> list[str]:
    if not cells.is_dir():
        return []
    return sorted(
        {entry.name.removesuffix(".json") for entry in cells.iterdir() if entry.is_dir() or entry.suffix == ".json"}
    )


def load_result(folder: Path, key: str) -> Outcome | None:
    """What `KEY.json` says, or None if there is none."""
    file = folder / CELLS / f"{key}.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        return {"schema": f"unreadable ({error})"}
    return found if isinstance(found, dict) else {"schema": "unreadable"}


def import_results(
    folder: Path, known: Mapping[str, Any], cells: Sequence[Cell], names: Mapping[str, str]
) -> list[str]:
    """Put what an earlier comparison (its `compare.json`) knows of these runs, by hash, into the folder; its KEYs.

    What is there already stays. A cell whose budget has bytes or queries may tell of the run's beginning alone, and is not
    taken. Raises `RunError` for a comparison of another version, one that cannot be read, and one of other records: the
    hash of a run knows the name of a file, and not what is in it.
    """
    if known["ficpd"] != __version__:
        raise RunError(
            f"the known comparison is of ficpd {known['ficpd']}, and this is {__version__}: leave out --known"
        )
    try:
        return _take(folder, known, {cell.hash: cell for cell in reversed(cells)}, names)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(
            f"the known comparison is not as `ficpd compare` writes it ({error!r}): leave out --known"
        ) from error


def _take(folder: Path, known: Mapping[str, Any], cells: Mapping[str, Cell], names: Mapping[str, str]) -> list[str]:
    limited = {label for label, budget in known["budgets"].items() if budget["bytes"] or budget["queries"]}
    taken, here = [], dict[str, str]()
    for row in known["cells"]:
        run = row["key"].rsplit("-", 1)[-1]
        if run not in names or row["status"] != "done" or row["budget"] in limited:
            continue
        key, cell = names[run], cells[run]
        if load_result(folder, key) is not None or (folder / CELLS / key).exists():
            continue
        if cell.ground not in here:
            here[cell.ground] = data_of(load_and_partition(cell.experiment).shards)
        if here[cell.ground] != row["data"]:
            raise RunError(
                f"{key} of the known comparison was run on other records than those here: a file has changed since, or is "
                "another one. Leave out --known"
            )
        task = known["tasks"][row["task"]]
        found = {name: row[name] for name in ("status", "reason", *NOTHING) if name != "at_round"}
        found |= {"metric": task["metric"], "task": task["task"], "backbone": task["backbone"]}
        atomic_write(
            folder / CELLS / f"{key}.json", json.dumps({"schema": SCHEMA, "ficpd": __version__, "key": key, **found})
        )
        taken.append(key)
    return taken


def check_versions(folder: Path, wanted: Sequence[str], redo: bool) -> list[str]:
    """The runs of another version, which `redo` deletes. Raises `RunError`, naming them, without it: figures of two versions
    do not belong in one table, and what took hours is not thrown away unasked."""
    old = {key: version for key in wanted if (version := _version(folder, key)) is not None}
    if old and not redo:
        shown = ", ".join(f"{key} ({version})" for key, version in list(old.items())[:5])
        more = f" and {len(old) - 5} more" if len(old) > 5 else ""
        raise RunError(
            f"{folder} has results of another version than this one (ficpd {__version__}, schema {SCHEMA}): {shown}{more}. "
            "Choose another --out, or say --redo to delete them and run them again"
        )
    for key in old:
        shutil.rmtree(folder / CELLS / key, ignore_errors=True)
        (folder / CELLS / f"{key}.json").unlink(missing_ok=True)
    return list(old)


def _version(folder: Path, key: str) -> str | None:
    """Which other version a run is of; None if it is of this one, or not there."""
    found = load_result(folder, key)
    if found is not None and found.get("schema") != SCHEMA:
        return f"schema {found.get('schema', 'none')}"
    by = found.get("ficpd") if found is not None else _made_by(folder / CELLS / key / "result.json")
    return None if by in (None, __version__) else f"ficpd {by}"


def _made_by(result: Path) -> Any:
    """The version that finished a run whose outcome was not written yet."""
    try:
        return json.loads(result.read_text())["versions"]["ficpd"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
