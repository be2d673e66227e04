"""A directory as a page: which kind it is, and what belongs on it."""

from pathlib import Path

from ficpd.files import write
from ficpd.page import comparison, costs, efforts, grids, members, overview, promises, prompts, spreads, tables
from ficpd.page.blocks import Page, kept
from ficpd.page.comparison import COMPARISON, Tree
from ficpd.page.finished import Finished, opened
from ficpd.page.render import render

PAGE = "report.html"


def write_page(directory: Path, out: Path | None = None) -> Path:
    """One HTML file (none named: `report.html` in the directory) of a run, or of a comparison. Raises `RunError` for what is
    neither."""
    directory = Path(directory)
    return write(out or directory / PAGE, render(page_of(directory)))


def page_of(directory: Path) -> Page:
    if (directory / COMPARISON).exists():
        text = directory / "compare.toml"
        tree = comparison.read(directory / COMPARISON)
        return of_comparison(tree, text.read_text(encoding="utf-8") if text.exists() else "")
    return of_run(opened(directory))


def of_run(run: Finished) -> Page:
    own = run.own
    return Page(
        f"{own['method']} on {own['backbone']['name']}: {own['task']}",
        overview.headline(run),
        overview.lead(run),
        kept(
            overview.methods(run),
            costs.costs(run),
            overview.over_rounds(run),
            members.clients(run),
            members.levels(run),
            members.groups(run),
            prompts.prototypes(run),
            prompts.library(run),
            prompts.examples(run),
            promises.ledger(run),
            promises.audit(run),
            overview.settings(run),
        ),
    )


def of_comparison(tree: Tree, text: str) -> Page:
    return Page(
        f"Comparison: {tree['name']}",
        comparison.headline(tree),
        comparison.lead(tree),
        kept(
            grids.grid(tree),
            grids.ranks(tree),
            efforts.fronts(tree),
            efforts.on_the_way(tree),
            efforts.targets(tree),
            spreads.spreads(tree),
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
        tree = comparison.read(directory / COMPARISON)
        lines, drawn = grids.csv_lines(tree), grids.matrices(tree)
    else:
        run = opened(directory)
        lines, drawn = tables.lines(run), [tables.shown(run)]
    if csv:
        found["csv"] = write(page.with_suffix(".csv"), tables.csv(lines))
    if latex:
        found["latex"] = write(page.with_suffix(".tex"), tables.latex(drawn))
    return found
