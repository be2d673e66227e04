"""Reads public data sets in their published layouts. `data.layout` names one; columns need no setting.

| layout | official files, or the hub's rows | text, text_pair | target | further columns |
|---|---|---|---|---|
| medqa | JSON Lines of jind11/MedQA (4 or 5 options) | question | options, place | step |
| medmcqa | train.json, dev.json (JSON Lines) | question | options, place | subject, topic, choice_type, id |
| pubmedqa | ori_pqal.json | context, question | yes, no, maybe | year, id |
| xglue-nc | XGLUE's folder NC | title, body | foodanddrink, sports, ... (10) | lang |
| xglue-xnli | XNLI | premise, hypothesis | entailment, neutral, contradiction | lang |
| xglue-pawsx | PAWSX | two sentences | different, same | lang |
| xglue-qam | QAM | question, passage | False, True | lang |
| xglue-qadsm | QADSM | query, advertisement | Bad, Good | lang |
| xglue-wpr | WPR | query, web page | Bad, Fair, Good, Excellent, Perfect | lang |
| xglue-qg | QG | passage | question | lang |
| xglue-ntg | NTG | news | title | lang |

Each layout also has a column `split` (train, dev, test, or empty if unknown), for `where`. MedQA: Jin et al., 2020, arXiv
2009.13081; MedMCQA: Pal et al., CHIL 2022, arXiv 2203.14371; PubMedQA: Jin et al., EMNLP 2019, arXiv 1909.06146; XGLUE:
Liang et al., EMNLP 2020, arXiv 2004.01401.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ficpd.data import tables
from ficpd.data.tables import SPLITS, WHOLE, ReadOptions, Table, read_text
from ficpd.errors import DataError, did_you_mean

Cells = Mapping[str, Any]
OPTIONS = ("opa", "opb", "opc", "opd")
WITHOUT = (
    "; official test files have no answers: leave them out (a dev file may be named test instead), or say which split of "
    "the hub's to read (hf_split)"
)


class Xglue(NamedTuple):
    """One task of XGLUE.

    files: patterns of paths in its folder, with {lang}, {split} and, for some, {side}.
    columns: the hub's names; the text is first, the target last.
    labels: a target as the files or the hub spell it, to its label.
    """

    folder: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    languages: str
    labels: Mapping[str, str] | None = None


def _same(*labels: str, **others: str) -> dict[str, str]:
    return {label: label for label in labels} | others


def _numbered(*labels: str) -> dict[str, str]:
    return _same(*labels) | {str(number): label for number, label in enumerate(labels)}


OWN, SIDES = ("xglue.{task}.{lang}.{split}",), ("xglue.{task}.{lang}.{side}.{split}",)
XGLUE = {
    "nc": Xglue("NC", OWN, ("news_title", "news_body", "news_category"), "en de es fr ru",
                _same("foodanddrink", "sports", "travel", "finance", "lifestyle", "news", "entertainment", "health",
                      "video", "autos")),
    "xnli": Xglue("XNLI", ("multinli.{split}.{lang}.tsv", "{lang}.{split}"), ("premise", "hypothesis", "label"),
                  "en ar bg de el es fr hi ru sw th tr ur vi zh",
                  _same("entailment", "neutral", "contradiction", contradictory="contradiction")),
    "pawsx": Xglue("PAWSX", ("{lang}/{split}.tsv", "{lang}/{split}_2k.tsv"), ("sentence1", "sentence2", "label"),
                   "en de es fr", _numbered("different", "same")),
    "qam": Xglue("QAM", OWN, ("question", "answer", "label"), "en de fr", _numbered("False", "True")),
    "qadsm": Xglue("QADSM", OWN, ("query", "ad_title", "ad_description", "relevance_label"), "en de fr",
                   _same("Bad", "Good")),
    "wpr": Xglue("WPR", OWN, ("query", "web_page_title", "web_page_snippet", "relavance_label"), "en de es fr it pt zh",
                 _numbered("Bad", "Fair", "Good", "Excellent", "Perfect")),
    "qg": Xglue("QG", SIDES, ("answer_passage", "question"), "en de es fr it pt"),
    "ntg": Xglue("NTG", SIDES, ("news_body", "news_title"), "en de es fr ru"),
}  # fmt: skip


class BenchmarkSchema(NamedTuple):
    """`row` maps a place (for errors) and a row of the files to a row with these `columns`."""

    columns: tuple[str, ...]
    row: Callable[..., dict[str, Any]]


def schema_columns(layout: str) -> dict[str, str]:
    """Returns the default of `data.columns`: all columns of the layout."""
    return {column: column for column in LAYOUTS[layout].columns}


def read(layout: str, path: Path, options: ReadOptions = WHOLE) -> list[Table]:
    """Reads the files without changes. XGLUE's get the hub's column names and a column `lang`."""
    if layout.startswith("xglue-"):
        return _xglue_files(layout.removeprefix("xglue-"), path)
    return tables.read_files(path, options)


def to_records(layout: str, found: Sequence[Table]) -> list[Table]:
    """Returns the tables with the layout's columns. Raises `DataError` for a row of another layout."""
    of = LAYOUTS[layout]
    row = partial(of.row, first=_first_option(found)) if layout == "medmcqa" else of.row
    arranged = []
    for table in found:
        split = {"dropped": "dev"}.get(str(table.split), table.split)
        # The hub's splits name their language (`validation.de`), except train, which is English.
        language = table.name.rpartition(" ")[2].partition(".")[2] or "en"
        spoken = {"lang": language} if "lang" in of.columns else {}
        rows = {n: row(f"{table.name} row {n}", {**spoken, **c}) | {"split": split} for n, c in table.rows.items()}
        arranged.append(Table(table.name, [*of.columns, "split"], rows, split=table.split))
    return arranged


