"""The converters of `data.py`: from each source's own files to the columns that the benches read.

Splits are the sources' own where they have one. Where the benches have one test file only, fixed seeds divide it.
"""

import gzip
import io
import json
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

DISEASES = ("neoplasms", "digestive system diseases", "nervous system diseases", "cardiovascular diseases",
            "general pathological conditions")  # fmt: skip
NLI = ("entailment", "neutral", "contradiction")
OPTIONS = "ABCD"
MEDMCQA = [
    "id", "question", "opt_a", "opt_b", "opt_c", "opt_d", "label", "subject", "topic", "exp", "choice_type", "split",
]  # fmt: skip
MEDQUAD_LEAST = 100
"""Least number of pairs of a question type of MedQuAD."""


def coded(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the column `label`: each label's place in alphabetical order."""
    code = {name: n for n, name in enumerate(sorted(set(table["label_name"])))}
    return table.assign(label=table["label_name"].map(code))  # pyright: ignore[reportArgumentType]


def shuffled(table: pd.DataFrame, train: int) -> pd.DataFrame:
    """Draws the rows' order with seed 0. The first `train` rows are training records."""
    table = table.iloc[np.random.RandomState(0).permutation(len(table))].reset_index(drop=True)
    return table.assign(split=["train" if place < train else "test" for place in range(len(table))])


def banking77(files: Sequence[Path]) -> pd.DataFrame:
    """Reads train.csv and test.csv (text,category)."""
    both = [pd.read_csv(file, keep_default_na=False).assign(split=file.stem) for file in files]
    return coded(pd.concat(both, ignore_index=True).rename(columns={"category": "label_name"}))


def clinc150(files: Sequence[Path]) -> pd.DataFrame:
    """Reads data_full.json (part -> [text, intent] pairs) and domains.json (domain -> intents), without `oos`."""
    full, domains = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    domain = {intent: name for name, intents in domains.items() for intent in intents}
    parts = {"train": "train", "val": "dev", "test": "test"}
    rows = [(text, intent, split, domain[intent]) for part, split in parts.items() for text, intent in full[part]]
    return coded(pd.DataFrame(rows, columns=["text", "label_name", "split", "domain"]))


def medical_abstracts(files: Sequence[Path]) -> pd.DataFrame:
    """Reads medical_tc_test.csv (condition_label from 1, medical_abstract)."""
    table = pd.read_csv(files[0], keep_default_na=False)
    label = table["condition_label"] - 1
    names = [DISEASES[code] for code in label]
    return shuffled(pd.DataFrame({"text": table["medical_abstract"], "label": label, "label_name": names}), 2000)


def sib200(files: Sequence[Path]) -> pd.DataFrame:
    """Reads LANGUAGE/{train,dev,test}.tsv (index_id, category, text; a quotation mark is a character)."""
    parts = []
    for file in files:
        lines = [line.split("\t") for line in file.read_text(encoding="utf-8").split("\n")[1:] if line]
        part = pd.DataFrame(lines, columns=["uid", "label_name", "text"]).astype({"uid": "int64"})
        parts.append(part.assign(lang=file.parent.name, split=file.stem))
    return coded(pd.concat(parts, ignore_index=True))[["uid", "text", "label", "label_name", "lang", "split"]]  # pyright: ignore[reportReturnType]


def medmcqa(files: Sequence[Path]) -> pd.DataFrame:
    """Reads dev.json (one object a line, `cop` from 1); explanations have 600 characters at most."""
    lines = [json.loads(line) for line in files[0].read_text(encoding="utf-8").split("\n") if line]
    names = {f"opt_{letter}": f"op{letter}" for letter in "abcd"} | {"subject": "subject_name", "topic": "topic_name"}
    columns = ("id", "question", *names, "choice_type")
    table = pd.DataFrame([{name: line[names.get(name, name)] for name in columns} for line in lines])
    explained = [(line["exp"] or "")[:600] for line in lines]
    label = [line["cop"] - 1 for line in lines]
    return shuffled(table.assign(label=label, exp=explained), 3183)[MEDMCQA]  # pyright: ignore[reportReturnType]


def medqa_usmle4(files: Sequence[Path]) -> pd.DataFrame:
    """Reads MediQ's dev file (the case in sentences, then the question) and MedQA's test file, one object a line."""
    rows = []
    for file, split in zip(files, ("train", "test"), strict=True):
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
            case = json.loads(line)
            options = {f"opt_{letter.lower()}": case["options"][letter] for letter in OPTIONS}
            asked = {"question": " ".join([*case.get("context", []), case["question"]]), **options}
            rows.append(asked | {"answer_idx": case["answer_idx"], "split": split, "step": case.get("meta_info")})
    table = pd.DataFrame(rows)
    return table.assign(label=table["answer_idx"].map(OPTIONS.index))


def pubmedqa(files: Sequence[Path]) -> pd.DataFrame:
    """Reads ori_pqal.json (PubMed number -> question) and test_ground_truth.json, whose numbers are the test records."""
    asked, test = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    rows = [
        (number, one["QUESTION"], " ".join(one["CONTEXTS"]), one["final_decision"], one.get("YEAR"))
        for number, one in asked.items()
    ]
    table = pd.DataFrame(rows, columns=["pmid", "question", "context", "label_name", "year"])
    split = ["test" if number in test else "train" for number in table["pmid"]]
    return table.assign(split=split, label=table["label_name"].map(["yes", "no", "maybe"].index))


def medquad(files: Sequence[Path]) -> pd.DataFrame:
    """Reads the repository's XML documents: pairs with an answer, of question types with 100 pairs or more."""
    rows = []
    with zipfile.ZipFile(files[0]) as whole:
        paths = [Path(name) for name in whole.namelist() if name.endswith(".xml")]
        for path in sorted(paths, key=lambda path: (int(path.parent.name.split("_")[0]), path.name)):
            document = ElementTree.fromstring(whole.read(path.as_posix()))
            rows += _pairs(document, path.parent.name.split("_", 1)[1], str(path))
    table = pd.DataFrame(rows)
    table = table[table.groupby("label_name")["label_name"].transform("size") >= MEDQUAD_LEAST].reset_index(drop=True)  # pyright: ignore[reportOperatorIssue]
    documents = list(dict.fromkeys(table["document"]))
    test = np.random.RandomState(7).rand(len(documents)) < 0.15
    held = {document for document, one in zip(documents, test, strict=True) if one}
    split = ["test" if document in held else "train" for document in table["document"]]
    return coded(table.drop(columns="document").assign(split=split))


def _pairs(document: ElementTree.Element, client: str, name: str) -> list[dict[str, str | None]]:
    about = {"focus": document.findtext("Focus"), "semantic_group": document.findtext(".//SemanticGroup") or ""}
    found = []
    for pair in document.iter("QAPair"):
        question, answer = pair.find("Question"), _one_line(pair.findtext("Answer"))
        if question is not None and answer:
            found.append({
                "question": _one_line(question.text), "answer": answer[:700], "label_name": question.get("qtype"), **about,
                "client": client, "url_doc": document.get("id"), "document": name,
            })  # fmt: skip
    return found


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def mnist_t10k(files: Sequence[Path]) -> pd.DataFrame:
    """Reads the two IDX files of MNIST's test records: every fifth is a test record here, too."""
    pixels, label = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    images = pixels[16:].reshape(-1, *(int.from_bytes(pixels[at : at + 4].tobytes(), "big") for at in (8, 12)))
    count = len(images)
    return pd.DataFrame(
        {
            "image": [_png(image) for image in images],
            "label": label[8:].astype(np.int64),
            "writer_group": ["SD-3 (clean)" if n < count // 2 else "SD-1 (hard)" for n in range(count)],
            "split": ["train" if n % 5 else "test" for n in range(count)],
        }
    )


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def pawsx(files: Sequence[Path]) -> pd.DataFrame:
    """Reads LANGUAGE/dev_2k.tsv of the archive: a quarter of the pairs, the same in each language, are test records."""
    parts = []
    with tarfile.open(files[0]) as whole:
        for name in sorted(one for one in whole.getnames() if one.endswith("/dev_2k.tsv")):
            lines = whole.extractfile(name).read().decode().split("\n")[1:]  # pyright: ignore[reportOptionalMemberAccess]
            rows = [line.strip().split("\t") for line in lines if line]
            pairs = [(n, _quoted(one), _quoted(two), int(label)) for n, (_, one, two, label) in enumerate(rows)]
            part = pd.DataFrame(pairs, columns=["uid", "text", "text_pair", "label"]).assign(lang=name.split("/")[-2])
            test = np.random.RandomState(7).choice(len(part), len(part) // 4, replace=False)
            parts.append(part.assign(split=np.where(part["uid"].isin(test), "test", "train")))  # pyright: ignore[reportArgumentType]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(label_name=["paraphrase" if label else "different" for label in table["label"]])


def _quoted(text: str) -> str:
    """Quotes a text as a CSV cell: the published rows are from a copy that was written so and read as it stands."""
    return f'"{text.replace(chr(34), chr(34) * 2)}"' if '"' in text else text


def xnli(files: Sequence[Path]) -> pd.DataFrame:
    """Reads xnli.dev.tsv of the archive: a fifth of the premises are test records, of the other pairs 1,320 are drawn."""
    with zipfile.ZipFile(files[0]) as whole:
        lines = whole.read("XNLI-1.0/xnli.dev.tsv").decode().split("\n")[1:]
    cells = [line.split("\t") for line in lines if line]
    columns = ["lang", "label_name", "text", "text_pair"]
    table = pd.DataFrame([(one[0], one[1], one[6].strip(), one[7].strip()) for one in cells], columns=columns)
    both = pd.concat([_xnli_split(part, lang) for lang, part in table.groupby("lang")], ignore_index=True)
    return both[["uid", "text", "text_pair", "label_name", "lang", "split", "label"]]  # pyright: ignore[reportReturnType]


def _xnli_split(part: pd.DataFrame, lang: object) -> pd.DataFrame:
    """Splits one language's pairs. The test premises are the same in each; the training pairs are drawn by its name."""
    part = part.reset_index(drop=True).rename_axis("uid").reset_index()
    premises = len(part) // 3
    test = part["uid"].floordiv(3).isin(np.random.RandomState(7).choice(premises, premises // 5, replace=False))  # pyright: ignore[reportArgumentType]
    seed = sum(map(ord, str(lang)))
    most = min(1320, int((~test).sum()))  # pyright: ignore[reportArgumentType]
    drawn = np.random.RandomState(seed).choice(part["uid"][~test], most, replace=False)
    both = pd.concat(
        [part.set_index("uid", drop=False).loc[drawn].assign(split="train"), part[test].assign(split="test")]
    )
    return both.assign(label=both["label_name"].map(NLI.index))
