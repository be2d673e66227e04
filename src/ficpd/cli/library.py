"""The commands for libraries: evaluate, adapt, export, import."""

from pathlib import Path
from typing import Annotated

import typer

from ficpd.cli.console import note, print_json, print_scores, say
from ficpd.cli.options import Columns, Data, Device, Encoding, Json, Library, Separator, TaskName, pairs, reading, roles


def evaluate(
    library: Library, data: Data, columns: Columns = None, encoding: Encoding = "utf-8", separator: Separator = None,
    prompt: Annotated[str | None, typer.Option(help="a prompt's name; none: every prompt of the library")] = None,
    task: TaskName = None, device: Device = "cpu", as_json: Json = False,
) -> None:  # fmt: skip
    """Score a library's prompts, and the backbone without a prompt, on labelled records.

    Example: `ficpd evaluate runs/demo --data reviews.csv -c text=review -c target=label`
    """
    from ficpd.library.records import read_records
    from ficpd.library.session import load_library

    files, opened = reading(encoding, separator), load_library(library, device=device, weights=False)
    named = opened.named(task)
    records = read_records(data, roles(columns), files=files)
    found = opened.evaluate_prompts(records, None if prompt is None else ["zero-shot", prompt], task=task)
    say(f"{len(records)} records from {data}")
    print_scores("prompt", found)
    print_json({"library": library, "data": data, "task": named, "records": len(records), "prompts": found})


def adapt(
    library: Library,
    out: Annotated[Path, typer.Option(help="folder of the adapted library")],
    data: Annotated[str | None, typer.Option("--data", help="your records; none: choose a prompt by the task alone")] = None,
    shots: Annotated[int, typer.Option(help="number of records used; 0: all", min=0)] = 16,
    per_class: Annotated[bool, typer.Option("--per-class", help="use --shots records of each class")] = False,
    how: Annotated[
        str, typer.Option(help="auto, leave, nearest, head, ensemble, tune, mixture, demonstrations")
    ] = "auto",
    task: TaskName = None,
    label: Annotated[
        list[str] | None, typer.Option(help="a new task: label=its text, once for each label; none: as found in the data")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="a new task: its instruction")] = None,
    columns: Columns = None, encoding: Encoding = "utf-8", separator: Separator = None,
    seed: int = 0, device: Device = "cpu", as_json: Json = False,
) -> None:  # fmt: skip
    """Adapt a library to a few records of a known or new task, and save the result.

    Example: `ficpd adapt runs/demo --data few.jsonl --shots 4 --per-class --out mine`
    """
    from ficpd.library.records import read_records
    from ficpd.library.selection import describe_choice
    from ficpd.library.session import load_library, require_new

    if task and (label or instruction is not None):
        raise typer.BadParameter(
            "--task names a task of the library, --label and --instruction make a new one: give one of them"
        )
    labels = pairs(label, "--label takes label=text, such as lost_card=lost card")
    require_new(out)
    files = reading(encoding, separator)
    records = read_records(data, roles(columns), files=files) if data else []
    mine = load_library(library, device=device, weights=False).adapt(
        records, shots=shots, per_class=per_class, how=how, task=task, labels=labels, instruction=instruction,
        seed=seed, say=note,
    )  # fmt: skip
    mine.save(out)
    facts = mine.library.card["adapted"]
    if facts["table"]:
        print_scores("strategy", facts["table"], TABLE)
    for line in describe_choice(facts["way"], facts["why"], how):
        say(line)
    note(f"prompt:  {facts['made_of']}, for {facts['shots']} records\nlibrary: {out}")
    holds = bool(facts["demonstrations"] or mine.library.mixture) or "adapted" in mine.library.readouts
    if holds:
        say("it holds your records, or values computed from them: give it only to people who may see them")
    print_json({"library": out, "holds_records": holds, **facts})


TABLE = "on records held back: loss (lower is better), error (standard error of the loss's distance to the best)"


def export(
    library: Library,
    prompt: Annotated[str, typer.Option(help="the prompt's name; `ficpd info LIBRARY` lists them")],
    out: Annotated[Path, typer.Option(help="the PEFT folder, which must not exist yet")],
    base: Annotated[str | None, typer.Option(help="the model PEFT loads: a folder or hub id; none: ficpd's copy")] = None,
    reenter: Annotated[bool, typer.Option("--reenter", help="first tune a prompt at the input that imitates it")] = False,
    data: Annotated[str | None, typer.Option("--data", help="with --reenter: a file of texts")] = None,
    columns: Columns = None,
    task: Annotated[str | None, typer.Option(help="with --reenter: the task's name, if there are several")] = None,
    tokens: Annotated[int | None, typer.Option(help="with --reenter: virtual tokens; none: the same", min=1)] = None,
    steps: Annotated[int, typer.Option(help="with --reenter: steps of tuning", min=1)] = 200,
    seed: int = 0, device: Device = "cpu",
) -> None:  # fmt: skip
    """Write a prompt as a PEFT prompt-tuning folder. PEFT supports only prompts at the input: see `--reenter`.

    Example: `ficpd export runs/demo --prompt global --out peft --reenter --data texts.csv -c text=review`
    """
    from ficpd.library.session import load_library

    if data and not reenter:
        raise typer.BadParameter("--data is for --reenter: give both")

    found = load_library(library, device=device, weights=False).export_peft(
        out, prompt, base=base, reenter=reenter, data=data, columns=roles(columns), say=say,
        **({"task": task, "num_tokens": tokens, "steps": steps, "seed": seed} if reenter else {}),
    )  # fmt: skip
    typer.echo(f"base:   {found}")
    typer.echo(f"folder: {out} (README.md says how to load it)")


def import_(
    folder: Annotated[Path, typer.Argument(help="a PEFT prompt-tuning folder")],
    out: Annotated[Path, typer.Option(help="folder of the new library")],
    backbone: Annotated[str, typer.Option(help="the model it was tuned on: a name, folder or hub id")],
    label: Annotated[
        list[str] | None, typer.Option(help="label=its text, once for each label; none: the task writes texts")
    ] = None,
    instruction: Annotated[str, typer.Option(help="the task's instruction")] = "",
    device: Device = "cpu",
) -> None:
    """Make a library from a PEFT prompt-tuning folder. Its prompt is named `imported`.

    Example: `ficpd import peft --out mine --backbone smollm2 --label good=positive --label bad=negative`
    """
    from ficpd.backbones.loading import BackboneConfig
    from ficpd.library.peft_io import IMPORTED, imported
    from ficpd.library.session import require_new
    from ficpd.registry import validated_section

    require_new(out)
    labels = pairs(label, "--label takes label=text, such as good=positive")
    kind = {"name": "classification", "labels": labels} if labels else {"name": "generation"}
    task = validated_section("tasks", {**kind, "instruction": instruction}, "--label")
    library, base = imported(folder, BackboneConfig(name=backbone), task, device)
    library.save(out)
    typer.echo(f"the folder names {base} as its model; it cannot prove that {backbone} is the same")
    typer.echo(f"library: {out} (its prompt is {IMPORTED})")
