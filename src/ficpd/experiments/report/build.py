"""A directory as a page: which kind it is, and what belongs on it."""

from pathlib import Path

from ficpd.experiments.comparison.schema import COMPARISON, ComparisonResult
from ficpd.experiments.report import (
    clients,
    comparison,
    costs,
    export,
    fairness,
    grid,
    library,
    overview,
    privacy,
    targets,
)
from ficpd.experiments.report.blocks import Page, non_empty
from ficpd.experiments.report.load import Finished, opened
from ficpd.experiments.report.render import render
from ficpd.storage import atomic_write

PAGE = "report.html"


def write_page(directory: Path, out: Path | None = None) -> Path:
    """One HTML file (none named: `report.html` in the directory) of a run, or of a comparison. Raises `RunError` for what is
    neither."""
    directory = Path(directory)
    return atomic_write(out or directory / PAGE, render(page_of(directory)))


def page_of(directory: Path) -> Page:
    if (directory / COMPARISON).exists():
        text = directory / "compare.toml"
        tree = ComparisonResult.load(directory)
        return of_comparison(tree, text.read_text(encoding="utf-8") if text.exists() else "")
    return of_run(opened(directory))


def of_run(run: Finished) -> Page:
    own = run.own
    return Page(
        f"{own.method} on {own.backbone.name}: {own.task}",
        overview.headline(run),
        overview.summary_blocks(run),
        non_empty(
            overview.methods(run),
            costs.costs(run),
            overview.over_rounds(run),
            clients.clients(run),
            clients.levels(run),
            clients.groups(run),
            library.prototypes(run),
            library.library(run),
            library.examples(run),
            privacy.ledger(run),
            privacy.audit(run),
            overview.settings(run),
        ),
    )


def of_comparison(tree: ComparisonResult, text: str) -> Page:
    return Page(
        f"Comparison: {tree.name}",
        comparison.headline(tree),
        comparison.summary_blocks(tree),
        non_empty(
            grid.grid(tree),
            grid.ranks(tree),
            targets.fronts(tree),
            targets.on_the_way(tree),
            targets.targets(tree),
            fairness.spreads(tree),
            comparison.failures(tree),
            comparison.settings(tree, text),
        ),
    )


def write_tables(directory: Path, page: Path, csv: bool, latex: bool) -> dict[str, Path]:
    """What was asked for, beside the page and under its name."""
    directory, found = Path(directory), {}
    if not (csv or latex):
        return found
    if (directory / COMPARISON).exists():
        tree = ComparisonResult.load(directory)
        lines, drawn = grid.csv_lines(tree), grid.matrices(tree)
    else:
        run = opened(directory)
        lines, drawn = export.lines(run), [export.shown(run)]
    if csv:
        found["csv"] = atomic_write(page.with_suffix(".csv"), export.csv(lines))
    if latex:
        found["latex"] = atomic_write(page.with_suffix(".tex"), export.latex(drawn))
    return found
