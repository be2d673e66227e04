"""Describes every setting of a recipe: as a JSON schema for editors, and as a page."""

import json
from collections.abc import Container, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_core import PydanticUndefined

from ficpd.experiments.config import PARTS, RECORD_LEVEL, REGISTRIES, Experiment, Group
from ficpd.registry import load, names

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ELSEWHERE = {"type": "object", "properties": {"name": {"type": "string", "pattern": r"\."}}, "required": ["name"]}
"""A part of one's own, by its dotted name."""


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe. Parts with a `name` are one of their registry, or a dotted name."""
    entries = {part: _entries(kind) for part, kind in REGISTRIES.items()}
    models = [Experiment, Group, *PARTS.values(), *(model for found in entries.values() for model in found.values())]
    keys, whole = models_json_schema([(model, "validation") for model in dict.fromkeys(models)])
    defs = whole["$defs"]
    for model in dict.fromkeys(models):
        about = _about(model)
        for key, value in _definition(defs, keys[model, "validation"]).get("properties", {}).items():
            value |= {"description": about[key]} if key in about else {}
    schema = _definition(defs, keys[Experiment, "validation"])
    for part, found in entries.items():
        named = [_named(_definition(defs, keys[model, "validation"]), name) for name, model in found.items()]
        defs[part] = {"anyOf": [*named, ELSEWHERE]}
        schema["properties"][part] = {"$ref": f"#/$defs/{part}"}
    _definition(defs, keys[Group, "validation"])["properties"]["task"] = {"$ref": "#/$defs/task"}
    return {"$schema": DIALECT, "title": "FICPD recipe", **schema, "$defs": defs}


def settings_page() -> str:
    """Returns a Markdown page with a table for each part of a recipe."""
    pieces = ["# Settings\n\nEvery key of a recipe, its type, its default and its meaning.\n"]
    pieces.append(_table("Above the first section", Experiment, {*PARTS, *REGISTRIES, "groups"}))
    pieces += [_table(f"[{part}]", model) for part, model in PARTS.items()]
    for part, kind in REGISTRIES.items():
        pieces += [_table(f'[{part}] with `name = "{name}"`', model) for name, model in _entries(kind).items()]
    inner = {
        kind.__name__: kind for part in REGISTRIES.values() for m in _entries(part).values() for _, kind in _inner(m)
    }
    pieces += [_table(f"`{name}`", model) for name, model in inner.items()]
    return "\n".join(pieces)


def _entries(kind: str) -> dict[str, type[BaseModel]]:
    return {name: load(kind, name).Config for name in names(kind)}


def _definition(defs: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    return defs[reference["$ref"].rpartition("/")[2]]


def _named(definition: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a module's settings with its name, which only a record-level mechanism may leave out."""
    properties = {"name": {"const": name}, **definition.get("properties", {})}
    needed = [*([] if name == RECORD_LEVEL else ["name"]), *definition.get("required", ())]
    return {**definition, "properties": properties, "required": needed}


def _inner(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Returns the fields that are tables, with their models."""
    kinds = ((name, field.annotation) for name, field in model.model_fields.items())
    return [(name, kind) for name, kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _about(model: type[BaseModel]) -> dict[str, str]:
    """Reads the meaning of each key from the docstring's lines `key: meaning` and `key, key: meaning`.

    >>> _about(PARTS["prompt"])["of"]
    'the name of the prompt in `library`.'
    """
    fields = model.model_fields
    found = {name: f"a table of `{kind.__name__}`, below" for name, kind in _inner(model)}
    found |= {name: field.description for name, field in fields.items() if field.description}
    keys: list[str] = []
    for line in "\n\n".join(kind.__doc__ or "" for kind in reversed(model.__mro__)).splitlines():
        words, colon, meaning = line.strip().partition(": ")
        named = words.replace("`", "").split(", ")
        if colon and set(named) <= fields.keys():
            keys, line = named, meaning
            found |= dict.fromkeys(keys, "")
        elif not line.strip():
            keys = []
        found |= {key: f"{found[key]} {line.strip()}".strip() for key in keys}
    return found


def _table(title: str, model: type[BaseModel], without: Container[str] = ()) -> str:
    about = _about(model)
    rows = [
        f"| `{name}` | `{_kind(field.annotation)}` | {_default(field)} | {_escape(about.get(name, ''))} |"
        for name, field in model.model_fields.items()
        if name not in without
    ]
    if not rows:
        return f"## {title}\n\nNo settings.\n"
    return "\n".join([f"## {title}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _kind(annotation: Any) -> str:
    """Returns a type in words.

    >>> _kind(tuple[str, ...] | Literal["auto"])
    'tuple[str, ...] or "auto"'
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(json.dumps(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, inner))
    if inner:
        return f"{origin.__name__}[{', '.join('...' if kind is Ellipsis else _kind(kind) for kind in inner)}]"
    return "None" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "`{}`"
    return f"`{_escape(repr(field.default))}`" if not isinstance(field.default, BaseModel) else "its own defaults"


def _escape(words: str) -> str:
    return words.replace("|", r"\|")
