"""Builds a task from its configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.interfaces import Task
from ficpd.registry import build_config


def build_task(description: Mapping[str, Any]) -> Task:
    """A task from what `Task.describe` said of it."""
    module, config = build_config("tasks", description)
    return module.build(config)


def start_text(tasks: Sequence[Task]) -> str | None:
    """The task's own words: its instruction and its answers' texts. Of several tasks the instructions; None if there
    are none."""
    configs = [task.to_config() for task in tasks]
    words = list(dict.fromkeys(config.get("instruction", "") for config in configs))
    if len(tasks) == 1:
        words += configs[0].get("labels", {}).values() or configs[0].get("anchors", {}).keys()
    return " ".join(words).strip() or None
