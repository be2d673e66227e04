"""`ficpd predict`: from where it takes texts, and how it writes answers."""

import io
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import small
from ficpd.backbones import loading
from ficpd.library.session import load_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table and a finished run."""
    folder = tmp_path_factory.mktemp("predict")
    small.run(folder, "fedavg")
    return folder


@pytest.fixture
def typed(monkeypatch):
    """Sets the standard input."""

    def type_in(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))

    return type_in


def answers(outcome: tuple[int, str, str]) -> list[dict]:
    status, out, err = outcome
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


TEXTS = ["the film was lovely", "awful and grey ü"]


def test_arguments_standard_input_and_files_have_the_same_answers(ficpd, folder, tmp_path, typed):
    wanted = answers(ficpd("predict", folder / "run", *TEXTS))
    assert [line["text"] for line in wanted] == TEXTS
    assert wanted == answers(ficpd("predict", folder / "run", "--text", TEXTS[0], "--text", TEXTS[1]))
    for words in ((), ("-",), ("--data", "-")):
        typed("\n".join(["", *TEXTS, " "]).encode())
        assert answers(ficpd("predict", folder / "run", *words)) == wanted
    (tmp_path / "new.txt").write_text("\ufeff" + "\n".join(TEXTS), encoding="utf-8")
    frame = pd.DataFrame({"text": TEXTS})
    frame.to_csv(tmp_path / "new.csv", index=False)
    frame.to_parquet(tmp_path / "new.parquet")
    frame.to_json(tmp_path / "new.jsonl", orient="records", lines=True)
    for file in tmp_path.iterdir():
        assert answers(ficpd("predict", folder / "run", "--data", file)) == wanted, file.name


def test_each_label_has_a_score(ficpd, folder):
    frame = load_library(folder / "run").predict(TEXTS, scores=True)
    for line, row in zip(answers(ficpd("predict", folder / "run", *TEXTS)), frame.to_dict("records"), strict=True):
        assert line["prediction"] == row["label"] == max(line["scores"], key=line["scores"].get)
        assert line["scores"] == pytest.approx({label: row[label] for label in small.LABELS}, abs=1e-6)


def test_a_task_of_numbers_has_no_scores(ficpd, tmp_path):
    small.numbered(small.table(tmp_path / "records.csv"))
    (tmp_path / "small.toml").write_text(small.toml(tmp_path / "records.csv", rounds=1))
    assert ficpd("run", tmp_path / "small.toml", "--out", tmp_path / "run", "--set", small.NUMBERS)[0] == 0
    (line,) = answers(ficpd("predict", tmp_path / "run", "a film"))
    assert line.keys() == {"text", "prediction"}
    assert isinstance(line["prediction"], float)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_keep_their_columns_in_every_format(ficpd, folder, tmp_path, ending):
    given = pd.DataFrame({"id": ["007", "8"], "review": TEXTS, "prediction": ["mine", None]})
    given.to_csv(tmp_path / "in.csv", index=False)
    out = tmp_path / f"out.{ending}"
    call = ("predict", folder / "run", "--data", tmp_path / "in.csv", "-c", "text=review", "--out", out)
    assert ficpd(*call)[0] == 0
    read = {
        "csv": lambda: pd.read_csv(out, dtype=str),
        "parquet": lambda: pd.read_parquet(out),
        "jsonl": lambda: pd.DataFrame(map(json.loads, out.read_text(encoding="utf-8").splitlines())),
    }
    found = read[ending]()
    assert list(found["id"]) == ["007", "8"]
    assert list(found["review"]) == TEXTS
    assert found["prediction"][0] == "mine"
    assert set(found["prediction_2"]) <= {*small.LABELS}
    if ending == "jsonl":
        assert found["scores"][0].keys() == small.LABELS.keys()
    else:
        assert {f"score_{label}" for label in small.LABELS} < {*found.columns}
    assert f"{out} exists already" in ficpd(*call).said(1)


@pytest.mark.parametrize(("words", "status", "told"), [
    (("x", "--data", "y.csv"), 2, "texts or --data"),
    (("x", "-"), 2, "- stands alone"),
    ((" ",), 1, "text 1 is empty"),
    (("x", "--format", "parquet"), 1, "--out"),
    (("x", "--format", "csvv"), 1, "did you mean 'csv'"),
    (("x", "--out", "answers.doc"), 1, "expected one of jsonl, csv, parquet"),
])  # fmt: skip
def test_what_it_cannot_take(ficpd, folder, words, status, told):
    found, _, err = ficpd("predict", folder / "run", *words)
    assert found == status
    assert told in err


def test_a_file_among_the_texts_is_told_from_a_text(ficpd, folder):
    assert "is a file: write --data" in ficpd("predict", folder / "run", folder / "records.csv").said(2)
    assert ficpd("predict", folder / "run", "--text", str(folder / "records.csv"))[0] == 0


@pytest.mark.parametrize("name", ["recrods.csv", "new/few.jsonl.gz", "NOTES.TXT"])
def test_a_file_that_is_not_there_is_no_text(ficpd, folder, name):
    assert "there is no file" in ficpd("predict", folder / "run", name).said(2)
    assert ficpd("predict", folder / "run", "--text", name)[0] == 0
    assert ficpd("predict", folder / "run", f"see {name}")[0] == 0


def test_out_of_predict_is_tried_before_weights_load(ficpd, folder, monkeypatch):
    monkeypatch.setattr("ficpd.library.session.load_library", lambda *_, **__: pytest.fail("the work began"))
    err = ficpd("predict", folder / "run", "x", "--out", folder / "records.csv" / "new.csv").said(1)
    assert "a file stands where a folder is expected" in err


def test_an_empty_standard_input_is_an_error_and_a_terminal_is_not_read(ficpd, folder, typed, monkeypatch):
    typed(b"\n \n")
    assert "standard input has no text" in ficpd("predict", folder / "run").said(1)
    typed(b"\xff\n")
    assert "standard input line 1: byte 0 (0xff) is not UTF-8" in ficpd("predict", folder / "run")[2]
    typed(b"never read\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert "no text" in ficpd("predict", folder / "run").said(2)


def test_a_library_of_the_hub_answers_from_its_cache(ficpd, folder, tmp_path, monkeypatch):
    wanted = answers(ficpd("predict", folder / "run", *TEXTS))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kept = tmp_path / "models--clinic--triage"
    shutil.copytree(folder / "run" / "library", kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    assert answers(ficpd("predict", "hf:clinic/triage", *TEXTS)) == wanted
    assert ficpd("info", "hf:clinic/triage", "--json")[0] == 0
    err = ficpd("predict", "hf:clinic/other", *TEXTS).said(1)
    assert "hf:clinic/other: the Hugging Face hub does not give it" in err


@pytest.fixture
def odd(tmp_path) -> Path:
    """The texts with their labels, with a bar between cells, in Windows' encoding."""
    rows = zip(TEXTS, ("good", "bad"), strict=True)
    content = "".join(f"{text}|{label}\n" for text, label in [("text", "target"), *rows])
    (tmp_path / "odd.csv").write_bytes(content.encode("cp1252"))
    return tmp_path / "odd.csv"


