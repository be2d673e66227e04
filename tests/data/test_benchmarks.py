"""Public data sets in their official form, two or three lines each, and what is refused of them."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from pydantic import ValidationError

from ficpd.data.benchmarks import LAYOUTS, XGLUE
from ficpd.data.loading import Config, load, load_all
from ficpd.data.partition import Config as Partition
from ficpd.data.partition import partition
from ficpd.errors import DataError
from ficpd.experiments.config import parse, to_toml
from ficpd.tasks.multiple_choice import Config as Choice
from ficpd.tasks.multiple_choice import build

MEDQA = {
    "question": "Which drug?",
    "answer": "Heparin",
    "options": {"A": "Aspirin", "B": "Heparin", "C": "Zinc", "D": "Iron"},
    "meta_info": "step1",
    "answer_idx": "B",
}
MEDMCQA = {
    "question": "Which nerve?", "exp": "", "cop": 1, "opa": "Ulnar", "opb": "Vagus", "opc": "Facial", "opd": "Optic",
    "subject_name": "Anatomy", "topic_name": "Nerves", "id": "a1", "choice_type": "single",
}  # fmt: skip
PUBMEDQA = {
    "QUESTION": "Does it help?", "CONTEXTS": ["First part.", "Second part."], "LABELS": ["AIM", "RESULTS"],
    "MESHES": [], "YEAR": "2011", "final_decision": "maybe",
}  # fmt: skip
PAIRS = {  # task: one line of its file, and what it is
    "nc": ("A title\tA body\tsports", ("A title", "A body", "sports")),
    "qam": ("who?\tshe\t1", ("who?", "she", "True")),
    "qadsm": ("boots\tBoots\tBuy them\tGood", ("boots", "Boots\nBuy them", "Good")),
    "wpr": ("boots\tShop\tAll boots\t4", ("boots", "Shop\nAll boots", "Perfect")),
}


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fields(source: Path | str, layout: str, **more) -> list[dict]:
    return [dict(record.fields) for record in load_all(Config(source=str(source), layout=layout, **more))]


def refused(source: object, layout: str, **more) -> str:
    with pytest.raises(DataError) as caught:
        fields(str(source), layout, **more)
    return str(caught.value)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_medqa_has_four_or_five_options(tmp_path):
    five = MEDQA | {"options": MEDQA["options"] | {"E": "Gold"}, "answer_idx": "E", "answer": "Gold"}
    listed = MEDQA | {"options": [{"key": key, "value": value} for key, value in MEDQA["options"].items()]}
    old = {key: value for key, value in MEDQA.items() if key != "answer_idx"}
    hub = MEDQA | {"options": MEDQA["options"] | {"E": None}}
    path = jsonl(tmp_path / "train.jsonl", MEDQA, five, listed, old, hub)
    found = fields(path, "medqa")
    four = {"text": "Which drug?", "options": ["Aspirin", "Heparin", "Zinc", "Iron"], "target": 1, "step": "step1"}
    assert found[:1] + found[2:] == [four] * 4
    assert (found[1]["options"][4], found[1]["target"]) == ("Gold", 4)
    task = build(Choice())
    assert task.targets(load_all(Config(source=str(path), layout="medqa"))) == [1, 4, 1, 1, 1]


@pytest.mark.parametrize(("wrong", "says"), [
    ({"answer_idx": "F"}, "the answer 'F' is none of the options A, B, C, D"),
    ({"answer_idx": None, "answer": None}, r"the answer None .*official test files have no answers"),
    ({"options": "A or B"}, "options 'A or B' are no mapping of letters to texts"),
])  # fmt: skip
def test_what_is_no_medqa(tmp_path, wrong, says):
    with pytest.raises(DataError, match=r"a\.jsonl row 2: " + says):
        fields(jsonl(tmp_path / "a.jsonl", MEDQA, MEDQA | wrong), "medqa")


def test_a_file_of_another_layout_says_which_column_is_missing(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", MEDMCQA), "medqa")
    assert "a.jsonl row 1: unknown column 'options'" in message
    assert "the right layout" in message


@pytest.mark.parametrize(
    ("given", "places"),
    [([1, 4, 2], [0, 3, 1]), ([0, 3, 2], [0, 3, 2]), (["a", "D", "c"], [0, 3, 2]), (["1", "4", "4"], [0, 3, 3])],
)
def test_medmcqa_counts_options_as_the_whole_file_does(tmp_path, given, places):
    found = fields(jsonl(tmp_path / "dev.json", *(MEDMCQA | {"cop": cop} for cop in given)), "medmcqa")
    assert [row["target"] for row in found] == places
    assert found[0]["options"] == ["Ulnar", "Vagus", "Facial", "Optic"]
    assert {key: found[0][key] for key in ("subject", "topic", "choice_type", "id")} == {
        "subject": "Anatomy", "topic": "Nerves", "choice_type": "single", "id": "a1",
    }  # fmt: skip


def test_medmcqa_that_counts_from_nowhere_is_refused(tmp_path):
    for given in ([1, 2, 3], [0, 4, 1]):
        rows = [MEDMCQA | {"cop": cop} for cop in given]
        said = refused(jsonl(tmp_path / "a.json", *rows), "medmcqa")
        assert "does not tell whether the first option is 0 or 1" in said
    rows = [MEDMCQA | {"cop": cop} for cop in (1, 4, 7)]
    assert "a.json row 3: cop 7 names no option" in refused(jsonl(tmp_path / "a.json", *rows), "medmcqa")


def test_a_medmcqa_test_file_has_no_answers(tmp_path):
    bare = {key: value for key, value in MEDMCQA.items() if key not in ("cop", "exp")}
    jsonl(tmp_path / "train.json", MEDMCQA, MEDMCQA | {"cop": 4})
    jsonl(tmp_path / "test.json", bare)
    message = refused(tmp_path, "medmcqa")
    assert "test.json row 1: cop None names no option; official test files have no answers: leave them out" in message
    jsonl(tmp_path / "test.json", MEDMCQA)
    data = load(Config(source=str(tmp_path), layout="medmcqa"), 0)
    assert (len(data.train), len(data.test)) == (2, 1)


def test_medmcqa_by_subject_becomes_clients(tmp_path):
    rows = [MEDMCQA | {"subject_name": ["Skin", "ENT"][i % 2], "cop": 1 + i % 4} for i in range(20)]
    config = Config(source=str(jsonl(tmp_path / "dev.json", *rows)), layout="medmcqa")
    shards = partition(Partition(kind="column", column="subject"), load(config, 0), "target", 0)
    cards = {name: shard.metadata for name, shard in shards.items()}
    assert cards == {"ENT": {"subject": "ENT"}, "Skin": {"subject": "Skin"}}


def test_pubmedqa_is_one_object(tmp_path):
    path = tmp_path / "ori_pqal.json"
    path.write_text(json.dumps({"2101": PUBMEDQA, "2102": PUBMEDQA | {"final_decision": "no"}}, indent=4))
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"2101": "maybe", "2102": "no"}, indent=4))
    first, second = fields(path, "pubmedqa")
    expected = {"text": "First part. Second part.", "text_pair": "Does it help?", "target": "maybe"}
    assert first == expected | {"year": "2011", "id": "2101"}
    assert (second["target"], second["id"]) == ("no", "2102")
    assert "test_ground_truth.json line 1: not JSON" in refused(tmp_path / "test_ground_truth.json", "pubmedqa")
    path.write_text(json.dumps({"2101": PUBMEDQA | {"final_decision": "perhaps"}}))
    assert "ori_pqal.json row 1: final_decision is 'perhaps'; expected yes, no or maybe" in refused(path, "pubmedqa")


@pytest.mark.parametrize("form", ["[{}, {}]", "{}\n{}\n"])
def test_json_is_a_list_or_lines(tmp_path, form):
    (tmp_path / "a.json").write_text(form.format('{"text": "a", "target": 1}', '{"text": "b", "target": 2}'))
    found = load_all(Config(source=str(tmp_path / "a.json")))
    assert [(r.key, r.fields["target"]) for r in found] == [("a.json row 1", 1), ("a.json row 2", 2)]


@pytest.mark.parametrize(("text", "says"), [
    ("", "no rows"),
    ("[]", "no rows"),
    ("[1]", "no table; expected a list of objects"),
    ('[{"a":', "line 1: not JSON"),
])  # fmt: skip
def test_json_that_is_no_table(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json:? " + says):
        load_all(Config(source=str(tmp_path / "a.json")))


def test_json_beside_tables_is_passed_over(tmp_path):
    (tmp_path / "a.csv").write_text("text,target\nx,1\n")
    (tmp_path / "dataset_info.json").write_text('{"a": {"b": 1}}')
    assert [record.key for record in load_all(Config(source=str(tmp_path)))] == ["a.csv row 1"]


def xglue(folder: Path, task: str, line: str, languages=("en", "de")) -> Path:
    files = {f"xglue.{task}.en.train": f"{line}\n{line}\n"}
    files |= {f"xglue.{task}.{lang}.{split}": f"{line}\n" for lang in languages for split in ("dev", "test")}
    return write(folder / XGLUE[task].folder, **files)


@pytest.mark.parametrize("task", PAIRS)
def test_tab_separated_tasks(tmp_path, task):
    line, (text, pair, target) = PAIRS[task]
    folder = xglue(tmp_path / "xglue_full_dataset", task, line)
    for source in (folder, folder.parent):
        data = load(Config(source=str(source), layout=f"xglue-{task}"), 0)
        record = {"text": text, "text_pair": pair, "target": target}
        assert [dict(r.fields) for r in data.train] == [record | {"lang": "en"}] * 2
        assert [dict(r.fields) for r in data.test] == [record | {"lang": "de"}, record | {"lang": "en"}]
    assert data.train[1].key == f"xglue.{task}.en.train row 2"


def test_dev_files_make_every_language_a_client(tmp_path):
    folder = xglue(tmp_path, "nc", PAIRS["nc"][0])
    config = {"source": str(folder), "layout": "xglue-nc", "dev_as_train": True}
    with_train = load(Config(**config), 0)
    assert Counter(r.fields["lang"] for r in with_train.train) == {"en": 3, "de": 1}
    data = load(Config(**config, where={"split": ("dev", "test")}), 0)
    assert Counter(r.fields["lang"] for r in data.train) == {"en": 1, "de": 1}
    shards = partition(Partition(kind="column", column="lang"), data, "target", 0)
    assert {name: (len(s.train), len(s.test)) for name, s in shards.items()} == {"de": (1, 1), "en": (1, 1)}


def test_dev_as_train_is_not_only_for_layouts(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.csv").write_text(f"text,target\n{name},1\n")
    data = load(Config(source=str(tmp_path), dev_as_train=True), 0)
    assert [r.fields["text"] for r in data.train] == ["dev", "train"]
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(DataError, match="no row is of a dev split"):
        load(Config(source=str(tmp_path), dev_as_train=True), 0)


def test_xnli_has_a_header_in_one_file_and_literal_quotes(tmp_path):
    line = 'He said "no\tHe spoke"\tcontradictory'
    files = {
        "multinli.train.en.tsv": f"premise\thypo\tlabel\n{line}\n",
        "sw.dev": f"{line}\n",
        "sw.test": f"{line}\r\n",
    }
    write(tmp_path, **files)
    data = load(Config(source=str(tmp_path), layout="xglue-xnli", dev_as_train=True), 0)
    expected = {"text": 'He said "no', "text_pair": 'He spoke"', "target": "contradiction"}
    assert [dict(r.fields) for r in data.train] == [expected | {"lang": "en"}, expected | {"lang": "sw"}]
    assert [dict(r.fields) for r in data.test] == [expected | {"lang": "sw"}]
    assert data.train[0].key == "multinli.train.en.tsv row 1"


def test_pawsx_lies_in_a_folder_for_each_language(tmp_path):
    head = "id\tsentence1\tsentence2\tlabel\n"
    write(
        tmp_path,
        **{
            "PAWSX/en/train.tsv": f"{head}7\tone\ttwo\t0\n",
            "PAWSX/de/dev_2k.tsv": f"{head}1\teins\tzwei\t0\n",
            "PAWSX/de/test_2k.tsv": f"{head}1\teins\tein\t1\n",
        },
    )
    data = load(Config(source=str(tmp_path), layout="xglue-pawsx"), 0)
    (record,) = data.train
    assert dict(record.fields) == {"text": "one", "text_pair": "two", "target": "different", "lang": "en"}
    assert [dict(r.fields) for r in data.test] == [{"text": "eins", "text_pair": "ein", "target": "same", "lang": "de"}]
    assert data.test[0].key == "de/test_2k.tsv row 1"


@pytest.mark.parametrize("task", ["qg", "ntg"])
def test_texts_and_their_targets_lie_side_by_side(tmp_path, task):
    write(
        tmp_path,
        **{
            f"xglue.{task}.en.src.train": "a long text\nanother\n",
            f"xglue.{task}.en.tgt.train": "short\nother\n",
            f"xglue.{task}.fr.src.test": "un texte\n",
            f"xglue.{task}.fr.tgt.test": "texte",
        },
    )
    data = load(Config(source=str(tmp_path), layout=f"xglue-{task}"), 0)
    assert [dict(r.fields) for r in data.train] == [
        {"text": "a long text", "target": "short", "lang": "en"},
        {"text": "another", "target": "other", "lang": "en"},
    ]
    assert dict(data.test[0].fields) == {"text": "un texte", "target": "texte", "lang": "fr"}
    write(tmp_path, **{f"xglue.{task}.fr.tgt.test": "texte\nplus\n"})
    message = refused(tmp_path, f"xglue-{task}")
    assert f"xglue.{task}.fr.src.test has 1 lines, xglue.{task}.fr.tgt.test 2" in message
    (tmp_path / f"xglue.{task}.fr.tgt.test").unlink()
    assert f"there is no xglue.{task}.fr.tgt.test in its folder" in refused(tmp_path, f"xglue-{task}")


@pytest.mark.parametrize(("name", "text", "says"), [
    ("xglue.nc.en.dev", "title\tbody\tsports\ntitle\tsports\n",
     "line 2: 2 columns, not 3 .* a pair column or the label"),
    ("xglue.nc.en.dev", "title\tbody\tsports\tmore\n", "line 1: 4 columns, not 3"),
    ("xglue.nc.en.dev", "title\tbody\tsport\n", "row 1: unknown label 'sport'; did you mean 'sports'"),
    ("xglue.nc.en.dev", "", "no rows"),
    ("xglue.nc.it.dev", "title\tbody\tsports\n", "unknown language 'it'"),
    ("xglue.nc.en.test", "title\t \tsports\n", "row 1, column 'text_pair': is empty"),
    ("xglue.qam.en.dev", "x", "holds no file of XGLUE's NC"),
])  # fmt: skip
def test_what_is_no_file_of_xglue(tmp_path, name, text, says):
    write(tmp_path, **{name: text})
    with pytest.raises(DataError, match=says):
        fields(tmp_path, "xglue-nc")


def hub(monkeypatch, **splits: list[dict]) -> None:
    """What the hub's client would hand over: `__` stands for the dot in a split's name."""
    loaded = {name.replace("__", "."): datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, subset, split: loaded[split] if split else datasets.DatasetDict(loaded)
    )


def test_the_hubs_splits_by_language(monkeypatch):
    row = {"query": "q", "wed_page_title": "t", "web_page_snippet": "s", "relavance_label": "Fair"}
    hub(monkeypatch, train=[row], validation__de=[row], test__en=[row], test__de=[row])
    config = {"source": "hf:microsoft/xglue", "subset": "wpr", "layout": "xglue-wpr"}
    data = load(Config(**config), 0)
    expected = {"text": "q", "text_pair": "t\ns", "target": "Fair"}
    assert [dict(r.fields) for r in data.train] == [expected | {"lang": "en"}]
    assert [dict(r.fields) for r in data.test] == [expected | {"lang": "en"}, expected | {"lang": "de"}]
    data = load(Config(**config, dev_as_train=True, where={"split": ("dev", "test")}), 0)
    assert [(r.key, r.fields["lang"]) for r in data.train] == [("microsoft/xglue validation.de row 1", "de")]


def test_the_hubs_medicine(monkeypatch):
    numbers = [MEDMCQA | {"cop": cop} for cop in (0, 3, 1)]
    hub(monkeypatch, train=numbers, test=[MEDMCQA | {"cop": -1}])
    assert "test row 1: cop -1 names no option" in refused("hf:openlifescienceai/medmcqa", "medmcqa")
    found = fields("hf:openlifescienceai/medmcqa", "medmcqa", hf_split="train")
    assert [row["target"] for row in found] == [0, 3, 1]
    row = {"pubid": 21, "question": "Does it?", "context": {"contexts": ["a.", "b."]}, "final_decision": "yes"}
    hub(monkeypatch, train=[row] * 5)
    assert fields("hf:qiaojin/PubMedQA", "pubmedqa", subset="pqa_labeled")[0] == {
        "text": "a. b.", "text_pair": "Does it?", "target": "yes", "year": None, "id": 21,
    }  # fmt: skip


def test_a_layouts_columns_need_not_be_stated_and_may_be():
    for layout in LAYOUTS:
        config = Config(source="x", layout=layout)
        assert {"text", "target"} <= config.columns.keys()
        assert Config.model_validate(config.model_dump()) == config
    other = Config(source="x", layout="medmcqa", columns={"text": "text", "target": "subject"})
    assert other.columns == {"text": "text", "target": "subject"}
    with pytest.raises(ValidationError, match="unknown layout 'medqaa'; did you mean 'medqa'"):
        Config(source="x", layout="medqaa")


def test_an_experiments_file_keeps_what_a_layout_says():
    text = """
[task]
name = "multiple_choice"
instruction = "Answer:"
[data]
source = "medmcqa"
layout = "medmcqa"
[partition]
kind = "column"
column = "subject"
"""
    experiment = parse(text, "a.toml")
    assert parse(to_toml(experiment), "b.toml").data == experiment.data
    assert experiment.data.columns["options"] == "options"


def test_options_may_be_in_a_column_each(tmp_path):
    (tmp_path / "a.csv").write_text("text,target,a,b,c\nwho?,B,she,he,\nwhat?,C,x,y,2\n")
    records = load_all(Config(source=str(tmp_path / "a.csv"), options=("a", "b", "c")))
    assert [r.fields["options"] for r in records] == [["she", "he", None], ["x", "y", "2"]]
    with pytest.raises(DataError, match="unknown column 'd'"):
        load_all(Config(source=str(tmp_path / "a.csv"), options=("a", "d")))
    with pytest.raises(ValidationError, match="options"):
        Config(source="x", options=("a", "b"), columns={"text": "text", "target": "target", "options": "o"})
