"""A table drawn: Markdown to read, CSV for a spreadsheet, LaTeX to print."""

from collections.abc import Sequence

from ficpd.experiments.report.blocks import Table

SIGNS = {
    "ε": r"$\varepsilon$", "δ": r"$\delta$", "±": r"$\pm$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "▲": r"$\uparrow$", "▼": r"$\downarrow$", "[": "{[}",
}  # fmt: skip
"""Beyond what pandas escapes. After a line's end a bracket would be its option."""


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
    lines = [table.heads, ["---", *["---:"] * (len(table.heads) - 1)], *table.cells]
    drawn = [
        "|" + "|".join(cells) + "|"
        if place == 1
        else "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for place, cells in enumerate(lines)
    ]
    title = f"{level}{table.caption}" if level else f"**{table.caption}**"
    return f"{title}\n\n" + "\n".join(drawn) + "\n" + (f"\n{table.note}\n" if table.note else "")


def as_csv(tables: Sequence[Table]) -> str:
    """Joins tables, each line with its table's caption in front. Heads stand once, where they are the same."""
    import pandas as pd

    drawn, heads = [], None
    for table in tables:
        frame = pd.DataFrame([[table.caption, *row] for row in table.cells], columns=["table", *table.heads])
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
