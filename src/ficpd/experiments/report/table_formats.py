"""A table drawn: Markdown to read, CSV for a spreadsheet, LaTeX to print."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.experiments.report.blocks import Table

SIGNS = {
    "ε": r"$\varepsilon$", "δ": r"$\delta$", "±": r"$\pm$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "▲": r"$\uparrow$", "▼": r"$\downarrow$", "[": "{[}",
}  # fmt: skip
"""Beyond what pandas escapes. After a line's end a bracket would be its option."""


FORMULA = tuple("=+-@\t")
"""Characters that make a formula of a cell."""


def as_markdown(table: Table, level: str = "") -> str:
    """
    >>> print(as_markdown(Table("T", ["a", "b"], [["x|y", "1"]], note="n.")))
    **T**
    <BLANKLINE>
    | a | b |
    |---|---:|
    | x\\|y | 1 |
    <BLANKLINE>
    n.
    <BLANKLINE>
    """
    lines = [[_plain(head) for head in table.heads], ["---", *["---:"] * (len(table.heads) - 1)]]
    lines += [[_plain(cell) for cell in row] for row in table.cells]
    drawn = [
        "|" + "|".join(cells) + "|" if place == 1 else "| " + " | ".join(cells) + " |"
        for place, cells in enumerate(lines)
    ]
    title = f"{level}{table.caption}" if level else f"**{table.caption}**"
    return f"{title}\n\n" + "\n".join(drawn) + "\n" + (f"\n{table.note}\n" if table.note else "")


def _plain(cell: str) -> str:
    """Escapes a cell for Markdown, where a client's name could be markup."""
    cell = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(cell.split()))
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _text(cell: Any) -> Any:
    """Marks a text as text, where a spreadsheet would read a formula. Numbers stay numbers."""
    if not isinstance(cell, str):
        return cell
    cell, number = cell.replace("\r", " "), re.fullmatch(r"[-+][\d.,]+(e[-+]?\d+)?", cell)
    return f"'{cell}" if cell.lstrip(" ")[:1] in FORMULA and not number else cell


def safe_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Formats lines for a spreadsheet."""
    import pandas as pd

    rows = [{_text(name): _text(value) for name, value in line.items()} for line in lines]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False)


def as_csv(tables: Sequence[Table]) -> str:
    """Joins tables, each line with its table's caption in front. Heads stand once, where they are the same."""
    import pandas as pd

    drawn, heads = [], None
    for table in tables:
        rows = [[_text(cell) for cell in (table.caption, *row)] for row in table.cells]
        frame = pd.DataFrame(rows, columns=["table", *map(_text, table.heads)])
        drawn.append(frame.to_csv(index=False, header=table.heads != heads))
        heads = table.heads
    return "".join(drawn)


def as_latex(table: Table) -> str:
    """Draws a `tabular` with booktabs' rules."""
    import pandas as pd

    columns = "l" + "r" * (len(table.heads) - 1)
    frame = pd.DataFrame(table.cells, columns=list(table.heads))
    drawn = frame.to_latex(index=False, escape=True, column_format=columns)
    for sign, command in SIGNS.items():
        drawn = drawn.replace(sign, command)
    note = f"% {' '.join(table.note.split())}\n" if table.note else ""
    return f"% {table.caption}\n{note}{drawn}"
