"""Defines the options that several commands share."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from ficpd.cli import console

if TYPE_CHECKING:
    from ficpd.data.tables import ReadOptions

Library = Annotated[Path, typer.Argument(help="a library's folder, the run directory that holds it, or hf:OWNER/NAME")]
Data = Annotated[str, typer.Option("--data", help="a CSV, TSV, JSON Lines or Parquet file (or folder), or hf:ID")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", "-c", help="role=column, such as text=review; may be repeated")
]
Encoding = Annotated[str, typer.Option("--encoding", help="the encoding of --data, such as cp1252 or utf-16")]
Separator = Annotated[
    str | None,
    typer.Option(
        "--separator", help="the separator of CSV files, such as |; none: comma, semicolon or tab, by the header"
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps")]
TaskName = Annotated[str | None, typer.Option("--task", help="the task's name, if the library has several")]


def _as_json(wanted: bool) -> bool:
    console.asked.json = wanted
    return wanted


Json = Annotated[
    bool, typer.Option("--json", callback=_as_json, help="print the result as JSON; notes go to standard error")
]


def _quiet(context: Any, option: Any, wanted: bool) -> None:
    console.asked.quiet |= wanted


def _verbose(context: Any, option: Any, wanted: bool) -> None:
    console.asked.verbose |= wanted
    if wanted:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


class Command(TyperCommand):
    """A command that also takes `--quiet` and `--verbose`."""

    def __init__(self, *args: Any, params: Any = None, **more: Any):
        super().__init__(*args, params=[*(params or []), *_verbosity()], **more)
        _restore_argument_help(self)


class Group(TyperGroup):
    """A group that takes these options before its command."""

    def __init__(self, *args: Any, params: Any = None, **more: Any):
        super().__init__(*args, params=[*(params or []), *_verbosity()], **more)


def _verbosity() -> list[TyperOption]:
    same: dict[str, Any] = {"is_flag": True, "expose_value": False, "default": False}
    return [
        TyperOption(param_decls=["-q", "--quiet"], callback=_quiet, help=QUIET, **same),
        TyperOption(param_decls=["-v", "--verbose"], callback=_verbose, help=VERBOSE, **same),
    ]


QUIET = "print only results, warnings and errors"
VERBOSE = "print the log and the traceback of an error"


def _restore_argument_help(command: TyperCommand) -> None:
    """Sets the help of arguments again, because click 8.5 removes it."""
    for name, annotated in getattr(command.callback, "__annotations__", {}).items():
        told = next((about.help for about in getattr(annotated, "__metadata__", ()) if hasattr(about, "help")), None)
        for param in command.params:
            if param.name == name and isinstance(param, TyperArgument) and param.help is None:
                param.help = told


def roles(columns: list[str] | None) -> dict[str, str]:
    return pairs(columns, "--column takes role=column, such as text=review")


def reading(encoding: str, separator: str | None) -> "ReadOptions":
    """Returns the format of `--data`. Raises `ConfigError` for an unknown encoding or an invalid separator."""
    from ficpd.data.loading import Config
    from ficpd.data.tables import ReadOptions
    from ficpd.registry import validate

    config = validate(Config, {"source": "", "encoding": encoding, "separator": separator}, "--data")
    return ReadOptions(separator=config.separator, encoding=config.encoding)


def pairs(given: list[str] | None, expected: str) -> dict[str, str]:
    """Parses options of the form `a=b`. Raises `BadParameter` for another form."""
    found = [word.partition("=") for word in given or []]
    if any(not all(pair) for pair in found):
        raise typer.BadParameter(expected)
    return {left: right for left, _, right in found}
