"""What is seen of a comparison while it runs: on a terminal bars with the time left, into a file one line a run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Event = Mapping[str, Any]


class ProgressDisplay:
    """`planned` comes before the first event. A run counts by the rounds that it has done: the time left is no staircase."""

    def __init__(self, console: Console, errors: Console):
        self.console, self.errors = console, errors
        columns = [
            TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[count]:>7}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        ]  # fmt: skip
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.all: TaskID | None = None
        self.runs: dict[str, TaskID] = {}
        self.parts: dict[str, float] = {}
        self.done, self.missing = 0, 0
        self.warned: set[str] = set()

    def planned(self, runs: int, missing: int) -> None:
        self.missing = missing
        self.console.print(f"{runs} runs, {runs - missing} of them finished before", highlight=False)
        if missing:
            self.all = self.bars.add_task("all runs", total=missing, count=f"0/{missing}", figures="")

    def seen(self, event: Event) -> None:
        if "warning" in event:
            if event["warning"] not in self.warned:
                self.warned.add(event["warning"])
                self.errors.print("[bold yellow]warning:[/]", escape(event["warning"]), highlight=False, soft_wrap=True)
        elif "status" in event:
            self._ended(event)
        else:
            self._went_on(event)

    def _went_on(self, event: Event) -> None:
        key, done, planned = event["key"], event["done"], event["planned"]
        if key not in self.runs:
            self.runs[key] = self.bars.add_task(escape(key), total=max(planned, 1), count="", figures="")
        figures = {name: value for name, value in event["figures"].items() if name != "clients"}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        self.bars.update(self.runs[key], completed=done, count=f"{done}/{planned}", figures=shown)
        self.parts[key] = done / max(planned, 1)
        self._all()

    def _ended(self, event: Event) -> None:
        key, reason = event["key"], event["reason"]
        self.done += 1
        self.parts.pop(key, None)
        if key in self.runs:
            self.bars.remove_task(self.runs.pop(key))
        said = f"{event['status']}: {reason}" if reason else event["status"]
        self.console.print(f"{self.done}/{self.missing} {escape(key)} {escape(said)}", highlight=False, soft_wrap=True)
        self._all()

    def _all(self) -> None:
        if self.all is not None:
            gone = self.done + sum(self.parts.values())
            self.bars.update(self.all, completed=gone, count=f"{self.done}/{self.missing}")


@contextmanager
def progress(console: Console, errors: Console) -> Iterator[ProgressDisplay]:
    screen = ProgressDisplay(console, errors)
    with screen.bars:
        yield screen
