"""The sets of the benches come out of each source's own format, and a file that changed is refused."""

import gzip
import hashlib
import importlib
import io
import json
import re
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

BENCH = Path(__file__).parent.parent / "bench"
PREPARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def data():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        for name in ("data", "data_formats"):  # `data` is also a folder of the tests
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("data")
        for name in ("data", "data_formats"):
            sys.modules.pop(name, None)


def lines(*values: dict) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def zipped(files: dict[str, str]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as whole:
        for name, text in files.items():
            whole.writestr(name, text)
    return body.getvalue()


def tarred(files: dict[str, str]) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as whole:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            whole.addfile(entry, io.BytesIO(text.encode()))
    return body.getvalue()


def idx(magic: int, array: np.ndarray) -> bytes:
    header = b"".join(n.to_bytes(4, "big") for n in (magic, *array.shape))
    return gzip.compress(header + array.astype(np.uint8).tobytes())


OPTIONS = {"A": "one", "B": "two", "C": "three", "D": "four"}
MCQA = {
    "question": "Which?", "exp": None, "cop": 2, "opa": "one", "opb": "two", "opc": "three", "opd": "four",
    "subject_name": "Dental", "topic_name": None, "id": "45258d3d", "choice_type": "single",
}  # fmt: skip
XML = """<?xml version="1.0" encoding="UTF-8"?>
<Document id="0000001_1" source="CancerGov" url="https://www.cancer.gov">
<Focus>Leukemia</Focus><FocusAnnotations><UMLS><SemanticGroup>Disorders</SemanticGroup></UMLS></FocusAnnotations>
<QAPairs>
<QAPair pid="1"><Question qid="1-1" qtype="information">What is (are) Leukemia ?</Question><Answer>Key Points
       - Too many    cells.</Answer></QAPair>
<QAPair pid="2"><Question qid="1-2" qtype="symptoms">What are the symptoms ?</Question><Answer></Answer></QAPair>
</QAPairs></Document>"""
XNLI = "language\tgold_label\t\t\t\t\tsentence1\tsentence2\tpromptID\n" + "".join(
    f"{lang}\t{label}\t\t\t\t\tpremise {n}\thypothesis {label}\t{n}\n"
    for lang in ("de", "ar")
    for n in range(5)
    for label in ("neutral", "contradiction", "entailment")
)
PAWS = "id\tsentence1\tsentence2\tlabel\n" + "".join(f'{n + 1}\tA "word" {n}.\tSaid {n}.\t{n % 2}\n' for n in range(8))
RAW: dict[str, list[tuple[str, bytes]]] = {
    "banking77": [
        ("train.csv", b'text,category\n"A card, please",card_arrival\nNA,Refund_not_showing_up\n'),
        ("test.csv", b"text,category\nWhere is it?,card_arrival\n"),
    ],
    "clinc150": [
        ("data_full.json", lines({"train": [["say hi", "translate"]], "val": [["pay it", "pay_bill"]],
                                  "test": [["in french", "translate"]], "oos_test": [["what", "oos"]]})),
        ("domains.json", lines({"banking": ["pay_bill"], "travel": ["translate"]})),
    ],
    "medical_abstracts": [("medical_tc_test.csv", b'condition_label,medical_abstract\n5,"Sleep, apnea. "\n1,Tumor.\n')],
    "medmcqa": [("dev.json", lines(MCQA, MCQA | {"exp": "x" * 700, "cop": 4}))],
    "medqa_usmle4": [
        ("dev.jsonl", lines({"id": 0, "question": "Which drug?", "context": ["A man coughs.", "He is 21."],
                             "options": OPTIONS, "answer_idx": "C"})),
        ("test.jsonl", lines({"question": "A man.\nWhich?", "options": OPTIONS, "meta_info": "step1", "answer_idx": "B"})),
    ],
    "medquad": [("zip", zipped({"MedQuAD-7e/readme.txt": "", "MedQuAD-7e/1_CancerGov_QA/0000001_1.xml": XML}))],
    "mnist_t10k": [
        ("images.gz", idx(2051, np.arange(10 * 4).reshape(10, 2, 2))), ("labels.gz", idx(2049, np.arange(10))),
    ],
    "pawsx": [("x-final.tar.gz", tarred({"x-final/fr/dev_2k.tsv": PAWS, "x-final/de/dev_2k.tsv": PAWS}))],
    "pubmedqa": [
        ("ori_pqal.json", lines({
            "21645374": {"QUESTION": "Do they?", "CONTEXTS": ["Cells die.", "We saw."], "YEAR": "2011",
                         "final_decision": "yes"},
            "16418930": {"QUESTION": "Is it?", "CONTEXTS": ["Letters."], "final_decision": "maybe"},
        })),
        ("test_ground_truth.json", lines({"21645374": "yes"})),
    ],
    "sib200": [
        ("eng_Latn/train.tsv", b'index_id\tcategory\ttext\n61\ttravel\t"He ""flew"" there."\n'),
        ("eng_Latn/test.tsv", "index_id\tcategory\ttext\n62\thealth\tΥγεία.\n".encode()),
    ],
    "xnli": [("XNLI-1.0.zip", zipped({"XNLI-1.0/xnli.dev.tsv": XNLI}))],
}  # fmt: skip
"""A small file in the format of each source."""
ROW = {
    "banking77": {"text": "NA", "label_name": "Refund_not_showing_up", "label": 0, "split": "train"},
    "clinc150": {"text": "pay it", "label_name": "pay_bill", "label": 0, "split": "dev", "domain": "banking"},
    "medical_abstracts": {"text": "Sleep, apnea. ", "label": 4, "label_name": "general pathological conditions"},
    "medmcqa": {"question": "Which?", "opt_b": "two", "label": 1, "subject": "Dental", "topic": None, "exp": ""},
    "medqa_usmle4": {"question": "A man coughs. He is 21. Which drug?", "opt_c": "three", "label": 2, "step": None},
    "medquad": {"question": "What is (are) Leukemia ?", "answer": "Key Points - Too many cells.", "client": "CancerGov_QA",
                "label_name": "information", "focus": "Leukemia", "semantic_group": "Disorders", "url_doc": "0000001_1"},
    "mnist_t10k": {"label": 7, "writer_group": "SD-1 (hard)", "split": "train"},
    "pawsx": {"lang": "de", "uid": 3, "text": '"A ""word"" 3."', "text_pair": "Said 3.", "label_name": "paraphrase"},
    "pubmedqa": {"pmid": "21645374", "context": "Cells die. We saw.", "label_name": "yes", "split": "test", "year": "2011"},
    "sib200": {"uid": 61, "text": '"He ""flew"" there."', "label_name": "travel", "label": 1, "lang": "eng_Latn"},
    "xnli": {"lang": "ar", "uid": 0, "text": "premise 0", "text_pair": "hypothesis neutral", "label": 1},
}  # fmt: skip
"""A row that comes out of it."""


@pytest.fixture
def sources(data, tmp_path, monkeypatch) -> Path:
    """Puts the small files in the place of the sources, by `file://`."""
    monkeypatch.setattr(data.formats, "MEDQUAD_LEAST", 1)
    for name, files in RAW.items():
        raw = []
        for path, body in files:
            file = tmp_path / "sources" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(body)
            raw.append(data.Raw(file.as_uri()))
        monkeypatch.setitem(data.SETS, name, replace(data.SETS[name], raw=raw))
    return tmp_path / "sources"


def prepare(data, folder: Path, *names: str) -> list[str]:
    return data.prepare(names, "web", folder / "data", folder / "lock.json")


def test_every_set_of_the_benches_is_in_the_table(data):
    read = set()
    for file in BENCH.glob("*.py"):
        read |= set(re.findall(r"(\w+)\.parquet", file.read_text(encoding="utf-8")))
    assert read - {"set", "public", "digits", "name"} <= data.SETS.keys() == RAW.keys() == ROW.keys()
    assert not any(raw.url.startswith("http:") for one in data.SETS.values() for raw in one.raw)


@pytest.mark.parametrize("name", sorted(RAW))
def test_a_source_is_converted(data, sources, tmp_path, name):
    assert prepare(data, tmp_path, name) == []
    table = pd.read_parquet(tmp_path / "data" / f"{name}.parquet")
    assert set(table["split"]) <= {"train", "dev", "test"}
    table = table.astype(object).where(table.notna(), None)
    assert any(ROW[name].items() <= row.items() for row in table.to_dict("records"))


def test_both_parts_have_the_same_pairs_in_each_language(data, sources, tmp_path):
    prepare(data, tmp_path, "pawsx", "xnli")
    for name in ("pawsx", "xnli"):
        table = pd.read_parquet(tmp_path / "data" / f"{name}.parquet")
        held = table[table["split"] == "test"].groupby("lang")["uid"].agg(tuple)
        assert len(set(held)) == 1
        assert len(held) == 2
        assert not set(held.iloc[0]) & set(table.loc[table["split"] == "train", "uid"])


def test_images_are_as_in_the_source(data, sources, tmp_path):
    pil = pytest.importorskip("PIL.Image")
    prepare(data, tmp_path, "mnist_t10k")
    table = pd.read_parquet(tmp_path / "data" / "mnist_t10k.parquet")
    assert np.asarray(pil.open(io.BytesIO(table["image"][1]))).tolist() == [[4, 5], [6, 7]]
    assert table["split"].tolist() == ["test", "train", "train", "train", "train"] * 2


def test_a_file_that_changed_since_the_first_fetch_is_refused(data, sources, tmp_path, capsys):
    source = sources / "banking77" / "train.csv"
    assert prepare(data, tmp_path, "banking77") == []
    locked = json.loads((tmp_path / "lock.json").read_text())
    assert locked[source.as_uri()] == hashlib.sha256(source.read_bytes()).hexdigest()
    source.write_bytes(source.read_bytes() + b"One more,card_arrival\n")
    assert prepare(data, tmp_path, "banking77") == []  # from the file fetched before
    (tmp_path / "data" / "raw" / "banking77" / "banking77" / "train.csv").unlink()
    capsys.readouterr()
    assert prepare(data, tmp_path, "banking77") == ["banking77"]
    assert "SHA-256" in capsys.readouterr().out


def test_a_file_with_another_than_the_known_hash_is_refused(data, sources, tmp_path, monkeypatch, capsys):
    one = data.SETS["xnli"]
    monkeypatch.setitem(data.SETS, "xnli", replace(one, raw=[data.Raw(one.raw[0].url, "0" * 64)]))
    assert prepare(data, tmp_path, "xnli", "pawsx") == ["xnli"]
    assert "expected " + "0" * 64 in capsys.readouterr().out
    assert not (tmp_path / "data" / "xnli.parquet").exists()
    assert (tmp_path / "data" / "pawsx.parquet").exists()


def test_a_source_that_is_not_there_is_a_sentence(data, sources, tmp_path, capsys):
    (sources / "pawsx" / "x-final.tar.gz").unlink()
    assert prepare(data, tmp_path, "pawsx") == ["pawsx"]
    assert "failed: " in capsys.readouterr().out


def test_the_output_says_whether_the_rows_are_those_of_the_tables(data, sources, tmp_path, monkeypatch, capsys):
    prepare(data, tmp_path, "sib200", "medquad")
    out = capsys.readouterr().out
    assert out.count("NOT those of the published tables") == 2
    assert "seed 7" in out
    rows = data.rows_sha256(pd.read_parquet(tmp_path / "data" / "sib200.parquet"))
    monkeypatch.setitem(data.SETS, "sib200", replace(data.SETS["sib200"], rows_sha256=rows))
    prepare(data, tmp_path, "sib200")
    assert "those of the published tables" in (out := capsys.readouterr().out)
    assert "NOT" not in out


def test_a_prepared_file_is_copied_only_if_it_is_the_published_one(data, tmp_path, capsys, monkeypatch):
    file = tmp_path / "from" / "sib200.parquet"
    file.parent.mkdir()
    file.write_bytes(b"another")
    assert data.prepare(["sib200"], str(file.parent), tmp_path / "data", tmp_path / "lock") == ["sib200"]
    assert "use --from web" in capsys.readouterr().out
    known = replace(data.SETS["sib200"], file_sha256=hashlib.sha256(b"another").hexdigest())
    monkeypatch.setitem(data.SETS, "sib200", known)
    assert data.prepare(["sib200"], str(file.parent), tmp_path / "data", tmp_path / "lock") == []
    assert (tmp_path / "data" / "sib200.parquet").read_bytes() == b"another"


def test_the_prepared_files_beside_the_repository_are_those_of_the_tables(data, tmp_path):
    if not PREPARED.is_dir():
        pytest.skip("there is no ../shared/data")
    assert data.prepare(sorted(data.SETS), str(PREPARED), tmp_path, tmp_path / "lock") == []
    table = pd.read_parquet(tmp_path / "medical_abstracts.parquet")
    assert data.rows_sha256(table) == data.SETS["medical_abstracts"].rows_sha256


def commands_of_tables(page: str) -> list[tuple[str, str]]:
    """Lists the tables of a page: the first line, and the text since the table or heading before it."""
    found = []
    for part in re.split(r"^#+ .*$", page, flags=re.MULTILINE):
        before = ""
        for block in re.split(r"(?m)^((?:\|.*\n)+)", part):
            if block.startswith("|"):
                found.append((block.split("\n")[0], before))
            before = block
    return found


def test_every_table_of_results_names_its_command():
    tables = commands_of_tables((BENCH.parent / "docs" / "results.md").read_text(encoding="utf-8"))
    verdict, *measured = tables
    assert "verdict" in verdict[0]
    assert len(measured) > 20
    assert [head for head, text in measured if not re.search(r"`(python\s+bench/\w+\.py|make demo)", text)] == []


@pytest.mark.parametrize("page", ["docs/results.md", "bench/README.md", "README.md"])
def test_every_command_of_a_page_is_there(page):
    """The bench's file exists, and its source has the part that a page names."""
    text = (BENCH.parent / page).read_text(encoding="utf-8")
    for name, part in re.findall(r"`python\s+bench/(\w+)\.py(?: (\w+))?", text):
        source = (BENCH / f"{name}.py").read_text(encoding="utf-8")
        assert part in source, (name, part)
