"""The commands that answer texts: predict and serve."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ficpd.cli.console import note
from ficpd.cli.options import Columns, Device, Encoding, Library, Separator, TaskName, reading, roles

if TYPE_CHECKING:
    from ficpd.data.tables import ReadOptions
    from ficpd.library.answers import Row

STDIN = "-"
FILE_NAME = re.compile(r"\S+\.(csv|tsv|jsonl|ndjson|json|parquet|txt)(\.gz|\.zst)?", re.IGNORECASE)
"""Matches a word with the ending of a file that `--data` reads."""
Prompt = Annotated[str | None, typer.Option("--prompt", help="a prompt's name; none: adapted, else global")]


def predict(
    library: Library,
    texts: Annotated[
        list[str] | None, typer.Argument(help="texts; - (or none, without --data): standard input, a text a line")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="a text; may be repeated")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="a .txt file (a text a line), CSV, TSV, JSON Lines, Parquet, a folder, or hf:ID"),
    ] = None,
    columns: Columns = None,
    encoding: Encoding = "utf-8",
    separator: Separator = None,
    prompt: Prompt = None,
    task: TaskName = None,
    out: Annotated[Path | None, typer.Option(help="file to write; none: standard output")] = None,
    format: Annotated[
        str | None, typer.Option(help="jsonl, csv or parquet; none: by the ending of --out, else jsonl")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Predict the answers to texts with a library's prompt, and a score for each label. A file's rows keep their columns.

    Example: `ficpd predict runs/demo "a quiet, lovely film" "the battery died within a week"`

    Example: `ficpd predict runs/demo --data reviews.csv -c text=review --out answers.csv`
    """
    from ficpd.library.answers import answer, choose_format, encode_answers, write_answers
    from ficpd.library.session import load_library
    from ficpd.storage import require_writable

    chosen, files = choose_format(format, out), reading(encoding, separator)
    _refuse_files(texts or [])
    given = [*(texts or ()), *(text or ())]
    if given and data:
        raise typer.BadParameter("give texts or --data, not both")
    if out is not None:
        require_writable(out.parent)
    opened = load_library(library, device=device, weights=False)
    rows = _rows(given, data, columns, files)
    content = encode_answers(rows, answer(opened, [row.record for row in rows], prompt, task), chosen)
    if out is None:
        typer.echo(content.decode(), nl=False)
    else:
        write_answers(out, content)
        note(f"file: {out} ({len(rows)} rows)")


def _rows(texts: list[str], data: str | None, columns: list[str] | None, files: "ReadOptions") -> "list[Row]":
    from ficpd.library.answers import read_rows, rows_of_lines, rows_of_texts

    if data not in (None, STDIN):
        return read_rows(data, roles(columns), files)
    if data == STDIN or texts in ([], [STDIN]):
        if not texts and data is None and sys.stdin.isatty():
            raise typer.BadParameter("no text: give some, --data FILE, or - for standard input")
        return rows_of_lines(_standard_input(files.encoding), "standard input")
    if STDIN in texts:
        raise typer.BadParameter("- stands alone: it reads the texts from standard input")
    return rows_of_texts(texts)


def _refuse_files(texts: list[str]) -> None:
    """Raises `BadParameter` for a file name among the texts, whether the file exists or not."""
    for one in texts:
        if os.path.isfile(one):
            raise typer.BadParameter(f"{one} is a file: write --data {one}")
        if FILE_NAME.fullmatch(one):
            raise typer.BadParameter(f"there is no file {one}; if it is a text, write --text {one}")


def _standard_input(encoding: str) -> str:
    from ficpd.data.tables import decode_text

    return decode_text(sys.stdin.buffer.read(), "standard input", encoding)


def serve(
    library: Library,
    host: Annotated[str, typer.Option(help="the address to listen on; callers are not authenticated")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port", min=0, max=65535)] = 8000,
    max_texts: Annotated[int, typer.Option(help="maximum number of texts in a request", min=1)] = 64,
    max_characters: Annotated[int, typer.Option(help="maximum number of characters in a text", min=1)] = 10_000,
    device: Device = "cpu",
) -> None:
    """Serve predictions by HTTP, with the backbone in memory: POST /predict, GET /healthz, schema at /openapi.json.

    Example: `ficpd serve runs/demo --port 8000`, then
    `curl localhost:8000/predict --json '{"texts": ["a quiet, lovely film"]}'`
    """
    from ficpd.errors import needs

    with needs("ficpd serve", "serve"):
        from ficpd.library.serving import Limits
        from ficpd.library.serving import serve as run
    from ficpd.library.session import load_library

    run(
        load_library(library, device=device), host, port, Limits(texts=max_texts, characters=max_characters),
        lambda address: note(f"serving {library} at {address} (Ctrl-C ends it)"),
    )  # fmt: skip
