"""The command line. Commands import inside their functions, so that `ficpd --help` loads neither torch nor Flower."""

import io
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated

import typer
from rich.markup import escape

from ficpd import __version__
from ficpd.cli import console
from ficpd.cli.audit import audit
from ficpd.cli.compare import compare
from ficpd.cli.console import errors
from ficpd.cli.deploy import deploy
from ficpd.cli.info import info, schema
from ficpd.cli.init import init
from ficpd.cli.library import adapt, evaluate, export, import_
from ficpd.cli.options import Command, Group
from ficpd.cli.plan import plan
from ficpd.cli.predict import predict, serve
from ficpd.cli.run import publish, report, run
from ficpd.cli.site import site
from ficpd.errors import FicpdError, describe_os_error

app = typer.Typer(
    cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Adapt one frozen foundation model together; share only soft prompts.

    Exit status: 0 done, 1 error, 2 wrong usage, 3 a failure was found (`audit`: ε is violated; `compare`: runs failed),
    130 stopped by Ctrl-C.""",
)  # fmt: skip
for command in (
    init, plan, run, compare, report, publish, audit, evaluate, adapt, predict, serve, export, info, schema,
):  # fmt: skip
    app.command()(command)
app.command("import")(import_)
app.add_typer(deploy, name="deploy")
app.add_typer(site, name="site")
for group in (app, deploy, site):
    for registered in group.registered_commands:
        registered.cls = Command


def main() -> None:
    """Runs the command line. For errors that a user can fix, prints no traceback and exits with status 1.

    Characters outside the output's encoding are replaced. SIGTERM stops a command like Ctrl-C.
    """
    console.asked.__init__()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _warn
    try:
        app()
    except FicpdError as error:
        _fail(str(error))
    except OSError as error:
        _fail(describe_os_error(error))
    except UnicodeEncodeError as error:
        _fail(f"a text holds {error.object[error.start]!r}, which {error.encoding} cannot hold; give it as UTF-8")
    except Exception as error:
        from ficpd.registry import describe_own_error

        if (own := describe_own_error(error)) is None:
            raise
        _fail(own)


def _fail(message: str) -> None:
    """Prints the handled exception's message, with --verbose also its traceback, and exits with status 1."""
    if console.asked.verbose:
        traceback.print_exc()
    errors.print("[bold red]error:[/]", escape(message), highlight=False, soft_wrap=True)
    sys.exit(1)


def _warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Prints a warning without its source line."""
    errors.print("[bold yellow]warning:[/]", escape(str(message)), highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ficpd {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
