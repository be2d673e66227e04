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
"""Characters to escape that pandas does not. A bracket after a line's end would be its option."""
FORMULA = tuple("=+-@\t")
"""Characters that make a formula of a cell."""


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
    """Escapes a cell for Markdown, where a client's name could be markup."""
    cell = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(cell.split()))
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def safe_csv(frame: "DataFrame", header: bool = True) -> str:
    """Writes a frame for a spreadsheet, in which no text is a formula."""
    return frame.map(_text).rename(columns=_text).to_csv(index=False, header=header)


def _text(cell: Any) -> Any:
    """Marks a text as text, where a spreadsheet would read a formula. Numbers stay numbers."""
    if not isinstance(cell, str):
        return cell
    cell, number = cell.replace("\r", " "), re.fullmatch(r"[-+][\d.,]+(e[-+]?\d+)?", cell)
    return f"'{cell}" if cell.lstrip(" ")[:1] in FORMULA and not number else cell


def as_csv(tables: Sequence[Table]) -> str:
    """Joins tables, each line with its table's caption in front. Heads stand once, where they are the same."""
    drawn, heads = [], None
    for table in tables:
        frame = _frame(table)
        frame.insert(0, "table", table.caption, allow_duplicates=True)
        drawn.append(safe_csv(frame, header=table.heads != heads))
        heads = table.heads
    return "".join(drawn)


def as_latex(table: Table) -> str:
    """Draws a `tabular` with booktabs' rules."""
    columns = "l" + "r" * (len(table.heads) - 1)
    drawn = _frame(table).to_latex(index=False, escape=True, column_format=columns)
    for sign, command in SIGNS.items():
        drawn = drawn.replace(sign, command)
    note = f"% {' '.join(table.note.split())}\n" if table.note else ""
    return f"% {table.caption}\n{note}{drawn}"
