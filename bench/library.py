"""Many tasks, one federation: who clusters right, what it is worth, and what a library does for a task left out. MiniLM.

python bench/library.py mixed|ablation|unseen|clients [--seeds 0 1 2] [--data FOLDER] [--rounds 10]

Thirty clients of about 100 records: polarity in four domains (8 clients), medical abstracts (4), the domains of CLINC150
(6), SIB-200 in English (4), Banking77 (8). `mixed`: methods side by side. `ablation`: prototypes by number and space.
`unseen`: one task left out in turn, then 0 to 64 shots of it. `clients`: the same records among 10 to 500. The sets lie in
`--data` (README.md here); polarity is built in. A cell of a seed that the result file has, in the same setting, is not run
again (`unseen` makes its libraries anew).
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch

from ficpd.auto import adapt
from ficpd.experiment import parse, part
from ficpd.library import PromptLibrary
from ficpd.metrics.evaluate import score_prompt
from ficpd.run import one_method, silent
from ficpd.rundir import RunDir
from ficpd.world import World, build_world
from measure import Cells

POLARITY = {
    "task": {
        "name": "classification",
        "instruction": "The sentiment of this sentence is",
        "labels": {"negative": "negative", "positive": "positive"},
    },
    "data": {"source": "ratings", "columns": {"text": "text", "target": "polarity", "domain": "domain"},
             "test_fraction": 0.3},
    "partition": {"kind": "column_dirichlet", "column": "domain", "concentration": 100.0},
}  # fmt: skip
FILES = {
    "abstracts": ("medical_abstracts.parquet", "label_name", "This abstract is about", {}),
    "clinc": ("clinc150.parquet", "domain", "This request is about", {}),
    "sib": ("sib200.parquet", "label_name", "This sentence is about", {"lang": ["eng_Latn"]}),
    "banking": ("banking77.parquet", "label_name", "This question to a bank is about", {}),
}
"""Group: file, column of the label, instruction, rows taken."""
CLIENTS = {"polarity": 8, "abstracts": 4, "clinc": 6, "sib": 4, "banking": 8}
TRAIN_SHARE = {"polarity": 0.7, "abstracts": 0.69, "clinc": 0.66, "sib": 0.7, "banking": 0.76}
RECORDS = 100
SHOTS = (0, 4, 16, 64)
WAYS = ("leave", "nearest", "compose", "tune", "demonstrations", "compose+demonstrations", "auto")


def group(name: str, data: str, clients: int, records: int) -> dict[str, Any]:
    """One task's part of the recipe: `clients` of about `records` training records."""
    most = round(clients * records / TRAIN_SHARE[name])
    if name == "polarity":
        parts = {key: dict(value) for key, value in POLARITY.items()}
        parts["data"]["max_records"], parts["partition"]["num_clients"] = most, clients
        return parts
    file, column, instruction, where = FILES[name]
    table = pd.read_parquet(Path(data) / file)
    for key, values in where.items():
        table = table[table[key].isin(values)]
    labels = {label: label.replace("_", " ").lower() for label in sorted(table[column].unique())}
    source = {"source": str(Path(data) / file), "columns": {"text": "text", "target": column}, "split_column": "split",
              "max_records": most, "where": where}  # fmt: skip
    return {
        "task": {"name": "classification", "instruction": instruction, "labels": labels},
        "data": source,
        "partition": {"kind": "iid", "num_clients": clients},
    }


