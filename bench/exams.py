"""One honest row each: medical exams and pairs of sentences in many languages, with chance, zero-shot and an interval.

python bench/exams.py [medqa medmcqa pubmedqa medquad xnli pawsx] [--data FOLDER] [--e5 FOLDER] [--seeds 0]

FedAvg on ten virtual tokens, 5 rounds of 4 steps of 16 records at each of 6 clients, 300 test records; multilingual E5, but
MedMCQA on SmolLM2 (2 rounds of 3 steps of 8: it reads every question once for each option). Clients: MedMCQA by specialty,
XNLI and PAWS-X by language, the others iid. A small model is near chance on these, and the table is to say so. MedQuAD is
written: SmolLM2 answers 117 questions in up to 40 tokens, clients are the NIH's nine sites (4 rounds of 4 steps of 8).
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import tomli_w
from scipy.stats import binomtest

from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from library import faster
from measure import Cells, of_everyone, parse

TESTED = 300
SITES = {"medquad": (100, 13)}
"""Train and test records of each client, as many of the small sites as of the large; writing makes more too slow."""
METHODS = ("zero_shot", "fedavg")
SUBJECTS = ("Dental", "Surgery", "Pathology", "Medicine")
OPTIONS = ["opt_a", "opt_b", "opt_c", "opt_d"]
NLI = {"entailment": "yes, the second follows from the first", "neutral": "maybe",
       "contradiction": "no, the second contradicts the first"}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "medqa": {
        "task": {"name": "multiple_choice"},
        "data": {"source": "medqa_usmle4", "columns": {"text": "question", "target": "answer_idx"}, "options": OPTIONS},
        "partition": {"kind": "iid", "num_clients": 6},
    },
    "medmcqa": {
        "task": {"name": "multiple_choice", "instruction": "Answer:"},
        "data": {
            "source": "medmcqa",
            "columns": {"text": "question", "target": "label"},
            "keep": ["subject"],
            "options": OPTIONS,
            "where": {"subject": list(SUBJECTS)},
        },
        "partition": {"kind": "column", "column": "subject"},
        "backbone": {"name": "smollm2", "options": {"max_tokens": 128}},
        "training": {"local_steps": 3, "batch_size": 8},
        "federation": {"num_rounds": 2},
    },
    "pubmedqa": {
        "task": {
            "name": "classification", "instruction": "The answer is", "labels": {"yes": "yes", "no": "no", "maybe": "maybe"}
        },
        "data": {
            "source": "pubmedqa", "columns": {"text": "question", "text_pair": "context", "target": "label_name"}
        },
        "partition": {"kind": "iid", "num_clients": 6},
    },
    "medquad": {
        "task": {"name": "generation", "instruction": "Here is what doctors say:", "max_new_tokens": 40},
        "data": {"source": "medquad", "columns": {"text": "question", "target": "answer", "client": "client"}},
        "partition": {"kind": "column", "column": "client"},
        "backbone": {"name": "smollm2", "options": {"max_tokens": 96}},
        "training": {"local_steps": 4, "batch_size": 8},
        "federation": {"num_rounds": 4},
    },
    "xnli": {
        "task": {"name": "classification", "instruction": "premise and hypothesis:", "labels": NLI},
        "data": {
            "source": "xnli",
            "columns": {"text": "text", "text_pair": "text_pair", "target": "label_name", "lang": "lang"},
        },
        "partition": {"kind": "column", "column": "lang"},
    },
    "pawsx": {
        "task": {"name": "classification", "instruction": "these two sentences have", "labels": {}},
        "data": {
            "source": "pawsx",
            "columns": {"text": "text", "text_pair": "text_pair", "target": "label_name", "lang": "lang"},
        },
        "partition": {"kind": "column", "column": "lang"},
    },
}  # fmt: skip


def world_of(args: argparse.Namespace, seed: int, name: str, folder: Path) -> ExperimentContext:
    """The test records are cut to `TESTED`, the train records to twice of what is trained on."""
    tree = recipe(args, seed, name, folder)
    context = build_context(parse(tomli_w.dumps(tree)))
    return context if "backbone" in SETS[name] else faster(context, 10.0)


def recipe(args: argparse.Namespace, seed: int, name: str, folder: Path, trained: int = 1500) -> dict[str, Any]:
    """The recipe of a set, whose records it writes to `folder`: at most `trained` and `TESTED`."""
    parts = {key: dict(value) for key, value in SETS[name].items()}
    table = pd.read_parquet(Path(args.data) / f"{parts['data']['source']}.parquet")
    for column, values in parts["data"].get("where", {}).items():
        table = table.loc[table[column].isin(values)]
    train, test = (table.loc[table["split"] == side].sample(frac=1, random_state=seed) for side in ("train", "test"))
    some = [train[:trained], test[:TESTED]]
    if name in SITES:
        some = [side.groupby("client").head(most) for side, most in zip((train, test), SITES[name], strict=True)]
    pd.concat(some).to_parquet(folder / "set.parquet")
    if name == "pawsx":
        words = sorted(table["label_name"].unique())
        texts = {word: "different" if word.startswith(("diff", "not", "no")) else "equal" for word in words}
        parts["task"]["labels"] = texts
    parts["data"] |= {"source": str(folder / "set.parquet"), "split_column": "split"}
    tree: dict[str, Any] = {
        "seed": seed,
        "backbone": {
            "name": str(args.e5),
            "kind": "sentence_encoder",
            "options": {"max_tokens": 128, "prefix": "query: "},
        },
        "prompt": {"num_tokens": 10, "init": "vocabulary"},
        "training": {"local_steps": 4, "batch_size": 16},
        "federation": {"num_rounds": 5, "clients_per_round": 6},
    }
    return tree | parts


def row(context: ExperimentContext, method: str, folder: Path) -> dict[str, float]:
    result = run_method(context, {"name": method}, RunDir(folder), None, no_progress)
    return chosen(context, result) if context.task.to_config()["name"] != "generation" else written(result)


def written(result: RunResult) -> dict[str, float]:
    """BLEU and chrF of each client's own test records, on average, and the clients' spread."""
    own, everyone = result.scores.per_client.values(), result.scores.global_prompt or {}
    found = {name: sum(score[name] for score in own) / len(own) for name in ("bleu", "chrf")}
    return (
        found | {"worst chrf": min(score["chrf"] for score in own)} | {f"everyone {n}": v for n, v in everyone.items()}
    )


def chosen(context: ExperimentContext, result: RunResult) -> dict[str, float]:
    """Accuracy on everybody's test records, in percent, the ends of its 95 % interval (Wilson), and chance."""
    records, labels = result.num_records, context.task.to_config().get("labels")
    assert records is not None
    score, tested = of_everyone(result), records.test
    low, high = binomtest(round(score["accuracy"] * tested), tested).proportion_ci(method="wilson")
    chance = score["chance"] if "chance" in score else 1 / len(cast("dict[str, str]", labels))
    figures = {"accuracy": score["accuracy"], "low": low, "high": high, "chance": chance}
    truths = [t for c in context.clients().values() for t in context.task.targets(c.test)]
    figures["most frequent"] = max(truths.count(t) for t in set(truths)) / len(truths)
    return {name: 100 * float(value) for name, value in figures.items()} | {"tested": tested}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS), help=" ".join(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--e5", type=Path, help="folder of multilingual-e5-small")
    args = parser.parse_args()
    cells = Cells("exams", f"FedAvg, 10 virtual tokens, {TESTED} test records")
    for name in args.sets:
        for seed in args.seeds:
            if all(cells.has(f"{name}, {method}", seed) for method in METHODS):
                continue
            with tempfile.TemporaryDirectory() as folder:
                context = world_of(args, seed, name, Path(folder))
                for method in METHODS:
                    cells.add(f"{name}, {method}", seed, partial(row, context, method, Path(folder) / method))


if __name__ == "__main__":
    main()