def _get(place: str, cells: Cells, *names: str) -> Any:
    """Returns the value of the first column that exists: copies of the data differ in names. Raises `DataError`."""
    found = next((name for name in names if name in cells), None)
    if found is None:
        raise DataError(f"{place}: {did_you_mean('column', names[0], cells)}; is it the right layout for this file?")
    return cells[found]


# ---------------------------------------------------------------- medicine


def _medqa(place: str, cells: Cells) -> dict[str, Any]:
    options = _get(place, cells, "options")
    if isinstance(options, list) and all(isinstance(option, Mapping) for option in options):
        options = {option.get("key"): option.get("value") for option in options}
    if not isinstance(options, Mapping):
        raise DataError(f"{place}: options {options!r} are no mapping of letters to texts, as MedQA has them")
    options = {letter: text for letter, text in options.items() if text}
    right = cells.get("answer_idx") or next((k for k, text in options.items() if text == cells.get("answer")), None)
    if right not in options:
        given = right or cells.get("answer")
        raise DataError(f"{place}: the answer {given!r} is none of the options {', '.join(map(str, options))}{WITHOUT}")
    return {
        "text": _get(place, cells, "question"),
        "options": list(options.values()),
        "target": list(options).index(right),
        "step": cells.get("meta_info"),
    }


def _medmcqa(place: str, cells: Cells, first: int = 0) -> dict[str, Any]:
    said = str(_get(place, cells, "cop") if "cop" in cells else "").strip().lower()
    right = int(said) - first if said.isdigit() else "abcd".find(said) if len(said) == 1 else -1
    if right not in range(len(OPTIONS)):
        raise DataError(f"{place}: cop {cells.get('cop')!r} names no option{WITHOUT}")
    return {
        "text": _get(place, cells, "question"),
        "options": [_get(place, cells, option) for option in OPTIONS],
        "target": right,
        "subject": cells.get("subject_name"),
        "topic": cells.get("topic_name"),
        "choice_type": cells.get("choice_type"),
        "id": cells.get("id"),
    }


def _first_option(found: Sequence[Table]) -> int:
    """Returns the number of the first option: 0 if the files have a 0, 1 if they have a 4. Else raises `DataError`."""
    said = {str(cells.get("cop")).strip() for table in found for cells in table.rows.values()}
    numbers = {word for word in said if word.isdigit()}
    if numbers and ("0" in numbers) == ("4" in numbers):
        raise DataError(
            f"{found[0].name}: cop is one of {', '.join(sorted(numbers))}, which does not tell whether the first option is "
            "0 or 1; write letters (a to d), or read more of the data"
        )
    return int("4" in numbers)


def _pubmedqa(place: str, cells: Cells) -> dict[str, Any]:
    contexts = _get(place, cells, "CONTEXTS", "context")
    contexts = contexts.get("contexts") if isinstance(contexts, Mapping) else contexts
    said = cells.get("final_decision")
    if said not in ("yes", "no", "maybe"):
        raise DataError(f"{place}: final_decision is {said!r}; expected yes, no or maybe (ori_pqal.json, pqa_labeled)")
    return {
        "text": " ".join(contexts) if isinstance(contexts, list) else contexts,
        "text_pair": _get(place, cells, "QUESTION", "question"),
        "target": said,
        "year": cells.get("YEAR"),
        "id": cells.get("id", cells.get("pubid")),
    }


