"""The commands of `ficpd deploy`."""

from pathlib import Path
from typing import Annotated

import typer

from ficpd.cli.console import note

deploy = typer.Typer(
    no_args_is_help=True,
    help="Set up a federation of organisations: write their files, check the connection, rehearse.",
)


@deploy.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where to write; it must not exist yet, or be empty")],
    sites: Annotated[str, typer.Option(help="the organisations' names, such as north,south,east")],
    address: Annotated[str, typer.Option(help="the coordinator's HOST:PORT, as the sites see it")] = "127.0.0.1:9443",
    secure_aggregation: Annotated[
        bool, typer.Option("--secure-aggregation", help="the server sees only sums, and the sites share the noise")
    ] = False,
) -> None:
    """Write keys, certificates, settings and systemd units for a coordinator and its sites, a folder for each.

    Example: `ficpd deploy init federation --sites north,south,east --address federation.example.org:9443`
    """
    from ficpd.deployment.provision import init as write

    names = [name.strip() for name in sites.split(",")]
    write(folder, names, address, secure_aggregation)
    typer.echo(f"folder: {folder} (README.md says who gets which files)")


@deploy.command()
def check(
    address: Annotated[str, typer.Argument(help="the coordinator's HOST:PORT")],
    ca: Annotated[Path | None, typer.Option(help="ca.crt of the coordinator")] = None,
) -> None:
    """Check that the coordinator's address answers with the right certificate.

    Example: `ficpd deploy check federation.example.org:9443 --ca /etc/ficpd/ca.crt`
    """
    from ficpd.deployment.tls_check import check_tls

    typer.echo(check_tls(address, ca))


@deploy.command()
def demo(
    out: Annotated[Path, typer.Option(help="run directory, which must not exist yet")] = Path("runs/deploy-demo"),
    rounds: Annotated[int, typer.Option(help="number of rounds", min=1)] = 5,
    secure_aggregation: Annotated[
        bool, typer.Option("--secure-aggregation", help="the server sees only sums, and the sites share the noise")
    ] = False,
) -> None:
    """Run a few private rounds on this machine: a coordinator with TLS and three authenticated sites."""
    from ficpd.deployment.demo import demo as rehearse

    rehearse(out, rounds, note, secure_aggregation)
