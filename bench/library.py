"""Many tasks, one federation: who clusters right, and what it is worth. MiniLM.

python bench/library.py mixed|defaults|private|ablation|clients|texts [--seeds 0 1 2] [--data FOLDER] [--rounds 10]

Thirty clients of about 100 records: polarity in four domains (8 clients), medical abstracts (4), the domains of CLINC150
(6), SIB-200 in English (4), Banking77 (8). `mixed`: methods side by side. `defaults`: each method's own defaults alone,
also among 10 and 500 clients, and at ε = 2. `private`: the main row in 64 numbers, with and without ε = 2. `ablation`:
prototypes by number and space, and what is distilled from them. `clients`: the same records among 10 to 500. `texts`: what
a decoder (SmolLM2) writes for the labels of all tasks, to distil on.

The sets lie in `--data` (README.md here); polarity is built in. A cell of a seed that the result file has, in the same
setting, is not run again.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from ficpd.library.distillation.generation import generate_texts
from ficpd.registry import validated_section
from ficpd.tasks.build import build_task
from measure import MOST_RECORDS, Cells, parse

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
RECORDS, SITE_RECORDS = 100, 400
CROWDS = (10, 50, 200, 500)
"""Numbers of clients that share the same records."""
SITES = {"polarity": 4, "abstracts": 4, "clinc": 4, "sib": 2, "banking": 4}
PROTOTYPES: dict[str, Any] = {
    "name": "ficpd", "num_prototypes": 5, "class_totals": False, "local_model": "prototype", "label_prior": False
}  # fmt: skip
"""FICPD of prototypes alone, whose rows the tables have: no readout, no mixture."""
RATE = 3.0
"""Of the catalog's learning rate: 8 rounds then reach what 20 reach at the rate itself (70.9 and 71.6, one seed)."""
PRIVATE: dict[str, Any] = {
    "training": {"local_steps": 2, "batch_size": 64},
    "compression": {"name": "subspace", "dimension": 64},
}


def group(name: str, data: str, clients: int, records: int) -> dict[str, Any]:
    """One task's part of the recipe: `clients` of about `records` training records."""
    most = round(clients * min(records, MOST_RECORDS or records) / TRAIN_SHARE[name])
    if name == "polarity":
        parts = {key: dict(value) for key, value in POLARITY.items()}
        parts["data"]["max_records"], parts["partition"]["num_clients"] = most, clients
        return parts
    file, column, instruction, where = FILES[name]
    table = pd.read_parquet(Path(data) / file)
    for key, values in where.items():
        table = table.loc[table[key].isin(values)]
    labels = {label: label.replace("_", " ").lower() for label in sorted(table[column].unique())}
    source = {"source": str(Path(data) / file), "columns": {"text": "text", "target": column}, "split_column": "split",
              "max_records": most, "where": where}  # fmt: skip
    return {
        "task": {"name": "classification", "instruction": instruction, "labels": labels},
        "data": source,
        "partition": {"kind": "iid", "num_clients": clients},
    }


