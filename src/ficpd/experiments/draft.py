"""Drafts a recipe from a table or a folder of images: counts labels and clients, warns of problems."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from ficpd.backbones.catalog import NAMED
from ficpd.data.tables import WHOLE, ReadOptions
from ficpd.data.untyped import is_regression_target, parse_number
from ficpd.errors import ConfigError, DataError, FicpdError
from ficpd.experiments.build import load_records
from ficpd.experiments.config import parse
from ficpd.experiments.draft_columns import MOST_LABELS, Rows, choose_columns, read

USUAL = {"text": "minilm", "image": "facebook/dinov2-small"}
"""By the kind of the records, the backbone where none is named."""
FEW_RECORDS, FEW_OF_A_LABEL, FEW_OF_A_CLIENT, FEW_FOR_NOISE = 200, 10, 20, 100
MOST_NUMBERS = 20
"""Whole numbers of more different values than this are no labels, but numbers to predict."""
DECIMAL_COMMA = re.compile(r"\s*-?\d+(,\d+)?\s*")
UNBALANCED = 10
DRAWN_CLIENTS = 5
SHOWN = 5
ENGLISH = 0.02
"""Above this share of letters outside ASCII, texts are not English."""


@dataclass(frozen=True)
class Draft:
    """toml: the recipe. found: sentences about columns, labels and clients. warnings: sentences about the records."""

    toml: str
    found: Sequence[str] = field(repr=False)
    warnings: Sequence[str] = field(repr=False)


def draft(
    source: str, name: str, columns: Mapping[str, str | None], epsilon: float | None = None, backbone: str | None = None,
    files: ReadOptions = WHOLE,
) -> Draft:  # fmt: skip
    """Drafts the recipe `name` for a file, a folder of files or of images, or `hf:ID`.

    columns: role (text, image, target, client, subject) to column; None: guessed, or none for a client or a subject.
    epsilon: the privacy budget; None: no privacy.
    backbone: None: one that reads these records (`USUAL`).
    files: the separator and the encoding of text files.

    Raises `DataError` or `ConfigError` for a column that is not there, or a target that makes no task.
    """
    rows = read(source, files)
    chosen, found = choose_columns(rows, columns)
    backbone = _backbone(chosen, backbone)
    task, of_task = _task(rows, chosen)
    found += [of_task]
    if rows.sizes:
        found.append(f"train has {rows.sizes['train']} records, test {rows.sizes['test']}")
    if chosen["client"]:
        sizes = Counter(str(client) for client in rows.column(chosen["client"]) if client is not None)
        found.append(f"{len(sizes)} clients: {_counts(sizes)}")
    else:
        found.append(
            f"no client column: {DRAWN_CLIENTS} clients of equal, random shares are simulated (--client names one)"
        )
    lines = [*_head(name, backbone, chosen), *task, *_data(source, chosen, rows, files), *_rest(chosen, epsilon)]
    body = "\n".join(lines) + "\n"
    warnings = [line for check in CHECKS for line in check(rows, chosen, epsilon)]
    if _is_foreign(rows.column(chosen["text"])) and backbone == "minilm":
        warnings.append(
            "the texts look as if they were not English, which is all that minilm reads; set backbone.name to a "
            "multilingual encoder, such as intfloat/multilingual-e5-small"
        )
    try:
        load_records(parse(body, name))
    except FicpdError as error:
        warnings.append(f"as it is, the run stops: {error}")
    told = [
        f"By `ficpd init` from {source!r}. Run it: ficpd run {name}",
        *found,
        *(f"Warning: {one}" for one in warnings),
    ]
    return Draft("".join(f"# {' '.join(line.split())}\n" for line in told) + "\n" + body, found, warnings)


# ---------------------------------------------------------------- the recipe


def _line(key: str, value: Any, comment: str = "") -> str:
    """Writes a setting with its comment; value None: `key` is the whole line."""
    line = key if value is None else tomli_w.dumps({key: value}).strip()
    return f"{line:<40}# {comment}" if comment else line


def _backbone(chosen: Mapping[str, str | None], given: str | None) -> str:
    """Returns the backbone's name. Raises `ConfigError` for a backbone of texts where the records are images."""
    role = "image" if chosen["image"] else "text"
    if role == "image" and (given in NAMED or given == "tiny"):
        raise ConfigError(
            f"--backbone = {given}: it reads texts, and column {chosen['image']!r} holds images; expected a vision "
            f"transformer. Write --backbone {USUAL['image']}, or name the column of the texts (--text)"
        )
    return given or USUAL[role]