def world_of(args: argparse.Namespace, seed: int, without: str = "", clients: Mapping[str, int] = CLIENTS) -> World:
    total = {name: number * RECORDS for name, number in CLIENTS.items()}
    tree = {
        "seed": seed,
        "backbone": {"name": "minilm", "options": {"max_tokens": 48}},
        "prompt": {"num_tokens": 10, "enters_at": 4, "init": "vocabulary"},
        "training": {"local_steps": 5, "batch_size": 16},
        "federation": {"num_rounds": args.rounds},
        "groups": {
            name: group(name, args.data, number, total[name] // number)
            for name, number in clients.items()
            if name != without
        },
    }
    return build_world(parse(tomli_w.dumps(tree), "bench"))


def trial(world: World, method: dict[str, Any], folder: Path, **changes: dict[str, Any]) -> dict[str, float]:
    """One method in this world, its run in `folder`; figures in percent, over clients and by group."""
    experiment = world.experiment.model_copy(update={"method": part("methods", method, "bench")})
    for name, update in changes.items():
        experiment = experiment.model_copy(update={name: getattr(experiment, name).model_copy(update=update)})
    result = one_method(replace(world, experiment=experiment), experiment.method, RunDir(folder), None, silent)
    clients, clusters = result["metrics"]["per_client"], result["clusters"] or {"agreement": {}, "number": 0}
    found = {"mean client": 100 * result["metrics"]["per_client_mean"]["accuracy"]}
    for group_name in world.tasks:
        own = [score["accuracy"] for name, score in clients.items() if name.startswith(group_name + ".")]
        found[group_name] = 100 * sum(own) / len(own)
    found["rand index"] = clusters["agreement"].get("group") or 0.0
    found["prototypes"] = clusters["number"]
    found["bytes up"], found["seconds"] = result["bytes"]["up_per_client_round"], sum(result["seconds"].values())
    return found


def alone(world: World, method: dict[str, Any], **changes: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return trial(world, method, Path(folder) / "run", **changes)


METHODS: dict[str, dict[str, Any]] = {
    "zero-shot": {"name": "zero_shot"},
    "fedavg": {"name": "fedavg"},
    "ficpd, 5 prototypes": {"name": "ficpd"},
    "ficpd, oracle": {"name": "ficpd", "space": "metadata"},
    "local": {"name": "local"},
    "ficpd, K by silhouette": {"name": "ficpd", "num_prototypes": "auto"},
}


def mixed(args: argparse.Namespace) -> None:
    cells = Cells(
        "library_mixed", f"30 clients of about {RECORDS} records, {args.rounds} rounds of 5 steps of 16, entry 4"
    )
    for seed in args.seeds:
        world = world_of(args, seed)
        for name, method in METHODS.items():
            cells.add(name, seed, partial(alone, world, method))


def ablation(args: argparse.Namespace) -> None:
    cells = Cells("library_ablation", f"as library_mixed, {args.rounds} rounds")
    for seed in args.seeds:
        world = world_of(args, seed)
        cells.add("1 prototype", seed, partial(alone, world, {"name": "ficpd", "num_prototypes": 1}))
        for space in ("prompt", "delta", "function"):
            for number in (2, 5, 10, 20):
                method = {"name": "ficpd", "space": space, "num_prototypes": number}
                cells.add(f"{number} prototypes, {space}", seed, partial(alone, world, method))


def clients(args: argparse.Namespace) -> None:
    """The same records among more clients; 20 take part in a round (all, where there are fewer)."""
    cells = Cells("library_clients", f"{30 * RECORDS} records, 20 clients a round, {args.rounds} rounds")
    for seed in args.seeds:
        for number in (10, 50, 200, 500):
            shares = {name: max(1, round(number * CLIENTS[name] / 30)) for name in CLIENTS}
            shares["polarity"] = max(4, shares["polarity"])
            world = world_of(args, seed, clients=shares)
            for name in ("fedavg", "ficpd, 5 prototypes"):
                cohort = {"clients_per_round": min(20, len(world.shards))}
                cells.add(f"{number} clients, {name}", seed, partial(alone, world, METHODS[name], federation=cohort))


def unseen(args: argparse.Namespace) -> None:
    """Every task left out in turn: a library of the others, fitted to few of its records, scored on its test records."""
    cells = Cells("library_unseen", f"library of four tasks, {args.rounds} rounds; shots in all; accuracy in percent")
    for seed in args.seeds:
        for left in CLIENTS:
            with tempfile.TemporaryDirectory() as folder:
                world = world_of(args, seed, without=left)
                trial(world, METHODS["ficpd, 5 prototypes"], Path(folder) / "run")
                library = PromptLibrary.load(Path(folder) / "run")
                for cell, figures in fitted(world, library, world_of(args, seed, clients={left: CLIENTS[left]}), seed):
                    cells.add(f"{left}, {cell}", seed, lambda figures=figures: figures)


def fitted(world: World, library: PromptLibrary, other: World, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each way with each number of shots, beside the same ways without a library (its start alone)."""
    task, model = other.task, world.model
    train = [record for shard in other.shards.values() for record in shard.train]
    test = [record for shard in other.shards.values() for record in shard.test]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    bare, truths = PromptLibrary(library.start, {}, library.card), task.targets(test)
    for shots in SHOTS:
        records = [train[i] for i in order[:shots]]
        for name, basis in (("library", library), ("no library", bare)):
            for way in WAYS if shots else ("leave", "nearest"):
                if name == "no library" and way in ("nearest", "compose", "compose+demonstrations"):
                    continue
                found = adapt(basis, records, task, model, world.experiment.training, how=way, seed=seed).fitted
                batch = found.encode(task, test, model.backbone)
                score = score_prompt(found.prompt.vectors_PD, batch, truths, model)
                yield f"{shots} shots, {name}, {way}", {"accuracy": 100 * score["accuracy"]}


PARTS = {"mixed": mixed, "ablation": ablation, "clients": clients, "unseen": unseen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
