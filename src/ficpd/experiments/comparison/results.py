"""Reads the runs in a comparison's folder as cells of `compare.json`, each cut at its budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ficpd import __version__
from ficpd.errors import RunError
from ficpd.experiments.comparison.grid import Cell
from ficpd.experiments.comparison.schema import BytesOfAll, CellResult, Figures, RunFigures, RunOutcome

CELLS = "cells"


def result_rows(
    cells: Sequence[Cell], keys: Mapping[str, str], outcomes: Mapping[str, RunOutcome | None]
) -> list[CellResult]:
    """Returns all cells in the plan's order. Raises `RunError` if cells that must have the same records do not."""
    found = [_row(cell, keys[cell.hash], outcomes[cell.hash]) for cell in cells]
    _check_fair(cells, found)
    return found


def _row(cell: Cell, key: str, outcome: RunOutcome | None) -> CellResult:
    row = CellResult(
        method=cell.method, task=cell.task, partition=cell.partition, budget=cell.budget, sweep=dict(cell.sweep),
        seed=cell.seed, key=key, status=outcome.status if outcome else "missing", reason=outcome and outcome.reason,
    )  # fmt: skip
    if outcome is None or outcome.status != "done":
        return row
    figures = {name: getattr(outcome, name) for name in RunFigures.model_fields}
    row = row.model_copy(update={**figures, "at_round": outcome.curve[-1].round})
    return truncate_to_budget(row, cell.limits) if cell.limits else row


def truncate_to_budget(row: CellResult, limits: Mapping[str, float]) -> CellResult:
    """Returns the cell at the last evaluated round within its budget of bytes and queries, or a refused cell."""
    if "queries" in limits and any(point.queries is None for point in row.curve):
        return _refused(row, "its queries were not counted, so no budget of them can be kept")
    paid = [point for point in row.curve if all(getattr(point, cost) <= most for cost, most in limits.items())]
    if not paid:
        first = {cost: getattr(row.curve[0], cost) for cost in limits}
        over = [f"{first[c]:,} {c} where the budget has {most:,.0f}" for c, most in limits.items() if first[c] > most]
        return _refused(row, f"its first evaluated round takes {', '.join(over)}")
    last = paid[-1]
    if last is row.curve[-1]:
        return row
    return row.model_copy(
        update={
            "figures": Figures(own=last.own, everyone=last.everyone, worst=None),
            "at_round": last.round,
            "bytes": BytesOfAll(up=last.bytes_up, down=last.bytes_down, total=last.bytes),
            "queries": last.queries,
            "seconds": last.seconds,
            "curve": paid,
        }
    )


def _refused(row: CellResult, reason: str) -> CellResult:
    labels = row.model_dump(include={"method", "task", "partition", "budget", "sweep", "seed", "key"})
    return CellResult(**labels, status="refused", reason=reason)


def _check_fair(cells: Sequence[Cell], found: Sequence[CellResult]) -> None:
    """Raises `RunError` unless all methods of a condition and seed had the same records per client."""
    seen: dict[tuple, CellResult] = {}
    for cell, row in zip(cells, found, strict=True):
        if row.data is None:
            continue
        first = seen.setdefault((*cell.condition, cell.seed), row)
        if first.data != row.data:
            raise RunError(
                f"{first.key} and {row.key} should hold the same records and do not: a file was changed between them. "
                "Delete the older of them (its folder and its .json) and call again"
            )


def run_keys(folder: Path, cells: Sequence[Cell]) -> dict[str, str]:
    """Maps each hash to its run's KEY: the existing folder or outcome, else the first cell's `readable` name."""
    entries = [entry for entry in (folder / CELLS).glob("*") if entry.is_dir() or entry.suffix == ".json"]
    there = {name.rsplit("-", 1)[-1]: name for name in sorted(entry.name.removesuffix(".json") for entry in entries)}
    found: dict[str, str] = {}
    for cell in cells:
        found.setdefault(cell.hash, there.get(cell.hash, cell.readable))
    return found


def load_result(folder: Path, key: str) -> RunOutcome | None:
    """Reads `KEY.json`; None if it is missing. Raises `RunError` for another version: a table must not mix versions."""
    file = folder / CELLS / f"{key}.json"
    found = RunOutcome.read(file) if file.exists() else None
    if found and found.ficpd != __version__:
        raise RunError(
            f"{file} is of ficpd {found.ficpd}, and this is {__version__}; choose another --out, or delete {folder}"
        )
    return found