def _head(name: str, backbone: str, chosen: Mapping[str, str | None]) -> list[str]:
    about = "`ficpd info` lists those with a name; a folder or a hub id works, too"
    examples = [
        "# [prompt]",
        _line('# head_examples = "public/"', None, "a few public images of each label: the head starts from them"),
        "",
    ]  # fmt: skip
    return [
        _line("name", Path(name).stem),
        _line("seed", 0),
        "",
        "[backbone]",
        _line("name", backbone, "a folder or a hub id of a vision transformer" if chosen["image"] else about),
        "",
        *(examples if chosen["image"] else []),
    ]


def _task(rows: Rows, chosen: Mapping[str, str | None]) -> tuple[list[str], str]:
    """Returns the lines of `[task]`, and a sentence about the targets. Raises `DataError` if they make no task."""
    target = chosen["target"]
    cells = [cell for cell in rows.column(target) if cell is not None]
    of_inputs = _of_texts(str(target)) if chosen["text"] else _of_images()
    if numbers := _numbers(cells):
        return _regression(of_inputs, str(target), numbers), f"numbers from {min(numbers):g} to {max(numbers):g}"
    counts = Counter(str(cell) for cell in cells)
    if not 2 <= len(counts) <= MOST_LABELS:
        raise DataError(
            f"{rows.name}, column {target!r}: {len(counts)} different values in {len(rows.cells)} rows; expected 2 to "
            f"{MOST_LABELS} labels. Name the column of the labels: --target COLUMN, one of {', '.join(rows.columns)}"
        )
    lines = [
        "[task]",
        _line("name", "classification"),
        *of_inputs,
        "",
        "[task.labels]                           # a label of the file = the words that the model reads",
        *(_line(label, _words(label), f"{count} record{'s' * (count > 1)}") for label, count in counts.most_common()),
        "",
    ]
    return lines, f"{len(counts)} labels: {_counts(counts)}"


def _numbers(cells: Sequence[Any]) -> list[float]:
    """Returns the targets as numbers; none if they are labels."""
    numbers = [parse_number(cell) for cell in cells]
    real = all(type(number) in (int, float) for number in numbers)
    return numbers if real and (is_regression_target(cells) or len(set(numbers)) > MOST_NUMBERS) else []  # type: ignore[return-value]


def _of_texts(target: str) -> list[str]:
    return [_line("instruction", f"The {target.replace('_', ' ')} is", "the words between a text and its target")]


def _of_images() -> list[str]:
    return [_line("tuned_head", True, "without words for an answer; CLIP and SigLIP know words: false"),
            _line("instruction", "a photo of", "CLIP and SigLIP: the words before a label")]  # fmt: skip


def _words(label: str) -> str:
    return " ".join(label.replace("_", " ").split()) or label


def _regression(of_inputs: Sequence[str], target: str, numbers: Sequence[float]) -> list[str]:
    if min(numbers) == max(numbers):
        raise DataError(f"column {target!r}: all targets are {min(numbers):g}; expected different numbers (--target)")
    return [
        "[task]",
        _line("name", "regression"),
        *of_inputs,
        "",
        "[task.anchors]                          # words that stand for a low and a high number",
        _line(f"low {_words(target)}", float(min(numbers))),
        _line(f"high {_words(target)}", float(max(numbers))),
        "",
    ]


