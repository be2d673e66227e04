"""Applies the axes of a comparison to its recipe. An axis has pieces of a recipe, by label."""

import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, create_model

from ficpd.errors import ConfigError, did_you_mean
from ficpd.experiments.config import Experiment, parse_value, read_recipe, read_tree
from ficpd.registry import FrozenConfig, load, validate

Piece = Mapping[str, Any]
Sweeps = dict[str, list[Any]]

REFERENCE_METHODS: dict[str, Piece] = {
    "zero_shot": {"method": {"name": "zero_shot"}},
    "local": {"method": {"name": "local"}},
    "centralized": {"method": {"name": "centralized"}, "private": False},
}
RESERVED = {"name", "seed", "baselines", "method", "metrics"}


def _entry(*parts: str, **keys: Any) -> type[FrozenConfig]:
    """Makes the schema of an axis's entries: the parts of the recipe that they may change, and further keys."""
    fields: dict[str, Any] = {part: (dict[str, Any], {}) for part in parts} | keys
    return create_model("Entry", __base__=FrozenConfig, **fields)


NUMBER = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
ENTRIES = {
    "methods": _entry("method", "training", "prompt", "compression", "distillation", private=(StrictBool, True)),
    "tasks": _entry(*set(Experiment.model_fields) - RESERVED, recipe=(str, "")),
    "partitions": _entry("partition"),
    "budgets": _entry(
        "privacy", "federation", "compression", epsilon=(Annotated[float, Field(gt=0, strict=True)], math.inf),
        rounds=(Annotated[int, Field(gt=0, strict=True)], 1), bytes=(NUMBER, 1), queries=(NUMBER, 1),
    ),
}  # fmt: skip
DEFAULT = "given"
"""The label of a missing axis: the recipe's settings are used."""


