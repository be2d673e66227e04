"""The cells of `compare.json`: what each run came to, seen with the labels and at the budget of the cell."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.errors import RunError
from ficpd.experiments.comparison.grid import Cell
from ficpd.experiments.comparison.run_cell import Outcome

Row = dict[str, Any]
"""A CELL of the schema."""
NOTHING: Row = dict.fromkeys((
    "figures", "at_round", "rounds", "bytes", "queries", "gradients", "seconds", "epsilon", "guarantee", "stopped",
)) | {"per_client": {}, "data": None, "curve": []}  # fmt: skip


def result_rows(cells: Sequence[Cell], keys: Mapping[str, str], outcomes: Mapping[str, Outcome | None]) -> list[Row]:
    """All cells, in the plan's order. Raises `RunError` where cells that should hold the same records do not."""
    found = [_row(cell, keys[cell.hash], outcomes[cell.hash]) for cell in cells]
    _check_fair(cells, found)
    return found


def _row(cell: Cell, key: str, outcome: Outcome | None) -> Row:
    labels = {"method": cell.method, "task": cell.task, "partition": cell.partition, "budget": cell.budget}
    row = (
        labels
        | {"sweep": dict(cell.sweep), "seed": cell.seed, "status": "missing", "reason": None, "key": key}
        | NOTHING
    )
    if outcome is None:
        return row
    row |= {name: outcome[name] for name in ("status", "reason")}
    if outcome["status"] != "done":
        return row
    row |= {name: outcome[name] for name in (*NOTHING, "metric", "task", "backbone") if name in outcome}
    row |= {"of_task": row.pop("task"), "task": cell.task, "at_round": outcome["curve"][-1]["round"]}
    return truncate_to_budget(row, cell.limits) if cell.limits else row


def truncate_to_budget(row: Row, limits: Mapping[str, float]) -> Row:
    """The cell at the last evaluated round that its bytes and queries pay for."""
    if "queries" in limits and any(point["queries"] is None for point in row["curve"]):
        reason = "its queries were not counted, so no budget of them can be kept"
        return {**row, "status": "refused", "reason": reason, **NOTHING}
    spent = [{"bytes": p["bytes_up"] + p["bytes_down"], "queries": p["queries"]} for p in row["curve"]]
    paid = [
        point for point, cost in zip(row["curve"], spent, strict=True) if all(cost[k] <= v for k, v in limits.items())
    ]
    if not paid:
        over = ", ".join(
            f"{spent[0][k]:,} {k} where the budget has {v:,.0f}" for k, v in limits.items() if spent[0][k] > v
        )
        return {**row, "status": "refused", "reason": f"its first evaluated round takes {over}", **NOTHING}
    last = paid[-1]
    if last is row["curve"][-1]:
        return row
    spent_on = {"up": last["bytes_up"], "down": last["bytes_down"], "total": last["bytes_up"] + last["bytes_down"]}
    return {
        **row,
        "figures": {"own": last["own"], "everyone": last["everyone"], "worst": None},
        "at_round": last["round"],
        "bytes": spent_on,
        "queries": last["queries"],
        "seconds": last["seconds"],
        "curve": paid,
    }


def _check_fair(cells: Sequence[Cell], found: Sequence[Row]) -> None:
    """All methods of one condition and seed saw the same records in the same hands."""
    seen: dict[tuple, Row] = {}
    for cell, row in zip(cells, found, strict=True):
        if row["data"] is None:
            continue
        first = seen.setdefault((*cell.condition, cell.seed), row)
        if first["data"] != row["data"]:
            raise RunError(
                f"{first['key']} and {row['key']} should hold the same records and do not: a file was changed between them. "
                "Delete the older of them (its folder and its .json) and call again"
            )
