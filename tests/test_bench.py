"""Every benchmark runs at toy size, and its figures come out. Their values and timings are not checked."""

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import decoders
import sights
import small

pytestmark = pytest.mark.slow
BENCH = Path(__file__).parent.parent / "bench"
TINY = 'backbone={name="tiny",dtype="float32",attention="eager",options={depth=8}}'
ONE_ROUND = "federation.num_rounds=1"
EACH = """
import ast, importlib, sys
name, constants, *calls = ast.literal_eval(sys.argv[1])
bench = importlib.import_module(name)
for constant, value in constants.items():
    assert hasattr(bench, constant), constant
    setattr(bench, constant, value)
for call in calls:
    sys.argv = [name, *call]
    try:
        bench.main()
    except SystemExit as end:
        if end.code:
            raise
"""
"""Calls a bench's `main` once for each list of arguments, with other constants, in one process."""
ON_THE_NET = """
import tempfile
from pathlib import Path
from deploy import round_seconds
from deploy_net import network
from measure import save
with tempfile.TemporaryDirectory(prefix="fb-") as folder, network(["films", "tweets"], Path(folder) / "n") as net:
    save("deploy_round", round_seconds(net, Path(folder), repeats=1, rounds=1))
"""
LANGUAGES = [
    "arb_Arab", "bul_Cyrl", "deu_Latn", "eng_Latn", "fin_Latn", "hin_Deva", "pol_Latn", "rus_Cyrl", "spa_Latn", "swh_Latn",
    "tha_Thai", "ukr_Cyrl", "urd_Arab", "vie_Latn", "zho_Hans",
]  # fmt: skip
DISEASES = ["neoplasms", "digestive system diseases", "nervous system diseases", "cardiovascular diseases",
            "general pathological conditions"]  # fmt: skip
OPTIONS = {f"opt_{letter}": [f"choice {letter}", f"answer {letter}"] for letter in "abcd"}
SETS: dict[str, tuple[int, dict[str, Sequence[Any]]]] = {
    "medical_abstracts": (2400, {"label_name": DISEASES}),
    "clinc150": (
        400,
        {"domain": [f"domain {n % 10}" for n in range(20)], "label_name": [f"asks_{n}" for n in range(20)]},
    ),
    "sib200": (900, {"lang": [*LANGUAGES, *["eng_Latn"] * 15], "label_name": ["travel"] * 7 + ["health"] * 6}),
    "banking77": (400, {"label_name": [f"card_{n}" for n in range(14)]}),
    "medqa_usmle4": (60, {"answer_idx": "ABCD", **OPTIONS}),
    "medmcqa": (
        60,
        {"label": [0, 1, 2, 3], "subject": ["Dental", "Surgery", "Pathology", "Medicine", "Other"], **OPTIONS},
    ),
    "pubmedqa": (60, {"label_name": ["yes", "no", "maybe"]}),
    "medquad": (80, {"client": ["one", "two"]}),
    "xnli": (120, {"lang": LANGUAGES[:6], "label_name": ["entailment", "neutral", "contradiction", "neutral"]}),
    "pawsx": (120, {"lang": LANGUAGES[:6], "label_name": ["paraphrase", "not_paraphrase"] * 3 + ["paraphrase"]}),
}
"""Set: rows, and the values that its columns repeat, besides its texts."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Made-up sets with the columns of the real ones, a decoder and a vision transformer."""
    folder = tmp_path_factory.mktemp("sets")
    for name, (rows, columns) in SETS.items():
        texts = [record.fields["text"] for record in small.records(rows)]
        table = pd.DataFrame(dict.fromkeys(("text", "text_pair", "question", "context", "answer"), texts))
        for column, values in columns.items():
            table[column] = _repeated(values, rows)
        _split(table).to_parquet(folder / f"{name}.parquet")
    digits = pd.DataFrame({"image": [_png(n) for n in range(600)], "label": _repeated("0123456789", 600)})
    digits["writer_group"] = _repeated(["SD-1", "SD-3", "SD-3"], 600)
    _split(digits).to_parquet(folder / "mnist_t10k.parquet")
    decoders.write(folder / "decoder")
    sights.write_dinov2(folder / "dino")
    return folder


