"""The command line. Every command's work is one import away, so that `ficpd --help` loads neither torch nor Flower."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ficpd import __version__
from ficpd.compare.cli import compare
from ficpd.deploy.cli import deploy
from ficpd.errors import FicpdError
from ficpd.page.cli import report
from ficpd.site.cli import site
from ficpd.track import Track

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Adapt one frozen foundation model together; share only soft prompts.",
)  # fmt: skip
app.add_typer(deploy, name="deploy")
app.add_typer(site, name="site")
app.command()(compare)
screen, errors = Console(), Console(stderr=True)

Library = Annotated[Path, typer.Argument(help="a library's folder, or the run directory that holds it")]
Data = Annotated[str, typer.Option("--data", help="a CSV, TSV, JSON Lines or Parquet file (or folder), or hf:ID")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", "-c", help="role=column, such as text=review; may be repeated")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
TaskName = Annotated[str | None, typer.Option("--task", help="which task, if the library has several")]
Changes = Annotated[list[str] | None, typer.Option("--set", "-s", help="change one setting: part.key=value")]


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(help="a TOML file or a recipe's name; none: quickstart")] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="run directory; none: runs/NAME-METHOD-SEED")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last finished round")] = False,
    engine: Annotated[
        str | None, typer.Option(help="in_process, or flower: real sites, or Flower's simulation")
    ] = None,
    track: Track = None,
) -> None:
    """Run an experiment and leave its results, its library and a report in a run directory.

    Example: `ficpd run quickstart --set method.name=fedavg --out runs/fedavg`
    """
    from ficpd import experiment as experiments
    from ficpd.library import guarantee
    from ficpd.page.build import write_page
    from ficpd.report import chosen, rows
    from ficpd.run import run as run_experiment
    from ficpd.track import followed

    changed = [*(changes or ()), *([f"engine.name={engine}"] if engine else [])]
    experiment = experiments.read(recipe, changed)
    out = out or Path("runs") / f"{experiment.name}-{experiment.method['name']}-{experiment.seed}"
    screen.print(
        f"[bold]{experiment.name}[/]: {experiment.method['name']} on {experiment.backbone.name}, into {escape(str(out))}"
    )
    if experiment.engine.name == "flower":
        from ficpd.deploy.start import over_flower

        with followed(track, out):
            raise typer.Exit(over_flower(experiment, recipe if not changes else None, out, resume))
    try:
        with followed(track, out) as look, _progress() as progress:

            def show(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
                progress(method, done, planned, figures)
                look()

            run_experiment(experiment, out, resume, show)
    except KeyboardInterrupt:
        errors.print("stopped; `--resume` goes on from the last finished round")
        raise typer.Exit(130) from None
    results = rows(out)
    _print_table(results)
    if results[-1]["privacy"].get("lines"):
        typer.echo(f"privacy: {guarantee(results[-1]['privacy'])}; noise multipliers {chosen(results[-1]['privacy'])}")
    typer.echo(f"library: {out / 'library'}")
    typer.echo(f"report:  {out / 'report.md'}")
    typer.echo(f"page:    {write_page(out)}")


app.command()(report)


@app.command()
def evaluate(
    library: Library, data: Data, columns: Columns = None,
    prompt: Annotated[str | None, typer.Option(help="a prompt's name; none: every prompt of the library")] = None,
    task: TaskName = None, device: Device = "cpu",
) -> None:  # fmt: skip
    """Score a library's prompts, and no prompt at all, on labelled records."""
    from ficpd.use import open_library, read_records, scores

    opened = open_library(library, device)
    opened.named(task)
    records = read_records(data, _roles(columns), labelled=True)
    found = scores(opened, records, prompt, task)
    screen.print(f"{len(records)} records from {data}")
    _print_scores("prompt", found)