AS_WRITTEN = ("--encoding", "cp1252", "--separator", "|")


def test_predict_reads_what_encoding_and_separator_say(ficpd, folder, tmp_path, odd, typed):
    wanted = answers(ficpd("predict", folder / "run", *TEXTS))
    found = answers(ficpd("predict", folder / "run", "--data", odd, *AS_WRITTEN))
    assert [line.pop("target") for line in found] == ["good", "bad"]
    assert found == wanted
    content = "\n".join(TEXTS).encode("utf-16")
    (tmp_path / "odd.txt").write_bytes(content)
    assert answers(ficpd("predict", folder / "run", "--data", tmp_path / "odd.txt", "--encoding", "utf-16")) == wanted
    typed(content)
    assert answers(ficpd("predict", folder / "run", "-", "--encoding", "utf-16")) == wanted


def test_evaluate_and_adapt_read_what_encoding_and_separator_say(ficpd, folder, tmp_path, odd):
    (tmp_path / "plain.csv").write_text(odd.read_bytes().decode("cp1252").replace("|", ","), encoding="utf-8")
    asked = ("evaluate", folder / "run", "--json", "--data")
    found, plain = ficpd(*asked, odd, *AS_WRITTEN), ficpd(*asked, tmp_path / "plain.csv")
    assert (found[0], plain[0]) == (0, 0)
    assert json.loads(found[1])["prompts"] == json.loads(plain[1])["prompts"]
    made = ("adapt", folder / "run", "--how", "demonstrations", "--json", "--data")
    found = ficpd(*made, odd, "--out", tmp_path / "mine", *AS_WRITTEN)
    assert found[0] == 0, found[2]
    plain = ficpd(*made, tmp_path / "plain.csv", "--out", tmp_path / "other")[1]
    assert sorted(json.loads(found[1])["demonstrations"]) == sorted(json.loads(plain)["demonstrations"])


