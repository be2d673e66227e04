"""How much of the time is the model's own: engine efficiency, lock step, entering in the middle.

    python bench/engine.py [--backbone minilm] [--e5 FOLDER] [--dtypes float32 bfloat16] [--repeats 5] [--compiled]

All figures are ratios from one run. Every measurement takes its parts in turn, so that a drifting machine hits all alike.
The bare backbone runs in three ways: a forward for each thread at a time, in this process, as the engine does; one forward
of all threads at a time; and one of all rows, padded to the longest. The last two are in a process of their own, because
torch keeps the kernels that it chose first. `--compiled` adds one whose blocks torch.compile has compiled.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ficpd.backbones import loading
from ficpd.backbones.chunks import bucket_by_shape, shape_of
from ficpd.backbones.query_engine import QueryEngine, run_queries, run_queries_lockstep
from ficpd.backbones.query_rows import Row
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.federation.client import Client
from ficpd.federation.execution import execute_assignment
from ficpd.interfaces import Backbone
from ficpd.methods import fedavg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import Answer, EncodedInput, FederationInfo, Prompt, Query
from measure import medians, paired, quietness, ratio, read, save

CLIENTS, RECORDS, TOKENS = 16, 8, 10
SIZES = "16x1", "16x8", "16x32", "64x32"
MANY = 512
"""Rows from which on a turn is repeated three times at most."""
Work = Callable[[], object]


def context(*backbone: str) -> ExperimentContext:
    settings = ["data.max_records=6000", "partition.min_records=2", f"prompt.num_tokens={TOKENS}"]
    return build_context(read("quickstart", [*settings, *backbone]))


def start_at(backbone: Backbone, layer: int) -> Prompt:
    return Prompt(backbone.init_prompt(None, TOKENS, layer, 0), backbone.fingerprint, layer)


def queries(built: ExperimentContext, layer: int, clients: int, records: int) -> list[Query]:
    """`clients` queries of `records` real sentences each, encoded for a prompt at this layer."""
    start = start_at(built.model.backbone, layer)
    pool = [r for shard in built.shards.values() for r in shard.train][: clients * records]
    assert len(pool) == clients * records, f"{len(pool)} records are too few for {clients} x {records}"
    batch = built.task.encode(pool, built.model.backbone, start)
    parts = [batch.select(range(c * records, (c + 1) * records)) for c in range(clients)]
    return [Query(start.vectors_PD[None], part, grad=True) for part in parts]


# ---------------------------------------------------------------- the bare backbone


def bare(backbone: Backbone, asked: list[Query], layer: int, sort: bool = True, workers: int = 1) -> Work:
    """Forward and backward of the backbone alone on the same rows: nothing clipped, split, scored or gathered.

    `sort`: in the chunks that the engine makes; else in one batch, padded to the longest, as a plain loop would.
    `workers`: chunks at a time.
    """
    items = [item for query in asked for (item,) in query.batch.items]
    tokens = QueryEngine(backbone).tokens_per_chunk([Row(0, 0, 0, _shape(item)) for item in items], TOKENS)
    parts = list(bucket_by_shape(items, _shape, tokens, TOKENS)) if sort else [items]
    chunks = [(part, backbone.encode_prefix(part, layer)) for part in parts]
    prompt = asked[0].prompts_KPD[0]

    def one(chunk: tuple[list[EncodedInput], list[torch.Tensor]]) -> None:
        part, hidden = chunk
        rows = prompt.expand(len(part), -1, -1).clone().requires_grad_(True)
        backbone.forward(rows, hidden, part, layer).features_RD.sum().backward()

    def work() -> None:
        if workers == 1:
            for chunk in chunks:
                one(chunk)
            return
        with ThreadPoolExecutor(workers, initializer=torch.get_num_threads) as pool:
            list(pool.map(one, chunks))

    return work


def _shape(item: EncodedInput):
    return shape_of([item])


class AllThreads(AbstractContextManager):
    """The bare backbone in a process of its own, where one forward pass has all threads."""

    def __init__(self, compiled: bool, *of: str):
        spawn = multiprocessing.get_context("spawn")
        self.ours, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_all_threads, args=(theirs, compiled, *of), daemon=True)
        self.process.start()
        theirs.close()

    def prepared(self, layer: int, clients: int, records: int, sort: bool = True) -> Work:
        """Returns a work of this process. Its first call also prepares it."""
        wanted = layer, clients, records, sort

        def work() -> None:
            self.ours.send(wanted)
            self.ours.recv()

        return work

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.join()


def _all_threads(told: Connection, compiled: bool, *of: str) -> None:
    loading.set_single_threaded_forward = lambda: None
    built, works = context(*of), {}
    if compiled:
        built.model.backbone.model.compile(dynamic=True)
    while True:
        wanted = layer, clients, records, sort = told.recv()
        if wanted not in works:
            works[wanted] = bare(built.model.backbone, queries(built, layer, clients, records), layer, sort)
        works[wanted]()
        told.send(True)


def efficiency(
    built: ExperimentContext, others: dict[str, AllThreads], layers: list[int], sizes: list[str], repeats: int
) -> dict:
    """The bare backbone's seconds over the engine's, for the same rows; 1 is an engine that costs nothing.

    `efficiency` is that of the fastest of the bare ways, by medians, for an engine that fills no chunks, as the bare ways
    do not; `reproducible` that of the default.
    """
    found = {}
    for layer, size in ((layer, size) for layer in layers for size in sizes):
        clients, records = map(int, size.split("x"))
        asked = queries(built, layer, clients, records)
        free = QueryEngine(built.model.backbone)
        works: dict[str, Work] = {
            "engine": partial(built.model.answer, asked),
            "engine, bits may differ": partial(free.answer, asked),
            "a forward for each thread": bare(built.model.backbone, asked, layer, workers=built.model.workers),
        }
        works |= {name: beside.prepared(layer, clients, records) for name, beside in others.items()}
        if clients * records < MANY:  # a batch of thousands of rows may not fit
            works["one padded batch"] = others["forwards of all threads"].prepared(layer, clients, records, False)
        seconds = paired(works, repeats if clients * records < MANY else min(repeats, 3))
        bare_ways = [name for name in works if not name.startswith("engine")]
        ratios = {name: ratio(seconds, name, "engine, bits may differ") for name in bare_ways}
        best = min(ratios, key=lambda name: ratios[name]["median"])
        found[f"layer {layer}, {clients} x {records}"] = {
            "efficiency": ratios[best]["median"], "best": best, "ratios": ratios,
            "reproducible": ratio(seconds, best, "engine"), "seconds": medians(seconds),
        }  # fmt: skip
        print(f"layer {layer}, {size}", found[f"layer {layer}, {clients} x {records}"], flush=True)
    return found


# ---------------------------------------------------------------- lock step, and the middle


def lock_step(built: ExperimentContext, sizes: list[str], repeats: int) -> dict:
    """One client after another over all in one forward, for small and large shares of rows."""
    found = {}
    for clients, records in (map(int, size.split("x")) for size in sizes):
        asked = queries(built, built.start.enters_at, clients, records)
        works = {
            "one after another": lambda asked=asked: [built.model.answer([query]) for query in asked],
            "lock step": lambda asked=asked: built.model.answer(asked),
        }
        seconds = paired(works, repeats)
        gain = ratio(seconds, "one after another", "lock step")
        found[f"{clients} x {records}"] = {"gain": gain, "seconds": medians(seconds)}
    return found


def middle(built: ExperimentContext, layer: int, repeats: int) -> dict:
    """A step that enters at 0 over one that enters in the middle with the layers below kept; and their equality."""
    backbone = built.model.backbone
    bottom, mid = (queries(built, n, CLIENTS, RECORDS) for n in (0, layer))
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
    options.add_argument("--e5", type=Path, help="folder of multilingual-e5-small, in the place of --backbone")
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--sizes", nargs="+", default=list(SIZES), help="clients x records of each")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--compiled", action="store_true", help="adds torch.compile, which takes minutes")
    given = options.parse_args()
    name, of = given.backbone, [f"backbone.name={given.backbone}"]
    if given.e5:
        name, of = "multilingual-e5-small", [f"backbone.name={given.e5}", "backbone.kind=sentence_encoder"]
    result = {"backbone": name, "quiet": quietness()}
    for dtype in given.dtypes:
        here = [*of, f"backbone.dtype={dtype}"]
        built = context(*here)
        half, chosen = built.model.backbone.depth // 2, built.experiment.backbone
        with ExitStack() as stack:
            others = {"forwards of all threads": stack.enter_context(AllThreads(False, *here))}
            if given.compiled:
                others["compiled"] = stack.enter_context(AllThreads(True, *here))
            measured = efficiency(built, others, [0, half], given.sizes, given.repeats)
        result[dtype] = {"attention": chosen.attention, "efficiency": measured}
        result[dtype]["lock step"] = lock_step(built, given.sizes, given.repeats)
        result[dtype]["entering in the middle"] = middle(built, half, given.repeats)
        result[dtype]["driven singly against lock step, relative difference"] = agreement(built)
        print(dtype, result[dtype]["lock step"], result[dtype]["entering in the middle"], flush=True)
        save(f"engine-{name}", result)


if __name__ == "__main__":
    main()
