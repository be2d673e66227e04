"""The command `ficpd init`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ficpd.cli.console import errors, note, say
from ficpd.cli.options import Encoding, Separator, reading


def init(
    data: Annotated[
        str,
        typer.Argument(
            help="a CSV, TSV, JSON Lines, JSON or Parquet file, a folder of them, a folder of images with a folder for each "
            "label, or hf:ID"
        ),
    ],
    text: Annotated[str | None, typer.Option(help="the column of the texts; none: guessed")] = None,
    image: Annotated[
        str | None, typer.Option(help="the column of the images or their paths, instead of texts; none: guessed")
    ] = None,
    target: Annotated[str | None, typer.Option(help="the column of the labels or numbers; none: guessed")] = None,
    client: Annotated[
        str | None,
        typer.Option(help="the column of clients, such as hospitals; none: guessed by its name, else simulated"),
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="the column of subjects, such as patients; none: guessed by its name")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="the privacy budget; none: no privacy")] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="the frozen model: a name, folder or hub id; none: minilm, or for images facebook/dinov2-small"
        ),
    ] = None,
    encoding: Encoding = "utf-8",
    separator: Separator = None,
    out: Annotated[Path | None, typer.Option(help="the recipe to write; none: DATA's name with .toml, here")] = None,
) -> None:
    """Write a commented recipe for your own table or images, with the labels found, counts and warnings.

    Example: `ficpd init notes.csv --text note --target department --client hospital --epsilon 2`

    Example: `ficpd init images/`, with `images/cat/1.png` and `images/dog/1.png`
    """
    from ficpd.experiments.draft import check_new, draft
    from ficpd.storage import atomic_write

    if epsilon is not None and not 0 < epsilon < float("inf"):
        raise typer.BadParameter(f"--epsilon {epsilon:g}: expected a number above 0, such as 2")
    out = out or Path(f"{Path(data).resolve().stem}.toml")
    check_new(out)
    columns = {"text": text, "image": image, "target": target, "client": client, "subject": subject}
    drafted = draft(data, out.name, columns, epsilon, backbone, reading(encoding, separator))
    for line in drafted.found:
        note(line)
    for line in drafted.warnings:
        errors.print("[bold yellow]warning:[/]", escape(line), highlight=False, soft_wrap=True)
    atomic_write(out, drafted.toml)
    say(f"recipe: {out}")
    note(f"next:   ficpd run {out}")
