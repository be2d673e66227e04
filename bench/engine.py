"""How much of the time is the model's own: engine efficiency, lock step, entering in the middle.

    python bench/engine.py [--backbone minilm] [--repeats 7]      about ten minutes on two cores

All figures are ratios from one run. Every measurement takes its parts in turn, so that a drifting machine hits all alike.
"""

import argparse

import torch

from ficpd.backbones.chunks import bucket_by_shape, shape_of
from ficpd.backbones.memory import CHUNK_TOKENS
from ficpd.backbones.query_engine import QueryEngine, run_queries, run_queries_lockstep
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.federation.client import Client
from ficpd.federation.execution import execute_assignment
from ficpd.interfaces import Backbone
from ficpd.methods import fedavg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import Answer, FederationInfo, Prompt, Query
from measure import medians, paired, ratio, read, save

CLIENTS, RECORDS, TOKENS = 16, 8, 10


def context(backbone: str, *changes: str) -> ExperimentContext:
    settings = [f"backbone.name={backbone}", "data.max_records=4000", "partition.min_records=2"]
    settings += [f"prompt.num_tokens={TOKENS}", *changes]
    return build_context(read("quickstart", settings))


def start_at(backbone: Backbone, layer: int) -> Prompt:
    return Prompt(backbone.init_prompt(None, TOKENS, layer, 0), backbone.fingerprint, layer)


def queries(built: ExperimentContext, start: Prompt, clients: int, records: int) -> list[Query]:
    """`clients` queries of `records` real sentences each, encoded for the prompt's layer."""
    pool = [r for shard in built.shards.values() for r in shard.train][: clients * records]
    batch = built.task.encode(pool, built.model.backbone, start)
    parts = [batch.select(range(c * records, (c + 1) * records)) for c in range(clients)]
    return [Query(start.vectors_PD[None], part, grad=True) for part in parts]


def bare(backbone: Backbone, asked: list[Query], layer: int, sort: bool):
    """Forward and backward of the backbone alone on the same rows: nothing clipped, split, scored or gathered.

    `sort`: in the chunks that the engine makes; else in one batch, padded to the longest, as a plain loop would.
    """
    items = [item for query in asked for (item,) in query.batch.items]
    items = sorted(items, key=lambda item: item.length) if sort else items
    parts = (
        list(bucket_by_shape(items, lambda item: shape_of([item]), CHUNK_TOKENS["cpu"], TOKENS)) if sort else [items]
    )
    kept = [backbone.encode_prefix(part, layer) for part in parts]
    prompt = asked[0].prompts_KPD[0]

    def work() -> None:
        for part, hidden in zip(parts, kept, strict=True):
            rows = prompt.expand(len(part), -1, -1).clone().requires_grad_(True)
            backbone.forward(rows, hidden, part, layer).features_RD.sum().backward()

    return work


def efficiency(built: ExperimentContext, repeats: int) -> dict:
    """The bare backbone's seconds over the engine's, for the same 16 x 8 rows."""
    backbone, found = built.model.backbone, {}
    for layer in sorted({0, built.start.enters_at}):
        asked = queries(built, start_at(backbone, layer), CLIENTS, RECORDS)
        works = {
            "bare": bare(backbone, asked, layer, sort=True),
            "bare, one padded batch": bare(backbone, asked, layer, sort=False),
            "engine": lambda asked=asked: built.model.answer(asked),
        }
        seconds = paired(works, repeats)
        found[f"enters_at={layer}"] = {
            "efficiency": ratio(seconds, "bare", "engine"),
            "against one padded batch": ratio(seconds, "bare, one padded batch", "engine"),
            "seconds": medians(seconds),
        }
    return found


def lock_step(built: ExperimentContext, repeats: int) -> dict:
    """One client after another over all in one forward, for small and large shares of rows."""
    found = {}
    for records in (1, 2, 8, 32):
        asked = queries(built, built.start, CLIENTS, records)
        works = {
            "one after another": lambda asked=asked: [built.model.answer([query]) for query in asked],
            "lock step": lambda asked=asked: built.model.answer(asked),
        }
        seconds = paired(works, repeats)
        gain = ratio(seconds, "one after another", "lock step")
        found[f"{CLIENTS} x {records}"] = {"gain": gain, "seconds": medians(seconds)}
    return found


def middle(built: ExperimentContext, repeats: int) -> dict:
    """A step that enters at 0 over one that enters in the middle with the layers below kept; and their equality."""
    backbone = built.model.backbone
    layer = built.start.enters_at or backbone.depth // 2
    bottom, mid = (queries(built, start_at(backbone, n), CLIENTS, RECORDS) for n in (0, layer))
    forgetful = QueryEngine(backbone, keep_bytes=0)
    works = {
        "enters at 0": lambda: built.model.answer(bottom),
        f"enters at {layer}, kept": lambda: built.model.answer(mid),
        f"enters at {layer}, not kept": lambda: forgetful.answer(mid),
    }
    seconds = paired(works, repeats)
    kept, fresh = built.model.answer(mid), forgetful.answer(mid)
    apart = max(float((_grad(a) - _grad(b)).abs().max()) for a, b in zip(kept, fresh, strict=True))
    scale = max(float(_grad(a).abs().max()) for a in kept)
    return {
        "layer": layer,
        "gain over entering at 0": ratio(seconds, "enters at 0", f"enters at {layer}, kept"),
        "gain of keeping": ratio(seconds, f"enters at {layer}, not kept", f"enters at {layer}, kept"),
        "largest difference of a gradient, relative": apart / scale,
        "seconds": medians(seconds),
    }


def _grad(answer: Answer) -> torch.Tensor:
    assert answer.grad_KBPD is not None
    return answer.grad_KBPD


def agreement(built: ExperimentContext) -> float:
    """Largest difference between clients driven singly and in lock step, over three steps, relative to the prompt."""
    method = fedavg.build(fedavg.Config(), LocalTrainingConfig(local_steps=3, batch_size=4, learning_rate=0.01))

    def updates(together: bool) -> dict[str, torch.Tensor]:
        clients = dict(list(built.clients().items())[:6])
        order = method.make_assignment(
            method.init(FederationInfo(built.start, [], 1, 6, 0)), next(iter(clients.values())).card, 1
        )
        works = {name: _work(method, client, order) for name, client in clients.items()}
        done = (
            run_queries_lockstep(built.model, works)
            if together
            else [(n, run_queries(built.model, w)) for n, w in works.items()]
        )
        found = {}
        for name, update in done:
            if isinstance(update, Exception):
                raise update
            found[name] = update.arrays["delta"]
        return found

    alone, together = updates(False), updates(True)
    scale = float(built.start.vectors_PD.abs().mean())
    return max(float((alone[name] - together[name]).abs().max()) for name in alone) / scale


def _work(method, client: Client, order):
    return execute_assignment(method, client, order)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="minilm")
    options.add_argument("--repeats", type=int, default=7)
    given = options.parse_args()
    built = context(given.backbone)
    chosen = built.experiment.backbone
    result = {"backbone": given.backbone, "dtype": chosen.dtype, "attention": chosen.attention}
    for name, measure in (
        ("efficiency", efficiency),
        ("lock step", lock_step),
        ("entering in the middle", middle),
    ):
        result[name] = measure(built, given.repeats)
        print(name, result[name], flush=True)
    result["driven singly against lock step, relative difference"] = agreement(built)
    save(f"engine-{given.backbone}", result)


if __name__ == "__main__":
    main()
