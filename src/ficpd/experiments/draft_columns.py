"""Reads the rows of a source for a draft, and chooses the column of each role."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficpd.data import huggingface, images
from ficpd.data.tables import WHOLE, ReadOptions, Table, read_files
from ficpd.data.untyped import UntypedStr
from ficpd.errors import DataError, did_you_mean

NAMES = {
    "text": ("text", "note", "review", "sentence", "comment", "message", "description", "abstract", "body", "content"),
    "image": ("image", "img", "picture", "photo", "scan"),
    "target": ("target", "label", "class", "category", "department", "diagnosis", "sentiment", "polarity", "rating"),
    "client": (
        "client",
        "hospital",
        "site",
        "clinic",
        "bank",
        "branch",
        "center",
        "centre",
        "organisation",
        "organization",
    ),
    "subject": ("subject", "patient", "person", "customer", "user", "pupil", "author"),
}
"""By role, the names by which a column is guessed; one name may be a part of the column's (`patient_id`)."""
INPUTS = ("text", "image")
"""The roles of what a backbone reads. A record has one of them."""
MOST_LABELS = 150


@dataclass(frozen=True)
class Rows:
    """The rows of a table: by key (`data.csv row 7`), their cells by column. A cell without content is None.

    sizes: the number of rows of train and test, where files or folders say which they are; else empty.
    """

    name: str
    columns: list[str]
    cells: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int]

    def column(self, name: str | None) -> list[Any]:
        return [] if name is None else [row[name] for row in self.cells.values()]


def read(source: str, options: ReadOptions = WHOLE) -> Rows:
    """Reads a table, a folder of tables or of images, or `hf:ID`. Images stay where they are. Raises `DataError`."""
    tables = _tables(source, options)
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    cells = {
        f"{table.name} row {number}": {column: _cell(row.get(column), table.untyped) for column in columns}
        for table in tables
        for number, row in table.rows.items()
    }
    sizes = Counter(table.split for table in tables for _ in table.rows if table.split in ("train", "test"))
    return Rows(Path(source).name, columns, cells, sizes)


def _tables(source: str, options: ReadOptions) -> list[Table]:
    path = Path(source).expanduser()
    if source.startswith("hf:") or huggingface.is_saved(path):
        return huggingface.read(source, None, None, False)
    column = "image" if images.is_folder(path) else images.stored_column(path)
    return images.read_tables(path, column, options) if column else read_files(path, options)


def _cell(value: Any, untyped: bool) -> Any:
    """Reads the value as a run does; None for an empty cell."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    return UntypedStr(value) if untyped and isinstance(value, str) else value


# ---------------------------------------------------------------- columns


def choose_columns(rows: Rows, given: Mapping[str, str | None]) -> tuple[dict[str, str | None], list[str]]:
    """Returns the column of each role, and a sentence for each guess.

    Raises `DataError` for a column that is not there, and where no column can be the input or the target.
    """
    if given.get("text") and given.get("image"):
        raise DataError(f"--image = {given['image']}: expected one of --text and --image. Leave one out")
    for role, column in given.items():
        if column is not None and column not in rows.columns:
            raise DataError(f"{rows.name}: {did_you_mean('column', column, rows.columns)} (--{role})")
    chosen = {role: given.get(role) for role in NAMES}
    found = []
    for role, guess in GUESSES.items():
        if chosen[role] is None and not (role in INPUTS and any(chosen[other] for other in INPUTS)):
            free = [column for column in rows.columns if column not in chosen.values()]
            chosen[role] = guess(rows, free) if role == "image" else _by_name(free, NAMES[role]) or guess(rows, free)
            if chosen[role]:
                option = "--image or --text" if role == "image" else f"--{role}"
                found.append(f"{role} is column {chosen[role]!r}, a guess ({option} names another)")
    if rows.columns == ["image"]:
        raise DataError(
            f"{rows.name}: images without labels; expected a folder for each label, with its images directly in it"
        )
    missing = ["text"] * (not any(chosen[role] for role in INPUTS)) + ["target"] * (not chosen["target"])
    if missing:
        raise DataError(
            f"{rows.name}: which column is the {missing[0]}? Name it: --{missing[0]} COLUMN, one of "
            f"{', '.join(rows.columns)}"
        )
    return chosen, found


def _by_name(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Returns the first column that is one of these names, or has one of them as a word.

    >>> _by_name(["id", "patient_id", "Note"], ["note"]), _by_name(["id", "patient_id"], ["subject", "patient"])
    ('Note', 'patient_id')
    """
    words = {column: re.findall(r"[a-z]+", column.lower()) for column in columns}
    whole = [column for name in names for column in columns if column.lower().strip() == name]
    return next(iter([*whole, *(column for name in names for column in columns if name in words[column])]), None)


def _pictures(rows: Rows, columns: Sequence[str]) -> str | None:
    """Returns the column whose cells are images, or paths with the ending of one; that of a usual name first."""
    found = [column for column in columns if _is_picture([cell for cell in rows.column(column) if cell is not None])]
    return _by_name(found, NAMES["image"]) or next(iter(found), None)


def _is_picture(cells: Sequence[Any]) -> bool:
    return bool(cells) and all(
        isinstance(cell, images.LazyImage)
        or (isinstance(cell, str) and Path(cell.strip()).suffix.lower() in images.ENDINGS)
        for cell in cells
    )


def _longest(rows: Rows, columns: Sequence[str]) -> str | None:
    """Returns the column of the longest texts, if they have several words."""
    texts = {column: [str(cell) for cell in rows.column(column) if isinstance(cell, str)] for column in columns}
    length = {column: sum(map(len, found)) / len(found) for column, found in texts.items() if found}
    best = max(length, key=lambda column: length[column], default=None)
    return best if best and sum(" " in text.strip() for text in texts[best]) > len(texts[best]) / 2 else None


def _fewest(rows: Rows, columns: Sequence[str]) -> str | None:
    """Returns the column of the fewest different values, from two on, that are no names of clients or subjects."""
    named = {_by_name(columns, NAMES[role]) for role in ("client", "subject")}
    different = {column: len({str(cell) for cell in rows.column(column)}) for column in columns if column not in named}
    usable = {
        column: count for column, count in different.items() if 2 <= count <= min(MOST_LABELS, len(rows.cells) / 2)
    }
    return min(usable, key=lambda column: usable[column], default=None)


def _none(rows: Rows, columns: Sequence[str]) -> str | None:
    return None


GUESSES: dict[str, Callable[[Rows, Sequence[str]], str | None]] = {
    "image": _pictures, "text": _longest, "target": _fewest, "client": _none, "subject": _none,
}  # fmt: skip
"""The roles in the order of their guesses, with the rule that decides without a name."""
