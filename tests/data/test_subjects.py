"""Subjects in data: read as text, named in all rows or none, and never divided between two sides."""

from collections import Counter
from pathlib import Path

import pytest

from ficpd.data import loading
from ficpd.data.partition import Config as Partition
from ficpd.data.partition import partition
from ficpd.data.subjects import count_units, num_scattered, subject_numbers
from ficpd.errors import ConfigError, DataError
from ficpd.registry import validate
from ficpd.types import Record

COLUMNS = {"text": "text", "target": "target", "subject": "patient"}


def table(path: Path, patients: list[str], more: str = "") -> str:
    """A CSV with a row for each name, and the column `split` if `more` holds one side for each row."""
    sides = more.split()
    lines = ["text,target,patient" + (",split" if sides else "")]
    for i, patient in enumerate(patients):
        lines.append(f"note {i},{'ab'[i % 2]},{patient}" + (f",{sides[i]}" if sides else ""))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def load(source: str, seed: int = 0, **more) -> loading.Dataset:
    return loading.load(validate(loading.Config, {"source": source, "columns": COLUMNS, **more}, "data"), seed)


def names(records) -> set[str | None]:
    return {record.subject for record in records}


MANY = [f"p{i % 12}" for i in range(60)] + ["big"] * 20


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("more", [{}, {"max_records": 40}, {"test_fraction": 0.5}])
def test_no_subject_is_in_train_and_in_test(tmp_path, seed, more):
    found = load(table(tmp_path / "a.csv", MANY), seed, **more)
    assert found.train
    assert found.test
    assert not names(found.train) & names(found.test)
    if not more:
        assert len(found.train) + len(found.test) == len(MANY)
        assert 0 < len(found.test) <= 16


def test_rows_that_were_left_out_are_of_other_subjects(tmp_path):
    config = loading.Config(source=table(tmp_path / "a.csv", MANY), columns=COLUMNS, max_records=40)
    for seed in range(5):
        used = loading.load(config, seed)
        left = loading.unsampled(config, seed)
        assert len(used.train) + len(used.test) <= 40
        assert len(used.train) + len(used.test) + len(left) == len(MANY)
        assert left
        assert not names(left) & names([*used.train, *used.test])


def test_the_subject_is_no_field_that_a_task_sees(tmp_path):
    record = load(table(tmp_path / "a.csv", MANY)).train[0]
    assert set(record.fields) == {"text", "target"}
    assert record.subject in MANY
    kept = load(table(tmp_path / "a.csv", MANY), keep=["patient"]).train[0]
    assert kept.fields["patient"] == kept.subject


@pytest.mark.parametrize("gap", ["", "  "])
def test_a_gap_in_the_column_is_an_error_that_names_the_row(tmp_path, gap):
    with pytest.raises(DataError, match=r"a\.csv row 3, column 'patient': is empty; .* fill or drop the row"):
        load(table(tmp_path / "a.csv", ["p1", "p2", gap, "p3"]))


@pytest.mark.parametrize("cell", ["null", "NaN", "[1]", "true", "1.5"])
def test_what_is_no_subject_is_an_error_that_names_the_row(tmp_path, cell):
    rows = [f'{{"text": "note", "target": "a", "patient": {value}}}' for value in ("1", cell, "2")]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"a\.jsonl row 2, column 'patient'"):
        load(str(tmp_path / "a.jsonl"))


def test_numbers_are_read_as_text(tmp_path):
    rows = [f'{{"text": "note", "target": "a", "patient": {value}}}' for value in ("7", "7.0", '" 7 "', '"007"', "8")]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = load(str(tmp_path / "a.jsonl"), test_fraction=0.4)
    assert Counter(record.subject for record in [*found.train, *found.test]) == {"7": 3, "007": 1, "8": 1}


