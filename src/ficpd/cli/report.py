"""`ficpd report`: the command. Its work is one import away."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="the directory of a finished run or of a comparison")
    ],
    out: Annotated[Path | None, typer.Option(help="the HTML file; none: DIR/report.html")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="also the table as CSV, beside the page")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="also the table as LaTeX, beside the page")] = False,
) -> None:
    """Draw a run, or a comparison, as one HTML file that needs nothing else: no network, no server.

    Example: `ficpd report runs/demo --csv`
    """
    from ficpd.experiments.report.build import write_page, write_tables

    page = write_page(directory, out)
    typer.echo(f"page:    {page}")
    for kind, file in write_tables(directory, page, csv, latex).items():
        typer.echo(f"{kind + ':':9}{file}")
