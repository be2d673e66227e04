import json
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pandas as pd
import pytest
from pydantic import ValidationError

import small
from ficpd import storage
from ficpd.data import sentence_ratings as built_in
from ficpd.data.loading import Config, Dataset, load, load_all, unsampled
from ficpd.errors import DataError
from ficpd.experiments.config import parse
from ficpd.experiments.runner import run

ROWS = [{"text": f"sentence {i}", "target": ["good", "bad"][i % 2], "site": "north"} for i in range(20)]


def csv(path: Path, rows=ROWS, **options) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False, **options)
    return path


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def everything(data: Dataset) -> list:
    return sorted(data.train + data.test, key=lambda record: int(record.key.split()[-1]))


def targets(path: Path) -> list:
    return [record.fields["target"] for record in everything(load(Config(source=str(path)), 0))]


def refused(source: object, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(Config(source=str(source), **options), 0)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "ndjson", "parquet", "CSV"])
def test_every_format_gives_the_same_records(tmp_path, ending):
    path = tmp_path / f"reviews.{ending}"
    if ending in ("jsonl", "ndjson"):
        jsonl(path, ROWS)
    elif ending == "parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    else:
        csv(path, sep="\t" if ending == "tsv" else ",")
    records = everything(load(Config(source=str(path), keep=("site",)), 0))
    assert [dict(record.fields) for record in records] == ROWS
    assert records[16].key == f"reviews.{ending} row 17"


def test_a_key_counts_data_rows_whatever_lines_they_take(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,target\r\n"two\nlines",x\r\n\r\nsecond,y\r\nthird,x\r\n')
    records = everything(load(Config(source=str(path)), 0))
    assert [(record.key, record.fields["text"]) for record in records] == [
        ("a.csv row 1", "two\nlines"),
        ("a.csv row 2", "second"),
        ("a.csv row 3", "third"),
    ]


def test_na_and_null_are_words(tmp_path):
    path = csv(tmp_path / "a.csv", [{"text": word, "target": word} for word in ("NA", "null", "nan", "None", "")][:4])
    assert targets(path) == ["NA", "null", "nan", "None"]


def labels(*cells: str, ending: str = "csv", folder: Path) -> list:
    separator = "\t" if ending == "tsv" else ","
    return targets(csv(folder / f"a.{ending}", [{"text": "x", "target": cell} for cell in cells], sep=separator))


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize(
    "cells", [("007", "7"), ("250", "250.1"), ("250", "V45"), ("1", "-2", "+3"), ("1e5", "1e999"), ("true", "1.50")]
)
def test_a_csv_label_is_text_as_it_is_spelled_whatever_others_are(tmp_path, ending, cells):
    assert labels(*cells, ending=ending, folder=tmp_path) == [*cells]


def test_a_classification_of_codes_runs(tmp_path):
    codes = ("007", "250", "250.1", "V45")
    lines = [f"{word} film,{codes[i % 4]},site-{i % 2}" for i, word in enumerate(small.GOOD * 10)]
    (tmp_path / "codes.csv").write_text("\n".join(["text,target,site", *lines]) + "\n")
    said = ", ".join(f"'{code}' = 'good'" for code in codes)
    text = small.toml(tmp_path / "codes.csv", rounds=1).replace('good = "good fine", bad = "bad dull"', said)
    result = run(parse(text, "codes.toml"), tmp_path / "run")
    assert result.num_records.train + result.num_records.test == 40


def test_a_regression_reads_the_numbers_of_a_csv(tmp_path):
    task = small.numbers()
    for cells, numbers in (("1", "2.50", "-1e1"), [1.0, 2.5, -10.0]), (("3", "07"), [3.0, 7.0]):
        path = csv(tmp_path / "a.csv", [{"text": "x", "target": cell} for cell in cells])
        assert task.targets(load_all(Config(source=str(path)))) == numbers
    for odd in ("good", "1e999", "1_0"):
        path = csv(tmp_path / "a.csv", [{"text": "x", "target": cell} for cell in ("1", odd)])
        with pytest.raises(DataError, match=f"a.csv row 2, column target: '{odd}' is no number"):
            task.targets(load_all(Config(source=str(path))))


def test_a_regression_reads_no_number_off_the_text_of_a_file_with_types(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "target": "2.5"}] * 2)
    with pytest.raises(DataError, match=r"'2\.5' is no number"):
        small.numbers().targets(load_all(Config(source=str(path))))


