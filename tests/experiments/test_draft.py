"""`ficpd init`: the recipe that it writes runs, and it warns of what impairs a run."""

import json
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from ficpd.errors import DataError
from ficpd.experiments.config import parse
from ficpd.experiments.draft import draft
from ficpd.experiments.results import RunResult

WORDS = {"cardio": "the heart was racing", "neuro": "the head did hurt", "skin_rash": "the arm was red"}
NONE = dict.fromkeys(("text", "target", "client", "subject"))


def notes(count: int = 240, **columns: list) -> pd.DataFrame:
    """Notes of three departments at four hospitals; each patient has two, at one hospital."""
    labels = [list(WORDS)[i % 3] for i in range(count)]
    frame = {
        "note_id": [str(i) for i in range(count)],
        "hospital": [f"h{i // 2 % 4}" for i in range(count)],
        "patient": [f"p{i // 2}" for i in range(count)],
        "note": [f"{WORDS[label]} on day {i}" for i, label in enumerate(labels)],
        "department": labels,
    }
    return pd.DataFrame({**frame, **columns})


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table as `data.csv` into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(frame: pd.DataFrame, name: str = "data.csv") -> str:
        writers = {"csv": lambda: frame.to_csv(name, index=False), "parquet": lambda: frame.to_parquet(name),
                   "jsonl": lambda: frame.to_json(name, orient="records", lines=True)}  # fmt: skip
        writers[name.rpartition(".")[2]]()
        return name

    return write


def warned(source: str, epsilon: float | None = None, **columns: str) -> str:
    return "\n".join(draft(source, "data.toml", {**NONE, **columns}, epsilon).warnings)


def test_the_recipe_runs(ficpd, table):
    call = ("init", table(notes()), "--text", "note", "--target", "department", "--client", "hospital",
            "--subject", "patient", "--epsilon", "2")  # fmt: skip
    status, out, err = ficpd(*call)
    assert status == 0
    assert "recipe: data.toml" in out
    assert "next:   ficpd run data.toml" in out
    assert "3 labels: 'cardio' (80), 'neuro' (80), 'skin_rash' (80)" in out
    assert "4 clients" in out
    text = Path("data.toml").read_text(encoding="utf-8")
    assert "# Warning: the smallest client has 60 records" in text
    assert "the smallest client has 60 records" in err
    experiment = parse(text, "data.toml")
    assert experiment.task is not None
    assert experiment.task["labels"] == {"cardio": "cardio", "neuro": "neuro", "skin_rash": "skin rash"}
    assert text.count("# 80 records") == 3
    changes = ("-s", "backbone={name='tiny',options={width=16}}", "-s", "federation.num_rounds=1", "-s", "baselines=[]")
    assert ficpd("run", "data.toml", "--out", "run", *changes)[0] == 0
    result = RunResult.load(Path("run"))
    assert (result.num_clients, result.privacy.unit, result.privacy.budget) == (4, "subject", 2.0)


def test_it_refuses_to_overwrite(ficpd, table):
    assert ficpd("init", table(notes()))[0] == 0
    before = Path("data.toml").read_text(encoding="utf-8")
    assert "data.toml exists already" in ficpd("init", "data.csv", "--epsilon", "2").said(1)
    assert Path("data.toml").read_text(encoding="utf-8") == before
    assert ficpd("init", "data.csv", "--out", "other.toml")[0] == 0


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet"])
def test_columns_that_are_not_named_are_guessed_and_said(table, name):
    found = draft(table(notes(), name), "data.toml", NONE)
    told = "\n".join(found.found)
    for role, column in {"text": "note", "target": "department", "client": "hospital", "subject": "patient"}.items():
        assert f"{role} is column {column!r}, a guess (--{role} names another)" in told
    assert tomllib.loads(found.toml)["data"]["columns"] == {
        "text": "note", "target": "department", "client": "hospital", "subject": "patient",
    }  # fmt: skip
    assert "a guess" not in "\n".join(draft(name, "data.toml", {**NONE, "text": "note"}).found[3:])


def test_columns_without_a_known_name_are_guessed_by_their_content(table):
    frame = notes()[["note", "department"]].rename(columns={"note": "x1", "department": "x2"})
    recipe = tomllib.loads(draft(table(frame), "data.toml", NONE).toml)
    assert recipe["data"]["columns"] == {"text": "x1", "target": "x2"}
    assert recipe["partition"] == {"kind": "iid", "num_clients": 5}


@pytest.mark.parametrize(("columns", "words"), [
    ({"target": "departmen"}, r"did you mean 'department'.* \(--target\)"),
    ({"target": "note"}, "240 different values"),
    ({"target": "same"}, "1 different values"),
])  # fmt: skip
def test_a_column_that_cannot_be_is_refused(table, columns, words):
    source = table(notes(same=["a"] * 240))
    with pytest.raises(DataError, match=words):
        draft(source, "data.toml", {**NONE, **columns})


def test_without_a_column_of_labels_it_asks_for_one(table):
    source = table(notes()[["note_id", "note"]])
    with pytest.raises(DataError, match=r"which column is the target\? Name it: --target"):
        draft(source, "data.toml", NONE)


def test_numbers_become_a_regression(table):
    recipe = tomllib.loads(draft(table(notes(rating=[i % 40 / 10 for i in range(240)])), "data.toml",
                                 {**NONE, "target": "rating"}).toml)  # fmt: skip
    assert recipe["task"] == {
        "name": "regression", "instruction": "The rating is", "anchors": {"low rating": 0.0, "high rating": 3.9},
    }  # fmt: skip