def validate_overrides(axis: str, table: Any, where: str) -> dict[str, Piece]:
    """Validates the entries of one axis. Raises `ConfigError` for a part that this axis must not change."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: {axis} is a table of entries, such as [{axis}.LABEL]")
    for label, piece in table.items():
        if not label.strip() or not label.isprintable():
            raise ConfigError(f"{where}: {axis} has the label {label!r}; a label is a few printable characters")
        if not isinstance(piece, Mapping):
            raise ConfigError(f"{where}: {axis}.{label} = {piece!r}: expected a piece of a recipe, [{axis}.{label}]")
        validate(ENTRIES[axis], piece, f"{where}: {axis}.{label}")
    return dict(table)


def parsed_sweeps(given: Iterable[str]) -> Sweeps:
    """Parses sweeps `part.key=a,b,c`, with values as in `--set`. Raises `ConfigError` for an invalid one.

    >>> parsed_sweeps(["privacy.epsilon=1,2,4", "training.optimizer=adam, sgd", "prompt.text='a, b','c'"])
    {'privacy.epsilon': [1, 2, 4], 'training.optimizer': ['adam', 'sgd'], 'prompt.text': ['a, b', 'c']}
    """
    sweeps: Sweeps = {}
    for sweep in given:
        path, equals, text = sweep.partition("=")
        path = path.strip()
        keys = path.split(".")
        if not equals or not text.strip() or len(keys) < 2 or not all(keys):
            raise ConfigError(f"--ablate {sweep!r}: expected part.key=value,value, such as privacy.epsilon=1,2,4")
        if keys[0] not in Experiment.model_fields or keys[0] in RESERVED - {"method"}:
            known = sorted(set(Experiment.model_fields) - RESERVED | {"method"})
            raise ConfigError(f"--ablate {sweep!r}: {did_you_mean('part', keys[0], known)}")
        if path == "method.name":
            raise ConfigError(f"--ablate {sweep!r}: methods are entries of the file, [methods.LABEL]")
        if path in sweeps:
            raise ConfigError(f"--ablate {sweep!r}: {path} is swept twice; give all its values at once")
        values = _values(text, sweep)
        if len({repr(value) for value in values}) < len(values):  # 1 and true are equal
            raise ConfigError(f"--ablate {sweep!r}: a value is given twice")
        sweeps[path] = values
    return sweeps


def _values(text: str, sweep: str) -> list[Any]:
    """Parses values as a TOML array, else word by word."""
    try:
        return tomllib.loads(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"--ablate {sweep!r}: a value is empty; write part.key=value,value")
    return [parse_value(word) for word in words]


def methods_of(pieces: Mapping[str, Piece], sweeps: Sweeps, where: str) -> dict[str, Piece]:
    """Returns methods and baselines by label. One with a swept setting has an entry for each value."""
    named = {label: _named(label, piece, where) for label, piece in {**REFERENCE_METHODS, **pieces}.items()}
    for path, values in sweeps.items():
        if not path.startswith("method."):
            continue
        key = path.split(".")[1]
        fields = {label: load("methods", piece["method"]["name"]).Config.model_fields for label, piece in named.items()}
        having = [label for label in named if key in fields[label]]
        if not having:
            known = {field for one in fields.values() for field in one}
            raise ConfigError(f"--ablate {path}: no method here has it: {did_you_mean('setting', key, known)}")
        named = {
            new: variant
            for label, piece in named.items()
            for new, variant in (_variants(label, piece, path, values) if label in having else {label: piece}).items()
        }
    return named


def _named(label: str, piece: Piece, where: str) -> Piece:
    method = dict(piece.get("method", {}))
    method.setdefault("name", label)
    if label in REFERENCE_METHODS and method["name"] != label:
        raise ConfigError(
            f"{where}: methods.{label} is a line that is always there; give {method['name']} another label"
        )
    if label == "centralized" and piece.get("private"):
        raise ConfigError(f"{where}: methods.centralized is the line without privacy; give a private one another label")
    load("methods", method["name"])
    return {**REFERENCE_METHODS.get(label, {}), **piece, "method": method}


def _variants(label: str, piece: Piece, path: str, values: list[Any]) -> dict[str, Piece]:
    found = {}
    for value in values:
        tree: dict[str, Any] = {"method": dict(piece["method"])}
        set_path(tree, path, value)
        found[f"{label} {path.removeprefix('method.')}={format_value(value)}"] = {**piece, **tree}
    return found


def format_value(value: Any) -> str:
    """Formats a swept value for a label.

    >>> format_value(0.5), format_value("adam"), format_value(True), format_value([1, 2])
    ('0.5', 'adam', 'true', '[1, 2]')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets one value in the tree. Copies the nested mappings on its path, so that other references do not change."""
    *above, last = path.split(".")
    for key in above:
        inner = tree.get(key, {})
        if not isinstance(inner, Mapping):
            raise ConfigError(f"--ablate {path}: {key} is a value, not a part with keys of its own")
        tree[key] = dict(inner)
        tree = tree[key]
    tree[last] = value


def load_base(recipe: str, changes: Iterable[str], beside: Path | None) -> tuple[dict[str, Any], str]:
    """Reads a recipe's tree with changes, and its name. Paths of TOML files are relative to the comparison's folder."""
    if beside is not None and recipe.endswith(".toml"):
        recipe = str(beside / Path(recipe).expanduser())
    text, where = read_recipe(recipe)
    return read_tree(text, where, changes), where


def merge(tree: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """Merges a piece into the tree. A part with another name or kind replaces the whole old part.

    >>> merge({"training": {"s": 2}, "task": {"name": "a", "k": 1}}, {"training": {"n": 4}, "task": {"name": "b"}})
    {'training': {'s': 2, 'n': 4}, 'task': {'name': 'b'}}
    """
    tree = dict(tree)
    for key, part in piece.items():
        before = tree.get(key)
        if isinstance(part, Mapping) and isinstance(before, Mapping):
            renamed = any(name in part and part[name] != before.get(name) for name in ("name", "kind"))
            part = part if renamed else {**before, **part}
        tree[key] = part
    return tree


def with_task(tree: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """Merges a task's piece. A piece with groups replaces the recipe's single task, its data and its partition."""
    if "groups" in piece:
        tree = {key: part for key, part in tree.items() if key not in ("task", "data", "partition")}
    return merge(tree, {key: part for key, part in piece.items() if key != "recipe"})


def with_partition(tree: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """Sets the partition; in a recipe with groups, that of each group."""
    if "groups" not in tree:
        return merge(tree, piece)
    return {**tree, "groups": {name: merge(dict(group), piece) for name, group in tree["groups"].items()}}


def with_budget(tree: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """Applies a budget's parts, then epsilon and rounds. Bytes and queries do not change a run."""
    tree = merge(tree, {key: part for key, part in piece.items() if isinstance(part, Mapping)})
    if "rounds" in piece:
        tree = merge(tree, {"federation": {"num_rounds": piece["rounds"]}})
    return with_epsilon(tree, piece["epsilon"]) if "epsilon" in piece else tree


def with_epsilon(tree: dict[str, Any], epsilon: Any) -> dict[str, Any]:
    """Sets epsilon (`inf`: no privacy). A recipe without privacy gets the record level."""
    if isinstance(epsilon, float) and math.isinf(epsilon):
        return {**tree, "privacy": {"name": "none"}}
    privacy = tree.get("privacy", {"name": "none"})
    if privacy.get("name") == "none":
        privacy = {"name": "record_gaussian"}
    return {**tree, "privacy": {**privacy, "epsilon": epsilon}}


def with_sweep(tree: dict[str, Any], sweep: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(tree)
    for path, value in sweep.items():
        if path == "privacy.epsilon":
            tree = with_epsilon(tree, value)
        else:
            set_path(tree, path, value)
    return tree