def test_numbers_of_a_text_file_are_read_alike(tmp_path):
    found = load(table(tmp_path / "a.csv", ["7", "7.0", "7.00", "007", "8", "v7.0", "7.5"]), test_fraction=0.4)
    counts = Counter(record.subject for record in [*found.train, *found.test])
    assert counts == {"7": 3, "007": 1, "8": 1, "v7.0": 1, "7.5": 1}


def test_a_column_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("text,target\na,b\nc,d\n")
    with pytest.raises(DataError, match="patient"):
        load(str(tmp_path / "a.csv"))


def test_one_subject_with_all_records_is_an_error(tmp_path):
    with pytest.raises(DataError, match="all 6 rows are of one subject"):
        load(table(tmp_path / "a.csv", ["p1"] * 6))


def test_max_records_below_every_subject_is_an_error(tmp_path):
    with pytest.raises(DataError, match="max_records = 4: each of 3 subjects has 5 records or more"):
        load(table(tmp_path / "a.csv", ["p1", "p2", "p3"] * 5), max_records=4)


def test_a_given_split_that_divides_a_subject_is_an_error_that_names_both_rows(tmp_path):
    source = table(tmp_path / "a.csv", ["p1", "p2", "p2", "p3"], "train train test test")
    with pytest.raises(DataError, match=r"a\.csv row 2 \(train\) and a\.csv row 3 \(test\) are of one subject"):
        load(source, split_column="split")
    split = table(tmp_path / "b.csv", ["p1", "p2", "p2", "p3"], "train test test dev")
    assert len(load(split, split_column="split").test)


def test_a_folders_train_and_test_files_may_not_share_a_subject(tmp_path):
    table(tmp_path / "train.csv", ["p1", "p2"])
    table(tmp_path / "test.csv", ["p3", "p1"])
    with pytest.raises(DataError, match=r"train\.csv row 1 \(train\) and test\.csv row 2 \(test\)"):
        load(str(tmp_path))


def test_records_of_one_subject_stand_together(tmp_path):
    train = load(table(tmp_path / "a.csv", MANY)).train
    numbers = subject_numbers(train)
    assert numbers == sorted(numbers or [])


@pytest.mark.parametrize("how", [{"kind": "iid"}, {"kind": "dirichlet", "concentration": 0.5}])
@pytest.mark.parametrize("seed", range(3))
def test_a_drawn_client_gets_whole_subjects(tmp_path, how, seed):
    data = load(table(tmp_path / "a.csv", MANY), seed)
    shards = partition(Partition(num_clients=3, **how), data, "target", seed)
    assert num_scattered([*shard.train, *shard.test] for shard in shards.values()) == 0
    assert sum(len(shard.train) for shard in shards.values()) == len(data.train)
    assert min(len(shard.train) for shard in shards.values()) >= 1


def test_a_partition_by_column_may_scatter_a_subject(tmp_path):
    data = load(table(tmp_path / "a.csv", ["p1", "p1", "p2", "p2", "p3", "p3"]), test_fraction=0.3)
    shards = partition(Partition(kind="column", column="target"), data, "target", 0)
    assert num_scattered([*shard.train, *shard.test] for shard in shards.values()) == 3


def test_units_are_counted():
    records = [Record(str(i), {}, name) for i, name in enumerate("abaac")]
    assert count_units(records) == (5, 3)
    assert count_units(records).units == 3
    assert count_units([Record("1", {})] * 4).units == 4
    with pytest.raises(DataError, match="5: no subject, and other records have one"):
        subject_numbers([*records, Record("5", {})])


def test_of_medmcqa_the_subject_is_a_field_of_medicine_and_no_patient():
    config = loading.Config(source="x", layout="medmcqa")
    assert config.subject is None
    assert "subject" in config.wanted


def test_a_role_that_is_misspelt_is_an_error():
    with pytest.raises(ConfigError, match="subject"):
        validate(loading.Config, {"source": "x", "columns": {"subjct": "patient"}}, "data")
