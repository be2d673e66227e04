"""Watches what reaches the disk, and in which order."""

import os
import stat
from collections.abc import Callable
from pathlib import Path


def watch_renames(monkeypatch, seen: Callable[[Path], object]) -> None:
    """Call `seen` with the place that anything is about to be renamed to."""
    for verb in ("replace", "rename"):
        true = getattr(Path, verb)
        monkeypatch.setattr(Path, verb, lambda self, target, true=true: (seen(Path(target)), true(self, target))[1])


def to_the_disk(monkeypatch) -> list[str]:
    """What is done from now on: "file" or "folder" for what is flushed, "-> NAME" for a rename."""
    steps, fsync = [], os.fsync

    def flushed(number: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", flushed)
    watch_renames(monkeypatch, lambda target: steps.append(f"-> {target.name}"))
    return steps
