"""Prints tables, scores and progress bars."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

screen, errors = Console(), Console(stderr=True)


def print_table(heads: list[str], cells: list[list[str]]) -> None:
    drawn = Table(*heads)
    for line in cells:
        drawn.add_row(*map(escape, line))
    screen.print(drawn)


def print_scores(first: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Prints one line of scores per name; missing metrics are empty."""
    metrics = sorted({metric for score in scores.values() for metric in score})
    cells = [[name, *(f"{s[m]:.3f}" if m in s else "" for m in metrics)] for name, s in scores.items()]
    print_table([first, *metrics], cells)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """Shows a bar per method: rounds, time, clients and latest figures. Prints lines if the output is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    drawn = Progress(
        TextColumn("{task.description:>11}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=screen,
        disable=not screen.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def show(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
        words = "  ".join(
            f"{name} {value:.3f}" if value % 1 else f"{value:.0f} {name}" for name, value in figures.items()
        )
        if not screen.is_terminal:
            typer.echo(f"{method:>11} {done}/{planned} rounds  {words}")
            return
        if method not in tasks:
            tasks[method] = drawn.add_task(method, total=max(planned, 1), figures="")
        drawn.update(tasks[method], completed=done if planned else len(figures) and 1, figures=words)

    with drawn:
        yield show
