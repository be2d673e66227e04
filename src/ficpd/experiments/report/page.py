"""Writes the page of a finished run, if the extra packages for it (plotly, pandas) are installed."""

import warnings
from html import escape
from pathlib import Path

from ficpd.errors import PackageError, needs
from ficpd.experiments.facts import PAGE
from ficpd.storage import atomic_write


def end_with_page(directory: Path) -> Path:
    """Writes `report.html`. Without the packages, the file and a warning name the commands that make the page."""
    try:
        with needs("the report", "report"):
            from ficpd.experiments.report.build import write_page
    except PackageError as error:
        remedy = f"{error}; then run: ficpd report {directory}"
        warnings.warn(remedy, stacklevel=2)
        return atomic_write(
            directory / PAGE, f"<!doctype html><meta charset=utf-8><p>{escape(remedy, quote=False)}</p>\n"
        )
    return write_page(directory)
