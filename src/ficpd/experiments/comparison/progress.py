"""Shows the progress of a comparison: bars on a terminal, else one line a run."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressDisplay:
    """Shows events. Call `planned` before the first event.

    A run counts by its finished rounds, so that the estimate of the time left is smooth."""

    def __init__(self, console: Console, errors: Console):
        self.console, self.errors = console, errors
        columns = [
            TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[count]:>7}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        ]  # fmt: skip
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.all = self.bars.add_task("all runs", count="", figures="", visible=False)
        self.runs: dict[str, TaskID] = {}
        self.done, self.missing = 0, 0
        self.warned: set[str] = set()

    def planned(self, runs: int, missing: int) -> None:
        self.missing = missing
        self.console.print(f"{runs} runs, {runs - missing} of them finished before", highlight=False)
        self.bars.update(self.all, total=missing, count=f"0/{missing}", visible=missing > 0)

    def seen(self, event: Mapping[str, Any]) -> None:
        if "warning" in event:
            if event["warning"] not in self.warned:
                self.warned.add(event["warning"])
                self.errors.print("[bold yellow]warning:[/]", escape(event["warning"]), highlight=False, soft_wrap=True)
            return
        key = escape(event["key"])
        if key not in self.runs:
            self.runs[key] = self.bars.add_task(key, count="", figures="")
        if "status" in event:
            self.done += 1
            self.bars.remove_task(self.runs.pop(key))
            why = f": {escape(event['reason'])}" if event["reason"] else ""
            line = f"{self.done}/{self.missing} {key} {event['status']}{why}"
            self.console.print(line, highlight=False, soft_wrap=True)
        else:
            done, planned = event["done"], event["planned"]
            shown = "  ".join(f"{name} {value:.3f}" for name, value in event["figures"].items() if name != "clients")
            count = f"{done}/{planned}"
            self.bars.update(self.runs[key], completed=done, total=max(planned, 1), count=count, figures=shown)
        gone = self.done + sum(one.percentage / 100 for one in self.bars.tasks if one.id != self.all)
        self.bars.update(self.all, completed=gone, count=f"{self.done}/{self.missing}")
