"""Predicts texts and the rows of a file with a library, with scores. The rows keep their columns."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ficpd.data.tables import WHOLE, ReadOptions, read_files, read_text, replace_surrogates, table_paths
from ficpd.errors import DataError, describe_os_error, did_you_mean, needs
from ficpd.library.records import NO_COLUMNS, read_records
from ficpd.library.session import LibrarySession
from ficpd.storage import atomic_write
from ficpd.types import Record

TEXTS = (".txt", ".text")
"""Endings of files with one text a line."""
FORMATS = ("jsonl", "csv", "parquet")
PREDICTION, SCORES = "prediction", "scores"


class Row(NamedTuple):
    """A record, and the cells of its row by column."""

    record: Record
    cells: Mapping[str, Any]


class Answer(NamedTuple):
    """A prediction, and the probability of each label (None for a task without labels)."""

    prediction: Any
    scores: dict[str, float] | None


def rows_of_texts(texts: Sequence[str], name: str = "text") -> list[Row]:
    """Makes a row of each text. Raises `DataError` for an empty one."""
    texts = [replace_surrogates(text) for text in texts]
    for place, text in enumerate(texts, 1):
        if not text.strip():
            raise DataError(f"{name} {place} is empty; expected a text")
    return [Row(Record(f"{name} {place}", {"text": text}), {"text": text}) for place, text in enumerate(texts, 1)]


def rows_of_lines(content: str, name: str) -> list[Row]:
    """Makes a row of each line that is not blank. Raises `DataError` if there is none."""
    texts = [line for line in content.splitlines() if line.strip()]
    if not texts:
        raise DataError(f"{name} has no text; expected one a line")
    return rows_of_texts(texts, f"{name} line")


def read_rows(data: str, columns: Mapping[str, str] = NO_COLUMNS, files: ReadOptions = WHOLE) -> list[Row]:
    """Reads a file with one text a line, or a source of `read_records`. Rows keep all their columns.

    Raises `DataError`, naming file, row and column, for a row without a text.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() in TEXTS and path.is_file():
        return rows_of_lines(read_text(path, files.encoding), path.name)
    records = read_records(data, columns, labelled=False, files=files)
    if not path.exists():  # a data set of the hub, a built-in one, or a module
        return [Row(record, _shown(record)) for record in records]
    whole = files._replace(images=columns.get("image"))
    tables = [] if path.is_dir() and not table_paths(path) else read_files(path, whole)
    cells = {f"{table.name} row {number}": _cells(row) for table in tables for number, row in table.rows.items()}
    return [Row(record, {**_image(record), **cells.get(record.key, _shown(record))}) for record in records]


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: replace_surrogates(cell) for column, cell in row.items()}


def _shown(record: Record) -> dict[str, Any]:
    return {**record.fields, **_image(record)}


def _image(record: Record) -> dict[str, str]:
    return {"image": str(record.fields["image"])} if "image" in record.fields else {}


def answer(
    opened: LibrarySession, records: Sequence[Record], prompt: str | None = None, task: str | None = None
) -> list[Answer]:
    """Predicts each record, as `LibrarySession.predict` does. A task with labels also gives scores."""
    if not opened.tasks[opened.named(task)].num_labels:
        return [Answer(found, None) for found in opened.predict(records, prompt=prompt, task=task)]
    space = opened.tasks[opened.named(task)].label_space
    return [
        Answer(found, {label: round(score, 6) for label, score in zip(space, scores, strict=True)})
        for found, scores in zip(*opened.probabilities(records, prompt=prompt, task=task), strict=True)
    ]


def choose_format(name: str | None, out: Path | None) -> str:
    """Returns the named format, else the format of the file's ending, else JSON Lines.

    Raises `DataError` for an unknown format or ending, for Parquet without a file, and for a file that exists. Raises
    `PackageError` for Parquet without pyarrow.
    """
    ending = out.suffix.lower().removeprefix(".") if out else ""
    if out and os.path.lexists(out):
        raise DataError(f"{out} exists already; choose another file (--out)")
    if name is None and out and ending not in FORMATS:
        raise DataError(f"--out {out}: unknown ending {ending!r}; expected one of {', '.join(FORMATS)}, or --format")
    chosen = name or ending or FORMATS[0]
    if chosen not in FORMATS:
        raise DataError(did_you_mean("format", chosen, FORMATS) + " (--format)")
    if chosen == "parquet" and out is None:
        raise DataError("--format parquet is no text; name the file to write (--out)")
    if chosen == "parquet":
        with needs("--format parquet", "parquet"):
            import_module("pyarrow")
    return chosen


def encode_answers(rows: Sequence[Row], answers: Sequence[Answer], format: str) -> bytes:
    """Encodes the rows with their answers in one of `FORMATS`.

    JSON Lines have a `prediction` and `scores` by label; tables have a column `score_LABEL` for each label. An answer's
    column gets the suffix `_2` if the rows have its name.
    """
    if format == "jsonl":
        names = _free([PREDICTION, SCORES], rows)
        lines = [
            {
                **row.cells,
                names[PREDICTION]: found.prediction,
                **({names[SCORES]: found.scores} if found.scores else {}),
            }
            for row, found in zip(rows, answers, strict=True)
        ]
        return "".join(
            json.dumps(_without_nan(line), ensure_ascii=False, default=str) + "\n" for line in lines
        ).encode()
    labels = list(next((found.scores for found in answers if found.scores), {}))
    names = _free([PREDICTION, *(f"score_{label}" for label in labels)], rows)
    flat = [
        _without_nan(
            {
                **row.cells,
                names[PREDICTION]: found.prediction,
                **{names[f"score_{k}"]: v for k, v in (found.scores or {}).items()},
            }
        )
        for row, found in zip(rows, answers, strict=True)
    ]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    return (_csv if format == "csv" else _parquet)(flat, columns)


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    held = io.StringIO()
    writer = csv.DictWriter(held, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return held.getvalue().encode()


def _parquet(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = io.BytesIO()
    try:
        pq.write_table(pa.table({column: [row.get(column) for row in rows] for column in columns}), held)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"a column has values of several kinds, which Parquet cannot hold ({error}); use jsonl"
        ) from error
    return held.getvalue()


def _free(names: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Maps each name to a column name that no row has: itself, or with `_2`, `_3`, ... ."""
    taken, found = {column for row in rows for column in row.cells}, {}
    for name in names:
        found[name] = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    return found


def _without_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in line.items()}


def write_answers(out: Path, content: bytes) -> None:
    """Writes a file. Raises `DataError` if it cannot be written."""
    try:
        atomic_write(out, content)
    except OSError as error:
        raise DataError(f"--out {describe_os_error(error)}") from error