def world_of(
    args: argparse.Namespace, seed: int, clients: Mapping[str, int] = CLIENTS, rate: float = RATE, **parts: Any
) -> ExperimentContext:
    """The federation of these clients by group; `parts` of the recipe in the place of the bench's own."""
    total = {name: number * RECORDS for name, number in CLIENTS.items()}
    tree = {
        "seed": seed,
        "backbone": {"name": "minilm", "options": {"max_tokens": 48}},
        "prompt": {"num_tokens": 10, "enters_at": 4, "init": "vocabulary"},
        "training": {"local_steps": 5, "batch_size": 16},
        "federation": {"num_rounds": args.rounds},
        "groups": {name: group(name, args.data, number, total[name] // number) for name, number in clients.items()},
    }
    return faster(build_context(parse(tomli_w.dumps(tree | parts))), rate)


def faster(context: ExperimentContext, rate: float = RATE) -> ExperimentContext:
    """The same with this many times its learning rate."""
    training = context.experiment.training
    quick = training.model_copy(update={"learning_rate": rate * (training.learning_rate or 0)})
    return replace(context, experiment=context.experiment.model_copy(update={"training": quick}))


def trial(
    context: ExperimentContext, method: dict[str, Any], folder: Path, **changes: dict[str, Any]
) -> dict[str, float]:
    """One method in this world, its run in `folder`; figures in percent: over clients, by group, and those of the prompts
    that serve everybody (each task counts once)."""
    experiment = context.experiment.model_copy(update={"method": validated_section("methods", method, "bench")})
    for name, update in changes.items():
        experiment = experiment.model_copy(update={name: getattr(experiment, name).model_copy(update=update)})
    result = run_method(replace(context, experiment=experiment), experiment.method, RunDir(folder), None, no_progress)
    scores, clusters = result.scores, result.clusters
    found = {"mean client": 100 * scores.per_client_mean["accuracy"]}
    for group_name in context.tasks:
        own = [s["accuracy"] for name, s in scores.per_client.items() if name.startswith(group_name + ".")]
        found[group_name] = 100 * sum(own) / len(own)
    both = {"global": scores.global_prompt, "distilled": scores.distilled}
    found |= {key: 100 * score["accuracy"] for key, score in both.items() if score}
    found["rand index"] = (clusters and clusters.adjusted_rand.get("group")) or 0.0
    found["prototypes"] = clusters.number if clusters else 0
    found["bytes up"], found["seconds"] = result.bytes.up_per_client_round, result.seconds.total
    if result.privacy.epsilon is not None and result.privacy.noise:
        found["epsilon"] = result.privacy.epsilon
    return found


def alone(context: ExperimentContext, method: dict[str, Any], **changes: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return trial(context, method, Path(folder) / "run", **changes)


METHODS: dict[str, dict[str, Any]] = {
    "zero-shot": {"name": "zero_shot"},
    "fedavg": {"name": "fedavg"},
    "ficpd, 5 prototypes": PROTOTYPES,
    "ficpd, oracle": PROTOTYPES | {"space": "metadata"},
    "local": {"name": "local"},
    "ficpd, K found": PROTOTYPES | {"num_prototypes": "auto"},
}


FARTHER = {"server": {"kind": "extrapolated"}}


def setting(args: argparse.Namespace) -> str:
    return f"{args.rounds} rounds of 5 steps of 16, entry 4, {RATE:g} times the catalog's rate"


def told(texts: str | None) -> str:
    return Path(texts).name if texts else "words of the vocabulary"


def mixed(args: argparse.Namespace) -> None:
    cells = Cells("library_mixed", f"30 clients of about {RECORDS} records, {setting(args)}")
    for seed in args.seeds:
        context = world_of(args, seed)
        for name, method in METHODS.items():
            cells.add(name, seed, partial(alone, context, method))


def private(args: argparse.Namespace) -> None:
    """Record level, at sites of 400 records; steps are fewer and larger, because each one's noise is paid for. Prototypes
    are found by what was learned, or go by who has which task, which is public. Nothing leaves a client alone: no noise."""
    cells = Cells(
        "library_private", f"18 clients of about 400 records, {args.rounds} rounds of 2 steps of 64, Adam in 64 numbers"
    )
    groups = {name: group(name, args.data, number, SITE_RECORDS) for name, number in SITES.items()}
    budgets = {"no privacy": {"name": "none"}, "ε = 2": {"name": "record_gaussian", "epsilon": 2.0}}
    for seed in args.seeds:
        for said, budget in budgets.items():
            context = world_of(args, seed, rate=1.0, privacy=budget, groups=groups, **PRIVATE)
            names = ("zero-shot", "fedavg", "ficpd, oracle", "ficpd, 5 prototypes")
            for name in (*names, *(("local",) if budget["name"] == "none" else ())):
                cells.add(f"{name}, {said}", seed, partial(alone, context, METHODS[name]))


def defaults(args: argparse.Namespace) -> None:
    """What a client gains by joining many tasks: no option is named, and the learning rate is the backbone's own."""
    cells = Cells("library_defaults", f"defaults alone, {args.rounds} rounds of 5 steps of 16; private: 2 steps of 64")
    sites = {name: group(name, args.data, number, SITE_RECORDS) for name, number in SITES.items()}
    budget = {"name": "record_gaussian", "epsilon": 2.0}
    for seed in args.seeds:
        context = world_of(args, seed, rate=1.0)
        for name in ("ficpd", "local", "linear_probe", "analytic", "class_means", "fedavg"):
            cells.add(name, seed, partial(alone, context, {"name": name}))
        for number in (CROWDS[0], CROWDS[-1]):
            shares = {name: max(1, round(number * CLIENTS[name] / 30)) for name in CLIENTS}
            crowd = world_of(args, seed, shares | {"polarity": max(4, shares["polarity"])}, 1.0)
            cells.add(f"ficpd, {number} clients", seed, partial(alone, crowd, {"name": "ficpd"}))
        training = PRIVATE["training"]
        context = world_of(args, seed, rate=1.0, privacy=budget, groups=sites, training=training)
        for name in ("ficpd", "local", "linear_probe", "class_means"):
            cells.add(f"{name}, 18 sites of 400, ε = 2", seed, partial(alone, context, {"name": name}))
        summed = {**budget, "name": "shared_gaussian"}
        context = world_of(args, seed, rate=1.0, privacy=summed, groups=sites, training=training)
        cells.add("ficpd, 18 sites of 400, ε = 2 with shared noise", seed, partial(alone, context, {"name": "ficpd"}))


def ablation(args: argparse.Namespace) -> None:
    """Each federation is run once; the prompt distilled from its prototypes is scored beside its global one."""
    cells = Cells("library_ablation", f"as library_mixed, {setting(args)}; squared distillation on {told(args.texts)}")
    distillation = {"how": "squared", "texts": args.texts} if args.texts else {"how": "squared", "per_label": 5}
    for seed in args.seeds:
        context = world_of(args, seed)
        for number in (1, 2, 5, 10, 20):
            method = PROTOTYPES | {"num_prototypes": number}
            cells.add(f"{number} prototypes, delta", seed, partial(alone, context, method, distillation=distillation))


def clients(args: argparse.Namespace) -> None:
    """The same records among more clients; 20 take part in a round (all, where there are fewer). Few steps and more rounds:
    five steps on six records are no longer the task's (10 rounds of 5 at 200 clients: 69.1, 25 of 2: 70.9, one seed)."""
    schedule: dict[str, Any] = {
        "federation": {"num_rounds": 25},
        "training": {"local_steps": 2, "batch_size": 16},
    }
    cells = Cells("library_clients", f"{30 * RECORDS} records, 20 clients a round, 25 rounds of 2 steps of 16, entry 4")
    for seed in args.seeds:
        for number in CROWDS:
            shares = {name: max(1, round(number * CLIENTS[name] / 30)) for name in CLIENTS}
            shares["polarity"] = max(4, shares["polarity"])
            context = world_of(args, seed, clients=shares, **schedule)
            named = {name: METHODS[name] for name in ("ficpd, 5 prototypes", "ficpd, oracle", "fedavg")}
            named |= {f"{name}, extrapolated": method | FARTHER for name, method in list(named.items())[:2]}
            for name, method in named.items() if number in (CROWDS[0], CROWDS[-1]) else list(named.items())[:1]:
                cohort = {"clients_per_round": min(20, len(context.shards))}
                cells.add(f"{number} clients, {name}", seed, partial(alone, context, method, federation=cohort))


def texts(args: argparse.Namespace) -> None:
    """Four drafts for every label, into the file `--texts`: public, for the writer is, and the labels' texts are."""
    writer, _ = load_backbone(BackboneConfig(name=args.writer), EngineConfig())
    found = []
    for name in CLIENTS:
        made = generate_texts(writer, {}, build_task(group(name, args.data, 1, RECORDS)["task"]), 4, 0)
        print(name, made.summary(), flush=True)
        found += [example.text for example in made.examples]
    Path(args.texts).write_text("".join(f"{text}\n" for text in found), encoding="utf-8")


PARTS = {
    "mixed": mixed,
    "defaults": defaults,
    "private": private,
    "ablation": ablation,
    "clients": clients,
    "texts": texts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--texts", help="public texts to distil on, one a line; none: words of the vocabulary")
    parser.add_argument("--writer", default="smollm2", help="texts: the backbone that writes them")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
