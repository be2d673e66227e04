"""Reads CSV, TSV, JSON Lines, JSON and Parquet files as tables, with unchanged cells. Text may be compressed."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ficpd.errors import DataError, describe_os_error, needs

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("dev", "val", "valid", "validation"), "dropped")
LONGEST_CELL = 2**31 - 1


class Table(NamedTuple):
    """The rows of one file by number, from 1, without the header and blank lines.

    untyped: every cell is text (CSV).
    split: "train", "test" or "dropped" (dev) for the whole table; None: unknown.
    """

    name: str
    columns: list[str]
    rows: Mapping[int, Mapping[str, Any]]
    untyped: bool = False
    split: str | None = None


class ReadOptions(NamedTuple):
    """Sets which columns of a file are read, and how.

    columns: the columns to read; None: all.
    images: the column of images. Its bytes in a Parquet file are not read.
    separator: the separator of CSV and TSV files; None: that of the ending, else the semicolon or tab of the header.
    encoding: the encoding of text files.
    """

    columns: Collection[str] | None = None
    images: str | None = None
    separator: str | None = None
    encoding: str = "utf-8"

    def asked(self, names: Iterable[str], where: str) -> list[str]:
        """Returns the columns of a file to read. Raises `DataError` if two of them have the same name."""
        found = [name for name in names if self.columns is None or name in self.columns]
        if twice := [name for name in found if found.count(name) > 1]:
            raise DataError(f"{where}: two columns are called {twice[0]!r}; rename one of them")
        return found


WHOLE = ReadOptions()


def read_files(path: Path, options: ReadOptions = WHOLE) -> list[Table]:
    """Reads the table of a file, or of each file in a folder (`table_paths`). Raises `DataError`."""
    try:
        return _folder(path, options) if path.is_dir() else [_named(path, options)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a file that this user may read") from error


def table_paths(folder: Path) -> list[Path]:
    """Returns the folder's tables, sorted by name. Skips hidden files, locks of spreadsheets and other endings."""
    found = [p for p in folder.iterdir() if _plain(p).suffix.lower() in READERS and not p.name.startswith((".", "~$"))]
    return sorted((p for p in found if p.is_file()), key=lambda p: p.name)


def _folder(folder: Path, options: ReadOptions) -> list[Table]:
    paths = table_paths(folder)
    # in a folder with tables, JSON files describe them
    paths = [p for p in paths if _plain(p).suffix.lower() != ".json"] or paths
    if not paths:
        raise DataError(f"folder {folder} holds no file ending in {', '.join(READERS)}; name another folder or a file")
    stems = {p: _plain(p).stem.lower() for p in paths}
    named = {"train", "test"} <= {*stems.values()} <= SPLITS.keys()
    return [_file(p, options)._replace(split=SPLITS[stems[p]] if named else None) for p in paths]


def _named(path: Path, options: ReadOptions) -> Table:
    if not path.is_file():
        raise DataError(
            f"there is no file or folder {str(path)!r}; source is 'ratings', the path of a table (seen from "
            f"{Path.cwd()}), or 'hf:DATASET_ID'"
        )
    if _plain(path).suffix.lower() not in READERS:
        endings = f"{', '.join(READERS)}; text may be compressed ({', '.join(COMPRESSED)})"
        raise DataError(f"{path.name}: unknown ending {path.suffix!r}; save it as one of {endings}")
    return _file(path, options)


def _file(path: Path, options: ReadOptions) -> Table:
    try:
        table = READERS[_plain(path).suffix.lower()](path, options)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(describe_os_error(error)) from error
        raise DataError(f"{path.name}: cannot be read ({error}); check that it is whole and readable") from error
    if not table.rows:
        raise DataError(f"{path.name}: no rows; expected a header and one record a row")
    return table


def _table(path: Path, rows: list[dict[str, Any]], columns: Iterable[str], untyped: bool = False) -> Table:
    return Table(path.name, [str(c) for c in columns], dict(enumerate(rows, 1)), untyped)


# ---------------------------------------------------------------- text


def _unzstd(path: Path) -> io.BufferedIOBase:
    with needs("a file ending in .zst", "parquet"):
        import pyarrow as pa

    return pa.input_stream(str(path), compression="zstd")


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _unzstd}


def _plain(path: Path) -> Path:
    """Returns the path without the ending of its compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Returns the file's text. Raises `DataError`, naming the line, for another encoding."""
    return decode_text(_content(path), path.name, encoding)


def decode_text(content: bytes, name: str, encoding: str = "utf-8") -> str:
    """Decodes a text and drops its byte order mark. Raises `DataError`, naming the line, for another encoding."""
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name} line {line}: byte {error.start} (0x{content[error.start]:02x}) is not {encoding.upper()}; save it as "
            "UTF-8, or name its encoding (data.encoding, --encoding), such as 'cp1252' or 'utf-16'"
        ) from error


def _content(path: Path) -> bytes:
    with COMPRESSED.get(path.suffix.lower(), partial(open, mode="rb"))(path) as stream:
        return stream.read()


