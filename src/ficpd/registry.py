"""The directory is the registry: a method, task, backbone, mechanism or tuner is the module of that name.

A registered module holds a pydantic `Config` and a `build` function (its docstring says with what arguments). A dotted
path (`mypackage.mymethod`) names a module outside the package, so that nothing here has to be edited to add one.
"""

import importlib
import pkgutil
from types import ModuleType

from ficpd.errors import ConfigError, unknown

NOT_ENTRIES = {
    "weights", "bert", "catalog", "completions", "decoding", "http", "lora", "words", "quantised",
    "noise", "accountant", "ledger", "settings", "clip", "space",
}  # fmt: skip
"""Modules that stand in a registry's folder and are no entry of it."""


def names(kind: str) -> list[str]:
    """The entries of a registry, without importing them.

    >>> "fedavg" in names("methods")
    True
    """
    package = importlib.import_module(f"ficpd.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in NOT_ENTRIES)


def load(kind: str, name: str) -> ModuleType:
    """The module of one entry. Raises `ConfigError`, listing the known names, if there is none."""
    if "." in name:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{kind} {name!r}: {error}. A dotted name must be an importable module.") from error
    if name not in names(kind):
        raise ConfigError(unknown(kind.removesuffix("s"), name, names(kind)))
    return importlib.import_module(f"ficpd.{kind}.{name}")