# ---------------------------------------------------------------- XGLUE


def _pair(task: str, place: str, cells: Cells) -> dict[str, Any]:
    first, *others, last = XGLUE[task].columns
    said, labels = _get(place, cells, last), XGLUE[task].labels
    if labels is not None and said not in labels:
        raise DataError(f"{place}: {did_you_mean('label', str(said), labels)}")
    paired = [_get(place, cells, name, *TYPING_ERRORS.get(name, ())) for name in others]
    return {
        "text": _get(place, cells, first),
        **({"text_pair": "\n".join(text for text in paired if text and text.strip())} if others else {}),
        "target": labels[said] if labels else said,
        "lang": cells["lang"],
    }


TYPING_ERRORS = {"web_page_title": ("wed_page_title",), "answer": ("annswer",)}
"""Misspelt columns of the hub's copy."""


def _xglue_files(task: str, path: Path) -> list[Table]:
    """Returns one table per language and split, from the task's folder or from XGLUE's folder."""
    of = XGLUE[task]
    folder = path / of.folder if (path / of.folder).is_dir() else path
    known, found = of.languages.split(), []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []:
        match = next((m for p in of.files if (m := _matched(p, task, file.relative_to(folder).as_posix()))), None)
        if match is None or match.get("side") == "tgt":
            continue
        if match["lang"] not in known:
            raise DataError(f"{file}: {did_you_mean('language', match['lang'], known)} (in XGLUE's {of.folder})")
        rows = {n: cells | {"lang": match["lang"]} for n, cells in enumerate(_lines(file, of, match), 1)}
        if not rows:
            raise DataError(f"{file.name}: no rows; copy it again")
        name = file.relative_to(folder).as_posix()
        found.append(Table(name, [*of.columns, "lang"], rows, split=SPLITS[match["split"]]))
    if not found:
        names = " or ".join(pattern.format(task=task, lang="en", split="train", side="src") for pattern in of.files)
        raise DataError(f"{folder} holds no file of XGLUE's {of.folder} ({names}); give the task's folder as source")
    return found


def _matched(pattern: str, task: str, name: str) -> dict[str, str] | None:
    """Returns the parts of a file's name that match the fields of a pattern; None if it does not match."""
    lang, split, side = "(?P<lang>[A-Za-z_-]+)", "(?P<split>train|dev|test)", "(?P<side>src|tgt)"
    match = re.fullmatch(pattern.replace(".", r"\.").format(task=task, lang=lang, split=split, side=side), name)
    return match.groupdict() if match else None


def _lines(file: Path, of: Xglue, match: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yields a file's rows, without the header of `.tsv` files and PAWS-X's row numbers. Quotes are kept as text."""
    if "side" in match:
        target = file.with_name(file.name.replace(".src.", ".tgt."))
        if not target.is_file():
            raise DataError(f"{file.name}: there is no {target.name} in its folder; every text needs its target")
        texts, targets = ([line for _, line in _numbered_lines(side)] for side in (file, target))
        if len(texts) != len(targets):
            raise DataError(f"{file.name} has {len(texts)} lines, {target.name} {len(targets)}; expected as many")
        yield from (dict(zip(of.columns, both, strict=True)) for both in zip(texts, targets, strict=True))
        return
    numbered, header = file.suffix == ".tsv" and of.folder == "PAWSX", file.suffix == ".tsv"
    for number, line in _numbered_lines(file):
        cells = line.split("\t")[numbered:]
        if len(cells) != len(of.columns):
            raise DataError(
                f"{file.name} line {number}: {len(cells)} columns, not {len(of.columns)} ({', '.join(of.columns)})"
                + ("; a pair column or the label is missing" if len(cells) < len(of.columns) else "")
            )
        if not (header and number == 1):
            yield dict(zip(of.columns, cells, strict=True))


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    lines = read_text(file).split("\n")
    yield from ((number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line or number < len(lines))


LAYOUTS = {
    "medqa": BenchmarkSchema(("text", "options", "target", "step"), _medqa),
    "medmcqa": BenchmarkSchema(("text", "options", "target", "subject", "topic", "choice_type", "id"), _medmcqa),
    "pubmedqa": BenchmarkSchema(("text", "text_pair", "target", "year", "id"), _pubmedqa),
    **{
        f"xglue-{task}": BenchmarkSchema(
            ("text", *["text_pair"][: len(of.columns) - 2], "target", "lang"), partial(_pair, task)
        )
        for task, of in XGLUE.items()
    },
}
