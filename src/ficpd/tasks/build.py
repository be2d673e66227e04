"""Builds a task from its configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.errors import ConfigError
from ficpd.interfaces import Task
from ficpd.registry import build_config, load, validate
from ficpd.types import Score


def build_task(description: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = ()) -> Task:
    """Builds a task from the mapping of `Task.to_config`, and adds the scores of `metrics`.

    metrics: sections of modules whose `build(config)` returns a function from predictions and targets to a `Score`.
    Raises `ConfigError` if a module's task has a `to_config` that builds another task.
    """
    module, config = build_config("tasks", description)
    task: Task = module.build(config)
    if "." in description["name"]:
        _check_config(description["name"], config, task)
    scores = [(f"task {description['name']!r}", task.score)]
    for metric in metrics:
        one, settings = build_config("metrics", metric)
        scores.append((f"metric {metric['name']!r}", one.build(settings)))

    def score(predictions: Sequence, targets: Sequence) -> Score:
        found: dict[str, float] = {}
        for place, of in scores:
            found |= _figures(place, of(predictions, targets), found)
        return found

    if metrics or "." in description["name"]:
        task.score = score
    return task


def _check_config(name: str, config: Any, task: Task) -> None:
    """Raises `ConfigError` unless `to_config` builds the task again: libraries store nothing else of it."""
    stored, place = dict(task.to_config()), f"task {name!r}: to_config()"
    given = stored.pop("name", None)
    if given != name:
        if not given or load("tasks", given).__name__ != type(task).__module__:
            raise ConfigError(f"{place}: name = {given!r}, and a library would predict by that; return name = {name!r}")
        return
    again = validate(type(config), stored, place)
    if lost := [key for key, value in config if getattr(again, key) != value]:
        raise ConfigError(f"{place} leaves out {', '.join(lost)}, which a library would not know. Return every setting")


def _figures(place: str, given: Any, taken: Mapping[str, float]) -> dict[str, float]:
    """Checks what a score function returned: figures by names that are not taken."""
    try:
        found = {str(name): float(value) for name, value in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"{place} returned {given!r:.80}; expected numbers by name, such as {{'kappa': 0.5}}"
        ) from None
    if known := sorted(found.keys() & taken):
        raise ConfigError(f"{place} returned {known[0]!r}, which there is already. Choose another name")
    return found


def start_text(tasks: Sequence[Task]) -> str | None:
    """Returns a task's instruction and answer texts, or several tasks' instructions. None if there are none."""
    configs = [task.to_config() for task in tasks]
    words = list(dict.fromkeys(config.get("instruction", "") for config in configs))
    if len(tasks) == 1:
        words += configs[0].get("labels", {}).values() or configs[0].get("anchors", {}).keys()
    return " ".join(words).strip() or None