def test_csv_numbers_beside_a_files_own_numbers_are_numbers(tmp_path):
    csv(tmp_path / "a.csv", [{"text": "x", "target": cell} for cell in ("1", "2.5")])
    jsonl(tmp_path / "b.jsonl", [{"text": "x", "target": 3}] * 2)
    found = [record.fields["target"] for record in load_all(Config(source=str(tmp_path)))]
    assert [(type(value), value) for value in found] == [(float, 1.0), (float, 2.5), (float, 3.0), (float, 3.0)]


def test_of_options_a_csv_number_is_the_place(tmp_path):
    rows = [{"text": "x", "target": place, "a": "2", "b": "1", "c": "0"} for place in (0, 2)]
    records = load_all(Config(source=str(csv(tmp_path / "a.csv", rows)), options=("a", "b", "c")))
    assert small.choices().targets(records) == [0, 2]
    rows[1]["target"] = "c"
    message = refused(csv(tmp_path / "a.csv", rows), options=("a", "b", "c"))
    assert "a.csv row 2, column 'target': 'c' is text, but 1 other rows hold a number" in message


def test_json_text_stays_text_and_truth_stays_truth(tmp_path):
    for values in (["1", "2"], [True, False]):
        path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "target": value} for value in values])
        assert targets(path) == values


def test_roles_rename_columns(tmp_path):
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": 1, "hospital": ""} for i in range(4)]
    columns = {"text": "premise", "text_pair": "hypothesis", "target": "label", "client": "hospital"}
    first = everything(load(Config(source=str(csv(tmp_path / "a.csv", rows)), columns=columns), 0))[0]
    assert first.fields == {"text": "p0", "text_pair": "h0", "target": "1", "client": None}


def test_a_folder_is_read_by_name_and_passes_over_other_files(tmp_path):
    csv(tmp_path / "b.csv")
    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "README.md").write_text("about")
    data = load(Config(source=str(tmp_path)), 3)
    assert Counter(record.key.split()[0] for record in data.train + data.test) == {"a.jsonl": 20, "b.csv": 20}
    assert next(record.key for record in data.train).startswith("a.jsonl")


