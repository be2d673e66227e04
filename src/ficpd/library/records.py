"""Records to predict, evaluate or adapt on: from a file, or in memory."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ficpd.data import loading
from ficpd.data.subjects import parse_subject, subject_numbers
from ficpd.data.tables import WHOLE, ReadOptions, replace_surrogates
from ficpd.data.untyped import label_spellings
from ficpd.errors import DataError, did_you_mean
from ficpd.interfaces import Task
from ficpd.registry import validate
from ficpd.types import Record

if TYPE_CHECKING:
    from pandas import DataFrame

Data: TypeAlias = "str | Path | DataFrame | Sequence[Record | Mapping[str, Any]]"
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


def read_records(
    data: Data, columns: Mapping[str, str] = NO_COLUMNS, labelled: bool = True, files: ReadOptions = WHOLE
) -> list[Record]:
    """Reads all records of a file in its order, or of a data frame, mappings or `Record`s in memory.

    columns: role to column. `subject`: whom a record is about; adaptation never tests on a subject it was fitted to.
        `options` may name several columns (`options=a,b,c`).
    labelled: False: reads only `text` (or `image`, if named) and the named columns.
    files: the separator and the encoding of text files.
    """
    roles = {"text": "text"} if "image" not in columns else {}
    roles |= {**({"target": "target"} if labelled else {}), **columns}
    if isinstance(data, (str, Path)):
        options = roles.pop("options").split(",") if "," in roles.get("options", "") else []
        config = {"source": str(data), "columns": roles, "options": options}
        config |= {"separator": files.separator, "encoding": files.encoding}
        return loading.load_all(validate(loading.Config, config, "--data"))
    pandas: Any = sys.modules.get("pandas")  # no import for a type: the core does not need pandas
    given: Any = data
    rows = given.to_dict("records") if pandas and isinstance(given, pandas.DataFrame) else given
    return [
        row if isinstance(row, Record) else _record(f"record {place}", row, roles) for place, row in enumerate(rows, 1)
    ]


def _record(key: str, row: Mapping[str, Any], roles: Mapping[str, str]) -> Record:
    if missing := [column for column in roles.values() if column not in row]:
        raise DataError(f"{key}: {did_you_mean('column', missing[0], row)}; name it in columns = {{role: column}}")
    subject = (
        parse_subject(key, roles[loading.SUBJECT], row[roles[loading.SUBJECT]]) if loading.SUBJECT in roles else None
    )
    fields = {**row, **{r: row[column] for r, column in roles.items() if r != loading.SUBJECT}}
    return Record(key, {name: replace_surrogates(value) for name, value in fields.items()}, subject)


def draw_shots(records: Sequence[Record], shots: int, per_class: bool, seed: int) -> list[Record]:
    """Returns the first `shots` records in a seeded random order (0: all), in total or of each class.

    If records name subjects, the order has one record of every subject before a second of any.
    """
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    if subject_numbers(records) is not None:
        earlier, of = Counter[str | None](), {}
        for i in order:
            of[i] = earlier[records[i].subject]
            earlier[records[i].subject] += 1
        order.sort(key=of.__getitem__)
    if not shots or not per_class:
        return [records[i] for i in order[: shots or len(order)]]
    taken: dict[str, int] = {}
    chosen = []
    for i in order:
        label = label_spellings(records[i].fields["target"])[-1]
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= shots:
            chosen.append(records[i])
    return chosen


def missing_labels(task: Task, records: Sequence[Record]) -> list[str]:
    """Returns the labels of a classification that no record has."""
    labels = task.to_config().get("labels", {})
    seen = {*task.targets(records)} if labels else {}
    return [label for label in labels if label not in seen]