@app.command()
def adapt(
    library: Library,
    out: Annotated[Path, typer.Option(help="folder of the adapted library")],
    data: Annotated[str | None, typer.Option("--data", help="your records; none: go by what the task is")] = None,
    shots: Annotated[int, typer.Option(help="records used; 0: all of them", min=0)] = 16,
    per_class: Annotated[bool, typer.Option("--per-class", help="use that many of each class")] = False,
    how: Annotated[
        str, typer.Option(help="auto, leave, nearest, compose, tune, demonstrations or compose+demonstrations")
    ] = "auto",
    task: TaskName = None,
    label: Annotated[
        list[str] | None, typer.Option(help="a new task: label=its text; one for each answer. None: as found in the data")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="a new task: what frames the answer")] = None,
    columns: Columns = None, seed: int = 0, device: Device = "cpu",
) -> None:  # fmt: skip
    """Fit a library to your own few records, of a task it knows or of another, and save it with the prompt for them.

    Example: `ficpd adapt runs/demo --data few.jsonl --shots 4 --per-class --out mine`
    """
    from ficpd.use import adapt_library, draw_shots, missing, open_library, own_task, read_records

    if task and (label or instruction is not None):
        raise typer.BadParameter("--task is one that the library knows, --label and --instruction make a new one")
    labels = _pairs(label, "--label takes label=text, such as lost_card=lost card")
    opened = open_library(library, device)
    records = read_records(data, _roles(columns), labelled=True) if data else []
    own = own_task(opened, records, task, labels, instruction)
    chosen = draw_shots(records, shots, per_class, seed)
    screen.print(escape(own.said), highlight=False)
    if absent := missing(own.task, chosen):
        screen.print(escape(f"none of the {len(chosen)} records is: {', '.join(absent)}"), highlight=False)
    found = adapt_library(opened, own, chosen, out, how, seed)
    if found.table:
        _print_scores("way, on records held back", found.table)
    for line in (found.said, f"{found.fitted.note}; {len(chosen)} records. Saved in {out}"):
        screen.print(escape(line), highlight=False)
    if found.fitted.demonstrations:
        screen.print("it holds your records, or what is made of them: pass it on only to who may see those")


@app.command()
def predict(
    library: Library,
    text: Annotated[list[str] | None, typer.Option("--text", help="a text; may be repeated")] = None,
    data: Annotated[str | None, typer.Option("--data", help="a file of texts")] = None,
    columns: Columns = None,
    prompt: Annotated[str | None, typer.Option(help="a prompt's name; none: adapted, else global")] = None,
    task: TaskName = None,
    device: Device = "cpu",
) -> None:
    """Answer texts with a library's prompt: one JSON line each."""
    import json

    from ficpd.use import open_library, predicted, read_records, texts_as_records

    if bool(text) == bool(data):
        raise typer.BadParameter("give --text or --data, one of them")
    records = texts_as_records(text) if text else read_records(str(data), _roles(columns), labelled=False)
    answers = predicted(open_library(library, device), records, prompt, task)
    for record, answer in zip(records, answers, strict=True):
        role = "image" if "image" in record.fields else "text"
        typer.echo(json.dumps({role: str(record.fields[role]), "prediction": answer}, ensure_ascii=False))