def _data(source: str, chosen: Mapping[str, str | None], rows: Rows, files: ReadOptions) -> list[str]:
    lines = ["[data]", _line("source", source, "seen from the folder where `ficpd run` is called")]
    lines += [_line("separator", files.separator)] if files.separator else []
    lines += [_line("encoding", files.encoding)] if files.encoding != WHOLE.encoding else []
    lines += [] if rows.sizes else [_line("test_fraction", 0.2, "of the records, to test on")]
    lines += ["", "[data.columns]"]
    lines += [_line(role, column) for role, column in chosen.items() if column]
    if chosen["subject"]:
        lines[-1] = _line("subject", chosen["subject"], "all rows of one are protected together, and stay on one side")
    partition = (
        [_line("kind", "column", "one client for each value"), _line("column", "client")]
        if chosen["client"]
        else [_line("kind", "iid", "equal, random shares"), _line("num_clients", DRAWN_CLIENTS)]
    )
    return [*lines, "", "[partition]", *partition, ""]


def _rest(chosen: Mapping[str, str | None], epsilon: float | None) -> list[str]:
    unit = f"all rows of a {chosen['subject']!r}" if chosen["subject"] else "one row"
    if epsilon is None:
        privacy = ["# [privacy]                             # without this part nothing is protected",
                   '# name = "record_gaussian"', "# epsilon = 2.0"]  # fmt: skip
    else:
        privacy = [
            "[privacy]",
            _line("name", "record_gaussian", f"protects {unit}"),
            _line("epsilon", float(epsilon), "the budget of the whole run; smaller is more private"),
            '# noise = "cryptographic"               # before the library leaves this machine: "simulated" can be repeated',
        ]
    method = _line("name", "ficpd", "`ficpd info` lists the methods")
    return ["[method]", method, "", "[federation]", _line("num_rounds", 10), "", *privacy]


# ---------------------------------------------------------------- warnings


def _missing_cells(rows: Rows, chosen: Mapping[str, str | None], epsilon: float | None) -> Iterable[str]:
    for role, column in chosen.items():
        if empty := [key for key, row in rows.cells.items() if column and row[column] is None]:
            what = "an image" if role == "image" else f"a {role}"
            yield (
                f"rows without {what} (column {column!r}): {len(empty)}; the first: {', '.join(empty[:SHOWN])}. A run "
                "refuses them: fill or drop them"
            )


def _few_records(rows: Rows, chosen: Mapping[str, str | None], epsilon: float | None) -> Iterable[str]:
    if len(rows.cells) < FEW_RECORDS:
        yield f"{len(rows.cells)} records are few: scores on a fifth of them have wide intervals"


def _labels(rows: Rows, chosen: Mapping[str, str | None], epsilon: float | None) -> Iterable[str]:
    counts = Counter(str(cell) for cell in rows.column(chosen["target"]) if cell is not None)
    if sum("," in label for label in counts) and all(DECIMAL_COMMA.fullmatch(label) for label in counts):
        yield f"labels look like numbers with a decimal comma ({_listed(list(counts))}): write a point for a regression"
    if len(counts) > MOST_LABELS or any(type(parse_number(c)) is float for c in rows.column(chosen["target"])):
        return
    if rare := [label for label, count in counts.items() if count < FEW_OF_A_LABEL]:
        yield f"labels with fewer than {FEW_OF_A_LABEL} records: {_listed(rare)}"
    (most, largest), (least, smallest) = counts.most_common()[0], counts.most_common()[-1]
    if largest > UNBALANCED * smallest:
        yield f"labels are unbalanced: {most!r} has {largest} records, {least!r} {smallest}. Look at f1 as well as accuracy"
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(_words(label).casefold(), []).append(label)
    for group in alike.values():
        if len(group) > 1:
            yield f"labels that differ by spaces or case only: {_listed(group)}. They are different labels; is one meant?"
    if chosen["text"] and all(len(label.strip()) < 3 or label.strip().isdigit() for label in counts):
        yield f"labels are codes ({_listed(list(counts))}): write in [task.labels] what they mean, which the model reads"


