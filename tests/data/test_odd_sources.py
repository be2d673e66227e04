"""Sources that are more than one plain table: class numbers, folders with hidden files, columns of one name, images."""

import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.test_odd_tables import NAMES, TEXTS, compressed, delimited, fields, refused, written

datasets.disable_progress_bars()
ROW = st.fixed_dictionaries({"text": TEXTS, "target": TEXTS})
ROWS = st.lists(ROW, min_size=1, max_size=5)
HIDDEN = {
    ".a.csv": b"text,target\nold,old\n", "._a.csv": b"\x00\x05\x16\x07\xb0", "~$a.csv": b"\xff\xfe lock",
    ".DS_Store": b"\x00\x01Bud1", "Thumbs.db": b"\xd0\xcf", "notes.txt": b"about", ".x.png": b"no image",
}  # fmt: skip
"""Files that a folder may hold beside its records."""
SHOWN = st.text(min_size=1, max_size=6)
FOLDER = SHOWN.filter(lambda n: n.strip() and not n.startswith(".") and not set(n) & {"/", "\0"})
"""Names of folders. Those of one label differ by more than case, which a file system may not keep."""


@st.composite
def classed(draw: st.DrawFn) -> dict[str, Any]:
    """Draws rows whose target is a class number, -1 where there is none."""
    names = draw(st.lists(TEXTS, min_size=1, max_size=3, unique=True))
    rows = draw(st.lists(st.tuples(TEXTS, st.integers(-1, len(names) - 1)), min_size=1, max_size=5))
    return {"names": names, "rows": rows, "kind": draw(st.sampled_from(["parquet", "saved", "split", "hf"]))}


def made(names: list[str], rows: list[tuple[str, int]]) -> datasets.Dataset:
    kinds = {"text": datasets.Value("string"), "target": datasets.ClassLabel(names=names)}
    cells = {"text": [text for text, _ in rows], "target": [number for _, number in rows]}
    return datasets.Dataset.from_dict(cells, features=datasets.Features(kinds))


@settings(max_examples=60, deadline=None)
@given(drawn=classed())
def test_class_numbers_are_their_names_or_a_missing_target(drawn):
    names, rows, kind = drawn["names"], drawn["rows"], drawn["kind"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet" if kind == "parquet" else "a")
        table, prefix = made(names, rows), "hf:" if kind == "hf" else ""
        if kind == "parquet":
            table.to_parquet(path)
        elif kind == "split":
            datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(path)
        else:
            table.save_to_disk(path)
        told = rows + rows[:1] if kind == "split" else rows
        gaps = [place for place, (_, number) in enumerate(told) if number < 0]
        if gaps:
            said = refused(f"{prefix}{path}")
            assert path.name in said
            assert f"row {gaps[0] % len(rows) + 1}, column 'target': is missing" in said
        else:
            assert fields(f"{prefix}{path}") == [{"text": text, "target": names[number]} for text, number in told]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, name=st.sampled_from(NAMES), hidden=st.sets(st.sampled_from([*HIDDEN])), nested=st.booleans())
