"""The experiment that the two designs describe, whole: what they claim, on their own kinds of sets.

python bench/design.py methods|rounds|shape|epsilon|attacks|server
                       [--seeds 0] [--data FOLDER] [--e5 FOLDER] [--sets NAME ...]

`methods`: FICPD, FPL, the rivals that the designs name, and rivals without prompts, on medical abstracts under label skew,
XNLI in 15 languages, PAWS-X in 7, PubMedQA, and MedMCQA by specialty: accuracy, the worst clients, who is worse off,
gaps between groups, bytes, and the accuracy after each round. `rounds`: FICPD ended after one and two rounds, and
FedAvg after eight, on the records of `compare.py joining`. `shape`: prompt length, compressed length and number of
prototypes on five tasks. `epsilon`: ε = 1, 2, 4 on the records of `compare.py private`. `attacks`: who was a member, by
what a library answers. `server`: one prompt, prototypes, and what is distilled or meta-learned from them.

Each method has its own defaults; on E5 all have ten times the found learning rate (FICPD's own threefold included), and
FedBPT has the plain loss and narrower first candidates. A cell of a seed that the result file has is not run again.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from compare import IID, SKEWED, TASKS
from exams import recipe
from ficpd.data import loading
from ficpd.evaluation.audit.attack_metrics import attack_metrics, best_advantage
from ficpd.evaluation.audit.member_split import split_records
from ficpd.evaluation.audit.shadow_prompts import losses
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from ficpd.library.library import PromptLibrary
from library import PROTOTYPES, RATE, alone, faster, group, world_of
from measure import Cells, parse
from privacy_audit import RECIPE

METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {"name": "zero_shot"},
    "local": {"name": "local"},
    "linear_probe": {"name": "linear_probe"},
    "analytic": {"name": "analytic"},
    "centralized": {"name": "centralized"},
    "fedavg": {"name": "fedavg"},
    "ficpd": {"name": "ficpd"},
    "fpl": {"name": "fpl"},
    "fedhpl": {"name": "fedhpl"},
    "fedbpt": {"name": "fedbpt", "iterations": 4, "ratio": False, "spread": 0.3},
    "feddtpt": {"name": "feddtpt"},
}
SETS: dict[str, dict[str, Any]] = {
    "abstracts": {"train": 800},
    "xnli": {"train": 600, "tokens": 64, "group": "lang", "without": ("fedbpt",)},
    "pawsx": {"train": 560, "tokens": 96, "group": "lang", "without": ("fedbpt",)},
    "pubmedqa": {"train": 480, "tokens": 128, "without": ("fedbpt",)},
    "medmcqa": {
        "train": 320,
        "tokens": 96,
        "group": "subject",
        "without": ("fedbpt", "linear_probe", "analytic", "fedhpl"),
    },
}
"""Set: training records of all clients, the longest text in tokens, the column whose groups are compared, and methods
left out: a choice among options has no labels to read from features, and FedBPT's queries take too long on E5."""
MINILM = {
    "backbone": {"name": "minilm", "options": {"max_tokens": 48}},
    "prompt": {"num_tokens": 10, "enters_at": 4, "init": "vocabulary"},
}
"""As the other benches have it."""
E5_RATE = 10.0
"""Of the found rate, as in `exams.py`."""
ROUNDS = 4
STEPS = {"local_steps": 4, "batch_size": 16}
ENDED = (("fedavg", 8), ("ficpd", 1), ("ficpd", 2))
"""Runs of `rounds`: a method, and its number of rounds."""
LENGTHS, DIMENSIONS, NUMBERS = (10, 20, 50), (64, 256, None), (5, 10, 20)
BUDGETS = (1.0, 2.0, 4.0, None)
"""ε of `epsilon`; None: no privacy."""
SERVER: dict[str, dict[str, Any]] = {
    "5 prototypes": {},
    "squared, words": {"how": "squared"},
    "squared, written": {"how": "squared", "writer": "smollm2"},
    "KL, written": {"how": "kl", "writer": "smollm2"},
    "Reptile, written": {"how": "reptile", "writer": "smollm2"},
    "MAML, written": {"how": "maml", "writer": "smollm2"},
}
"""Settings of the distillation. Clients of different tasks share no prototype, so there is one for each of five tasks."""
WRITTEN = 4
"""Drafts for each label."""
ATTACKED = (
    "task.tuned_head=false", "partition.num_clients=4", "training.batch_size=50", "training.decay=0.1",
    "federation.num_rounds=10",
)  # fmt: skip
"""What differs from the site of `privacy_audit.py`."""
NONMEMBERS = 1000