@app.command()
def export(
    library: Library,
    prompt: Annotated[str, typer.Option(help="the prompt's name; `ficpd info LIBRARY` lists them")],
    out: Annotated[Path, typer.Option(help="the PEFT folder, which must not exist yet")],
    base: Annotated[str | None, typer.Option(help="the model PEFT loads: a folder or hub id; none: our copy")] = None,
    reenter: Annotated[bool, typer.Option("--reenter", help="first tune an input prompt that imitates it")] = False,
    data: Annotated[str | None, typer.Option("--data", help="with --reenter: a file of texts")] = None,
    columns: Columns = None,
    task: Annotated[str | None, typer.Option(help="with --reenter: which task, if there are several")] = None,
    tokens: Annotated[int | None, typer.Option(help="with --reenter: virtual tokens; none: as many", min=1)] = None,
    steps: Annotated[int, typer.Option(help="with --reenter: steps of tuning", min=1)] = 200,
    seed: int = 0, device: Device = "cpu",
) -> None:  # fmt: skip
    """Write a prompt as a PEFT prompt-tuning folder. PEFT knows only prompts at the input: see `--reenter`.

    Example: `ficpd export runs/demo --prompt global --out peft --reenter --data texts.csv -c text=review`
    """
    from ficpd.library import PromptLibrary
    from ficpd.peft import checked_target, own_base
    from ficpd.peft import export as write_folder

    if data and not reenter:
        raise typer.BadParameter("--data is what --reenter tunes on; give both")
    found = PromptLibrary.load(library)
    base = base or own_base(found)
    checked_target(found, out, base)
    if reenter:
        found = _reentered(library, prompt, data, _roles(columns), task=task, num_tokens=tokens, steps=steps, seed=seed,
                           device=device)  # fmt: skip
    write_folder(found, prompt, out, base)
    typer.echo(f"base:   {base}")
    typer.echo(f"folder: {out} (README.md says how to load it)")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="a PEFT prompt-tuning folder")],
    out: Annotated[Path, typer.Option(help="folder of the new library")],
    backbone: Annotated[str, typer.Option(help="the model it was tuned on: a name, folder or hub id")],
    label: Annotated[
        list[str] | None, typer.Option(help="label=its text; one for each answer. None: the prompt writes")
    ] = None,
    instruction: Annotated[str, typer.Option(help="what frames the answer")] = "",
    device: Device = "cpu",
) -> None:
    """Make a library of a PEFT prompt-tuning folder: its one prompt is `imported`.

    Example: `ficpd import peft --out mine --backbone smollm2 --label good=positive --label bad=negative`
    """
    from ficpd.errors import LibraryError
    from ficpd.experiment import BackboneConfig, part
    from ficpd.peft import IMPORTED, imported

    if out.exists():
        raise LibraryError(f"{out} exists already; choose another --out")
    labels = _pairs(label, "--label takes label=text, such as good=positive")
    kind = {"name": "classification", "labels": labels} if labels else {"name": "generation"}
    task = part("tasks", {**kind, "instruction": instruction}, "--label")
    library, base = imported(folder, BackboneConfig(name=backbone), task, device)
    library.save(out)
    typer.echo(f"the folder says it is for {base}; nothing in it can prove that {backbone} is the same")
    typer.echo(f"library: {out} (its prompt is {IMPORTED})")


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="the directory of a finished run; with --trained, any library")],
    prompt: Annotated[str | None, typer.Option(help="the prompt attacked; none: global, else the first")] = None,
    trained: Annotated[str | None, typer.Option(help="a file of records that the library was tuned on")] = None,
    others: Annotated[str | None, typer.Option(help="a file of like records that it was not tuned on")] = None,
    columns: Columns = None,
    out: Annotated[Path | None, typer.Option(help="with --trained: where the page goes; none: LIBRARY-audit")] = None,
    shadows: Annotated[int, typer.Option(help="prompts tuned for comparison", min=1)] = 4,
    members: Annotated[int, typer.Option(help="training records attacked, at most", min=2)] = 1000,
    canaries: Annotated[int, typer.Option(help="records planted in a second training; 0: none", min=0)] = 100,
    seed: int = 0, device: Device = "cpu",
) -> None:  # fmt: skip
    """Attack a run: who was in the training data, and whether its ε holds. Exit status 2 if it does not.

    Without the run, attack a library's prompt by its members: `--trained` and `--others`.

    Example: `ficpd audit runs/quickstart-ficpd-0 --canaries 0`
    """
    from ficpd.attack import audit_library, audit_run
    from ficpd.audit.report import table, verdict
    from ficpd.use import read_records

    if bool(trained) != bool(others):
        raise typer.BadParameter("give --trained and --others together: members, and records to tell them from")
    if trained and others:
        folder = out or run.with_name(run.resolve().name + "-audit")
        known, unknown = (read_records(file, _roles(columns), labelled=True) for file in (trained, others))
        found = audit_library(run, known, unknown, folder, prompt, shadows, members, seed, device)
    else:
        folder = run
        found = audit_run(run, prompt, shadows, members, canaries, seed, device)
    screen.print(
        f"[bold]{escape(found.prompt)}[/] of {escape(str(run))}: {found.num_members:,} records that were trained on, "
        f"{found.num_nonmembers:,} that were not; privacy: {escape(found.guarantee)}"
    )
    _print_lines(*table(found))
    for name, bound in found.bounds.items():
        stated = "none stated" if bound.stated is None else f"{bound.stated:.2f} stated"
        screen.print(
            f"{name}: ε is at least {bound.epsilon:.2f} ({stated}; {bound.runs:,} could show {bound.reach:.2f})"
        )
    screen.print(f"[bold red]{escape(verdict(found))}[/]" if found.alarm else escape(verdict(found)))
    typer.echo(f"report:  {folder / 'audit.md'}")
    if found.alarm:
        raise typer.Exit(2)


