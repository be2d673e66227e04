"""Builds the page of a run or a comparison from its directory."""

from pathlib import Path

from ficpd.experiments.comparison.schema import COMPARISON, ComparisonResult
from ficpd.experiments.facts import PAGE
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import clients, comparison, library, overview, privacy
from ficpd.experiments.report.blocks import Page, Section
from ficpd.experiments.report.comparison_tables import cells_csv, overviews
from ficpd.experiments.report.render import render
from ficpd.experiments.report.summary import results_table
from ficpd.experiments.report.table_formats import as_latex, safe_csv
from ficpd.storage import atomic_write


def write_page(directory: Path, out: Path | None = None) -> Path:
    """Writes one HTML file for a run or a comparison (default: `report.html` in the directory).

    Raises `RunError` if the directory has neither.
    """
    directory = Path(directory)
    return atomic_write(out or directory / PAGE, render(page_of(directory)))


def page_of(directory: Path) -> Page:
    if (directory / COMPARISON).exists():
        text = directory / "compare.toml"
        tree = ComparisonResult.load(directory)
        return of_comparison(tree, text.read_text(encoding="utf-8") if text.exists() else "")
    return of_run(FinishedRun.load(directory))


def of_run(run: FinishedRun) -> Page:
    own = run.result
    return Page(
        f"{own.method} on {own.backbone.name}: {own.task}",
        overview.headline(run),
        overview.summary_blocks(run),
        non_empty(
            overview.curves(run),
            overview.methods(run),
            privacy.left(run),
            clients.clients(run),
            clients.levels(run),
            clients.groups(run),
            library.prototypes(run),
            library.library(run),
            library.examples(run),
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
            comparison.grid(tree),
            comparison.by_epsilon(tree),
            comparison.on_the_way(tree),
            comparison.fronts(tree),
            comparison.ranks(tree),
            comparison.targets(tree),
            comparison.spreads(tree),
            comparison.failures(tree),
            comparison.settings(tree, text),
        ),
    )


def non_empty(*sections: Section | None) -> list[Section]:
    """Returns the sections with at least one block."""
    return [section for section in sections if section and section.blocks]


def write_tables(directory: Path, page: Path, csv: bool, latex: bool) -> dict[str, Path]:
    """Writes the tables as CSV or LaTeX next to the page, under its name. Returns the files by kind."""
    directory, found = Path(directory), {}
    if not (csv or latex):
        return found
    if (directory / COMPARISON).exists():
        tree = ComparisonResult.load(directory)
        text, drawn = cells_csv(tree), overviews(tree)
    else:
        run = FinishedRun.load(directory)
        text = safe_csv(run.to_frame().reset_index()) if run.results else ""
        drawn = [results_table(run.results)] if run.results else []
    if csv:
        found["csv"] = atomic_write(page.with_suffix(".csv"), text)
    if latex:
        booktabs = "% needs \\usepackage{booktabs}\n"
        found["latex"] = atomic_write(page.with_suffix(".tex"), booktabs + "\n".join(map(as_latex, drawn)))
    return found
