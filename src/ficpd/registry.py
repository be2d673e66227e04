"""The registries: a method, task, backbone, mechanism, compression or optimizer is a module of its subpackage.

An entry is a module that defines a pydantic `Config` and a `build` function (`ARGUMENTS` has its arguments). A
dotted name (`mypackage.mymethod`) names a module outside the package: an installed one, or one in the recipe's folder or
the current folder. Metrics, partitions and data sources have dotted names only, or kinds of their own section.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ficpd.errors import ConfigError, did_you_mean, needs

ROOMS = {"compression": "federation.compression"}
"""Registries whose folder is not at the top."""
ENGINES = {
    "in_process": "ficpd.federation.simulation",
    "ray": "ficpd.federation.ray_engine",
    "flower": "ficpd.deployment.flower_engine",
}
ENTRY_POINTS = {"optimizers": ("tune",)}
"""The names that an entry defines, where they are not `Config` and `build`."""
ARGUMENTS = {
    "methods": "config, training",
    "tasks": "config",
    "backbones": "config, weights, *, dtype, attention, device, name",
    "metrics": "config",
    "partitions": "config",
    "sources": "config",
}
"""The arguments of `build`, for the registries that have entries outside the package."""
SEARCHED: list[str] = []
"""The folders of the recipes that were read, and the current one: where dotted names are found first."""
OWN: dict[str, str] = {}
"""The files of modules with dotted names, and the part that each is: `metric 'mylab.kappa'`."""
OUTSIDE = ("metrics", "partitions", "sources")
"""Registries whose entries are all outside the package."""
SETTINGS = {"methods": "method.name", "tasks": "task.name", "privacy": "privacy.name", "compression": "compression.name",
            "optimizers": "training.optimizer", "engines": "engine.name"}  # fmt: skip
"""The setting that names an entry of a registry."""
EXTRAS = {"flower": "flower", "generation": "generation", "vision": "images"}
"""Entries that import packages that the core does not need, and the extra that has them."""


class FrozenConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def names(kind: str) -> list[str]:
    """Lists the entries of a registry, without importing them.

    >>> "fedavg" in names("methods")
    True
    """
    return sorted(ENGINES) if kind == "engines" else list(_entries(kind))


@cache
def _entries(kind: str) -> tuple[str, ...]:
    spec = importlib.util.find_spec(f"ficpd.{ROOMS.get(kind, kind)}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    entry = re.compile(rf"^def {ENTRY_POINTS.get(kind, ('build',))[-1]}\(", re.MULTILINE)
    files = ((found.name, Path(folder, f"{found.name}.py")) for found in pkgutil.iter_modules([folder]))
    return tuple(sorted(n for n, file in files if file.is_file() and entry.search(file.read_text(encoding="utf-8"))))


def search_in(folder: Path) -> None:
    """Finds dotted names in a folder too, from now on and in worker processes."""
    if str(folder.resolve()) not in SEARCHED:
        SEARCHED.append(str(folder.resolve()))


def load(kind: str, name: str) -> ModuleType:
    """Imports the module of one entry. Raises `ConfigError`, listing the known names, if there is none."""
    if "." in name:
        return _load_dotted(kind, name, ENTRY_POINTS.get(kind, ("Config", "build")))
    if kind in OUTSIDE:
        raise ConfigError(
            f"{kind.removesuffix('s')} {name!r}: expected the dotted name of a module, such as mylab.{name}"
        )
    if name not in names(kind):
        what, homes = kind.removesuffix("s"), [setting for other, setting in SETTINGS.items() if name in names(other)]
        if homes:
            raise ConfigError(f"unknown {what} {name!r}; did you mean {homes[0]} = {name!r}?")
        text = did_you_mean(what, name, names(kind))
        own = "" if "did you mean" in text else f". A module of your own has a dotted name, such as mylab.{name}"
        raise ConfigError(text + own)
    extra = needs(f"{kind.removesuffix('s')} {name!r}", EXTRAS[name]) if name in EXTRAS else nullcontext()
    with extra:
        return importlib.import_module(ENGINES[name] if kind == "engines" else f"ficpd.{ROOMS.get(kind, kind)}.{name}")


def _load_dotted(registry: str, name: str, needed: Sequence[str]) -> ModuleType:
    """Imports a module with the searched folders first. Afterwards they are last, so that they hide no package."""
    search_in(Path.cwd())
    kind, before = registry.removesuffix("s"), list(sys.path)
    sys.path[:0] = SEARCHED
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{kind} {name!r}: {error}. A dotted name is a module in the recipe's folder, in {Path.cwd()}, or "
            "installed. Set PYTHONPATH to its folder, or install it"
        ) from error
    except Exception as error:
        place = "" if isinstance(error, SyntaxError) else f" ({_last_line(error)})"
        raise ConfigError(
            f"{kind} {name!r}: it cannot be imported: {type(error).__name__}: {error}{place}. Correct the module"
        ) from error
    finally:
        sys.path[:] = [*before, *(folder for folder in SEARCHED if folder not in before)]
    for part in needed:
        if not hasattr(module, part):
            raise ConfigError(
                f"{kind} {name!r}: {module.__file__} does not define `{part}`; it needs {' and '.join(needed)}"
            )
    OWN[str(module.__file__)] = f"{kind} {name!r}"
    if registry in ARGUMENTS:
        _check_entry(f"{kind} {name!r}: {module.__file__}", module, ARGUMENTS[registry])
    return module


def _check_entry(place: str, module: ModuleType, arguments: str) -> None:
    """Raises `ConfigError` unless `Config` is a pydantic model and `build` takes these arguments."""
    if not (isinstance(module.Config, type) and issubclass(module.Config, BaseModel)):
        raise ConfigError(f"{place}: `Config` = {module.Config!r}; expected a subclass of ficpd.registry.FrozenConfig")
    check_arguments(place, "build", module.build, arguments)


def check_arguments(place: str, name: str, function: Any, arguments: str) -> None:
    """Raises `ConfigError` unless this is a function of these arguments, written as in `ARGUMENTS`."""
    if not callable(function):
        raise ConfigError(f"{place}: {name} = {function!r:.60}; expected a function of ({arguments})")
    positional, _, keywords = (part.strip(", ").split(", ") for part in arguments.partition("*"))
    own = inspect.signature(function)
    try:
        own.bind(*positional, **dict.fromkeys(filter(None, keywords)))
    except TypeError as error:
        raise ConfigError(f"{place}: {name}{own}: {error}; expected {name}({arguments})") from None


def describe_own_error(error: BaseException) -> str | None:
    """Describes an error in a module with a dotted name: the part, file, line and reason. None if it is elsewhere."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if part := OWN.get(frame.filename):
            return (
                f"{part}: {frame.filename} line {frame.lineno}: {type(error).__name__}: {error}. Correct it there; -v "
                "prints the traceback"
            )
    return None