def methods(args: argparse.Namespace) -> None:
    cells = Cells("design_methods", f"{ROUNDS} rounds of {STEPS['local_steps']} steps of {STEPS['batch_size']}")
    for name in args.sets:
        for seed in args.seeds:
            asked = [method for method in METHODS if method not in SETS[name].get("without", ())]
            missing = [method for method in asked if not cells.has(f"{name}, {method}", seed)]
            if not missing:
                continue
            with tempfile.TemporaryDirectory() as folder:
                context = design_world(args, seed, name, Path(folder))
                for method in missing:
                    cells.add(f"{name}, {method}", seed, partial(row, context, method, Path(folder) / method))


def design_world(args: argparse.Namespace, seed: int, name: str, folder: Path) -> ExperimentContext:
    about = SETS[name]
    common = {"training": STEPS, "federation": {"num_rounds": ROUNDS}}
    if name == "abstracts":
        skewed = {"kind": "dirichlet", "num_clients": 10, "concentration": 0.3, "min_records": 16}
        parts = group(name, args.data, 10, about["train"] // 10) | {"partition": skewed}
        return build_context(parse(tomli_w.dumps({"seed": seed, **MINILM, **common, **parts})))
    tree: dict[str, Any] = recipe(args, seed, name, folder, about["train"]) | common
    options = {"max_tokens": about["tokens"], "prefix": "query: "}
    tree["backbone"] = {"name": str(args.e5), "kind": "sentence_encoder", "options": options}
    tree["prompt"] = tree["prompt"] | {"enters_at": 6}
    if "group" in about:
        tree["fairness"] = {"group": about["group"]}
        tree["data"]["keep"] = [about["group"]]
    return faster(build_context(parse(tomli_w.dumps(tree))), E5_RATE)


def row(context: ExperimentContext, method: str, folder: Path) -> dict[str, float]:
    """One method's figures, in percent; `of CLIENT` and `after ROUND` too, which the page's table reads."""
    config = METHODS[method]
    if method == "ficpd" and context.experiment.backbone.name != "minilm":
        config = config | {"rate_multiple": 1.0}
    return figures(run_method(context, config, RunDir(folder), None, no_progress), folder)


def figures(result: RunResult, folder: Path) -> dict[str, float]:
    scores = result.scores
    own = {name: 100 * score["accuracy"] for name, score in scores.per_client.items()}
    worst = sorted(own.values())[: -(-len(own) // 10)]
    found = {"own": 100 * scores.per_client_mean["accuracy"], "worst tenth": sum(worst) / len(worst)}
    if scores.global_prompt:
        found["everyone"] = 100 * scores.global_prompt["accuracy"]
    for gaps in result.fairness.groups.values() if result.fairness else ():
        both = {"parity gap": gaps.demographic_parity, "odds gap": gaps.equalised_odds}
        found |= {name: 100 * gap.gap for name, gap in both.items() if gap}
    found |= {"bytes up": result.bytes.up_total / len(own), "seconds": result.seconds.total}
    found |= {f"of {name}": value for name, value in own.items()}
    found |= {f"tests of {name}": number for name, number in scores.test_records.items()}
    for done in RunDir(folder).rounds():
        if "sample_accuracy" in done.metrics:
            found[f"after {done.round}"] = 100 * done.metrics["sample_accuracy"]
    return found


def rounds(args: argparse.Namespace) -> None:
    """A run that ends earlier is a run of its own: readouts and mixtures are made in the last round."""
    cells = Cells("design_rounds", "10 clients of 80 records, 5 steps of 16 a round, defaults alone")
    common = {**MINILM, "training": {"local_steps": 5, "batch_size": 16}}
    for seed in args.seeds:
        for task in TASKS:
            for said, partition in {"alike": IID, "skewed": SKEWED}.items():
                parts = {"seed": seed, **common, **group(task, args.data, 10, 80), **partition}
                for method, number in ENDED:
                    cell = f"{task}, {said}, {method}, {number}"
                    if cells.has(cell, seed):
                        continue
                    text = tomli_w.dumps(parts | {"federation": {"num_rounds": number}})
                    cells.add(cell, seed, partial(_own, build_context(parse(text)), METHODS[method]))


def shape(args: argparse.Namespace) -> None:
    """Prototypes alone, as the first design has them: no readout, no mixture."""
    cells = Cells(
        "design_shape", f"30 clients of five tasks, {ROUNDS} rounds of 5 steps of 16, {RATE:g} times the rate"
    )
    args.rounds = ROUNDS
    for seed in args.seeds:
        for length in LENGTHS:
            prompt = {"num_tokens": length, "enters_at": 4, "init": "vocabulary"}
            for dimension in DIMENSIONS:
                name = {"name": "none"} if dimension is None else {"name": "subspace", "dimension": dimension}
                backbone = {"name": "minilm", "options": {"max_tokens": 38 + length}}  # the texts have the same room
                context = world_of(args, seed, prompt=prompt, compression=name, backbone=backbone)
                for number in NUMBERS:
                    said = f"{length} tokens, {dimension or 'all'} numbers, {number} prototypes"
                    cells.add(said, seed, partial(alone, context, PROTOTYPES | {"num_prototypes": number}))


def epsilon(args: argparse.Namespace) -> None:
    """The records of `compare.py private`: six clients of 300. Every step is of all records, as many rounds as there."""
    cells = Cells("design_epsilon", "6 clients of 300 records of polarity, 8 rounds of 2 steps of all records")
    for seed in args.seeds:
        for given in BUDGETS:
            privacy = {"name": "record_gaussian", "epsilon": given} if given else {"name": "none"}
            tree = {
                "seed": seed,
                **MINILM,
                "training": {"local_steps": 2, "batch_size": 300},
                "federation": {"num_rounds": 8},
                "privacy": privacy,
                **group("polarity", args.data, 6, 300),
                "partition": {"kind": "iid", "num_clients": 6},
            }
            context = build_context(parse(tomli_w.dumps(tree)))
            for method in ("ficpd", "fpl", "fedavg", "class_means", "analytic", "local", "linear_probe"):
                if given or method not in ("local", "linear_probe"):
                    said = f"ε = {given:g}" if given else "no privacy"
                    cells.add(f"{method}, {said}", seed, partial(_own, context, METHODS.get(method, {"name": method})))


def _own(context: ExperimentContext, config: Mapping[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        return figures(run_method(context, config, RunDir(directory), None, no_progress), directory)


def attacks(args: argparse.Namespace) -> None:
    """The attacker has the library alone and asks it: a record's loss, and its loss less that under the start."""
    cells = Cells(
        "design_attacks", f"4 clients of 50 records; up to {NONMEMBERS} label-matched non-members; losses alone"
    )
    for seed in args.seeds:
        for said, privacy in {"no privacy": (), "ε = 2": ("privacy.name=record_gaussian", "privacy.epsilon=2")}.items():
            for method in ("fedavg", "fedbpt", "ficpd", "class_means", "analytic"):
                if (method, said) != ("fedbpt", "ε = 2"):  # its own private form is dp_cma_es
                    cells.add(f"{method}, {said}", seed, partial(attacked, seed, method, privacy))
            if privacy:
                cells.add(f"dp_cma_es, {said}", seed, partial(attacked, seed, "dp_cma_es", privacy))


def attacked(seed: int, method: str, privacy: Sequence[str]) -> dict[str, float]:
    context = build_context(parse(RECIPE, [f"seed={seed}", *ATTACKED, *privacy]))
    config = METHODS.get(method, {"name": method})
    with tempfile.TemporaryDirectory() as folder:
        result = run_method(context, config, RunDir(Path(folder) / "run"), None, no_progress)
        library = PromptLibrary.load(Path(folder) / "run")
    shards = context.shards.values()
    spare = [record for shard in shards for record in shard.test]
    assert context.experiment.data is not None
    spare += loading.unsampled(context.experiment.data, seed)
    split = split_records(context.task, [r for s in shards for r in s.train], spare, NONMEMBERS, seed)
    records = [*split.members, *split.outside]
    member_N = np.arange(len(records)) < len(split.members)
    asked = (context.model, context.task)
    start, readout = library.start, library.learned_readout(context.task)
    (loss_N,) = losses(*asked, library.prompts["global"].vectors_PD[None], records, start, readout=readout)
    (start_N,) = losses(*asked, start.vectors_PD[None], records, start)
    scores = {"loss": -loss_N, "difference": start_N - loss_N}
    advantage, interval = best_advantage(scores, member_N, seed)
    found = {"advantage": advantage, "at least": interval[0], "at most": interval[1]}
    found["auc"] = max(attack_metrics(score, member_N, seed).auc for score in scores.values())
    train, test = (float((loss_N[side]).mean()) for side in (member_N, ~member_N))
    found |= {"members' loss": train, "others' loss": test, "own": result.scores.per_client_mean["accuracy"]}
    return found | {"epsilon": result.privacy.epsilon or 0.0}


def server(args: argparse.Namespace) -> None:
    """Prototypes of 30 clients of five tasks; in `distilled`, one prompt made of them on synthetic examples."""
    cells = Cells(
        "design_server", f"30 clients of five tasks, {ROUNDS} rounds of 5 steps of 16, {RATE:g} times the rate"
    )
    args.rounds = ROUNDS
    for seed in args.seeds:
        context = world_of(args, seed)
        cells.add("fedavg", seed, partial(alone, context, {"name": "fedavg"}))
        for said, how in SERVER.items():
            distillation = how | ({"per_label": WRITTEN} if how else {})
            cells.add(said, seed, partial(alone, context, PROTOTYPES, distillation=distillation))


PARTS = {"methods": methods, "rounds": rounds, "shape": shape, "epsilon": epsilon, "attacks": attacks, "server": server}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--e5", type=Path, help="folder of multilingual-e5-small")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="methods: these sets alone")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