@pytest.mark.parametrize("command", ["predict", "evaluate", "adapt"])
@pytest.mark.parametrize(("words", "told"), [
    ((), "--encoding"),
    (("--encoding", "klingon"), "encoding = 'klingon': unknown encoding"),
    (("--encoding", "cp1252", "--separator", "||"), "separator = '||'"),
    (("--encoding", "cp1252", "--separator", '"'), "separator = '\"'"),
    (("--encoding", "cp1252"), "column"),
])  # fmt: skip
def test_another_encoding_or_separator_is_one_sentence(ficpd, folder, tmp_path, odd, command, words, told):
    out = ("--out", tmp_path / "out") if command == "adapt" else ()
    err = ficpd(command, folder / "run", "--data", odd, *out, *words).said(1)
    assert told in err
    assert err.count("\n") == 1


BAD = "text,target\na,good\nb,poor\nc,great\n"


@pytest.mark.parametrize(("words", "told"), [
    (("predict", "RUN", "x", "--prompt", "globl"), "no prompt 'globl'"),
    (("predict", "RUN", "x", "--task", "mood"), "unknown task 'mood'"),
    (("predict", "RUN", "--data", "BAD", "-c", "text=review"), "unknown column 'review'"),
    (("evaluate", "RUN", "--data", "BAD", "--prompt", "globl", "-c", "target=text"), "3 unknown labels in 3 records"),
    (("evaluate", "RUN", "--data", "BAD"), "2 unknown labels in 2 records: 'poor' (1), 'great' (1)"),
    (("evaluate", "RUN", "--data", "GOOD", "--prompt", "globl"), "no prompt 'globl'"),
    (("adapt", "RUN", "--data", "BAD", "--task", "classification", "--out", "OUT"), "2 unknown labels in 2 records"),
    (("adapt", "RUN", "--data", "BAD", "--how", "tuned", "--out", "OUT"), "did you mean 'tune'"),
    (("export", "RUN", "--prompt", "globl", "--out", "OUT"), "no prompt 'globl'"),
    (("audit", "RUN", "--prompt", "globl"), "no prompt 'globl'"),
    (("audit", "RUN", "--prompt", "globl", "--trained", "GOOD", "--others", "GOOD"), "no prompt 'globl'"),
])  # fmt: skip
def test_names_columns_and_labels_are_checked_before_weights_load(ficpd, folder, tmp_path, monkeypatch, words, told):
    (tmp_path / "bad.csv").write_text(BAD)
    places = {
        "RUN": folder / "run", "BAD": tmp_path / "bad.csv", "GOOD": folder / "records.csv", "OUT": tmp_path / "out",
    }  # fmt: skip

    def loaded(*given: object, **options: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("ficpd.library.session.load_backbone", loaded)
    monkeypatch.setattr("ficpd.experiments.build.load_backbone", loaded)
    assert loading.load_backbone is not loaded
    assert told in ficpd(*(places.get(word, word) for word in words)).said(1)


def test_adapt_says_what_it_chose_and_how_to_have_another(ficpd, folder, tmp_path):
    call = ("adapt", folder / "run", "--data", folder / "records.csv", "--out")
    out = ficpd(*call, tmp_path / "auto").said()
    assert "Chosen: " in out
    assert "add --how and one of: " in out
    said = json.loads(ficpd(*call, tmp_path / "tuned", "--how", "tune", "--json")[1])
    assert said["way"].startswith("tune ")
    assert said["library"] == str(tmp_path / "tuned")
    assert {"loss", "error"} < said["table"][said["way"]].keys()
    chosen = ficpd(*call, tmp_path / "headed", "--how", "head")[1]
    assert "Chosen: head, the library's prompt, with a readout fitted to your records" in chosen
    assert "add --how" not in chosen


@pytest.mark.parametrize(("how", "holds"), [("leave", False), ("tune", False), ("head", True), ("mixture", True)])
def test_adapt_says_whether_the_library_holds_values_computed_from_records(ficpd, folder, tmp_path, how, holds):
    call = ("adapt", folder / "run", "--data", folder / "records.csv", "--how", how, "--out")
    assert ("it holds your records, or values computed from them" in ficpd(*call, tmp_path / "mine").said()) == holds
    assert json.loads(ficpd(*call, tmp_path / "again", "--json")[1])["holds_records"] == holds
