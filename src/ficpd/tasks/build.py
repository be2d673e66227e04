"""Builds a task from its configuration."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.errors import ConfigError
from ficpd.interfaces import Backbone, Task
from ficpd.registry import build_config, check_arguments, load, validate
from ficpd.types import Answer, Batch, Prompt, Record, Score

BOUNDS = {"accuracy": (0.0, 1.0), "f1": (0.0, 1.0), "rmse": (0.0, math.inf)}
"""The smallest and largest values of the scores that tables and pages know by name."""


def build_task(description: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]] = ()) -> Task:
    """Builds a task from the mapping of `Task.to_config`, and adds the scores of `metrics`.

    metrics: sections of modules whose `build(config)` returns a function from predictions and targets to a `Score`.
    Raises `ConfigError` for an invalid task or metric of a module outside the package.
    """
    module, config = build_config("tasks", description)
    task: Task = module.build(config)
    if "." in description["name"]:
        _check_own(description["name"], config, task)
    scores = [(f"task {description['name']!r}", task.score)]
    for metric in metrics:
        one, settings = build_config("metrics", metric)
        place, made = f"metric {metric['name']!r}", one.build(settings)
        check_arguments(f"{place}: {one.__file__}", "build(config)", made, "predictions, targets")
        scores.append((place, made))

    def score(predictions: Sequence, targets: Sequence) -> Score:
        found: dict[str, float] = {}
        for place, of in scores:
            found |= _figures(place, of(predictions, targets), found)
        if not found:
            raise ConfigError(f"{scores[0][0]} returned no finite number; expected one at least, such as an accuracy")
        return found

    if metrics or "." in description["name"]:
        task.score = score
    return task


def _check_own(name: str, config: Any, task: Task) -> None:
    """Raises `ConfigError` unless `to_config` builds the task again. Wraps its methods to check their results."""
    if not isinstance(task, Task):
        raise ConfigError(f"task {name!r}: build returned a {type(task).__name__}; expected a ficpd.Task")
    _check_config(name, config, task)
    encode, predict, targets = task.encode, task.predict, task.targets

    def encoded(records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch:
        found = encode(records, backbone, prompt)
        if not isinstance(found, Batch):
            raise ConfigError(f"task {name!r}: encode returned a {type(found).__name__}; expected a ficpd.types.Batch")
        return _as_many(f"task {name!r}: encode", found, len(records))

    def predicted(answer: Answer, batch: Batch) -> list:
        found = _as_many(f"task {name!r}: predict", predict(answer, batch), len(batch))
        if odd := [one for one in found if task.num_labels and one not in task.label_space]:
            raise ConfigError(f"task {name!r}: predict returned {odd[0]!r}; expected one of {list(task.label_space)}")
        return found

    def true(records: Sequence[Record]) -> list:
        return _as_many(f"task {name!r}: targets", targets(records), len(records))

    task.encode, task.predict, task.targets = encoded, predicted, true


def _as_many(place: str, found: Any, number: int) -> Any:
    """Returns the result of a task's method. Raises `ConfigError` unless it has one entry for each record."""
    if not hasattr(found, "__len__") or len(found) != number:
        given = f"{len(found)} entries" if hasattr(found, "__len__") else f"a {type(found).__name__}"
        raise ConfigError(f"{place} returned {given}; expected {number}: one for each record")
    return found


def _check_config(name: str, config: Any, task: Task) -> None:
    """Raises `ConfigError` unless `to_config` builds the task again: a library stores only this."""
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
    """Returns the finite figures of a score function's result; warns of others.

    Raises `ConfigError` unless they are numbers by new names, within `BOUNDS`.
    """
    try:
        found = {str(name): float(value) for name, value in given.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        found = {}
    if not found:
        raise ConfigError(f"{place} returned {given!r:.80}; expected numbers by name, such as {{'kappa': 0.5}}")
    if known := sorted(found.keys() & taken):
        raise ConfigError(f"{place} returned {known[0]!r}, which exists already. Choose another name")
    for name, (least, most) in BOUNDS.items():
        if name in found and not least <= found[name] <= most and math.isfinite(found[name]):
            raise ConfigError(f"{place} returned {name} = {found[name]:g}; expected {least:g} to {most:g}. Divide it, or "
                              "choose another name")  # fmt: skip
    if odd := [name for name, value in found.items() if not math.isfinite(value)]:
        warnings.warn(
            f"{place} returned {odd[0]} = {found[odd[0]]}; expected a finite number. It is left out",
            stacklevel=4,
        )
    return {name: value for name, value in found.items() if math.isfinite(value)}


def start_text(tasks: Sequence[Task]) -> str | None:
    """Returns the instruction and answer texts of a task, or the instructions of several; None if all are empty."""
    configs = [task.to_config() for task in tasks]
    words = list(dict.fromkeys(config.get("instruction", "") for config in configs))
    if len(tasks) == 1:
        words += configs[0].get("labels", {}).values() or configs[0].get("anchors", {}).keys()
    return " ".join(words).strip() or None
