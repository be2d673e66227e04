"""A table drawn: Markdown to read, CSV for a spreadsheet, LaTeX to print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIGNS = {"ε": r"$\varepsilon$", "±": r"$\pm$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}"}
"""Beyond what pandas escapes. After a line's end a bracket would be its option."""


@dataclass(frozen=True)
class Table:
    """`rows` of words. `name`: which file it goes into; `note`: what stands below."""

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def as_markdown(table: Table, level: str = "") -> str:
    """
    >>> print(as_markdown(Table("t", "T", ["a", "b"], [["x|y", "1"]], "n.")))
    **T**
    <BLANKLINE>
    | a | b |
    |---|---:|
    | x\\|y | 1 |
    <BLANKLINE>
    n.
    <BLANKLINE>
    """
    lines = [table.heads, ["---", *["---:"] * (len(table.heads) - 1)], *table.rows]
    drawn = [
        "|" + "|".join(cells) + "|"
        if place == 1
        else "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for place, cells in enumerate(lines)
    ]
    title = f"{level}{table.title}" if level else f"**{table.title}**"
    return f"{title}\n\n" + "\n".join(drawn) + "\n" + (f"\n{table.note}\n" if table.note else "")


def as_csv(tables: Sequence[Table]) -> str:
    """Joins tables, each line with its table's title in front. Heads stand once, where they are the same."""
    import pandas as pd

    drawn, heads = [], None
    for table in tables:
        frame = pd.DataFrame([[table.title, *row] for row in table.rows], columns=["table", *table.heads])
        drawn.append(frame.to_csv(index=False, header=table.heads != heads))
        heads = table.heads
    return "".join(drawn)


def as_latex(table: Table) -> str:
    """Draws a `tabular` with booktabs' rules."""
    import pandas as pd

    columns = "l" + "r" * (len(table.heads) - 1)
    style: Any = pd.DataFrame(table.rows, columns=list(table.heads)).style.hide(axis="index")
    style = style.format(escape="latex").format_index(escape="latex", axis=1)
    drawn: str = style.to_latex(hrules=True, column_format=columns)
    for sign, command in SIGNS.items():
        drawn = drawn.replace(sign, command)
    note = f"% {' '.join(table.note.split())}\n" if table.note else ""
    return f"% {table.title}\n{note}{drawn}"
