"""Builds a task from its configuration."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from ficpd.interfaces import Task
from ficpd.registry import build_config
from ficpd.types import Score


def build_task(description: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = ()) -> Task:
    """Builds a task from the mapping of `Task.to_config`, and adds the scores of `metrics`.

    metrics: sections of modules whose `build(config)` returns a function from predictions and targets to a `Score`.
    """
    module, config = build_config("tasks", description)
    task: Task = module.build(config)
    built = [one.build(settings) for one, settings in (build_config("metrics", metric) for metric in metrics)]
    own_score = task.score

    def score(predictions: Sequence, targets: Sequence) -> Score:
        found = [metric(predictions, targets) for metric in built]
        return reduce(or_, found, own_score(predictions, targets))

    if built:
        task.score = score
    return task


def start_text(tasks: Sequence[Task]) -> str | None:
    """Returns a task's instruction and answer texts, or several tasks' instructions. None if there are none."""
    configs = [task.to_config() for task in tasks]
    words = list(dict.fromkeys(config.get("instruction", "") for config in configs))
    if len(tasks) == 1:
        words += configs[0].get("labels", {}).values() or configs[0].get("anchors", {}).keys()
    return " ".join(words).strip() or None
