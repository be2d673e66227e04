"""The command `ficpd compare`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ficpd.cli.console import FAILED, asked
from ficpd.experiments.tracking import Track

SWEEP = re.compile(r"[a-z_]+(\.\w+)+=")


def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET [SWEEP]...", help="a TOML file or a comparison's name, or a folder, to print its overview"
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="folder of the comparison; none: runs/compare-NAME")] = None,
    ablate: Annotated[
        list[str] | None, typer.Option("--ablate", help="part.key=value,value: one more axis; several may follow")
    ] = None,
    jobs: Annotated[
        str | None,
        typer.Option(help="runs at a time, or ray or ray://HOST:PORT; none: one for each core, one on a GPU"),
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="with a folder: print its overview as markdown, csv or latex")
    ] = None,
    track: Track = None,
) -> None:
    """Run methods on the same tasks at the same budgets, and write figures, tests, Pareto fronts and tables.

    TARGET is a TOML file, a comparison of ficpd (quick), or a folder, whose overview is printed again. Finished runs are
    not repeated. Exit status 3: some runs failed; the tables say which, and why.

    Example: `ficpd compare quick --out runs/quick --ablate privacy.epsilon=1,2,4 method.num_prototypes=5,10`
    """
    target, sweeps = _target(words, ablate or [])
    if table is None and (Path(target) / "compare.json").is_file():
        table = "markdown"
    if table is not None:
        if sweeps or out:
            raise typer.BadParameter("--table prints a folder's tables; leave out --ablate and --out")
        typer.echo(_overview(Path(target), table), nl=False)
        return
    _run(target, sweeps, out, _jobs(jobs), track)


def _target(words: list[str], ablate: list[str]) -> tuple[str, list[str]]:
    """Separates the target from the sweeps that follow the first one after `--ablate`.

    >>> _target(["quick", "method.k=5,10"], ["privacy.epsilon=1,2"])
    ('quick', ['privacy.epsilon=1,2', 'method.k=5,10'])
    """
    more = [word for word in words if ablate and SWEEP.match(word)]
    targets = [word for word in words if word not in more]
    if len(targets) != 1:
        raise typer.BadParameter(f"expected one file or name, got {', '.join(targets) or 'none'}")
    return targets[0], [*ablate, *more]


def _overview(path: Path, how: str) -> str:
    from ficpd.experiments.comparison.schema import ComparisonResult
    from ficpd.experiments.report.comparison_tables import overviews
    from ficpd.experiments.report.table_formats import as_csv, as_latex, as_markdown

    if how not in ("markdown", "csv", "latex"):
        raise typer.BadParameter(f"--table {how!r}: expected markdown, csv or latex")
    tables = overviews(ComparisonResult.load(path))
    if how == "csv":
        return as_csv(tables)
    return "\n".join(as_markdown(one) if how == "markdown" else as_latex(one) for one in tables)


def _jobs(given: str | None) -> int | str | None:
    """Parses `--jobs`.

    >>> _jobs("4"), _jobs("ray")
    (4, 'ray')
    """
    if given is None or given.startswith("ray"):
        return given
    if not given.isdecimal() or int(given) < 1:
        raise typer.BadParameter(f"--jobs {given!r}: expected a number of runs, at least 1, or ray, or ray://HOST:PORT")
    return int(given)


def _run(target: str, sweeps: list[str], out: Path | None, jobs: int | str | None, track: str | None) -> None:
    from rich.console import Console
    from rich.markup import escape

    from ficpd.errors import needs
    from ficpd.experiments.comparison.compare import compare as run_comparison
    from ficpd.experiments.comparison.grid import read_plan
    from ficpd.experiments.comparison.progress import ProgressDisplay
    from ficpd.experiments.report.blocks import Text

    with needs("ficpd compare", "report"):
        from ficpd.experiments.report.comparison import headline
    from ficpd.experiments.report.comparison_tables import overviews, without_figure
    from ficpd.experiments.report.screen import print_blocks
    from ficpd.experiments.tracking import followed

    console, errors, notes = Console(), Console(stderr=True), Console(quiet=asked.quiet)
    plan = read_plan(target, sweeps)
    out = out or Path("runs") / f"compare-{plan.spec.name}"
    notes.print(f"[bold]{plan.spec.name}[/]: {len(plan.cells)} cells, into {out}", highlight=False)
    screen = ProgressDisplay(notes, errors)
    try:
        with screen.bars, followed(track, out / "cells") as look:

            def seen(event: Any) -> None:
                screen.seen(event)
                look()

            found = run_comparison(plan, out, jobs, screen.planned, seen)
    except KeyboardInterrupt:
        errors.print("stopped; the same command continues with the missing runs")
        raise typer.Exit(130) from None
    print_blocks(console, [*overviews(found), Text(headline(found))])
    for why in without_figure(found):
        console.print(escape(why), highlight=False, soft_wrap=True)
    typer.echo(f"tables: {out / 'compare.md'}, {out / 'tables'}")
    if found.counts.get("failed") or found.counts.get("missing"):
        raise typer.Exit(FAILED)