def _duplicates(rows: Rows, chosen: Mapping[str, str | None], epsilon: float | None) -> Iterable[str]:
    if not chosen["text"]:
        return
    labels: dict[str, set[str]] = {}
    texts = [" ".join(str(text).split()).casefold() for text in rows.column(chosen["text"]) if text is not None]
    if repeated := len(texts) - len(set(texts)):
        yield f"rows that repeat the text of another: {repeated}. In training and in test, they make scores too good"
    for row in rows.cells.values():
        labels.setdefault(str(row[str(chosen["text"])]), set()).add(str(row[str(chosen["target"])]))
    if disputed := [text for text, found in labels.items() if len(found) > 1]:
        yield f"texts with several labels: {len(disputed)}, such as {disputed[0][:60]!r}"


def _clients(rows: Rows, chosen: Mapping[str, str | None], epsilon: float | None) -> Iterable[str]:
    sizes = Counter(str(cell) for cell in rows.column(chosen["client"]) if cell is not None)
    if len(sizes) == 1:
        yield f"there is one client, {next(iter(sizes))!r}; a federation needs two. Is it the right column (--client)?"
    if small := sorted((name for name in sizes if sizes[name] < FEW_OF_A_CLIENT), key=lambda name: sizes[name]):
        yield f"clients with fewer than {FEW_OF_A_CLIENT} records: {_listed(small)}. Merge or drop them"
    if epsilon and sizes and min(sizes.values()) < FEW_FOR_NOISE:
        yield (
            f"the smallest client has {min(sizes.values())} records: noise for epsilon = {epsilon:g} hides much of so few. "
            "If the verdict says so, raise epsilon, or training.batch_size to all records of a client"
        )


def _subjects(rows: Rows, chosen: Mapping[str, str | None], epsilon: float | None) -> Iterable[str]:
    if epsilon and not chosen["subject"]:
        yield (
            f"epsilon = {epsilon:g} protects one row. Somebody with several rows is protected less: name the column of the "
            "persons (--subject)"
        )
    if not chosen["subject"] or not chosen["client"]:
        return
    places: dict[str, set[str]] = {}
    for subject, client in zip(rows.column(chosen["subject"]), rows.column(chosen["client"]), strict=True):
        places.setdefault(str(subject), set()).add(str(client))
    if several := sum(len(found) > 1 for found in places.values()):
        yield f"subjects with rows at several clients: {several}. Each client protects its own rows of them alone"


def _known_without_records(rows: Rows, chosen: Mapping[str, str | None], epsilon: float | None) -> Iterable[str]:
    """Warns of settings that tell of single records. A library's card states them, and no noise covers them."""
    cells = [cell for cell in rows.column(chosen["target"]) if cell is not None]
    counts = Counter(map(str, cells))
    if epsilon and (numbers := _numbers(cells)):
        yield (
            f"[task.anchors] has the least and the largest number of the records ({min(numbers):g}, {max(numbers):g}), "
            "which a library states to all. Write limits that are known without the records, such as 0 and 100"
        )
    elif epsilon and (rare := [label for label, count in counts.items() if count < FEW_OF_A_LABEL]):
        yield (
            f"[task.labels] was read from the records, and a library lists it to all; {_listed(rare)} may tell of single "
            "records. Drop what is not known without the records"
        )


CHECKS = (_missing_cells, _few_records, _labels, _duplicates, _clients, _subjects, _known_without_records)


def _is_foreign(texts: Iterable[Any]) -> bool:
    letters = [letter for text in texts if isinstance(text, str) for letter in text[:500] if letter.isalpha()]
    return sum(not letter.isascii() for letter in letters) > ENGLISH * len(letters)


def _counts(counts: Counter[str]) -> str:
    """
    >>> _counts(Counter({"a": 3, "b": 1}))
    "'a' (3), 'b' (1)"
    """
    more = f" and {len(counts) - 2 * SHOWN} more" if len(counts) > 2 * SHOWN else ""
    return ", ".join(f"{name!r} ({count})" for name, count in counts.most_common(2 * SHOWN)) + more


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def check_new(out: Path) -> None:
    """Raises `ConfigError` if the recipe's file exists."""
    if out.exists():
        raise ConfigError(f"{out} exists already, and is kept. Choose another file (--out), or delete it")
