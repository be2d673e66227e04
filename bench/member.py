"""What a library gives a member with records of its own: every way of `adapt`, beside its model in the federation. MiniLM.

python bench/member.py [--seeds 0 1 2] [--data FOLDER] [--records 80]

The sets and partitions of `compare.py joining`: ten clients, defaults alone. Then each client adapts the library to all of
its training records and is scored on its own test records. Figures are means over clients, in percent.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import tomli_w

from compare import IID, SKEWED, TASKS
from ficpd.backbones.query_engine import run_queries
from ficpd.evaluation.evaluate import predictions_of
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from ficpd.library.adaptation import STRATEGIES, AdaptedPrompt
from ficpd.library.library import PromptLibrary
from ficpd.library.selection import adapt, prepare_shots
from ficpd.registry import validated_section
from ficpd.types import ClientData
from library import group
from measure import Cells, parse

WAYS = ("leave", "head", "ensemble", "mixture")
CLIENTS = 10


def context_of(args: argparse.Namespace, task: str, partition: dict, seed: int) -> ExperimentContext:
    tree = {
        "seed": seed,
        "backbone": {"name": "minilm", "options": {"max_tokens": 48}},
        "prompt": {"num_tokens": 10, "enters_at": 4, "init": "vocabulary"},
        "training": {"local_steps": 5, "batch_size": 16},
        "federation": {"num_rounds": 8},
        **group(task, args.data, CLIENTS, args.records),
        **partition,
    }
    return build_context(parse(tomli_w.dumps(tree)))


def scored(context: ExperimentContext, client: ClientData, fitted: AdaptedPrompt) -> float:
    task, model = context.task, context.model
    batch = fitted.encode(task, client.test, model.backbone)
    found = run_queries(model, predictions_of(task, fitted.predictors(), batch))
    return 100 * task.score(found, task.targets(client.test))["accuracy"]


def trial(context: ExperimentContext, seed: int, auto: bool) -> dict[str, float]:
    method = validated_section("methods", {"name": "ficpd"}, "bench")
    with tempfile.TemporaryDirectory() as folder:
        result = run_method(context, method, RunDir(Path(folder) / "run"), None, no_progress)
        library = PromptLibrary.load(Path(folder) / "run")
    found: dict[str, list[float]] = {}
    for client in context.shards.values():
        training = context.experiment.training
        shots = prepare_shots(library, client.train, context.task, context.model, training, seed)
        for way in WAYS:
            *_, fitted = run_queries(context.model, STRATEGIES[way](shots)).values()
            found.setdefault(way, []).append(scored(context, client, fitted))
        if auto:
            chosen = adapt(library, client.train, context.task, context.model, training, "auto", seed)
            found.setdefault("auto", []).append(scored(context, client, chosen.fitted))
            found.setdefault("auto takes the mixture", []).append(100.0 * (chosen.way == "mixture"))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    worse = [m < leave for m, leave in zip(found["mixture"], found["leave"], strict=True)]
    return {
        "in the run": 100 * result.scores.per_client_mean["accuracy"],
        **means,
        "below leave": 100 * sum(worse) / len(worse),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--records", type=int, default=80, help="training records of a client, in the mean")
    parser.add_argument("--auto", action="store_true", help="also what `auto` chooses, which takes most of the time")
    args = parser.parse_args()
    cells = Cells("member", f"{CLIENTS} clients of {args.records}, defaults alone, 8 rounds of 5 steps of 16, entry 4")
    for seed in args.seeds:
        for task in TASKS:
            for name, partition in {"alike": IID, "labels by Dirichlet 0.3": SKEWED}.items():
                context = context_of(args, task, partition, seed)
                cells.add(f"{task}, {name}", seed, partial(trial, context, seed, args.auto))


if __name__ == "__main__":
    main()
