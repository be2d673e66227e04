"""The commands of `ficpd site`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ficpd.cli.console import note

site = typer.Typer(
    no_args_is_help=True, help="Run the process of one organisation, which holds its records and budget."
)
Rehearsal = Annotated[bool, typer.Option("--rehearsal", help="allow [simulation] private_seed: nothing is protected")]
File = Annotated[Path, typer.Argument(help="the site's TOML file")]


@site.command()
def run(file: File, rehearsal: Rehearsal = False) -> None:
    """Serve on the site's socket until stopped. The backbone is loaded once; records and ledger stay here.

    Example: `ficpd site run north.toml`
    """
    from ficpd.deployment.site.http import serve
    from ficpd.deployment.site.load import build_site

    serve(build_site(file, _say, rehearsal))


@site.command()
def check(
    file: File,
    recipe: Annotated[Path | None, typer.Option(help="a run's recipe to check against the policy")] = None,
    clients: Annotated[int, typer.Option(help="the number of sites in the run", min=1)] = 1,
    rehearsal: Rehearsal = False,
) -> None:
    """Check records, labels, backbone and policy without a server, and print the outputs that would be released.

    Example: `ficpd site check north.toml --recipe recipe.toml`
    """
    from ficpd.deployment.site.preflight import preflight_lines

    for line in preflight_lines(file, recipe, clients, rehearsal):
        typer.echo(line)


@site.command()
def status(file: File) -> None:
    """Print the privacy cost, the served runs and the last error, from the site's state folder."""
    from ficpd.deployment.site.config import rehearsal_warning
    from ficpd.deployment.site.preflight import site_status

    found = site_status(file)
    if found["rehearsal"]:
        typer.echo(rehearsal_warning([found["name"]]))
    spent = found["epsilon"]
    unit = f" for one {spent['unit']}" if spent["unit"] else ""
    typer.echo(f"site     {found['name']} ({'running' if found['running'] else 'not running'})")
    typer.echo(f"budget   epsilon {spent['spent']:.4g} of {spent['of']:g} spent{unit} (delta {spent['delta']:g})")
    for name, run in found["runs"].items():
        scores = "; ".join(
            f"{kind} " + ", ".join(f"{name} {value:.3f}" for name, value in score.items())
            for kind, score in run["scores"].items()
        )
        typer.echo(
            f"run      {name[:12]}  {run['rounds_served']} rounds served, the last {run['last_assignment'] or 'never'}"
        )
        if scores:
            typer.echo(f"         on the own test records: {scores}")
    error = found["last_error"]
    typer.echo(f"error    {error['at']} {error['error']}" if error else "error    none")


def _say(line: str) -> None:
    note(f"{time.strftime('%H:%M:%S')} {line}")