def _repeated(values: Sequence[Any], rows: int) -> list[Any]:
    return [values[place % len(values)] for place in range(rows)]


def _split(table: pd.DataFrame) -> pd.DataFrame:
    """With a column `split`: three of ten blocks of rows are test records."""
    return table.assign(split=["test" if place // 40 % 10 % 3 == 1 else "train" for place in range(len(table))])


def _png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (12, 12), seed * 37 % 256).save(file, "PNG")
    return file.getvalue()


class Bench:
    """Runs benches; their results lie in a temporary folder."""

    def __init__(self, folder: Path):
        self.results = folder / "bench" / "results"

    def run(self, name: str, *calls: str, changes: Iterable[str] = (), **constants: Any) -> str:
        """Calls a bench's `main` once for each call's arguments; returns the output."""
        arguments = [call.split() for call in calls or [""]]
        return self.python("-c", EACH, repr([name, constants, *arguments]), changes=changes)

    def python(self, *arguments: str, changes: Iterable[str] = ()) -> str:
        paths = os.pathsep.join([str(BENCH), *filter(None, sys.path)])
        environment = os.environ | {
            "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FICPD_BENCH_RESULTS": str(self.results),
            "FICPD_BENCH_CHANGES": "\n".join(changes), "FICPD_BENCH_RECORDS": "60",
        }  # fmt: skip
        command = [sys.executable, *arguments]
        how = {"cwd": self.results.parent.parent, "capture_output": True, "text": True}
        done = subprocess.run(command, env=environment, check=False, **how)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    def found(self, name: str) -> dict[str, Any]:
        """A result file, of finite figures."""
        found = json.loads((self.results / f"{name}.json").read_text())
        numbers = list(_numbers(found))
        assert numbers
        assert all(map(math.isfinite, numbers))
        return found

    def rows(self, name: str) -> set[str]:
        """The cells of a result file, each with a mean of each of its figures."""
        cells = self.found(name)["cells"]
        assert all(cell and all("mean" in figure for figure in cell.values()) for cell in cells.values())
        return set(cells)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_engine(bench):
    bench.run("engine", "--backbone tiny --dtypes float32 --sizes 2x1 4x2 --repeats 1 --compiled")
    found = bench.found("engine-tiny")["float32"]
    assert {"efficiency", "lock step", "entering in the middle"} < found.keys()
    assert found["efficiency"].keys() == {f"layer {layer}, {size}" for layer in (0, 1) for size in ("2 x 1", "4 x 2")}
    for cell in found["efficiency"].values():
        assert cell["ratios"].keys() == {
            "a forward for each thread",
            "forwards of all threads",
            "compiled",
            "one padded batch",
        }
        assert cell["efficiency"] == min(way["median"] for way in cell["ratios"].values())


def test_overhead(bench):
    bench.run("overhead", "--rounds 2")
    assert len(bench.found("overhead")["resident MB after each round"]) == 2


def test_scale(bench):
    bench.run("scale", "--clients 4 30 --rounds 3")
    found = bench.found("scale")["by clients"]
    assert [figures["MB of states on disk"] > 0 for figures in found.values()] == [True, True]


def test_entry(bench):
    bench.run("entry", "tiny 0:0.1 1:0.1 --steps 2 --every 1 --batch 4 --tested 20")
    assert [len(curve["points"]) for curve in bench.found("entry-tiny")["curves"]] == [2, 2]


def test_quickstart(bench):
    few = ("data.max_records=400", 'partition={kind="iid",num_clients=3}')
    bench.run("quickstart", "--seeds 0", changes=(TINY, ONE_ROUND, *few))
    for recipe in ("quickstart", "regression", "smollm2"):
        assert {"zero_shot", "local"} < bench.found(f"quickstart-{recipe}")["methods"].keys()


def test_privacy(bench, sets):
    calls = [f"{part} --seeds 0 --data {sets}" for part in ("record", "client", "bytes")]
    few = {"BUDGETS": (None, 2.0), "CROWDS": {10: (10, 10)}, "ALSO_PRIVATE": ("subspace 64, 32 bit",)}
    bench.run("privacy", *calls, changes=(TINY, ONE_ROUND, "data.max_records=1300"), **few)
    kinds = ("zero-shot", "epsilon None", "epsilon 2.0")
    assert bench.rows("privacy_record") == {f"{task}, {kind}" for task in ("polarity", "abstracts") for kind in kinds}
    assert len(bench.rows("privacy_client")) == 1 + 3
    assert "subspace 64, 32 bit, epsilon 2.0" in bench.rows("privacy_bytes")


def test_privacy_shared(bench):
    changes = (TINY, ONE_ROUND, "partition.num_clients=4", "data.max_records=200")
    bench.run("privacy", "shared --seeds 0", changes=changes, EPSILONS=(2.0,), SITES=(4,))
    kinds = ("none", "shared_gaussian, epsilon 2", "record_gaussian, epsilon 2")
    runs = ("quick start", "4 sites")
    assert bench.rows("privacy_shared") == {f"{kind}, {run}" for kind in kinds for run in runs}


def test_privacy_dropouts(bench):
    bench.run("privacy", "dropouts --seeds 0 1", DROPOUTS={4: 1}, LEAVE=(0.0, 1.0))
    saved = {cell: row["saved"]["mean"] for cell, row in bench.found("privacy_dropouts")["cells"].items()}
    assert saved == {"4 sites, 1 may be lost, 0 % leave": 1.0, "4 sites, 1 may be lost, 100 % leave": 0.0}


def test_privacy_cost(bench):
    bench.run("privacy_cost", changes=(TINY, "data.max_records=1300"))
    assert len(bench.found("privacy_cost")["seconds per order, median"]) == 6


def test_subjects(bench):
    bench.run("subjects", "--seeds 0", changes=(TINY, ONE_ROUND, "partition.num_clients=3"), RECORDS=400)
    people = {f"the person, {size} records each" for size in (2, 5, 10)}
    assert bench.rows("subjects") == {"no privacy", "the record"} | people


def test_privacy_audit(bench):
    bench.run("privacy_audit", "--seeds 0", changes=(TINY, ONE_ROUND))
    assert bench.rows("privacy_audit") == {"no privacy", "epsilon 2"}


def test_fullmodel(bench):
    few = ("data.max_records=150", "partition.num_clients=2", "training.local_steps=1")
    bench.run("fullmodel", "--rounds 1", changes=few)
    rows = bench.rows("fullmodel")
    trained = {"zero-shot", "prompt, 10 tokens, 32 bit", "prompt, 64 numbers, 8 bit", "lora, rank 8, 32 bit"}
    assert {row for row in rows if not row.startswith("bytes")} == {*trained, "full model, 32 bit"}
    assert len(rows) == 5 + 2 * 6


def test_exams(bench, sets):
    data = f"--data {sets} --e5 {sets}"
    bench.run("exams", f"medqa medmcqa pubmedqa xnli pawsx {data}", changes=(TINY, ONE_ROUND))
    writer = (f"backbone.name={json.dumps(str(sets / 'decoder'))}", "task.max_new_tokens=4", ONE_ROUND)
    bench.run("exams", f"medquad {data}", changes=writer, SITES={"medquad": (10, 2)})
    names = ("medqa", "medmcqa", "pubmedqa", "xnli", "pawsx", "medquad")
    assert bench.rows("exams") == {f"{name}, {method}" for name in names for method in ("zero_shot", "fedavg")}


def test_design(bench, sets):
    data = f"--data {sets} --e5 {sets}"
    few: dict[str, Any] = {
        "METHODS": {name: {"name": name} for name in ("local", "linear_probe", "ficpd")}, "ROUNDS": 1, "NONMEMBERS": 40,
        "LENGTHS": (10,), "DIMENSIONS": (64, None), "NUMBERS": (5,), "WRITTEN": 1,
        "SERVER": {"5 prototypes": {}, "KL": {"how": "kl"}}, "ENDED": (("local", 1), ("ficpd", 1)),
    }  # fmt: skip
    bench.run("design", f"methods {data}", changes=(TINY, ONE_ROUND), **few)
    parts = [f"{part} {data}" for part in ("attacks", "server", "epsilon", "rounds", "shape")]
    bench.run("design", *parts, changes=(TINY, ONE_ROUND, "training.local_steps=1"), BUDGETS=(2.0, None), **few)
    names = ("abstracts", "xnli", "pawsx", "pubmedqa", "medmcqa")
    every = {f"{name}, {method}" for name in names for method in few["METHODS"]}
    assert bench.rows("design_methods") == every - {"medmcqa, linear_probe"}
    assert {"parity gap", "odds gap"} < bench.found("design_methods")["cells"]["xnli, ficpd"].keys()
    assert len(bench.rows("design_attacks")) == 10
    assert len(bench.rows("design_epsilon")) == 7 + 5
    assert len(bench.rows("design_rounds")) == 6 * 2
    assert len(bench.rows("design_shape")) == 2
    assert bench.rows("design_server") == {"fedavg", "5 prototypes", "KL"}


def test_library(bench, sets, tmp_path):
    texts = tmp_path / "texts"
    bench.run("library", f"texts --data {sets} --texts {texts} --writer {sets / 'decoder'}")
    parts = ("mixed", "defaults", "private", "ablation", "clients")
    calls = [f"{part} --seeds 0 --rounds 1 --data {sets}" for part in parts]
    few: dict[str, Any] = {"CROWDS": (6, 8, 10)}
    few |= {name: {"polarity": 4, "abstracts": 2, "clinc": 2, "sib": 2, "banking": 2} for name in ("CLIENTS", "SITES")}
    bench.run("library", *calls, changes=(TINY, ONE_ROUND), **few)
    assert texts.exists()
    assert len(bench.rows("library_mixed")) == 6
    assert len(bench.rows("library_defaults")) == 13
    assert len(bench.rows("library_private")) == 9
    assert len(bench.rows("library_ablation")) == 5
    assert len(bench.rows("library_clients")) == 5 + 1 + 5


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib: pip install -e '.[bench]'")
def test_draw(bench):
    (bench.results / "compare_joining.json").write_bytes((BENCH / "results" / "compare_joining.json").read_bytes())
    bench.run("draw", "")
    pictures = (bench.results.parent.parent / "docs" / "img").iterdir()
    assert {picture.name for picture in pictures} == {"joining.svg"}


def test_unseen(bench, sets):
    parts = ("tasks", "fine", "domains", "languages", "keys")
    calls = [f"{part} --seeds 0 --rounds 1 --shots 0 16 --data {sets} --e5 {sets}" for part in parts]
    few = {"CLIENTS": {"sib": 4, "clinc": 3}, "DOMAINS": ("films", "tweets"), "LEFT": ("tha_Thai",), "MOST_TESTED": 20}
    bench.run("unseen", *calls, changes=(TINY, ONE_ROUND), **few)
    assert len(bench.rows("unseen_tasks")) == 2 * 7
    assert len(bench.rows("unseen_fine")) == 2 * 3
    assert len(bench.rows("unseen_domains")) == 2 * 7
    assert len(bench.rows("unseen_languages")) == 7
    assert bench.found("unseen_keys")["cosine"]


def test_member(bench, sets):
    alike = {"partition": {"kind": "iid", "num_clients": 4}}
    few: dict[str, Any] = {"CLIENTS": 4, "IID": alike, "SKEWED": alike, "TASKS": ("polarity",)}
    bench.run("member", f"--seeds 0 --records 20 --data {sets}", changes=(TINY, ONE_ROUND), **few)
    assert len(bench.rows("member")) == 2


def test_fpl(bench, sets):
    data = f"--seeds 0 --rounds 1 --data {sets} --e5 {sets} --dino {sets / 'dino'}"
    bench.run("fpl", f"abstracts {data}", f"ablation {data}", changes=(TINY, "partition.num_clients=8"))
    bench.run("fpl", f"languages {data}", changes=(TINY,))
    changes = ("backbone.options={image_size=16}", "partition.num_clients=6", "prompt.enters_at=1")
    bench.run("fpl", f"digits {data}", changes=changes)
    for name in ("abstracts", "languages", "digits"):
        assert bench.rows(f"fpl_{name}") == {"zero-shot", "local", "fedavg", "fpl"}
    for privacy in ("none", "epsilon_2"):
        assert len(bench.rows(f"fpl_ablation_{privacy}")) == 9


@pytest.mark.parametrize("part", ["gradients", "joining", "private", "blackbox_skewed", "mixed", "languages", "words"])
def test_compare(bench, sets, part, tmp_path):
    call = f"{part} --seeds 0 --jobs 2 --data {sets} --e5 {sets} --out {tmp_path / 'runs'}"
    bench.run("compare", call, changes=(TINY, ONE_ROUND), TASKS=("polarity",), EPSILONS=(2,))
    found = bench.found(f"compare_{part}")
    assert found["conditions"]
    for condition in found["conditions"]:
        assert all(figure["mean"] is not None for figure in condition["methods"].values())


def test_faults(bench):
    bench.run("faults", "1 --only messages")
    assert bench.found("faults")["faults"].keys() == {"messages twice, late and lost"}


def test_deploy(bench, tmp_path):
    """What needs no network: a crowd in one process, and our side of the comparison with Ray."""
    last = bench.run("deploy", "crowd-of --backbone tiny --clients 8").splitlines()[-1]
    assert all(map(math.isfinite, json.loads(last).values()))
    bench.run("deploy_ray", f"ours --rows 2 --rounds 2 --times {tmp_path / 'times'}")
    assert [answered for _, _, answered in json.loads((tmp_path / "times").read_text())] == [20, 20]


def test_deploy_net(bench):
    """A SuperLink and two sites: a round's seconds by phase."""
    bench.python("-c", ON_THE_NET)
    assert set(bench.found("deploy_round")["mean over rounds"]) == {"poll 0.2 s", "poll 3 s"}


def test_gpu(bench):
    bench.run("gpu", "--device cpu --width 64 --layers 2 --clients 2 --rows 2")
    found = bench.found("gpu")
    assert {"enters_at=0", "enters_at=1", "7 B, planned"} < found.keys()
    assert found["enters_at=0"]["memory"]["planned_gb"] > 0
    seven = found["7 B, planned"]
    assert 13 < seven["bfloat16"]["weights_gb"] < 14
    assert 3.5 < seven["4 bits"]["weights_gb"] < 4.5
    assert seven["bfloat16"]["positions"]["16 GB"]["kept"] < seven["4 bits"]["positions"]["16 GB"]["kept"]


def test_every_bench_runs_here():
    # what the others share; the tables' modules are in test_readme.py, the sets' in test_bench_data.py
    untested = {"measure", "watched", "tables", "design_tables", "data", "data_formats"}
    untested |= {"backbones"}  # in backbones/test_frozen.py
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    parts = {"privacy_shared", "privacy_dropouts", "every_bench_runs_here"}
    assert {path.stem for path in BENCH.glob("*.py")} - untested - {"deploy_ray"} == tested - parts
