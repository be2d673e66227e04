"""The commands for experiments: run, report, audit, info."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ficpd.cli.console import errors, print_table, progress_bars, screen
from ficpd.cli.options import Columns, Device, roles
from ficpd.experiments.tracking import Track

Changes = Annotated[list[str] | None, typer.Option("--set", "-s", help="change one setting: part.key=value")]


def run(
    recipe: Annotated[str | None, typer.Argument(help="a TOML file or a recipe's name; none: quickstart")] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="run directory; none: runs/NAME-METHOD-SEED")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue after the last finished round")] = False,
    engine: Annotated[
        str | None, typer.Option(help="in_process, ray or ray://HOST:PORT: many processes, or flower: among real sites")
    ] = None,
    track: Track = None,
) -> None:
    """Run an experiment and write its results, library and report to a run directory.

    Example: `ficpd run quickstart --set method.name=fedavg --out runs/fedavg`
    """
    from ficpd.experiments import config as experiments
    from ficpd.experiments.api import default_directory
    from ficpd.experiments.finished import FinishedRun
    from ficpd.experiments.report.build import PAGE
    from ficpd.experiments.report.summary import format_noise_multipliers, results_table
    from ficpd.experiments.runner import run as run_experiment
    from ficpd.experiments.tracking import followed

    changed = [*(changes or ()), *_engine_changes(engine)]
    experiment = experiments.read(recipe, changed)
    out = out or default_directory(experiment)
    screen.print(
        f"[bold]{experiment.name}[/]: {experiment.method['name']} on {experiment.backbone.name}, into {escape(str(out))}"
    )
    if experiment.engine.name == "flower":
        from ficpd.deployment.flower_cli import run_with_flower

        with followed(track, out):
            raise typer.Exit(run_with_flower(experiment, recipe if not changes else None, out, resume))
    try:
        with followed(track, out) as look, progress_bars() as progress:

            def show(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
                progress(method, done, planned, figures)
                look()

            run_experiment(experiment, out, resume, show)
    except KeyboardInterrupt:
        errors.print("stopped; `--resume` continues after the last finished round")
        raise typer.Exit(130) from None
    finished = FinishedRun.load(out)
    print_table(*results_table(finished.results))
    privacy = finished.result.privacy
    if privacy.lines:
        typer.echo(f"privacy: {privacy.guarantee}; noise multipliers {format_noise_multipliers(privacy)}")
    typer.echo(f"library: {out / 'library'}")
    typer.echo(f"page:    {out / PAGE}")
    screen.print(f"\n[bold]{escape(finished.verdict)}[/]")


def _engine_changes(engine: str | None) -> list[str]:
    """Returns the settings of `--engine`.

    >>> _engine_changes("ray://10.0.0.1:10001")
    ['engine.name=ray', 'engine.options.address=ray://10.0.0.1:10001']
    """
    name, address, _ = (engine or "").partition("://")
    return [f"engine.name={name}"] * bool(name) + [f"engine.options.address={engine}"] * bool(address)


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="the directory of a finished run or of a comparison")
    ],
    out: Annotated[Path | None, typer.Option(help="the HTML file; none: DIR/report.html")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="also write the table as CSV")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="also write the table as LaTeX")] = False,
) -> None:
    """Write a report of a run or a comparison as one HTML file, which needs no network and no server.

    Example: `ficpd report runs/demo --csv`
    """
    from ficpd.experiments.report.build import write_page, write_tables

    page = write_page(directory, out)
    typer.echo(f"page:    {page}")
    for kind, file in write_tables(directory, page, csv, latex).items():
        typer.echo(f"{kind + ':':9}{file}")


def publish(
    run: Annotated[Path, typer.Argument(help="the directory of a finished private run")],
    out: Annotated[Path, typer.Argument(help="where to copy it; it must not exist yet, or be empty")],
) -> None:
    """Copy from a private run what its guarantee covers: the library, without scores, counts and ledger.

    Example: `ficpd publish runs/hospitals published`
    """
    from ficpd.experiments.publish import publish as copy

    copy(run, out)
    typer.echo(f"folder: {out}")


def audit(
    run: Annotated[Path, typer.Argument(help="the directory of a finished run; with --trained, any library")],
    prompt: Annotated[str | None, typer.Option(help="the prompt attacked; none: global, else the first")] = None,
    trained: Annotated[str | None, typer.Option(help="a file of records that the library was tuned on")] = None,
    others: Annotated[str | None, typer.Option(help="a file of like records that it was not tuned on")] = None,
    columns: Columns = None,
    out: Annotated[Path | None, typer.Option(help="with --trained: where audit.json goes; none: LIBRARY-audit")] = None,
    shadows: Annotated[int, typer.Option(help="prompts tuned for comparison", min=1)] = 4,
    members: Annotated[int, typer.Option(help="training records attacked, at most", min=2)] = 1000,
    canaries: Annotated[int, typer.Option(help="records planted in a second training; 0: none", min=0)] = 100,
    seed: int = 0, device: Device = "cpu",
) -> None:  # fmt: skip
    """Attack a run: infer members of its training data, and test its ε. Exit status 2 if the ε is violated.

    Without the run, attack a library's prompt with known members: `--trained` and `--others`.

    Example: `ficpd audit runs/quickstart-ficpd-0 --canaries 0`
    """
    from ficpd.evaluation.audit.report import FEW, table, verdict
    from ficpd.experiments.audit import audit_library, audit_run
    from ficpd.library.records import read_records

    if bool(trained) != bool(others):
        raise typer.BadParameter("give --trained and --others together: members and non-members")
    if trained and others:
        folder = out or run.with_name(run.resolve().name + "-audit")
        known, unknown = (read_records(file, roles(columns)) for file in (trained, others))
        found = audit_library(run, known, unknown, folder, prompt, shadows, members, seed, device)
    else:
        folder = run
        found = audit_run(run, prompt, shadows, members, canaries, seed, device)
    screen.print(
        f"[bold]{escape(found.prompt)}[/] of {escape(str(run))}: {found.num_members:,} records that were trained on, "
        f"{found.num_nonmembers:,} that were not; privacy: {escape(found.guarantee)}"
    )
    print_table(*table(found))
    if found.num_nonmembers < FEW:
        screen.print(f"few non-members (below {FEW:,}): intervals are wide, and low rates cannot be measured")
    for name, bound in found.bounds.items():
        stated = "none stated" if bound.stated is None else f"{bound.stated:.2f} stated"
        screen.print(
            f"{name}: ε is at least {bound.epsilon:.2f} ({stated}; {bound.runs:,} could show {bound.reach:.2f})"
        )
    screen.print(f"[bold red]{escape(verdict(found))}[/]" if found.alarm else escape(verdict(found)))
    typer.echo(f"result:  {folder / 'audit.json'}")
    if found.alarm:
        raise typer.Exit(2)


def info(
    path: Annotated[Path | None, typer.Argument(help="a library or run directory; none: this installation")] = None,
) -> None:
    """Describe a library or a run; without one, this installation."""
    import torch

    from ficpd import __version__, registry
    from ficpd.backbones.autotune import machine_info
    from ficpd.backbones.catalog import NAMED
    from ficpd.experiments.config import recipes
    from ficpd.library.session import library_facts

    if path:
        facts = library_facts(path)
    else:
        kinds = ("methods", "tasks", "backbones", "optimizers", "privacy", "engines")
        facts = {
            "ficpd": __version__, **{kind: ", ".join(registry.names(kind)) for kind in kinds},
            "named backbones": "; ".join(f"{name}: {entry.about}" for name, entry in NAMED.items()),
            "recipes": ", ".join(recipes()), "machine": machine_info(torch.device("cpu")),
            "cuda": torch.cuda.is_available(),
        }  # fmt: skip
    for name, value in facts.items():
        screen.print(f"[bold]{name:18}[/] {escape(str(value))}", highlight=False)
