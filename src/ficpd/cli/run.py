"""The commands for experiments: run, report, publish."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ficpd.cli.console import asked, errors, print_json, progress_bars, screen
from ficpd.cli.options import Json
from ficpd.experiments.tracking import Track

if TYPE_CHECKING:
    from ficpd.experiments.config import Experiment

Changes = Annotated[list[str] | None, typer.Option("--set", "-s", help="change one setting: part.key=value")]


def run(
    recipe: Annotated[
        str | None, typer.Argument(help="a TOML file or a recipe's name; none: quickstart, or the resumed run's")
    ] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="run directory; none: runs/NAME-METHOD-SEED")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue after the last finished round; with --out no recipe is needed")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="in_process, ray or ray://HOST:PORT (many processes), or flower (real sites)")
    ] = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Run an experiment and write its results, library and report to a run directory.

    `runs/X/experiment.toml` of any run lists every setting; `ficpd info` lists the recipes.

    Example: `ficpd run quickstart --set method.name=fedavg --out runs/fedavg`
    """
    from ficpd.experiments import config as experiments
    from ficpd.experiments.api import default_directory
    from ficpd.experiments.report.screen import announcement, print_blocks

    changed = [*(changes or ()), *_engine_changes(engine)]
    recipe = experiments.begun(out) if resume and out and recipe is None else recipe
    experiment = experiments.read(recipe, changed)
    out = out or default_directory(experiment)
    if not asked.quiet:
        print_blocks(errors if asked.json else screen, announcement(experiment, out))
    if experiment.engine.name == "flower":
        _run_among_sites(experiment, recipe if not changes else None, out, resume, track, as_json)
    from ficpd.experiments.runner import run as run_experiment
    from ficpd.experiments.tracking import followed

    try:
        with followed(track, out) as look, progress_bars() as progress:

            def show(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
                progress(method, done, planned, figures)
                look()

            run_experiment(experiment, out, resume, show)
    except KeyboardInterrupt:
        how = f"stopped; `ficpd run --resume --out {escape(str(out))}` continues after the last finished round"
        errors.print(how, soft_wrap=True)
        raise typer.Exit(130) from None
    _print_finished(out)


def _run_among_sites(
    experiment: "Experiment", recipe: str | None, out: Path, resume: bool, track: str | None, as_json: bool
) -> None:
    from ficpd.deployment.flower_cli import run_with_flower
    from ficpd.experiments.tracking import followed

    if as_json:
        raise typer.BadParameter("--json is for simulations; real sites keep their scores")
    with followed(track, out):
        raise typer.Exit(run_with_flower(experiment, recipe, out, resume))


def _print_finished(out: Path) -> None:
    from ficpd.experiments.finished import FinishedRun
    from ficpd.experiments.report.screen import print_blocks, result_blocks

    finished = FinishedRun.load(out)
    if not asked.json:
        print_blocks(screen, result_blocks(finished, brief=asked.quiet))
    print_json(
        {"directory": out, "verdict": finished.verdict, "stopped": finished.result.stopped, "methods": finished.lines}
    )


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
    from ficpd.errors import needs

    with needs("ficpd report", "report"):
        from ficpd.experiments.report.build import write_page, write_tables

    page = write_page(directory, out)
    typer.echo(f"page:    {page}")
    for kind, file in write_tables(directory, page, csv, latex).items():
        typer.echo(f"{kind + ':':9}{file}")


def publish(
    run: Annotated[Path, typer.Argument(help="the directory of a finished private run")],
    out: Annotated[Path, typer.Argument(help="where to copy it; it must not exist yet, or be empty")],
    hub: Annotated[
        str | None,
        typer.Option("--hub", help="OWNER/NAME: also send the library to this private repository of the hub"),
    ] = None,
) -> None:
    """Copy the library of a private run, without the scores, counts and ledger that its guarantee does not cover.

    Example: `ficpd publish runs/hospitals published`
    """
    from ficpd.experiments.publish import publish as copy

    copy(run, out)
    typer.echo(f"folder: {out}")
    if hub:
        from ficpd.library.library import PromptLibrary

        typer.echo(f"hub:    {PromptLibrary.load(out).push_to_hub(hub)}")