def _last_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename} line {frame.lineno}"


def build_config(registry: str, tree: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the module of a checked part and its `Config`."""
    module = load(registry, tree["name"])
    return module, module.Config(**{key: value for key, value in tree.items() if key != "name"})


def validate(model: type[BaseModel], tree: Any, where: str) -> Any:
    """Builds `model` from a mapping. Raises one `ConfigError` for pydantic's errors."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_complaint(model, problem, where) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def validated_section(registry: str, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns all settings of a named module: the given ones and the defaults."""
    if not isinstance(tree, Mapping):
        raise ConfigError(
            _expected("a table", where, tree, '{ name = "%s" }' % (tree if isinstance(tree, str) else "NAME"))
        )
    if not isinstance(tree.get("name"), str):
        raise ConfigError(f"{where} needs a `name`: which module of {registry}/ it is")
    rest = {key: value for key, value in tree.items() if key != "name"}
    config = validate(load(registry, tree["name"]).Config, rest, where)
    return {"name": tree["name"], **config.model_dump()}


def _complaint(model: type[BaseModel], problem: Mapping[str, Any], where: str) -> str:
    # a union's location ends in the type that did not fit
    path = ".".join(str(step) for step in problem["loc"] if not re.search(r"\W", str(step)))
    given, kind, place = problem["input"], problem["type"], where
    if kind == "extra_forbidden":
        return f"{where}: {did_you_mean('key', path, model.model_fields)}"
    if kind == "missing":
        return f"{where}: {path} is missing; it has no default"
    if path:
        place = f"{where}.{path}" if ":" in where else f"{where}: {path}"
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        key, field = ("KEY", None) if path else next(iter(model.model_fields.items()))
        value = f'"{given}"' if isinstance(given, str) and field and field.annotation is str else "..."
        return _expected("a table", place, given, f"{{ {key} = {value} }}")
    if kind == "too_short":
        return f"{place} = {given!r:.80}: expected {problem['ctx']['min_length']} entries or more, not {len(given)}"
    if kind in ("tuple_type", "list_type"):
        return _expected("a list", place, given, f'["{given}"]' if isinstance(given, str) else "[...]")
    if kind == "string_type" and isinstance(given, (int, float)):
        return _expected("a text", place, given, f'"{given}"')
    return f"{place} = {given!r}: {problem['msg'].removeprefix('Value error, ')}"


def _expected(kind: str, place: str, given: Any, example: str) -> str:
    """Says how a setting of another kind is written.

    >>> _expected("a list", "r.toml: data.keep", "site", '["site"]')
    'r.toml: data.keep = \\'site\\': a list is expected: write keep = ["site"]'
    """
    return f"{place} = {given!r}: {kind} is expected: write {re.split('[.: ]', place)[-1]} = {example}"
