"""The commands of people who use a library: evaluate, adapt, predict, export, import. Their work is one import away."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ficpd.cli.console import print_scores, screen
from ficpd.cli.options import Columns, Data, Device, Library, TaskName, pairs, roles


def evaluate(
    library: Library, data: Data, columns: Columns = None,
    prompt: Annotated[str | None, typer.Option(help="a prompt's name; none: every prompt of the library")] = None,
    task: TaskName = None, device: Device = "cpu",
) -> None:  # fmt: skip
    """Score a library's prompts, and no prompt at all, on labelled records."""
    from ficpd.library.session import open_library, read_records, score_library

    opened = open_library(library, device)
    opened.named(task)
    records = read_records(data, roles(columns), labelled=True)
    found = score_library(opened, records, prompt, task)
    screen.print(f"{len(records)} records from {data}")
    print_scores("prompt", found)


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
    from ficpd.library.session import (
        adapt_library,
        draw_shots,
        missing_labels,
        open_library,
        read_records,
        resolve_task,
    )

    if task and (label or instruction is not None):
        raise typer.BadParameter("--task is one that the library knows, --label and --instruction make a new one")
    labels = pairs(label, "--label takes label=text, such as lost_card=lost card")
    opened = open_library(library, device)
    records = read_records(data, roles(columns), labelled=True) if data else []
    own = resolve_task(opened, records, task, labels, instruction)
    chosen = draw_shots(records, shots, per_class, seed)
    screen.print(escape(own.said), highlight=False)
    if absent := missing_labels(own.task, chosen):
        screen.print(escape(f"none of the {len(chosen)} records is: {', '.join(absent)}"), highlight=False)
    found = adapt_library(opened, own, chosen, out, how, seed)
    if found.table:
        print_scores("way, on records held back", found.table)
    for line in (found.said, f"{found.fitted.note}; {len(chosen)} records. Saved in {out}"):
        screen.print(escape(line), highlight=False)
    if found.fitted.demonstrations:
        screen.print("it holds your records, or what is made of them: pass it on only to who may see those")


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

    from ficpd.library.session import open_library, predicted, read_records, texts_as_records

    if bool(text) == bool(data):
        raise typer.BadParameter("give --text or --data, one of them")
    records = texts_as_records(text) if text else read_records(str(data), roles(columns), labelled=False)
    answers = predicted(open_library(library, device), records, prompt, task)
    for record, answer in zip(records, answers, strict=True):
        role = "image" if "image" in record.fields else "text"
        typer.echo(json.dumps({role: str(record.fields[role]), "prediction": answer}, ensure_ascii=False))


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
    from ficpd.library.library import PromptLibrary
    from ficpd.library.peft_io import checked_target, own_base
    from ficpd.library.peft_io import export as write_folder

    if data and not reenter:
        raise typer.BadParameter("--data is what --reenter tunes on; give both")
    found = PromptLibrary.load(library)
    base = base or own_base(found)
    checked_target(found, out, base)
    if reenter:
        found = _reentered(library, prompt, data, roles(columns), task=task, num_tokens=tokens, steps=steps, seed=seed,
                           device=device)  # fmt: skip
    write_folder(found, prompt, out, base)
    typer.echo(f"base:   {base}")
    typer.echo(f"folder: {out} (README.md says how to load it)")


def _reentered(library: Path, prompt: str, data: str | None, roles: dict[str, str], **options: Any) -> Any:
    """The imitation alone as a library; the screen says how well it agrees."""
    from ficpd.library.peft_distillation import distill_library_prompt, load_texts
    from ficpd.library.peft_io import reentry_lines

    found = distill_library_prompt(library, prompt, load_texts(data, roles) if data else None, **options)
    for line in reentry_lines(found.card):
        screen.print(escape(line), highlight=False, soft_wrap=True)
    return found


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
    from ficpd.backbones.loading import BackboneConfig
    from ficpd.errors import LibraryError
    from ficpd.library.peft_io import IMPORTED, imported
    from ficpd.registry import validated_section

    if out.exists():
        raise LibraryError(f"{out} exists already; choose another --out")
    labels = pairs(label, "--label takes label=text, such as good=positive")
    kind = {"name": "classification", "labels": labels} if labels else {"name": "generation"}
    task = validated_section("tasks", {**kind, "instruction": instruction}, "--label")
    library, base = imported(folder, BackboneConfig(name=backbone), task, device)
    library.save(out)
    typer.echo(f"the folder says it is for {base}; nothing in it can prove that {backbone} is the same")
    typer.echo(f"library: {out} (its prompt is {IMPORTED})")