def test_a_folder_is_its_tables_whatever_else_it_holds(rows, name, hidden, nested):
    with tempfile.TemporaryDirectory() as folder:
        for other in hidden:
            Path(folder, other).write_bytes(HIDDEN[other])
        if nested:
            Path(folder, "older").mkdir()
            written(Path(folder, "older", "b.csv"), [{"text": "old", "target": "old"}])
            Path(folder, "folder.csv").mkdir()
        written(Path(folder, "a." + name), rows)
        assert fields(folder) == rows


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, name=st.sampled_from(NAMES), twice=st.sampled_from(["text", "target", "other"]))
def test_columns_of_one_name_are_refused_or_not_asked_for(rows, name, twice):
    with tempfile.TemporaryDirectory() as folder:
        path, kind = Path(folder, "a." + name), name.split(".")[0]
        heads = ["other", "other"] if twice == "other" else [twice]
        cells = [[*(row.get(head, "1") for head in heads), row["text"], row["target"]] for row in rows]
        heads += ["text", "target"]
        if kind == "parquet":
            columns = [pa.array(list(column)) for column in zip(*cells, strict=True)]
            pq.write_table(pa.Table.from_arrays(columns, names=heads), path)
        elif kind in ("csv", "tsv"):
            sign = "," if kind == "csv" else "\t"
            lines = delimited([dict(enumerate(line)) for line in [heads, *cells]], sign)
            compressed(path, lines.partition("\n")[2].encode())
        else:
            lines = ["{" + ", ".join(f"{json.dumps(h)}: {json.dumps(c)}" for h, c in zip(heads, line, strict=True)) + "}"
                     for line in cells]  # fmt: skip
            compressed(path, ("[" + ",".join(lines) + "]" if kind == "json" else "\n".join(lines)).encode())
        if twice == "other" and kind in ("csv", "tsv", "parquet"):
            assert fields(path) == rows
        else:
            said = refused(path)
            assert path.name in said
            assert "twice" in said or f"two columns are called {twice!r}" in said


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, name=st.sampled_from(NAMES), column=TEXTS, extra=st.booleans())
def test_a_column_of_any_name_is_found(rows, name, column, extra):
    if column in ("text", "target"):
        return
    given = [{column: row["text"], "target": row["target"]} | ({column + " ": "1"} if extra else {}) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder, "a." + name), given)
        assert fields(path, columns={"text": column, "target": "target"}) == rows


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(FOLDER, min_size=1, max_size=3, unique_by=str.casefold), counts=st.lists(st.integers(0, 2), min_size=3),
    hidden=st.sets(st.sampled_from([*HIDDEN])), damaged=st.booleans(), split=st.booleans(),
)  # fmt: skip
def test_a_folder_for_each_label_is_its_images(names, counts, hidden, damaged, split):
    with tempfile.TemporaryDirectory() as folder:
        root, expected = Path(folder, "set"), []
        sides = ["train", "test"] if split else [""]
        for side in sides:
            for name, count in sorted(zip(names, counts, strict=False)):
                inside = root / side / name
                inside.mkdir(parents=True)
                for other in hidden:
                    (inside / other).write_bytes(HIDDEN[other])
                for place in range(count):
                    Image.new("RGB", (2, 2)).save(inside / f"{place}.png")
                    expected.append((name, inside / f"{place}.png"))
        (root / ".ipynb_checkpoints").mkdir()
        columns = {"image": "image", "target": "target"}
        if empty := [name for name, count in sorted(zip(names, counts, strict=False)) if not count]:
            assert f"no image in {empty[0]!r}" in refused(root, columns=columns)
        elif damaged:
            expected[-1][1].write_bytes(b"no image")
            said = refused(root, columns=columns)
            assert f"{(root / sides[-1]).name} row {len(expected) // len(sides)}" in said
            assert str(expected[-1][1]) in said
        else:
            found = fields(root, columns=columns)
            assert sorted((row["target"], row["image"].place) for row in found) == sorted(expected)


def test_the_hidden_files_would_be_read_under_another_name(tmp_path):
    """Otherwise the folders above would hold the same records without the rule."""
    (tmp_path / "b.csv").write_bytes(HIDDEN[".a.csv"])
    assert fields(tmp_path) == [{"text": "old", "target": "old"}]
    (tmp_path / "a.csv").write_bytes(HIDDEN["~$a.csv"])
    assert "a.csv line 1: byte 0 (0xff) is not UTF-8" in refused(tmp_path)


def test_a_saved_folder_gives_the_split_that_is_asked_for(tmp_path):
    rows = {"text": ["a", "b", "c"], "target": ["x", "y", "x"]}
    table = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "d")
    assert [row["text"] for row in fields(str(tmp_path / "d"), hf_split="test")] == ["b"]
    assert "splits are train, test" in refused(str(tmp_path / "d"), hf_split="dev")
