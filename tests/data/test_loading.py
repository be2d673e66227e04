import json
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


def test_one_row_cannot_be_split(tmp_path):
    assert "no train records among 1" in refused(csv(tmp_path / "a.csv", ROWS[:1]))


def test_an_unknown_split_names_its_row(tmp_path):
    rows = [*ROWS[:2], ROWS[2] | {"part": "later"}]
    message = refused(csv(tmp_path / "a.csv", [{"part": "train"} | row for row in rows]), split_column="part")
    assert "a.csv row 3, column 'part': 'later' is no split; expected one of train, test" in message


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    message = refused(csv(tmp_path / "a.csv"), columns={"text": "txt", "target": "target"})
    assert "a.csv: unknown column 'txt'; did you mean 'text'? Known: site, target, text" in message
    assert "unknown column 'ward'" in refused(csv(tmp_path / "a.csv"), keep=("ward",))
    assert "unknown column 'part'" in refused(csv(tmp_path / "a.csv"), split_column="part")


def test_mixed_targets_name_the_first_odd_row(tmp_path):
    rows = [{"text": "x", "target": i} for i in range(20)]
    rows[16]["target"] = rows[18]["target"] = "good"
    message = refused(jsonl(tmp_path / "a.jsonl", rows))
    assert "a.jsonl row 17, column 'target': 'good' is text, but 18 other rows hold a number" in message


@pytest.mark.parametrize(("odd", "usual"), [("3", 3), (3, "3"), (True, 1), (False, "no")])
def test_json_kinds_do_not_mix(tmp_path, odd, usual):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "target": value} for value in (usual, usual, odd)])
    assert f"a.jsonl row 3, column 'target': {odd!r} is" in refused(path)


def test_targets_of_two_files_do_not_mix(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": "x", "target": 1}] * 3)
    csv(tmp_path / "b.csv", [{"text": "x", "target": "one"}] * 2)
    assert "b.csv row 1, column 'target': 'one' is text, but 3 other rows hold a number" in refused(tmp_path)


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  "])
def test_a_missing_target_names_its_row(tmp_path, missing):
    rows = [{"text": "x", "target": value} for value in (1, missing, 2)]
    for path in (csv(tmp_path / "a.csv", rows), jsonl(tmp_path / "a.jsonl", rows)):
        assert f"{path.name} row 2, column 'target': is missing" in refused(path)


def test_a_nan_in_parquet_is_a_missing_target(tmp_path):
    pd.DataFrame({"text": ["a", "b"], "target": [1.0, float("nan")]}).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet row 2, column 'target': is missing" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize("target", [[1], {"a": 1}, float("inf")])
def test_what_cannot_be_a_target(tmp_path, target):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "target": 1.5}, {"text": "x", "target": target}])
    assert f"a.jsonl row 2, column 'target': {target!r} cannot be a target" in refused(path)


@pytest.mark.parametrize("role", ["text", "text_pair"])
@pytest.mark.parametrize("text", ["", " \t", None])
def test_an_empty_text_names_its_row(tmp_path, role, text):
    rows = [{"text": "a", "text_pair": "b", "target": 1} | ({role: text} if i == 1 else {}) for i in range(3)]
    columns = {name: name for name in ("text", "text_pair", "target")}
    for path in (csv(tmp_path / "a.csv", rows), jsonl(tmp_path / "a.jsonl", rows)):
        assert f"{path.name} row 2, column {role!r}: is empty" in refused(path, columns=columns)


def test_a_text_that_is_a_number(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", [{"text": 5, "target": 1}]))
    assert "a.jsonl row 1, column 'text': holds 5; expected text" in message


@pytest.mark.parametrize(("name", "content"), [("a.csv", ""), ("a.csv", "text,target\n"), ("a.jsonl", "\n\n")])
def test_a_file_without_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert f"{name}: no rows" in refused(tmp_path / name)


def test_a_parquet_file_without_rows(tmp_path):
    pd.DataFrame({"text": [], "target": []}).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet: no rows" in refused(tmp_path / "a.parquet")


def test_an_unknown_ending(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    assert "a.xlsx: unknown ending '.xlsx'; save it as one of .csv, .tsv, .jsonl" in refused(tmp_path / "a.xlsx")


def test_no_such_file_and_a_folder_without_tables(tmp_path):
    assert "no file or folder" in refused(tmp_path / "missing.csv")
    assert "'ratings'" in refused("ratngs")
    (tmp_path / "a.txt").write_text("x")
    assert "holds no file ending in .csv" in refused(tmp_path)


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame(ROWS).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "a.parquet: no whole Parquet file" in refused(path)


def test_a_csv_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,target\nfine,1\ncafé,2\n".encode("latin-1"))
    assert "a.csv line 3: byte 22 (0xe9) is not UTF-8" in refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,target\nx,1,2\n", "row 1: 3 cells, expected 2"),
        ("text,target\nx,1\ny,1,2\n", "row 2: 3 cells, expected 2"),
        ("text,target\n\nx,1\ny\n", "row 2: 1 cells, expected 2"),
        ('text,target\n"x,1\ny,2\n', "row 1: unexpected end of data"),
        ('text,target\nx,1\n"so" she said,2\n', "row 2: ',' expected after '\"'"),
        ('"text,target\nx,1\n', "header: unexpected end of data"),
    ],
)
def test_a_csv_whose_rows_do_not_fit(tmp_path, content, says):
    (tmp_path / "a.csv").write_text(content)
    assert f"a.csv {says}" in refused(tmp_path / "a.csv")


@pytest.mark.parametrize(("line", "says"), [("{oops", "not JSON"), ("[1, 2]", "[1, 2] is no object")])
def test_a_broken_json_line_is_named(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "target": 1}\n\n' + line + "\n")
    assert f"a.jsonl line 3: {says}" in refused(tmp_path / "a.jsonl")


def test_files_of_a_folder_need_the_same_columns(tmp_path):
    csv(tmp_path / "a.csv")
    csv(tmp_path / "b.csv", [{"text": "x", "target": 1}])
    assert "b.csv and a.csv have different columns (site only in one of them)" in refused(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"columns": {"txt": "text"}},
        {"keep": ("target",), "columns": {"text": "text", "target": "label"}},
        {"test_fraction": 0},
        {"test_fraction": 1},
        {"max_records": 1},
        {"sauce": "x"},
    ],
)
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


def test_ratings_know_their_columns():
    assert "unknown column 'score'" in refused("ratings", columns={"text": "text", "target": "score"})


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
