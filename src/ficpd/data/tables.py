"""Files as tables: CSV, TSV, JSON Lines, JSON and Parquet, every cell as it was written."""

import io
import json
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ficpd.errors import DataError

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("dev", "val", "valid", "validation"), "dropped")


class Table(NamedTuple):
    """One file: rows by their number, counted from 1 without the header and blank lines.

    `untyped`: every cell is text (CSV). `split`: the whole table is train, or test.
    """

    name: str
    columns: list[str]
    rows: Mapping[int, Mapping[str, Any]]
    untyped: bool = False
    split: str | None = None


def read_files(path: Path, images: str | None = None) -> list[Table]:
    """One table per readable file, by name; what has another ending is passed over in a folder. Of a Parquet file the
    column `images` is not read, unless it holds paths."""
    if path.is_dir():
        paths = sorted((p for p in path.iterdir() if p.suffix.lower() in READERS and p.is_file()), key=lambda p: p.name)
        paths = [p for p in paths if p.suffix.lower() != ".json"] or paths  # beside tables JSON is about them
        if not paths:
            raise DataError(
                f"folder {path} holds no file ending in {', '.join(READERS)}; name another folder or a file"
            )
        named = {"train", "test"} <= {p.stem.lower() for p in paths} <= SPLITS.keys()
        return [_file(p, images)._replace(split=SPLITS[p.stem.lower()] if named else None) for p in paths]
    if not path.is_file():
        raise DataError(
            f"there is no file or folder {str(path)!r}; source is 'ratings', the path of a table (seen from "
            f"{Path.cwd()}), or 'hf:DATASET_ID'"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path.name}: unknown ending {path.suffix!r}; save it as one of {', '.join(READERS)}")
    return [_file(path, images)]


def _file(path: Path, images: str | None) -> Table:
    reader = READERS[path.suffix.lower()]
    try:
        table = _parquet(path, images) if reader is _parquet else reader(path)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error}); check that it is whole and readable") from error
    if not table.rows:
        raise DataError(f"{path.name}: no rows; expected a header and one record a row")
    return table


def _table(
    path: Path, rows: list[dict[str, Any]], columns: Iterable[str] | None = None, untyped: bool = False
) -> Table:
    columns = dict.fromkeys(name for row in rows for name in row) if columns is None else columns
    return Table(path.name, [str(c) for c in columns], dict(enumerate(rows, 1)), untyped)


def utf8(path: Path) -> str:
    """The file's text. Raises `DataError` with the line that is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path.name} line {line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8; "
            f"save the file as UTF-8"
        ) from error


def _delimited(path: Path, separator: str) -> Table:
    """Every cell as text: "NA" and "null" are words like any other."""
    import pandas as pd

    text = io.StringIO(utf8(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(text, sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except pd.errors.EmptyDataError:
        return _table(path, [], [])
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise DataError(
            f"{path.name}: the rows do not fit the header ({str(error).strip()}); every row needs one cell per column, "
            f"and a cell that holds the separator or a line break stands in double quotes"
        ) from error
    return _table(path, frame.to_dict("records"), frame.columns, untyped=True)  # type: ignore[arg-type]


def _json_lines(path: Path) -> Table:
    rows = []
    for number, line in enumerate(utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name} line {number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(rows[-1], dict):
            given = line.strip()[:40]
            raise DataError(f"{path.name} line {number}: {given} is no object; expected one object a line")
    return _table(path, rows)


def _json(path: Path) -> Table:
    """A list of objects; one object of objects, whose keys become the column `id`; or JSON Lines under another ending."""
    try:
        whole = json.loads(utf8(path).strip() or "[]")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _json_lines(path)
        raise DataError(f"{path.name} line {error.lineno}: not JSON ({error.msg}); copy or write it again") from error
    if isinstance(whole, dict):
        if not all(isinstance(row, dict) for row in whole.values()):
            return _json_lines(path)  # of one line
        whole = [{"id": key} | row for key, row in whole.items()]
    if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
        raise DataError(f"{path.name}: no table; expected a list of objects, an object of objects, or an object a line")
    return _table(path, whole)


def _parquet(path: Path, images: str | None = None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            read = [name for name, kind in fields.items() if name != images or not holds_bytes(kind)]
            rows = file.read(columns=read).to_pylist() if read else [{} for _ in range(file.metadata.num_rows)]
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name}: no whole Parquet file ({error}); copy or write it again") from error
    return _table(path, rows, fields)


def holds_bytes(kind: Any) -> bool:
    """Whether an Arrow column of this type holds files (or the hub's `{"bytes", "path"}`) and not their paths."""
    import pyarrow.types as of

    return of.is_binary(kind) or of.is_large_binary(kind) or of.is_struct(kind)


READERS = {
    ".csv": partial(_delimited, separator=","),
    ".tsv": partial(_delimited, separator="\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".json": _json,
}