def test_the_split_is_the_seeds_and_loses_nothing(tmp_path):
    path = str(csv(tmp_path / "a.csv"))
    one, same, other = (load(Config(source=path, test_fraction=0.25), seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert len(one.test) == 5
    assert sorted(r.key for r in one.train + one.test) == sorted(f"a.csv row {i}" for i in range(1, 21))


def test_a_split_column_is_obeyed_and_dev_dropped(tmp_path):
    rows = [row | {"part": ["train", "Test", "validation", "dev"][i % 4]} for i, row in enumerate(ROWS)]
    data = load(Config(source=str(csv(tmp_path / "a.csv", rows)), split_column="part"), 0)
    assert [r.key for r in data.train] == [f"a.csv row {i}" for i in range(1, 21, 4)]
    assert [r.key for r in data.test] == [f"a.csv row {i}" for i in range(2, 21, 4)]


def test_files_named_train_and_test_are_the_split(tmp_path):
    for name in ("train", "test", "dev"):
        csv(tmp_path / f"{name}.csv")
    data = load(Config(source=str(tmp_path)), 0)
    assert {r.key.split()[0] for r in data.train} == {"train.csv"}
    assert {r.key.split()[0] for r in data.test} == {"test.csv"}


def test_max_records_is_a_seeded_sample(tmp_path):
    path = str(csv(tmp_path / "a.csv"))
    one, same, other = (everything(load(Config(source=path, max_records=10), seed)) for seed in (1, 1, 2))
    assert len(one) == 10
    assert one == same
    assert one != other
    assert len(everything(load(Config(source=path, max_records=100), 1))) == 20


def test_unused_is_what_max_records_left_out(tmp_path):
    config = Config(source=str(csv(tmp_path / "a.csv")), max_records=12)
    for seed in (1, 2):
        used, rest = [r.key for r in everything(load(config, seed))], [r.key for r in unsampled(config, seed)]
        assert len(rest) == 8
        assert sorted(used + rest) == sorted(f"a.csv row {i}" for i in range(1, 21))
        assert rest == sorted(rest, key=lambda key: int(key.split()[-1]))
    assert unsampled(config, 1)[0].fields["text"].startswith("sentence")
    assert unsampled(Config(source=str(tmp_path / "a.csv"), max_records=20), 1) == []
    assert unsampled(Config(source=str(tmp_path / "a.csv")), 1) == []


def test_unused_rows_are_checked_too(tmp_path):
    path = csv(tmp_path / "a.csv", [{"text": "x", "target": cell} for cell in ("good", "", "bad")])
    with pytest.raises(DataError, match=r"a\.csv row 2"):
        unsampled(Config(source=str(path), max_records=2), 0)


def parquet(**columns: list) -> bytes:
    return pd.DataFrame(columns).to_parquet()


def targeted(*values: object) -> str:
    return "".join(json.dumps({"text": "x", "target": value}) + "\n" for value in values)


def table(rows: list[dict]) -> str:
    return pd.DataFrame(rows).to_csv(index=False)


UNKNOWN = "a.csv: unknown column 'txt'; did you mean 'text'? Known: site, target, text"
KINDS = "b.csv row 1, column 'target': 'one' is text, but 3 other rows hold a number"
COLUMNS_DIFFER = "b.csv and a.csv have different columns (site only in one of them)"
PARTS = [{"part": part} | row for part, row in zip(("train", "train", "later"), ROWS[:3], strict=True)]
NUMBERS = [float(i) if i not in (16, 18) else "good" for i in range(20)]


@pytest.mark.parametrize(("content", "says"), [
    (table(ROWS[:1]), "no train records among 1"),
    ("", "a.csv: no rows"),
    ("text,target\n", "a.csv: no rows"),
    ("text,target\nx,1,2\n", "a.csv row 1: 3 cells, expected 2"),
    ("text,target\nx,1\ny,1,2\n", "a.csv row 2: 3 cells, expected 2"),
    ("text,target\n\nx,1\ny\n", "a.csv row 2: 1 cells, expected 2"),
    ('text,target\n"x,1\ny,2\n', "a.csv row 1: unexpected end of data"),
    ('text,target\nx,1\n"so" she said,2\n', "a.csv row 2: ',' expected after '\"'"),
    ('"text,target\nx,1\n', "a.csv header: unexpected end of data"),
    ("text,target\nfine,1\ncafé,2\n".encode("latin-1"), "a.csv line 3: byte 22 (0xe9) is not UTF-8"),
    ("\n\n", "a.jsonl: no rows"),
    (targeted(1) + "\n{oops\n", "a.jsonl line 3: not JSON"),
    (targeted(1) + "\n[1, 2]\n", "a.jsonl line 3: [1, 2] is no object"),
    ('{"text": 5, "target": 1}\n', "a.jsonl row 1, column 'text': holds 5; expected text"),
    (targeted(*NUMBERS), "a.jsonl row 17, column 'target': 'good' is text, but 18 other rows hold a number"),
    *(
        (targeted(1.5, odd), f"a.jsonl row 2, column 'target': {odd!r} cannot be a target")
        for odd in ([1], {"a": 1})
    ),
    (targeted(1.5, float("inf")), "a.jsonl row 2, column 'target': inf cannot be a target"),
    (targeted(3, 3, "3"), "a.jsonl row 3, column 'target': '3' is"),
    (targeted("3", "3", 3), "a.jsonl row 3, column 'target': 3 is"),
    (targeted(1, 1, True), "a.jsonl row 3, column 'target': True is"),
    (targeted("no", "no", False), "a.jsonl row 3, column 'target': False is"),
    (parquet(text=["a", "b"], target=[1.0, float("nan")]), "a.parquet row 2, column 'target': is missing"),
    (parquet(text=[], target=[]), "a.parquet: no rows"),
    (parquet(text=["a"] * 9, target=["b"] * 9)[:-30], "a.parquet: no whole Parquet file"),
    ("x", "a.xlsx: unknown ending '.xlsx'; save it as one of .csv, .tsv, .jsonl"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_names_its_row(tmp_path, content, says):
    endings = re.findall(r"a\.(\w+)", says)
    path = tmp_path / f"a.{endings[0] if endings else 'csv'}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refused(path)


@pytest.mark.parametrize(("rows", "options", "says"), [
    (PARTS, {"split_column": "part"}, "a.csv row 3, column 'part': 'later' is no split; expected one of train, test"),
    (ROWS, {"columns": {"text": "txt", "target": "target"}}, UNKNOWN),
    (ROWS, {"keep": ("ward",)}, ": unknown column 'ward'"),
    (ROWS, {"split_column": "part"}, ": unknown column 'part'"),
])  # fmt: skip
def test_a_column_or_a_split_that_is_not_there_is_named_with_the_nearest(tmp_path, rows, options, says):
    assert says in refused(csv(tmp_path / "a.csv", rows), **options)
    assert "unknown column 'score'" in refused("ratings", columns={"text": "text", "target": "score"})


@pytest.mark.parametrize(("a", "b", "says"), [
    ({"a.jsonl": targeted(1, 1, 1)}, {"b.csv": "text,target\nx,one\n"}, KINDS),
    ({"a.csv": table(ROWS)}, {"b.csv": "text,target\nx,1\n"}, COLUMNS_DIFFER),
])  # fmt: skip
def test_files_of_a_folder_need_the_same_columns_and_kinds_of_targets(tmp_path, a, b, says):
    for name, text in (a | b).items():
        (tmp_path / name).write_text(text)
    assert says in refused(tmp_path)


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  "])
def test_a_missing_target_names_its_row(tmp_path, missing):
    rows = [{"text": "x", "target": value} for value in (1, missing, 2)]
    for path in (csv(tmp_path / "a.csv", rows), jsonl(tmp_path / "a.jsonl", rows)):
        assert f"{path.name} row 2, column 'target': is missing" in refused(path)


@pytest.mark.parametrize("role", ["text", "text_pair"])
@pytest.mark.parametrize("text", ["", " \t", None])
def test_an_empty_text_names_its_row(tmp_path, role, text):
    rows = [{"text": "a", "text_pair": "b", "target": 1} | ({role: text} if i == 1 else {}) for i in range(3)]
    columns = {name: name for name in ("text", "text_pair", "target")}
    for path in (csv(tmp_path / "a.csv", rows), jsonl(tmp_path / "a.jsonl", rows)):
        assert f"{path.name} row 2, column {role!r}: is empty" in refused(path, columns=columns)


def test_no_such_file_and_a_folder_without_tables(tmp_path):
    assert "no file or folder" in refused(tmp_path / "missing.csv")
    assert "'ratings'" in refused("ratngs")
    (tmp_path / "a.txt").write_text("x")
    assert "holds no file ending in .csv" in refused(tmp_path)


@pytest.mark.parametrize("wrong", [
    {"columns": {"txt": "text"}},
    {"keep": ("target",), "columns": {"text": "text", "target": "label"}},
    {"test_fraction": 0},
    {"test_fraction": 1},
    {"max_records": 1},
    {"sauce": "x"},
])  # fmt: skip
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Config(**({"source": "ratings"} | wrong))


def hub(monkeypatch, loaded) -> None:
    def load_dataset(name, subset, split):
        assert (name, subset) == ("owner/reviews", "en")
        return loaded[split] if split else loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def labelled(*numbers: int) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "target": datasets.ClassLabel(names=["no", "yes"])})
    return datasets.Dataset.from_dict({"text": ["x"] * len(numbers), "target": list(numbers)}, features=features)


def test_the_hubs_splits_and_class_names(monkeypatch):
    hub(monkeypatch, datasets.DatasetDict(train=labelled(0, 1, 1), validation=labelled(0), test=labelled(1)))
    data = load(Config(source="hf:owner/reviews", subset="en"), 0)
    assert [r.fields["target"] for r in data.train] == ["no", "yes", "yes"]
    assert [(r.key, r.fields["target"]) for r in data.test] == [("owner/reviews test row 1", "yes")]


def test_one_split_of_the_hub_is_divided(monkeypatch):
    hub(monkeypatch, datasets.DatasetDict(unsupervised=labelled(*[1] * 10)))
    data = load(Config(source="hf:owner/reviews", subset="en", hf_split="unsupervised"), 0)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert "splits are unsupervised; say which" in refused("hf:owner/reviews", subset="en")


def test_an_unlabelled_class_is_a_missing_target(monkeypatch):
    hub(monkeypatch, datasets.DatasetDict(train=labelled(1), test=labelled(1, -1)))
    assert "owner/reviews test row 2, column 'target': is missing" in refused("hf:owner/reviews", subset="en")


def test_an_unreachable_hub_names_the_id_and_the_way_out(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused("hf:owner/reviews")
    assert "hf:owner/reviews: cannot be loaded (ConnectionError: no route)" in message
    assert "local file" in message


def ratings(target: str) -> Dataset:
    return load(Config(source="ratings", columns={"text": "text", "target": target}, keep=("domain",)), 0)


def test_ratings_are_all_rated_sentences_of_four_domains():
    data = ratings("rating")
    records = data.train + data.test
    assert Counter(r.fields["domain"] for r in records) == {
        "tweets": 4200, "films": 10605, "products": 3708, "editorials": 5190,
    }  # fmt: skip
    assert len(data.test) == 4741
    assert all(type(r.fields["target"]) is float and -4 <= r.fields["target"] <= 4 for r in records)
    assert not any("&amp;" in r.fields["text"] or "\r" in r.fields["text"] for r in records)
    first = next(r for r in records if r.key == "tweets row 1")
    assert first.fields["text"].startswith("Somehow I was blessed")
    assert first.fields["target"] == 2.726315789


def test_polarity_drops_the_neutral_sentences():
    data = ratings("polarity")
    assert Counter((r.fields["domain"], r.fields["target"]) for r in data.train + data.test) == {
        ("tweets", "negative"): 1062, ("tweets", "positive"): 2300, ("films", "negative"): 5061,
        ("films", "positive"): 4982, ("products", "negative"): 1218, ("products", "positive"): 1725,
        ("editorials", "negative"): 1688, ("editorials", "positive"): 1100,
    }  # fmt: skip


def test_polarity_is_the_sign_beyond_a_half():
    assert [built_in._rated("tweets", f"1\t{r}\tx")["polarity"] for r in (-4, -0.5, 0, 0.5, 0.51)] == [
        "negative", None, None, None, "positive",
    ]  # fmt: skip


@pytest.fixture
def archive(tmp_path, monkeypatch) -> tuple[Path, list[Path]]:
    """An empty cache, and a download that hands over the true archive and notes each call."""
    built_in._sdist()
    true, calls = storage.cache_dir() / built_in.SDIST, []

    def download(folder: Path) -> Path:
        calls.append(folder)
        return Path(shutil.copy(true, folder))

    monkeypatch.setenv("FICPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(built_in, "_download", download)
    return tmp_path / "cache" / built_in.SDIST, calls


def test_the_archive_is_fetched_once_and_a_damaged_one_again(archive):
    kept, calls = archive
    content = built_in._sdist()
    assert built_in._sdist() == content == kept.read_bytes()
    assert len(calls) == 1
    kept.write_bytes(content[:1000])
    assert built_in._sdist() == content
    assert len(calls) == 2


def test_many_at_once_do_not_break_each_other(archive):
    kept, _ = archive
    with ThreadPoolExecutor(4) as pool:
        contents = set(pool.map(lambda _: built_in._sdist(), range(8)))
    assert contents == {kept.read_bytes()}
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_foreign_archive_is_refused(tmp_path, monkeypatch):
    def run(command, **_):
        (Path(command[-1]) / built_in.SDIST).write_bytes(b"something else")
        return type("Done", (), {"returncode": 1, "stderr": "THESE PACKAGES DO NOT MATCH THE HASHES"})

    monkeypatch.setenv("FICPD_CACHE", str(tmp_path))
    monkeypatch.setattr(built_in.subprocess, "run", run)
    message = refused("ratings")
    assert "DO NOT MATCH THE HASHES" in message
    assert built_in.SHA256 in message
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path / "file"))
    assert "set FICPD_CACHE to a folder" in refused("ratings")


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("FICPD_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert storage.cache_dir() == Path("/a")
    monkeypatch.delenv("FICPD_CACHE")
    assert storage.cache_dir() == Path("/b/ficpd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage.cache_dir() == Path.home() / ".cache" / "ficpd"


def test_where_takes_the_rows_that_hold_one_of_the_values(tmp_path):
    lines = [f"text {i},{'ab'[i % 2]},{('en', 'de', 'fr')[i % 3]}" for i in range(12)]
    (tmp_path / "t.csv").write_text("\n".join(["text,target,lang", *lines]) + "\n")
    config = Config(source=str(tmp_path / "t.csv"), where={"lang": ("en", "fr")}, keep=("lang",))
    records = load_all(config)
    assert {r.fields["lang"] for r in records} == {"en", "fr"}
    assert [r.key for r in records] == [f"t.csv row {i + 1}" for i in range(12) if i % 3 != 1]


def test_where_may_ask_for_what_only_some_of_the_files_have(tmp_path):
    for name in ("en", "fr"):
        (tmp_path / f"{name}.csv").write_text(f"text,target,lang\nsome words,a,{name}\nmore words,b,{name}\n")
    config = Config(source=str(tmp_path), where={"lang": ("fr",)}, keep=("lang",))
    assert {record.fields["lang"] for record in load_all(config)} == {"fr"}
    with pytest.raises(DataError, match=r"2 files of .*'lang'.*'de'"):
        load_all(Config(source=str(tmp_path), where={"lang": ("fr", "de")}))


def test_where_with_a_value_that_no_row_has_or_a_column_that_is_none_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("text,target,lang\none,a,en\ntwo,b,en\n")
    with pytest.raises(DataError, match=r"t\.csv, column 'lang': unknown value 'eng'; did you mean 'en'"):
        load_all(Config(source=str(tmp_path / "t.csv"), where={"lang": ("eng",)}))
    with pytest.raises(DataError, match="unknown column 'language'"):
        load_all(Config(source=str(tmp_path / "t.csv"), where={"language": ("en",)}))
