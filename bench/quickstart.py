"""The quick start over three seeds: polarity with MiniLM and SmolLM2, and the rating as a regression. Mean and spread.

python bench/quickstart.py [--seeds 0 1 2] [--parts quickstart regression smollm2]    about forty minutes on two cores
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from ficpd.experiments.build import build_context
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.runner import run
from measure import read, save, spread


def one(recipe: str, seed: int) -> dict[str, dict[str, float]]:
    """Every method's figures for one seed. A regression also gets the error of always saying the training mean."""
    experiment = read(recipe, [f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        run(experiment, Path(folder) / "run")
        found = FinishedRun.load(Path(folder) / "run").results
    main = "rmse" if experiment.all_groups[""].task["name"] == "regression" else "accuracy"
    figures = {
        r.label: {
            "epsilon": r.privacy.epsilon,
            f"global {main}": r.scores.global_prompt[main] if r.scores.global_prompt else None,
            f"own {main}, mean client": r.scores.per_client_mean[main],
            "bytes up per client and round": r.bytes.up_per_client_round,
            "seconds": r.seconds.total,
        }
        for r in found
    }
    if main == "rmse":
        figures["training mean"] = {"global rmse": _mean_error(experiment)}
    return figures


def _mean_error(experiment) -> float:
    shards = build_context(experiment).shards.values()
    mean = statistics.mean(r.fields["target"] for shard in shards for r in shard.train)
    return statistics.mean((r.fields["target"] - mean) ** 2 for shard in shards for r in shard.test) ** 0.5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--parts", nargs="+", default=["quickstart", "regression", "smollm2"])
    given = options.parse_args()
    for recipe in given.parts:
        runs = []
        for seed in given.seeds:
            runs.append(one(recipe, seed))
            print(recipe, seed, runs[-1], flush=True)
        table = {
            method: {
                name: spread([found[method][name] for found in runs if found[method][name] is not None])
                for name, value in runs[0][method].items()
                if value is not None
            }
            for method in runs[0]
        }
        save(f"quickstart-{recipe}", {"seeds": given.seeds, "methods": table, "runs": runs})


if __name__ == "__main__":
    main()
