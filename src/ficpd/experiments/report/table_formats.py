"""Writes tables by pandas: Markdown to read, CSV for a spreadsheet, LaTeX to print."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ficpd.errors import needs
from ficpd.experiments.report.blocks import Table

if TYPE_CHECKING:
    from pandas import DataFrame

SIGNS = {
    "ε": r"$\varepsilon$", "δ": r"$\delta$", "±": r"$\pm$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "▲": r"$\uparrow$", "▼": r"$\downarrow$", "[": "{[}",
}  # fmt: skip
"""Characters that pandas does not escape for LaTeX. A bracket after the end of a line would be read as its option."""
FORMULA = tuple("=+-@\t")
"""Characters at the beginning of a formula in a spreadsheet."""


def _frame(table: Table) -> "DataFrame":
    with needs("a table", "report"):
        import pandas as pd

    return pd.DataFrame(table.cells, columns=list(table.heads), dtype=object)


def as_markdown(table: Table, level: str = "") -> str:
    """
    >>> print(as_markdown(Table("T", ["a", "b"], [["x|y", "1"]], note="n.")))
    **T**
    <BLANKLINE>
    | a    |   b |
    |:-----|----:|
    | x\\|y |   1 |
    <BLANKLINE>
    n.
    <BLANKLINE>
    """
    frame, align = _frame(table).map(_plain).rename(columns=_plain), ["left", *["right"] * (len(table.heads) - 1)]
    drawn = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    title = f"{level}{table.caption}" if level else f"**{table.caption}**"
    return f"{title}\n\n{drawn}\n" + (f"\n{table.note}\n" if table.note else "")


def _plain(cell: str) -> str:
    """Escapes a cell for Markdown: a client's name may contain markup."""
    cell = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(cell.split()))
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def safe_csv(frame: "DataFrame", header: bool = True) -> str:
    """Returns a frame as CSV in which no text is a formula for a spreadsheet."""
    return frame.map(_text).rename(columns=_text).to_csv(index=False, header=header)


def _text(cell: Any) -> Any:
    """Marks a text that a spreadsheet would read as a formula. Numbers are not changed."""
    if not isinstance(cell, str):
        return cell
    cell, number = cell.replace("\r", " "), re.fullmatch(r"[-+][\d.,]+(e[-+]?\d+)?", cell)
    return f"'{cell}" if cell.lstrip(" ")[:1] in FORMULA and not number else cell


def as_csv(tables: Sequence[Table]) -> str:
    """Joins tables, with the caption in front of each row. Equal heads of successive tables are written once."""
    drawn, heads = [], None
    for table in tables:
        frame = _frame(table)
        frame.insert(0, "table", table.caption, allow_duplicates=True)
        drawn.append(safe_csv(frame, header=table.heads != heads))
        heads = table.heads
    return "".join(drawn)


def as_latex(table: Table) -> str:
    """Returns a LaTeX `tabular` with the rules of booktabs."""
    columns = "l" + "r" * (len(table.heads) - 1)
    drawn = _frame(table).to_latex(index=False, escape=True, column_format=columns)
    for sign, command in SIGNS.items():
        drawn = drawn.replace(sign, command)
    note = f"% {' '.join(table.note.split())}\n" if table.note else ""
    return f"% {table.caption}\n{note}{drawn}"
