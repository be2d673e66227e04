"""Where a prompt should enter and how fast it should be tuned, per backbone: the measurement behind `catalog.MEASURED`.

    python bench/entry.py minilm 0:0.2 0:0.5 2:0.06 3:0.06 4:0.06
    python bench/entry.py smollm2 0:0.1 0:0.4 10:0.1 20:0.1 --steps 20 --batch 16 --tested 200

A pair is a layer and a learning rate in units of the start's root mean square.

One prompt, all records in one place, Adam; accuracy on held-back records as steps and seconds go by.
"""

import argparse
import time

from ficpd.backbones.query_engine import run_queries
from ficpd.evaluation.evaluate import score_prompt
from ficpd.experiments.build import build_context
from ficpd.experiments.initialization import init_soft_prompt
from ficpd.federation.client import Client, ClientSession
from ficpd.federation.compression import none
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.types import Assignment, ClientCard
from measure import read, save


def curve(built, layer: int, rate: float, steps: int, every: int, batch: int, tested: int) -> dict:
    """Accuracy after each `every` steps, with the seconds spent on the steps (not on the evaluations)."""
    update = {"prompt": built.experiment.prompt.model_copy(update={"enters_at": layer})}
    start, _ = init_soft_prompt(built.experiment.model_copy(update=update), [built.task], built.model.backbone)
    pooled = built.clients(pooled=True)["everyone"]
    whole = none.build(none.Config(), start, 0)
    client = Client(
        ClientCard("one"), pooled.train, (), built.task, built.model.backbone, pooled.mechanism, whole, start, 1
    )
    records = pooled.test[:tested]
    test, targets = built.task.encode(records, built.model.backbone, start), built.task.targets(records)
    built.model.kept.clear()
    rms = float(start.vectors_PD.square().mean().sqrt())
    prompt, memory, seconds, points = start.vectors_PD, {}, 0.0, []
    for part in range(steps // every):
        share = LocalTrainingConfig(learning_rate=rate * rms).rate(part + 1, steps // every)  # the cosine that runs use
        order = Assignment("bench", part, {}, {"rate": share})
        began = time.perf_counter()
        work = tune(
            LocalTrainingConfig(),
            ClientSession(client, part),
            order,
            prompt,
            memory=memory,
            steps=every,
            batch_size=batch,
        )
        prompt = run_queries(built.model, work)
        seconds += time.perf_counter() - began
        accuracy = score_prompt(built.task, prompt, test, targets, built.model)["accuracy"]
        points.append({"steps": (part + 1) * every, "seconds": round(seconds, 2), "accuracy": round(accuracy, 4)})
    return {"layer": layer, "rate": rate, "rms of the start": round(rms, 4), "points": points}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("backbone")
    options.add_argument("pairs", nargs="+", help="LAYER:RATE")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--every", type=int, default=10)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--tested", type=int, default=500)
    given = options.parse_args()
    changes = [f"backbone.name={given.backbone}", "data.max_records=6000", "backbone.options={max_tokens=96}"]
    changes += ["partition.min_records=2"]
    built = build_context(read("quickstart", changes))
    curves = []
    for layer, rate in [pair.split(":") for pair in given.pairs]:
        curves.append(curve(built, int(layer), float(rate), given.steps, given.every, given.batch, given.tested))
        print(curves[-1], flush=True)
    layers = dict.fromkeys(found["layer"] for found in curves)
    best = {layer: max((c for c in curves if c["layer"] == layer), key=_final) for layer in layers}
    reach = _final(best[next(iter(layers))])
    result = {"backbone": given.backbone, "batch": given.batch, "tested": given.tested, "curves": curves}
    result["final accuracy of the first layer named, at its best rate"] = reach
    result["seconds to reach it"] = {str(layer): _reached(chosen, reach) for layer, chosen in best.items()}
    save(f"entry-{given.backbone}", result)


def _final(found: dict) -> float:
    """The mean of the last two points: one evaluation on 500 records has a standard error of two points."""
    return round(sum(point["accuracy"] for point in found["points"][-2:]) / 2, 4)


def _reached(found: dict, accuracy: float) -> float | None:
    return next((point["seconds"] for point in found["points"] if point["accuracy"] >= accuracy), None)


if __name__ == "__main__":
    main()
