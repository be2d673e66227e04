"""Groups records by subject: patients, customers, pupils. A subject's records are never divided between two sides."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ficpd.errors import DataError
from ficpd.types import Record

_WHOLE = re.compile(r"-?\d+\.0*")
"""A whole number with a decimal point."""


class UnitCounts(NamedTuple):
    """The numbers of records and of their subjects (None: the data name no subjects)."""

    records: int
    subjects: int | None = None

    @property
    def units(self) -> int:
        """Counts the units that a record-level mechanism samples: subjects if named, else records."""
        return self.records if self.subjects is None else self.subjects


def parse_subject(key: str, column: str, cell: Any) -> str:
    """Returns a cell as a subject's name. Numbers become text: 7, 7.0 and "7.0" are "7"; "007" is another subject.

    Raises `DataError` for an empty cell, and for a value that is no name. A record of an unknown subject could belong to
    any subject, so no guarantee would hold.

    >>> parse_subject("a.csv row 1", "patient", 7.0), parse_subject("a.csv row 2", "patient", " p7 ")
    ('7', 'p7')
    """
    expected = "expected the subject of each row, as text or a whole number: fill or drop the row"
    if cell is None or cell != cell or (isinstance(cell, str) and not cell.strip()):
        raise DataError(f"{key}, column {column!r}: is empty; {expected}")
    cell = cell.item() if isinstance(cell, np.generic) else cell
    if isinstance(cell, float) and math.isfinite(cell) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, bool) or not isinstance(cell, (str, int)):
        raise DataError(f"{key}, column {column!r}: {cell!r} is no subject; {expected}")
    text = str(cell).strip()
    return text.partition(".")[0] if _WHOLE.fullmatch(text) else text


def subject_numbers(records: Sequence[Record]) -> list[int] | None:
    """Returns the number of each record's subject, from 0 in order of appearance; None without subjects.

    Raises `DataError` if only some records name a subject.

    >>> subject_numbers([Record("1", {}, "b"), Record("2", {}, "a"), Record("3", {}, "b")])
    [0, 1, 0]
    """
    named = [record.subject for record in records]
    if all(subject is None for subject in named):
        return None
    if None in named:
        raise DataError(
            f"{records[named.index(None)].key}: no subject, and other records have one; name the subject of all records, or "
            "of none"
        )
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(named))}
    return [numbers[subject] for subject in named]


def count_units(records: Sequence[Record]) -> UnitCounts:
    numbers = subject_numbers(records)
    return UnitCounts(len(records), None if numbers is None else len(set(numbers)))


def group_by_subject(records: Sequence[Record]) -> list[list[int]]:
    """Returns the indices of each subject's records, in order of appearance; without subjects, each record alone."""
    numbers = subject_numbers(records)
    if numbers is None:
        return [[place] for place in range(len(records))]
    groups: list[list[int]] = [[] for _ in range(max(numbers) + 1)]
    for place, number in enumerate(numbers):
        groups[number].append(place)
    return groups


def take_whole(order: Iterable[int], groups: Sequence[Sequence[int]], most: int) -> list[int]:
    """Returns the indices of whole groups, at most `most` in total. Tries groups in `order`; skips one that is too large.

    >>> take_whole([1, 0, 2], [[0], [1, 2, 3], [4]], 2)
    [0, 4]
    """
    taken: list[int] = []
    for group in order:
        if len(taken) + len(groups[group]) <= most:
            taken.extend(groups[group])
    return taken


def subjects_on_both_sides(left: Iterable[Record], right: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Returns a record of each side for each subject that both sides have."""
    first = {record.subject: record for record in reversed([*left]) if record.subject is not None}
    second = {record.subject: record for record in reversed([*right]) if record.subject in first}
    return [(first[subject], record) for subject, record in second.items()]


def num_scattered(sides: Iterable[Iterable[Record]]) -> int:
    """Counts the subjects that more than one side has."""
    found = Counter(name for side in sides for name in {r.subject for r in side if r.subject is not None})
    return sum(count > 1 for count in found.values())
