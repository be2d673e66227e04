"""The command `ficpd report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="the directory of a finished run or of a comparison")
    ],
    out: Annotated[Path | None, typer.Option(help="the HTML file; none: DIR/report.html")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="also write the table as CSV")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="also write the table as LaTeX")] = False,
) -> None:
    """Write a report of a run or a comparison as one HTML file, which needs no network and no server.

    Example: `ficpd report runs/demo --csv`
    """
    from ficpd.experiments.report.build import write_page, write_tables

    page = write_page(directory, out)
    typer.echo(f"page:    {page}")
    for kind, file in write_tables(directory, page, csv, latex).items():
        typer.echo(f"{kind + ':':9}{file}")
