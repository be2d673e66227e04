"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Library = Annotated[Path, typer.Argument(help="a library's folder, or the run directory that holds it")]
Data = Annotated[str, typer.Option("--data", help="a CSV, TSV, JSON Lines or Parquet file (or folder), or hf:ID")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", "-c", help="role=column, such as text=review; may be repeated")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
TaskName = Annotated[str | None, typer.Option("--task", help="which task, if the library has several")]


def roles(columns: list[str] | None) -> dict[str, str]:
    return pairs(columns, "--column takes role=column, such as text=review")


def pairs(given: list[str] | None, expected: str) -> dict[str, str]:
    """Parses `a=b` options."""
    found = [word.partition("=") for word in given or []]
    if any(not all(pair) for pair in found):
        raise typer.BadParameter(expected)
    return {left: right for left, _, right in found}