def _delimited(path: Path, options: ReadOptions, separator: str) -> Table:
    """Reads every cell as text, also "NA" and "null"."""
    text = read_text(path, options.encoding).lstrip("\r\n")
    head = text.partition("\n")[0]
    usual = separator if separator in head else next((other for other in ";\t" if other in head), separator)
    header, *lines = _lines(path.name, text, options.separator or usual) or [[]]
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise DataError(
                f"{path.name} row {number}: {len(line)} cells, expected {len(header)}, as in the header; a cell that holds "
                "the separator or a line break needs double quotes"
            )
    nameless = [place for place, name in enumerate(header) if not name.strip()]
    empty = {place for place in nameless if not any(line[place].strip() for line in lines)}  # Excel adds such columns
    names = [name for place, name in enumerate(header) if place not in empty]
    asked = options.asked(names, path.name)
    places = [header.index(name) for name in asked]
    rows = [{name: line[place] for name, place in zip(asked, places, strict=True)} for line in lines]
    return _table(path, rows, names, untyped=True)


def _lines(name: str, text: str, separator: str) -> list[list[str]]:
    """Returns the cells of the header and of each row. Skips blank lines."""
    csv.field_size_limit(LONGEST_CELL)
    found: list[list[str]] = []
    try:
        for line in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            if len(line) > 1 or line == [""] or any(map(str.strip, line)):
                found.append(line)
    except csv.Error as error:
        place = f"row {len(found)}" if found else "header"
        raise DataError(
            f"{name} {place}: {error}; a cell that holds the separator, a line break or double quotes needs double "
            "quotes, and those inside it are doubled"
        ) from error
    return found


def _json_lines(path: Path, options: ReadOptions) -> Table:
    rows = []
    for number, line in enumerate(read_text(path, options.encoding).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_decode(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path.name} line {number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(rows[-1], dict):
            given = line.strip()[:40]
            raise DataError(f"{path.name} line {number}: {given} is no object; expected one object a line")
    return _table(path, rows, dict.fromkeys(name for row in rows for name in row))


def _json(path: Path, options: ReadOptions) -> Table:
    """Reads a list of objects, an object of objects (keys become the column `id`), or JSON Lines."""
    try:
        whole = _decode(read_text(path, options.encoding).strip() or "[]")
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _json_lines(path, options)
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path.name}{line}: not JSON ({error}); copy or write it again") from error
    if isinstance(whole, dict):
        if not all(isinstance(row, dict) for row in whole.values()):
            return _json_lines(path, options)  # a single line
        whole = [{"id": key} | row for key, row in whole.items()]
    if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
        raise DataError(f"{path.name}: no table; expected a list of objects, an object of objects, or an object a line")
    return _table(path, whole, dict.fromkeys(name for row in whole for name in row))


def _decode(text: str) -> Any:
    """Decodes JSON. Raises `ValueError` for a repeated name in an object (`json` would keep the last one)."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is given twice in one object")
        return found

    return json.loads(text, object_pairs_hook=once)


def replace_surrogates(value: Any) -> Any:
    r"""Replaces lone surrogates in a text, or in the texts of a list, by U+FFFD. JSON may contain them.

    >>> replace_surrogates("fine \ud83d day") == "fine \ufffd day"
    True
    """
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---------------------------------------------------------------- Parquet


def _parquet(path: Path, options: ReadOptions) -> Table:
    with needs("a Parquet file", "parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    if path != _plain(path):
        raise DataError(f"{path.name}: Parquet compresses its columns itself; decompress the file")
    try:
        with pq.ParquetFile(path) as file:
            schema, size = file.schema_arrow, file.metadata.num_rows
            asked = options.asked(schema.names, path.name)
            read = [n for n in asked if n != options.images or not holds_bytes(schema.field(n).type)]
            found = file.read(columns=read)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name}: no whole Parquet file ({error}); copy or write it again") from error
    classes = class_names(schema)
    cells = {name: _values(path, name, found.column(name), classes.get(name)) for name in read}
    rows = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    return _table(path, rows if read else [{} for _ in range(size)], schema.names)


def _values(path: Path, name: str, column: Any, classes: list[str] | None) -> list[Any]:
    import pyarrow as pa

    try:
        found = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path.name}, column {name!r}: cannot be read ({error}); write the column as text") from error
    if classes is None:
        return found
    return [classes[n] if isinstance(n, int) and 0 <= n < len(classes) else None for n in found]


def class_names(schema: Any) -> dict[str, list[str]]:
    """Returns the names of class numbers by column, from the metadata that `datasets` writes."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        named = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: list(map(str, kind["names"])) for name, kind in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # metadata of another program
        return {}


def holds_bytes(kind: Any) -> bool:
    """Tells whether an Arrow column of this type has the bytes of files (or the hub's `{"bytes", "path"}`)."""
    import pyarrow.types as of

    return of.is_binary(kind) or of.is_large_binary(kind) or of.is_struct(kind)


READERS: dict[str, Callable[[Path, ReadOptions], Table]] = {
    ".csv": partial(_delimited, separator=","),
    ".tsv": partial(_delimited, separator="\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".json": _json,
}
