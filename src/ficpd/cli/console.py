"""Prints results, notes, tables, scores and progress bars, according to `--quiet`, `--verbose` and `--json`."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

FAILED = 3
"""The exit status of a finished command that found a failure: failed runs of a comparison, or a violated ε."""
screen, errors = Console(), Console(stderr=True)


@dataclass
class Verbosity:
    """The output options of a command.

    quiet: no notes, no progress.
    verbose: tracebacks and logs.
    json: results are JSON, and notes go to standard error.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False


asked = Verbosity()
"""The output options of the current command; `main` resets them."""


def note(line: str, style: str = "") -> None:
    """Prints a line that is not a result, unless quiet."""
    if not asked.quiet:
        _notes().print(escape(line), style=style, highlight=False, soft_wrap=True)


def say(line: str, style: str = "") -> None:
    """Prints a line of a result, unless results are JSON."""
    if not asked.json:
        screen.print(escape(line), style=style, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Prints a result as JSON if `--json` is set. Numbers that are not finite become null."""
    if asked.json:
        print(json.dumps(_finite(value), ensure_ascii=False, indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(heads: Sequence[str], cells: Sequence[Sequence[str]], caption: str = "") -> None:
    if asked.json:
        return
    drawn = Table(*heads, caption=escape(caption) or None, caption_justify="left")
    for line in cells:
        drawn.add_row(*map(escape, line))
    screen.print(drawn)


def print_scores(first: str, scores: Mapping[str, Mapping[str, float]], caption: str = "") -> None:
    """Prints one row of scores per name. Missing metrics are empty."""
    metrics = sorted({metric for score in scores.values() for metric in score})
    cells = [[name, *(f"{s[m]:.3f}" if m in s else "" for m in metrics)] for name, s in scores.items()]
    print_table([first, *metrics], cells, caption)


def _notes() -> Console:
    return errors if asked.json else screen


Show = Callable[[str, int, int, dict[str, float]], None]


@contextmanager
def progress_bars(unit: str = " rounds") -> Iterator[Show]:
    """Shows a bar per method: rounds, time and latest figures. Without a terminal it prints lines with the unit."""
    if asked.quiet:
        yield lambda method, done, planned, figures: None
    elif _notes().is_terminal:
        with _bars() as show:
            yield show
    else:
        yield lambda method, done, planned, figures: note(
            f"{method:>12} {_count(done, planned, unit, figures)}  {_words(figures)}".rstrip()
        )


def _count(done: int, planned: int, unit: str, figures: Mapping[str, float]) -> str:
    """
    >>> _count(2, 5, " rounds", {}), _count(0, 0, " rounds", {}), _count(0, 0, " rounds", {"accuracy": 0.7})
    ('2/5 rounds', 'begins', 'done')
    """
    return f"{done}/{planned}{unit}" if planned else "done" if figures else "begins"


def _words(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" if value % 1 else f"{value:.0f} {name}" for name, value in figures.items())


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    whole = Column(no_wrap=True)
    drawn = Progress(
        TextColumn("{task.description}", table_column=whole),
        MofNCompleteColumn(table_column=whole),
        BarColumn(bar_width=10, table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TimeRemainingColumn(compact=True, table_column=whole),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=_notes(),
        expand=True,
    )
    tasks: dict[str, Any] = {}

    def show(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
        if method not in tasks:
            tasks[method] = drawn.add_task(method, total=max(planned, 1), figures="")
        drawn.update(tasks[method], completed=done if planned else len(figures) and 1, figures=_words(figures))

    with drawn:
        yield show
