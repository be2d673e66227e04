"""Reads records from the user's table, the Hugging Face hub, or the built-in sentence ratings."""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator

from ficpd import registry
from ficpd.data import benchmarks, huggingface, images
from ficpd.data.sentence_ratings import read_ratings
from ficpd.data.subjects import group_by_subject, parse_subject, subjects_on_both_sides, take_whole
from ficpd.data.tables import READERS, SPLITS, ReadOptions, Table, read_files, replace_surrogates
from ficpd.data.untyped import UntypedStr, parse_cell, parse_number
from ficpd.errors import DataError, did_you_mean
from ficpd.registry import FrozenConfig
from ficpd.rng import derive_seed
from ficpd.types import Record

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
ROLES = ("text", "text_pair", "target", "client", "options", "image", "references", "subject")
SUBJECT = "subject"
"""The role that becomes `Record.subject` instead of a field."""


class Config(FrozenConfig):
    """Sets the source of the records and the role of each column.

    source: "ratings"; a CSV, TSV, JSON (Lines) or Parquet file, or a folder of them, or of images (`data/images.py`);
        "hf:DATASET_ID"; or the dotted name of a module whose `build(config)` returns rows, each a mapping of column to
        value. "ratings" has the columns text, rating, polarity and domain; its rows without a target are dropped.
    source_options: settings of that module.
    columns: role (text, target, client, ...) to column. A target in a file without types (CSV, TSV) is text; a regression
        reads it as a number. `subject`: the person that a row is about (a patient, a customer). Train and test share no
        subject, samples have whole subjects, and record-level privacy covers a subject.
    layout: the form of a public data set (`data/benchmarks.py`), which sets the columns.
    options: the columns of a multiple choice with one option each.
    keep: further columns, under their names.
    where: keeps only rows whose column has one of these values (as text).
    split_column: a column with train, test or dev (dropped) in each row. Without it, the train and test files of a folder
        or the hub's splits are used, else a sample of `test_fraction`.
    dev_as_train: uses dev rows as training rows.
    test_fraction: the share of test records, if the source has no split.
    separator: the separator of CSV files, if it is not a comma, semicolon or tab.
    encoding: the encoding of text files, such as "cp1252".
    """

    source: str
    source_options: dict[str, Any] = {}
    columns: dict[str, str] = {"text": "text", "target": "target"}
    layout: str | None = None
    options: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    where: dict[str, tuple[str, ...]] = {}
    split_column: str | None = None
    dev_as_train: bool = False
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_records: int | None = Field(default=None, ge=2, description="a random sample of all records")
    subset: str | None = Field(default=None, description="the hub data set's configuration")
    hf_split: str | None = Field(default=None, description="the one split of the hub's data set to read")
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    encoding: str = "utf-8"

    @model_validator(mode="before")
    @classmethod
    def _laid_out(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("layout") in benchmarks.LAYOUTS and "columns" not in given:
            columns = benchmarks.schema_columns(given["layout"])
            if columns.pop(SUBJECT, None):  # MedMCQA's subject is a field of medicine, not a patient
                given = {**given, "keep": (*given.get("keep", ()), SUBJECT)}
            return {**given, "columns": columns}
        return given

    @field_validator("layout")
    @classmethod
    def _known(cls, layout: str | None) -> str | None:
        if layout is not None and layout not in benchmarks.LAYOUTS:
            raise ValueError(did_you_mean("layout", layout, benchmarks.LAYOUTS))
        return layout

    @field_validator("encoding")
    @classmethod
    def _decodes(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except LookupError as error:
            raise ValueError(f"{error}; expected a name such as 'utf-8', 'cp1252' or 'utf-16'") from error
        return encoding

    @field_validator("separator")
    @classmethod
    def _separates(cls, separator: str | None) -> str | None:
        if separator in ("\r", "\n", '"'):
            raise ValueError("line breaks and double quotes separate no cells; expected a sign such as '|'")
        return separator

    @model_validator(mode="after")
    def _roles(self) -> "Config":
        if self.options and "options" in self.columns:
            raise ValueError("options: a column holds them already (columns.options); state one of the two")
        for role, column in self.columns.items():
            if role not in ROLES and role != column:
                raise ValueError(
                    f"columns: {did_you_mean('role', role, ROLES)}. Or keep it by name: keep = [{column!r}]"
                )
        if taken := [c for c in self.keep if self.columns.get(c, c) != c and c != SUBJECT]:
            raise ValueError(
                f"keep: {taken[0]!r} is also a role, played by {self.columns[taken[0]]!r}; rename the column"
            )
        return self

    @property
    def wanted(self) -> dict[str, str]:
        """Maps the fields of a record to columns of the table."""
        roles = {role: column for role, column in self.columns.items() if role != SUBJECT}
        return {column: column for column in self.keep} | roles

    @property
    def subject(self) -> str | None:
        """Returns the column of the subjects, if one is named."""
        return self.columns.get(SUBJECT)

    @property
    def asked(self) -> list[str]:
        """Returns the columns that are read."""
        single = [column for column in (self.split_column, self.subject) if column]
        return [*self.wanted.values(), *self.options, *self.where, *single]

    @property
    def reading(self) -> ReadOptions:
        """Returns the options to read files: the wanted columns, or all columns with a layout."""
        columns = None if self.layout else frozenset(self.asked)
        return ReadOptions(columns, separator=self.separator, encoding=self.encoding)


@dataclass(frozen=True)
class Dataset:
    """The records in file order, grouped by subject. `Record.key` counts the data rows of a file from 1."""

    train: list[Record]
    test: list[Record]


class Row(NamedTuple):
    key: str
    fields: dict[str, Any]
    split: str | None
    subject: str | None = None

    @property
    def record(self) -> Record:
        return Record(self.key, self.fields, self.subject)


def load(config: Config, seed: int) -> Dataset:
    """Reads, checks, samples and splits all records. The same seed and files give the same split on every machine.

    Raises `DataError`, naming file, row and column, for a row that cannot be a record.
    """
    rows = _checked_rows(config)
    return _split(_seen([rows[i] for i in _sample(rows, config.max_records, seed)], config), config, seed)


def unsampled(config: Config, seed: int) -> list[Record]:
    """Returns the records that `max_records` leaves out of `load`, in file order. They share no subject with it."""
    rows = _checked_rows(config)
    used = set(_sample(rows, config.max_records, seed))
    return [row.record for i, row in enumerate(rows) if i not in used]


def load_all(config: Config) -> list[Record]:
    """Reads all records in file order without a split, to evaluate, adapt or predict on."""
    return [row.record for row in _seen(_checked_rows(config), config)]


def _checked_rows(config: Config) -> list[Row]:
    tables = _tables(config)
    _check_columns(tables, config)
    rows = [row for table in tables for row in _rows(table, config)]
    dev = [row for row in rows if row.split == "dropped"]
    if config.dev_as_train and not dev:
        raise DataError(
            f"{config.source}: dev_as_train, and no row is of a dev split; expected one in split_column, a dev file with "
            "train and test, or the hub's validation split"
        )
    if config.dev_as_train:
        rows = [row._replace(split="train") if row.split == "dropped" else row for row in rows]
    else:
        rows = [row for row in rows if row.split != "dropped"]
    for row in rows:
        for role in ("text", "text_pair"):
            text = row.fields.get(role)
            if role in config.columns and not isinstance(text, str):
                given = "is empty" if text is None else f"holds {text!r}"
                raise DataError(
                    f"{row.key}, column {config.columns[role]!r}: {given}; expected text: fill or drop the row"
                )
    if "target" in config.wanted:
        _check_targets(rows, config.wanted["target"])
    return rows


def _tables(config: Config) -> list[Table]:
    if config.source == "ratings":
        return read_ratings(config.columns.get("target"))
    path, on_hub = Path(config.source).expanduser(), config.source.startswith("hf:")
    on_hub |= huggingface.is_saved(path)
    of_hub = partial(
        huggingface.read, config.source, config.subset, config.hf_split, config.dev_as_train, config.reading.columns
    )
    if config.layout:
        tables = of_hub() if on_hub else benchmarks.read(config.layout, path, config.reading)
        return benchmarks.to_records(config.layout, tables)
    if on_hub:
        return of_hub()
    if DOTTED.fullmatch(config.source) and not path.exists() and path.suffix.lower() not in READERS:
        return [_of_module(config)]
    if "image" in config.columns:
        return images.read_tables(path, config.columns["image"], config.reading)
    return read_files(path, config.reading)


def _separator_of(table: Table) -> str:
    """Returns a hint to name the separator if the header is a single cell with punctuation, else ""."""
    signs = re.findall(r"[^\w\s.'\"-]", table.columns[0]) if len(table.columns) == 1 else []
    return f". If {signs[0]!r} separates the columns, name it (data.separator, --separator)" if signs else ""


def _of_module(config: Config) -> Table:
    """Reads rows from a module outside the package. Raises `DataError` unless they are mappings, at least one."""
    module = registry.load("sources", config.source)
    made = module.build(registry.validate(module.Config, config.source_options, "data.source_options"))
    if not isinstance(made, Iterable) or isinstance(made, Mapping):
        raise DataError(
            f"{config.source}: build returned a {type(made).__name__}; expected rows. Return a list, or yield each row"
        )
    rows = list(made)
    if not rows:
        raise DataError(f"{config.source}: it yields no rows; expected one at least. Look at data.source_options")
    for place, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{config.source} row {place} is a {type(row).__name__}; expected a mapping of column to value. Yield a "
                'dict; of a data frame return frame.to_dict("records")'
            )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(config.source, columns, dict(enumerate(rows, 1)))


def _check_columns(tables: list[Table], config: Config) -> None:
    first = tables[0]
    for table in tables:
        if differing := sorted(set(table.columns) ^ set(first.columns)):
            raise DataError(
                f"{table.name} and {first.name} have different columns ({', '.join(differing)} only in one of them); "
                f"all files of one source need the same"
            )
    for column in config.asked:
        if column not in first.columns:
            known = did_you_mean("column", column, first.columns)
            raise DataError(f"{first.name}: {known} (set it in data.columns, or by --column){_separator_of(first)}")
    for column, values in config.where.items():
        present = {str(cells.get(column)) for table in tables for cells in table.rows.values()}
        if missing := [value for value in values if value not in present]:
            of = first.name if len(tables) == 1 else f"{len(tables)} files of {config.source}"
            raise DataError(f"{of}, column {column!r}: {did_you_mean('value', missing[0], sorted(present)[:50])}")


def _rows(table: Table, config: Config) -> Iterable[Row]:
    """Yields the rows that `where` selects."""
    choice = bool(config.options) or "options" in config.wanted
    for number, cells in table.rows.items():
        if not all(str(cells.get(column)) in values for column, values in config.where.items()):
            continue
        key = f"{table.name} row {number}"
        fields = {name: _cell(cells.get(column)) for name, column in config.wanted.items()}
        if config.options:
            fields["options"] = [_cell(cells.get(column)) for column in config.options]
        if table.untyped and isinstance(target := fields.get("target"), str):
            fields["target"] = parse_cell(target) if choice else UntypedStr(target)  # a number is an option's index
        column = config.subject
        subject = None if column is None else parse_subject(key, column, _cell(cells.get(column)))
        yield Row(key, fields, _side(key, cells, config.split_column) or table.split, subject)


def _cell(value: Any) -> Any:
    """Returns the value without surrogates, or None for an empty cell or NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    empty = (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())
    return None if empty else replace_surrogates(value)


def _side(key: str, cells: Mapping[str, Any], column: str | None) -> str | None:
    if column is None:
        return None
    given = cells.get(column)
    if str(given).strip().lower() not in SPLITS:
        raise DataError(f"{key}, column {column!r}: {given!r} is no split; expected one of {', '.join(SPLITS)}")
    return SPLITS[str(given).strip().lower()]


def _seen(rows: list[Row], config: Config) -> list[Row]:
    """Returns the rows. Raises `DataError` for a row without an image, if the columns name one."""
    if "image" in config.columns:
        images.check_all(((row.key, row.fields["image"]) for row in rows), config.columns["image"])
    return rows


KINDS = {str: "text", UntypedStr: "text", int: "a number", float: "a number", bool: "true/false"}


def _check_targets(rows: list[Row], column: str) -> None:
    """Raises `DataError` unless targets are of one kind: text, numbers or truth values.

    If a number is real, all become real. Targets of a file without types stay text, because a label may be 007, unless
    another file has numbers. A regression parses them (`parse_number`).
    """
    if any(type(row.fields["target"]) in (int, float) for row in rows):
        for row in rows:
            row.fields["target"] = parse_number(row.fields["target"])
    kinds = [_kind(row, column) for row in rows]
    usual, count = Counter(kinds).most_common(1)[0] if kinds else ("", 0)
    for row, kind in zip(rows, kinds, strict=True):
        if kind != usual:
            raise DataError(
                f"{row.key}, column {column!r}: {row.fields['target']!r} is {kind}, but {count} other rows hold "
                f"{usual}; use one kind in the whole column"
            )
    if any(type(row.fields["target"]) is float for row in rows):
        for row in rows:
            row.fields["target"] = float(row.fields["target"])


def _kind(row: Row, column: str) -> str:
    target = row.fields["target"]
    if type(target) in KINDS and (isinstance(target, str) or abs(target) <= sys.float_info.max):
        return KINDS[type(target)]
    given = "is missing" if target is None else f"{repr(target)[:60]} cannot be a target"
    raise DataError(f"{row.key}, column {column!r}: {given}; expected text or a number: fill or drop the row")


def _sample(rows: list[Row], size: int | None, seed: int) -> list[int]:
    """Returns sorted indices of a sample of `size` rows, or of random whole subjects with at most `size` rows."""
    if size is None or size >= len(rows):
        return list(range(len(rows)))
    random = np.random.default_rng(derive_seed(seed, "sample"))
    if not rows[0].subject:
        return sorted(random.choice(len(rows), size, replace=False).tolist())
    groups = group_by_subject([row.record for row in rows])
    taken = take_whole(random.permutation(len(groups)).tolist(), groups, size)
    if not taken:
        smallest = min(len(group) for group in groups)
        raise DataError(
            f"max_records = {size}: each of {len(groups)} subjects has {smallest} records or more, and a subject is taken "
            f"whole; set max_records to {2 * smallest} or more"
        )
    return sorted(taken)


def _split(rows: list[Row], config: Config, seed: int) -> Dataset:
    sides = [row.split for row in rows]
    if None in sides:
        test = set(_draw_test(rows, config, seed))
        sides = ["test" if i in test else "train" for i in range(len(rows))]
    sorted_out: dict[str, list[Record]] = {"train": [], "test": []}
    for row, side in zip(rows, sides, strict=True):
        sorted_out[side or "train"].append(row.record)
    for trained, tested in subjects_on_both_sides(sorted_out["train"], sorted_out["test"]):
        raise DataError(
            f"column {config.subject!r}: {trained.key} (train) and {tested.key} (test) are of one subject; keep all rows of "
            "a subject on one side, or leave the split to test_fraction"
        )
    for side, records in sorted_out.items():
        if not records:
            raise DataError(
                f"{config.source}: no {side} records among {len(rows)}; expected at least one of each side: "
                f"look at split_column, test_fraction and max_records"
            )
    return Dataset(*([of[i] for group in group_by_subject(of) for i in group] for of in sorted_out.values()))


def _draw_test(rows: list[Row], config: Config, seed: int) -> list[int]:
    """Draws the indices of test rows: whole subjects that fit into `test_fraction`, at least the smallest one."""
    groups = group_by_subject([row.record for row in rows])
    if rows and rows[0].subject and len(groups) == 1:
        raise DataError(
            f"{config.source}, column {config.subject!r}: all {len(rows)} rows are of one subject; expected two at least, "
            "because a subject is in train or in test. Is it the right column?"
        )
    order = np.random.default_rng(derive_seed(seed, "split")).permutation(len(groups)).tolist()
    test = take_whole(order, groups, max(1, round(len(rows) * config.test_fraction)))
    return test or groups[min(order, key=lambda group: len(groups[group]), default=0)]
