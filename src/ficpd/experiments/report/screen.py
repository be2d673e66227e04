"""Prints the blocks of a page on a terminal: tables, facts and texts, but no figures and files."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Drawn

from ficpd.experiments.config import STANDARD_BASELINES, Experiment
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report.blocks import Block, Code, KeyValues, Table, Text
from ficpd.experiments.report.summary import RIVALS, results_table, stopped_early


def announcement(experiment: Experiment, out: Path) -> list[Block]:
    """Describes a run before it starts."""
    names = STANDARD_BASELINES if experiment.baselines == "auto" else experiment.baselines
    others = ", ".join(["no prompt", *(RIVALS.get(name, name) for name in names if name != experiment.method["name"])])
    epsilon = experiment.privacy.get("epsilon")
    private = f"ε = {epsilon:g}" if epsilon else "no privacy" if experiment.privacy["name"] == "none" else "private"
    what = f"{experiment.method['name']} on {experiment.backbone.name}, {experiment.federation.num_rounds} rounds, {private}"
    return [
        KeyValues([(experiment.name, what), ("compared with", f"{others}, on the same records"), ("into", str(out))]),
        Text(f"A bar shows the time left. Ctrl-C stops; `ficpd run --resume --out {out}` goes on."),
    ]


def result_blocks(run: FinishedRun, brief: bool = False) -> list[Block]:
    """Returns the blocks at the end of a run: the table, the verdict, and the next commands.

    brief: only the table and the verdict.
    """
    folder, (first, *rest) = shlex.quote(str(run.directory)), run.verdicts
    library, page = run.directory / "library", run.directory / "report.html"
    commands = [
        f'ficpd predict {folder} "a text of yours"',
        f"ficpd adapt {folder} --data few.csv --shots 16 --out my-library",
        f"ficpd audit {folder}",
    ]
    shown: list[Block] = [
        results_table(run.results),
        *stopped_early(run.result),
        Text(f"{first}\n{' '.join(rest)}", strong=True),
    ]
    if not brief:
        shown += [KeyValues([("library", str(library)), ("page", str(page))]), Code("next", "\n".join(commands))]
    return shown


def print_blocks(console: Console, blocks: Iterable[Block]) -> None:
    for block in blocks:
        if isinstance(block, Table):
            _print_table(console, block)
        elif isinstance(block, Text):
            style = "bold red" if block.alarm else "bold" if block.strong else ""
            console.print(escape(block.words), style=style, highlight=False, soft_wrap=not console.is_terminal)
        elif isinstance(block, KeyValues):
            for name, value in block.pairs:
                console.print(f"[bold]{escape(name)}:[/] {escape(value)}", highlight=False, soft_wrap=True)
        elif isinstance(block, Code):
            console.print(f"\n[bold]{escape(block.title)}:[/]\n{escape(block.words)}", highlight=False, soft_wrap=True)


def _print_table(console: Console, table: Table) -> None:
    """Prints one line a row. Long names are cut, figures are not."""
    drawn = Drawn(
        title=escape(table.caption), title_justify="left", title_style="bold", caption=escape(table.note),
        caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    columns = [(head, *(line[place] for line in table.cells)) for place, head in enumerate(table.heads)]
    widths = [max(map(len, [*head.split(), *cells])) for head, *cells in columns]
    widths[0] = min(widths[0], max(8, console.width - sum(widths[1:]) - 2 * len(widths)))
    for place, (head, numeric) in enumerate(zip(table.heads, table.numeric, strict=True)):
        whole = numeric or not place
        drawn.add_column(
            escape(head), justify="right" if numeric else "left", width=widths[place] if whole else None,
            no_wrap=not place, overflow="fold" if place else "ellipsis",
        )  # fmt: skip
    for place, line in enumerate(table.cells):
        drawn.add_row(*map(escape, line), style="bold" if place in table.marked else "")
    console.print(drawn)
