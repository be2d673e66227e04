"""The cells of `compare.json`: what each run came to, with the labels and at the budget of the cell."""

from collections.abc import Mapping, Sequence

from ficpd.errors import RunError
from ficpd.experiments.comparison.grid import Cell
from ficpd.experiments.comparison.schema import BytesOfAll, CellResult, Figures, RunFigures, RunOutcome


def result_rows(
    cells: Sequence[Cell], keys: Mapping[str, str], outcomes: Mapping[str, RunOutcome | None]
) -> list[CellResult]:
    """Returns all cells in the plan's order. Raises `RunError` where cells that should hold the same records do not."""
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
    """Returns the cell at the last evaluated round that its bytes and queries pay for."""
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
    """All methods of one condition and seed saw the same records in the same hands."""
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