@app.command()
def info(
    path: Annotated[Path | None, typer.Argument(help="a library or run directory; none: this installation")] = None,
) -> None:
    """Say what a library or a run is; with nothing given, what this installation has."""
    from ficpd.use import installed, library_facts

    for name, value in (library_facts(path) if path else installed()).items():
        screen.print(f"[bold]{name:18}[/] {escape(str(value))}", highlight=False)


def main() -> None:
    """Entry point: errors that a user can mend are one red paragraph and exit status 1, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _warn
    try:
        app()
    except FicpdError as error:
        errors.print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(1)


def _warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """A warning as one yellow paragraph, without the line of code that raised it."""
    errors.print("[bold yellow]warning:[/]", escape(str(message)), highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ficpd {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def _roles(columns: list[str] | None) -> dict[str, str]:
    return _pairs(columns, "--column takes role=column, such as text=review")


def _pairs(given: list[str] | None, expected: str) -> dict[str, str]:
    """`a=b` options as a mapping."""
    pairs = [word.partition("=") for word in given or []]
    if any(not all(pair) for pair in pairs):
        raise typer.BadParameter(expected)
    return {left: right for left, _, right in pairs}


def _reentered(library: Path, prompt: str, data: str | None, roles: dict[str, str], **options: Any) -> Any:
    """The imitation alone as a library; the screen says how well it agrees."""
    from ficpd.peft import reentry_lines
    from ficpd.reentry import reenter_from, texts_of

    found = reenter_from(library, prompt, texts_of(data, roles) if data else None, **options)
    for line in reentry_lines(found.card):
        screen.print(escape(line), highlight=False, soft_wrap=True)
    return found


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """A bar per method: rounds done and planned, time gone and left, clients and latest figures. Into a file: lines."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description:>11}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=screen,
        disable=not screen.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def show(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
        words = "  ".join(
            f"{name} {value:.3f}" if value % 1 else f"{value:.0f} {name}" for name, value in figures.items()
        )
        if not screen.is_terminal:
            typer.echo(f"{method:>11} {done}/{planned} rounds  {words}")
            return
        if method not in tasks:
            tasks[method] = bars.add_task(method, total=max(planned, 1), figures="")
        bars.update(tasks[method], completed=done if planned else len(figures) and 1, figures=words)

    with bars:
        yield show


def _print_table(results: list[dict[str, Any]]) -> None:
    from ficpd.report import table

    _print_lines(*table(results))


def _print_scores(first: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """A line of figures for each name; empty where one has not what others have."""
    metrics = sorted({metric for score in scores.values() for metric in score})
    cells = [[name, *(f"{s[m]:.3f}" if m in s else "" for m in metrics)] for name, s in scores.items()]
    _print_lines([first, *metrics], cells)


def _print_lines(heads: list[str], cells: list[list[str]]) -> None:
    drawn = Table(*heads)
    for line in cells:
        drawn.add_row(*map(escape, line))
    screen.print(drawn)