def test_labels_of_any_spelling_are_written(table):
    labels = ["a.b", 'say "hi" # no', "ü\nline", "[x]", "true", " spaced"]
    found = draft(table(notes(department=[labels[i % 6] for i in range(240)])), "data.toml", NONE)
    assert set(tomllib.loads(found.toml)["task"]["labels"]) == set(labels)
    assert not [line for line in found.warnings if "run stops" in line]


def test_a_table_as_excel_writes_it(table):
    """A byte order mark, semicolons, and columns without name and content at the end."""
    rows = notes()[["note", "department", "hospital"]].to_csv(sep=";", index=False).splitlines()
    Path("data.csv").write_bytes(("\ufeff" + "\r\n".join(row + ";;" for row in rows)).encode())
    assert tomllib.loads(draft("data.csv", "data.toml", NONE).toml)["data"]["columns"]["text"] == "note"


@pytest.mark.parametrize(("encoding", "separator"), [("utf-16", ";"), ("cp1252", "|")])
def test_an_encoding_and_a_separator_go_into_the_recipe(ficpd, table, encoding, separator):
    frame = notes(note=[f"über den Tag {i}" for i in range(240)])
    frame.to_csv("data.csv", sep=separator, index=False, encoding=encoding)
    assert "--encoding" in ficpd("init", "data.csv")[2]
    assert ficpd("init", "data.csv", "--encoding", encoding, "--separator", separator)[0] == 0
    text = Path("data.toml").read_text(encoding="utf-8")
    assert "the run stops" not in text
    data = tomllib.loads(text)["data"]
    assert (data["encoding"], data["separator"]) == (encoding, separator)


def test_a_good_table_has_no_warning(table):
    assert warned(table(notes(1200))) == ""


def test_it_warns_of_small_and_uneven_data(table):
    few = warned(table(notes(30)))
    assert "30 records are few" in few
    assert "clients with fewer than 20 records: 'h3', 'h0', 'h1', 'h2'" in few
    labels = ["cardio"] * 235 + ["neuro"] * 5
    uneven = warned(table(notes(department=labels)))
    assert "labels are unbalanced: 'cardio' has 235 records, 'neuro' 5" in uneven
    assert "labels with fewer than 10 records: 'neuro'" in uneven
    assert "there is one client, 'h0'" in warned(table(notes(hospital=["h0"] * 240)))


def test_it_warns_of_settings_that_tell_of_single_records(table):
    """A library's card states labels and anchors, which no noise covers."""
    rated = table(notes(rating=[i % 40 / 10 for i in range(240)]))
    assert "the least and the largest number of the records (0, 3.9)" in warned(rated, 2.0, target="rating")
    assert "single records" not in warned(rated, target="rating")
    rare = table(notes(department=["cardio"] * 120 + ["neuro"] * 119 + ["leprosy"]))
    assert "a library lists it to all; 'leprosy' may tell of single records" in warned(rare, 2.0)
    assert "single records" not in warned(table(notes()), 2.0)


def test_it_warns_of_cells_texts_and_labels(table):
    gaps = notes()
    gaps.loc[6, "department"] = None
    gaps.loc[[3, 4], "note"] = " "
    told = warned(table(gaps))
    assert "rows without a text (column 'note'): 2; the first: data.csv row 4, data.csv row 5" in told
    assert "rows without a target (column 'department'): 1; the first: data.csv row 7" in told
    assert "as it is, the run stops: data.csv row 4" in told
    twice = notes()
    twice.loc[1, "note"] = twice.loc[0, "note"]
    assert "rows that repeat the text of another: 1" in warned(table(twice))
    assert "texts with several labels: 1, such as 'the heart was racing" in warned(table(twice))
    alike = notes(department=[["cardio", "Cardio ", "neuro"][i % 3] for i in range(240)])
    assert "labels that differ by spaces or case only: 'cardio', 'Cardio '" in warned(table(alike))
    assert "labels are codes ('0', '1', '2')" in warned(table(notes(department=[i % 3 for i in range(240)])))
    comma = warned(table(notes(wert=[f"{i % 40},5" for i in range(240)])), target="wert")
    assert "labels look like numbers with a decimal comma ('0,5', '1,5'" in comma
    assert "not English" in warned(table(notes(note=[f"сердце билось быстро {i}" for i in range(240)])))


def test_it_warns_of_what_a_budget_does_not_cover(table):
    alone = notes()[["note", "department", "hospital"]]
    assert "protects one row. Somebody with several rows is protected less" in warned(table(alone), 2.0)
    assert "protects one row" not in warned(table(alone))
    assert "protects one row" not in warned(table(notes()), 2.0)
    scattered = notes(hospital=[f"h{i % 4}" for i in range(240)])
    assert "subjects with rows at several clients: 120" in warned(table(scattered))


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf"])
def test_a_budget_that_is_none_is_wrong_usage(ficpd, table, epsilon):
    assert ficpd("init", table(notes()), "--epsilon", epsilon)[0] == 2
    assert not Path("data.toml").exists()


def test_truth_values_and_numbers_of_typed_files_are_labels(table):
    rows = [json.dumps({"text": f"a text {i}", "label": i % 2 == 0}) + "\n" for i in range(240)]
    Path("data.jsonl").write_text("".join(rows), encoding="utf-8")
    found = draft("data.jsonl", "data.toml", NONE)
    assert tomllib.loads(found.toml)["task"]["labels"] == {"True": "True", "False": "False"}
    assert not [line for line in found.warnings if "run stops" in line]
