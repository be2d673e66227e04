"""Tables as they come: compressed, of other encodings and separators, with odd columns, labels and neighbours."""

import csv
import errno
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import small
from ficpd.data.loading import Config, load, load_all
from ficpd.data.tables import read_files
from ficpd.errors import DataError, LibraryError
from ficpd.library.records import read_records
from ficpd.library.session import resolve_task
from ficpd.tasks import classification
from ficpd.types import Record

ROWS = [{"text": f"sentence {i}", "target": ["good", "bad"][i % 2]} for i in range(6)]


def compressed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(content)
    return path


def delimited(rows: list[dict[str, Any]], separator: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=separator, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def written(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", separator: str | None = None) -> Path:
    """Writes the rows in the format of the path's ending."""
    kind = next(ending for ending in (".csv", ".tsv", ".jsonl", ".json", ".parquet") if ending in path.name)
    if kind == ".parquet":
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), path)
        return path
    text = {
        ".csv": lambda: delimited(rows, separator or ","),
        ".tsv": lambda: delimited(rows, separator or "\t"),
        ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
        ".json": lambda: json.dumps(rows),
    }[kind]()
    return compressed(path, text.encode(encoding))


def fields(source: object, **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in load_all(Config(source=str(source), **options))]


def refused(source: object, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_all(Config(source=str(source), **options))
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.TSV.GZ", "a.jsonl.zst", "a.json.gz", "a.csv.zst"])
def test_a_compressed_table_is_the_same_table(tmp_path, name):
    path = tmp_path / name
    written(tmp_path / name.lower(), ROWS).rename(path)
    assert fields(path) == ROWS
    assert load_all(Config(source=str(path)))[1].key == f"{name} row 2"


def test_compressed_train_and_test_files_are_the_split(tmp_path):
    written(tmp_path / "train.csv.gz", ROWS)
    written(tmp_path / "test.csv.zst", ROWS[:2])
    data = load(Config(source=str(tmp_path)), 0)
    assert (len(data.train), len(data.test)) == (6, 2)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_cut_or_of_another_kind_is_named(tmp_path, name):
    path = written(tmp_path / name, ROWS)
    for content in (path.read_bytes()[:-9], b"text,target\nx,y\n"):
        path.write_bytes(content)
        assert f"{name}: cannot be read" in refused(path)


def test_a_compressed_parquet_file_is_to_be_decompressed(tmp_path):
    plain = written(tmp_path / "a.parquet", ROWS)
    assert "decompress the file" in refused(compressed(tmp_path / "a.parquet.gz", plain.read_bytes()))


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_the_encoding_that_is_named(tmp_path, encoding):
    rows = [{"text": "café crème", "target": "süß"}]
    assert fields(written(tmp_path / "a.csv", rows, encoding), encoding=encoding) == rows
    if encoding == "cp1252":
        assert "data.encoding" in refused(tmp_path / "a.csv")


@pytest.mark.parametrize("encoding", ["klingon", "zlib"])
def test_an_unknown_encoding_is_refused(encoding):
    with pytest.raises(ValidationError, match="encoding"):
        Config(source="a.csv", encoding=encoding)


@pytest.mark.parametrize("separator", ['"', "\n", "\r", "||", ""])
def test_what_cannot_separate_is_refused(separator):
    with pytest.raises(ValidationError, match="separator"):
        Config(source="a.csv", separator=separator)


@pytest.mark.parametrize(("separator", "named"), [(";", None), ("\t", None), ("|", "|"), (";", ";")])
def test_semicolons_and_tabs_are_seen_and_others_named(tmp_path, separator, named):
    rows = [{"text": "one, two", "target": "a"}, {"text": 'so "called"; |', "target": "b"}]
    assert fields(written(tmp_path / "a.csv", rows, separator=separator), separator=named) == rows


@pytest.mark.parametrize("separator", "|:#")
def test_another_separator_is_named(tmp_path, separator):
    assert f"If {separator!r} separates the columns" in refused(written(tmp_path / "a.csv", ROWS, separator=separator))
    (tmp_path / "b.csv").write_text("a text\nx\n")
    assert "separates" not in refused(tmp_path / "b.csv")


def test_a_file_that_the_system_refuses_says_why(tmp_path, monkeypatch):
    def no(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "a.csv")

    path = written(tmp_path / "a.csv", ROWS)
    monkeypatch.setattr("ficpd.data.tables._content", no)
    assert refused(path) == "a.csv: Permission denied; choose a place that this user may read and write"


def test_columns_without_name_and_content_are_no_columns(tmp_path):
    (tmp_path / "a.csv").write_text("text;target;;\nx;a;;\ny;b; ;\n")
    (table,) = read_files(tmp_path / "a.csv")
    assert (table.columns, dict(table.rows[2])) == (["text", "target"], {"text": "y", "target": "b"})
    (tmp_path / "a.csv").write_text("text;target;;\nx;a;1;\ny;b;;2\n")
    with pytest.raises(DataError, match="two columns are called ''"):
        read_files(tmp_path / "a.csv")


def test_a_column_that_nobody_asked_for_does_no_harm(tmp_path):
    base = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    latin = pa.Array.from_buffers(pa.string(), 6, pa.array([b"\xff"] * 6, pa.binary()).buffers())
    odd = {
        "day": pa.array([-(10**6)] * 6, pa.date32()),
        "time": pa.array([-(10**17)] * 6, pa.timestamp("us")),
        "latin": latin,
        "pair": pa.StructArray.from_arrays([pa.array([1] * 6)] * 2, names=["a", "a"]),
    }
    pq.write_table(pa.table({**base, **odd}), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == ROWS
    for name in odd:
        assert f"a.parquet, column {name!r}: cannot be read" in refused(tmp_path / "a.parquet", keep=(name,))


def test_hidden_tables_do_not_make_a_folder_of_images_one_of_tables(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "._x.csv").write_bytes(b"\xb0")
    assert "no image in 'cat'" in refused(tmp_path, columns={"image": "image", "target": "target"})


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_of_save_to_disk(tmp_path, prefix):
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(tmp_path / "two")
    assert fields(f"{prefix}{tmp_path}/one") == ROWS
    data = load(Config(source=f"{prefix}{tmp_path}/two"), 0)
    assert (len(data.train), len(data.test)) == (6, 1)
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"")
    assert "save_to_disk" in refused(f"{prefix}{tmp_path}/one")


@pytest.mark.parametrize("name", ["x" * 300 + ".csv", "file/a.csv"])
def test_a_path_that_the_system_refuses_is_a_sentence(tmp_path, name):
    (tmp_path / "file").write_text("")
    assert name in refused(tmp_path / name)


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_of_absurd_depth_or_length_names_its_file(tmp_path, value, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text(f'{{"text": "x", "target": "a"}}\n{{"text": "x", "target": {value}')
    assert "a.jsonl line 2: not JSON" in refused(path) or "a.json line 2: not JSON" in refused(path)


@pytest.mark.parametrize("number", ["1e999", "9" * 400])
def test_a_number_beyond_all_numbers_is_no_target(tmp_path, number):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "target": 1.5}}\n{{"text": "x", "target": {number}}}\n')
    assert "a.jsonl row 2, column 'target'" in refused(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text(f"text,target\nx,1.5\nx,{number}\n")
    with pytest.raises(DataError, match=r"a\.csv row 2, column target"):
        small.numbers().targets(load_all(Config(source=str(tmp_path / "a.csv"))))


def test_half_a_sign_is_replaced(tmp_path):
    row = '{"text": "fine \\ud83d day", "target": "\\ud83d\\ude00", "o": ["\\ud83d", "b"]}\n'
    (tmp_path / "a.jsonl").write_text(row)
    read = fields(tmp_path / "a.jsonl", columns={"text": "text", "target": "target", "options": "o"})
    assert read == [{"text": "fine � day", "target": "😀", "options": ["�", "b"]}]
    (record,) = read_records([{"text": "caf\udce9"}], labelled=False)
    assert record.fields["text"] == "caf�"


@pytest.mark.parametrize(("labels", "targets"), [
    (("true", "false"), (True, False)),
    (("True", "False"), (True, False)),
    (("True", "False"), ("TRUE", "false")),
    (("1", "0"), (1.0, 0.0)),
    (("1", "0"), ("1.0", "0.0")),
    (("pos", "neg"), (" pos", "neg ")),
    (("1.0", "1"), (1.0, 1)),
])  # fmt: skip
def test_a_label_is_found_as_it_may_be_spelled(labels, targets):
    task = classification.build(classification.Config(labels=dict.fromkeys(labels, "word")))
    records = [Record(f"row {i}", {"text": "x", "target": target}) for i, target in enumerate(targets)]
    assert task.targets(records) == list(labels)


def test_labels_that_differ_by_blanks_are_one_label():
    targets = ("mild", " mild", "severe", "severe ")
    records = [Record(f"row {i}", {"text": "x", "target": t}) for i, t in enumerate(targets)]
    session = type("Opened", (), {"tasks": {}, "library": type("Card", (), {"card": {}})})()
    found = resolve_task(session, records, None, {}, None)
    assert list(found.task.label_space) == ["mild", "severe"]
    with pytest.raises(LibraryError, match="all targets are 'mild'"):
        resolve_task(session, records[:2], None, {}, None)


TEXTS = st.text(min_size=1, max_size=12).filter(str.strip)
NAMES = ["csv", "csv.gz", "tsv", "tsv.zst", "jsonl", "jsonl.gz", "json", "json.zst", "parquet"]
FAULTS = ["none", "none", "cut", "byte", "blank", "short", "long"]


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.lists(st.fixed_dictionaries({"text": TEXTS, "target": TEXTS}), min_size=1, max_size=5))
    return {
        "rows": rows,
        "name": "a." + draw(st.sampled_from(NAMES)),
        "encoding": draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])),
        "separator": draw(st.sampled_from([None, ";", "|"])),
        "fault": draw(st.sampled_from(FAULTS)),
        "place": draw(st.integers(0, len(rows) - 1)),
        "amount": draw(st.integers(1, 30)),
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_the_same_records_or_a_sentence_that_names_file_and_row(tmp_path, table):
    rows, name, fault, place = (table[key] for key in ("rows", "name", "fault", "place"))
    told, kind = [dict(row) for row in rows], name.split(".")[1]
    whole = name.endswith((".gz", ".zst", ".parquet"))
    if fault == "blank":
        told[place]["text"] = " \t"
    encoding = table["encoding"] if fault != "byte" else "utf-8"
    separator = table["separator"] if kind == "csv" else None
    path = written(tmp_path / name, told, encoding, separator)
    if fault in ("short", "long") and kind in ("csv", "tsv"):
        text = delimited(rows[: place + 1], separator or {"csv": ",", "tsv": "\t"}[kind]).rstrip("\r\n")
        text = text + (separator or {"csv": ",", "tsv": "\t"}[kind]) if fault == "long" else text + "\r\nx"
        compressed(path, text.encode(encoding))
        place += fault == "short"
    elif (fault == "cut" and (whole or kind == "json")) or (fault == "byte" and not whole):
        content, at = path.read_bytes(), min(table["amount"], path.stat().st_size - 1)
        path.write_bytes(content[:-at] if fault == "cut" else content[:at] + b"\xff" + content[at:])
    elif fault != "blank":
        fault = "none"
    options = {"encoding": encoding, "separator": separator}
    if fault == "none":
        assert fields(path, **options) == rows
        return
    said = refused(path, **options)
    assert path.name in said
    if fault in ("blank", "short", "long"):
        assert f"{path.name} row {place + 1}" in said
    if fault == "byte":
        assert f"{path.name} line " in said
