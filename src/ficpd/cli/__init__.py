"""The command line. Commands import inside their functions, so that `ficpd --help` loads neither torch nor Flower."""

import os
import sys
import warnings
from typing import Annotated

import typer
from rich.markup import escape

from ficpd import __version__
from ficpd.cli.compare import compare
from ficpd.cli.console import errors
from ficpd.cli.deploy import deploy
from ficpd.cli.library import adapt, evaluate, export, import_, predict
from ficpd.cli.run import audit, info, publish, report, run
from ficpd.cli.site import site
from ficpd.errors import FicpdError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Adapt one frozen foundation model together; share only soft prompts.",
)  # fmt: skip
for command in (run, compare, report, publish, audit, evaluate, adapt, predict, export, info):
    app.command()(command)
app.command("import")(import_)
app.add_typer(deploy, name="deploy")
app.add_typer(site, name="site")


def main() -> None:
    """Runs the command line. Prints a `FicpdError` without traceback and exits with status 1."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _warn
    try:
        app()
    except FicpdError as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(1)


def _warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Prints a warning without its source line."""
    errors.print("[bold yellow]warning:[/]", escape(str(message)), highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ficpd {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass
