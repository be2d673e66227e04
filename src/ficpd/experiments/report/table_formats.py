"""A table drawn: Markdown to read, CSV for a spreadsheet, LaTeX to print."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass


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
    """One table below the other, each line with its table's title in front; heads once, where they are the same."""
    text, heads = io.StringIO(), None
    lines = csv.writer(text, lineterminator="\n")
    for table in tables:
        if table.heads != heads:
            lines.writerow(["table", *table.heads])
            heads = table.heads
        lines.writerows([table.title, *row] for row in table.rows)
    return text.getvalue()


def as_latex(table: Table) -> str:
    """A `tabular` with booktabs' rules, to be put into a table of one's own."""
    columns = "l" + "r" * (len(table.heads) - 1)
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in [table.heads, *table.rows]]
    note = f"% {' '.join(table.note.split())}\n" if table.note else ""
    body = "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    )
    return f"% {table.title}\n{note}{body}\n\\end{{tabular}}\n"


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "ε": r"$\varepsilon$",
    "±": r"$\pm$", "–": "--", "-": r"-", "[": r"{[}",
}  # fmt: skip
"""A row that begins with a bracket would be an option of the line's end before it."""


def escaped(text: str) -> str:
    r"""
    >>> escaped("50 % of x_1 & {y}")
    '50 \\% of x\\_1 \\& \\{y\\}'
    """
    return "".join(TEX.get(sign, sign) for sign in text)
