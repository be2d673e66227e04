"""Estimates the memory and the time of an experiment before it runs.

Two rounds and the end of each method run with synthetic answers in the place of the backbone's (`PlanningEngine`), and are
measured. The queries are counted. A few of them are answered by the backbone and timed.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from ficpd.backbones.chunks import HiddenStateCache, shape_of
from ficpd.backbones.devices import free_bytes
from ficpd.backbones.memory import footprint, weight_bytes
from ficpd.backbones.output_cache import OutputCache
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import ConfigError
from ficpd.evaluation.evaluate import evaluate, score_sample
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import Experiment
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import Runner, SimulatedClients, resolve_baselines
from ficpd.types import LORA, Answer, EncodedInput, ModelOutput, Query

TIMED_CHUNKS = 4
"""Chunks of each core that a timed question has at most."""


class Kind(NamedTuple):
    """The facts that decide the seconds of a position. size: bits of the number of positions of a query."""

    enters_at: int
    virtual: int
    grad: bool
    written: int
    size: int


@dataclass
class Work:
    """Seconds of the code around the backbone, and positions by kind that the backbone computes."""

    seconds: float = 0.0
    positions: Counter = field(default_factory=Counter)

    def plus(self, other: "Work", times: float = 1) -> "Work":
        more = {kind: times * count for kind, count in other.positions.items()}
        total = {kind: self.positions[kind] + more.get(kind, 0) for kind in {*self.positions, *more}}
        return Work(self.seconds + times * other.seconds, Counter(total))


class PlanningEngine(QueryEngine):
    """Answers with synthetic numbers; counts positions and keeps one query of each kind."""

    def __init__(self, real: QueryEngine):
        super().__init__(real.backbone, 0, real.chunk_tokens)
        self.real, self.work, self.asked = real, Work(), dict[Kind, list[Query]]()
        self.items, self.trained, self.longest, self.scored = set[EncodedInput](), 0, 1, 0
        self.answered, self.nothing = OutputCache(real.outputs.limit), ModelOutput(torch.zeros(0))
        self.random = torch.Generator().manual_seed(0)

    @contextmanager
    def counting(self) -> Iterator[Work]:
        """Yields the work done in its body."""
        self.work, began = Work(), time.perf_counter()
        yield self.work
        self.work.seconds = time.perf_counter() - began

    def grow(self, records: int, rounds: int, planned: int) -> None:
        """Extrapolates the records read to all rounds, at the number of new ones in these rounds."""
        share = min(len(self.items) / max(records, 1), 1.0)
        self.trained = max(
            self.trained, int(records * (1 - (1 - share) ** (planned / max(rounds, 1)))) - len(self.items)
        )

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        groups: dict[Kind, list[Query]] = {}
        for query in queries:
            groups.setdefault(
                Kind(query.batch.enters_at, _virtual(query), query.grad, query.max_new_tokens, 0), []
            ).append(query)
        for kind, group in groups.items():
            positions = sum(map(self.computed, group))
            most = TIMED_CHUNKS * self.chunk_tokens * self.real.workers
            sized = kind._replace(size=min(positions, most).bit_length())
            self.work.positions[sized] += positions
            if positions and sized not in self.asked:
                self.asked[sized] = self._some(group, most)
        return [self._made_up(query) for query in queries]

    def computed(self, query: Query) -> int:
        """Counts the positions of rows whose outputs the engine would not have kept."""
        places = itertools.product([0], range(len(query.prompts_KPD)), range(len(query.batch)))
        keys = self.answered.keys([query], list(places))
        known = self.answered.find(keys)
        for key in keys:
            self.answered.keep(key, self.nothing, 4 * self.backbone.width)
        share = sum(key not in known for key in keys) / len(keys) if keys else 1.0
        return round(share * self._positions(query))

    def _positions(self, query: Query) -> int:
        total, more = 0, _virtual(query) + query.max_new_tokens
        for items in query.batch.items:
            shape = shape_of(items)
            total += shape.sequences * (shape.padded + more)
            self.longest = max(self.longest, shape.padded + more)
            self.scored = max(self.scored, *(item.scored for item in items))
            self.items.update(items)
        return total * len(query.prompts_KPD)

    def _some(self, queries: Sequence[Query], most: int) -> list[Query]:
        """Returns queries, or the first of their records, of about `most` positions at most."""
        found, left = [], float(most)
        for query in queries:
            if left <= 0:
                break
            size, records = self._positions(query), len(query.batch)
            few = max(1, int(records * left / size)) if size > left else records
            found.append(query if few == records else query._replace(batch=query.batch.select(range(few))))
            left -= size
        return [query for query in found if len(query.batch)]

    def _made_up(self, query: Query) -> Answer:
        K, B, backbone = len(query.prompts_KPD), len(query.batch), self.backbone

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=self.random).to(backbone.device)

        outputs = None
        if query.outputs:
            wide, heads = max(map(len, query.batch.items), default=1), query.batch.task.head_rows
            scored = any(item.scored for items in query.batch.items for item in items)
            rows = query.prompts_KPD[:, -heads:].repeat_interleave(B, 0).to(backbone.device) if heads else None
            readout = None if rows is None else backbone.head_to_readout(rows)
            outputs = ModelOutput(drawn(K * B, backbone.width), drawn(K * B, wide) if scored else None, readout)
        return Answer(
            drawn(K, B).abs(),
            1e-3 * drawn(K, B, *query.prompts_KPD.shape[1:]) if query.grad else None,
            outputs,
            [["word"] * B for _ in range(K)] if query.max_new_tokens else None,
        )


def _virtual(query: Query) -> int:
    return 0 if query.batch.enters_at == LORA else query.prompts_KPD.shape[1] - query.batch.task.head_rows


@dataclass(frozen=True)
class MethodPlan:
    """rounds: their number. Seconds of the preparation, of all rounds, and of evaluation and library. clients: bytes of
    what the clients keep between rounds."""

    name: str
    rounds: int
    seconds_prepare: float
    seconds_rounds: float
    seconds_finish: float
    clients: int

    @property
    def seconds(self) -> float:
        return self.seconds_prepare + self.seconds_rounds + self.seconds_finish


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of a run.

    weights, forward, kept: the model, one forward and backward on all cores, the kept lower layers; on the device.
    program: code and records of this process. clients: the states of all clients. Both are in main memory.
    free: memory of the device before anything was loaded.
    seconds_load: data, backbone and calibration. seconds_lower: the lower layers of all records, once.
    """

    device: str
    dtype: str
    chunk_tokens: int
    checkpoint: bool
    weights: int
    forward: int
    kept: int
    program: int
    clients: int
    free: int
    seconds_load: float
    seconds_lower: float
    methods: list[MethodPlan]

    @property
    def bytes(self) -> int:
        """Sums the memory on the device; on a CPU that is everything."""
        here = self.program + self.clients if self.device == "cpu" else 0
        return self.weights + self.forward + self.kept + here

    @property
    def seconds(self) -> float:
        return self.seconds_load + self.seconds_lower + sum(method.seconds for method in self.methods)

    def to_json(self) -> dict[str, Any]:
        methods = [asdict(method) | {"seconds": method.seconds} for method in self.methods]
        return asdict(self) | {"bytes": self.bytes, "seconds": self.seconds, "methods": methods}


def plan(experiment: Experiment, progress: Callable[[str], None] = lambda name: None) -> Plan:
    """Plans the method and its baselines, in one process and on this machine. Raises the errors that a run would.

    Raises `ConfigError` for a run among several processes, whose rounds wait for others.
    """
    if experiment.engine.name != "in_process":
        raise ConfigError(
            f"engine.name = {experiment.engine.name!r}: a plan is for one process; --set engine.name=in_process (and leave "
            "engine.options out)"
        )
    free, began = free_bytes(torch.device(experiment.engine.device)), time.perf_counter()
    context, configs = resolve_baselines(build_context(experiment))
    load, real = time.perf_counter() - began, context.model
    weights = weight_bytes(real.backbone.model) if isinstance(real.backbone.model, nn.Module) else 0
    in_main_memory = real.backbone.device.type == "cpu"
    program = psutil.Process().memory_info().rss - (weights if in_main_memory else 0)
    engine = PlanningEngine(real)
    context = replace(context, model=engine)
    works, method = [], context.experiment.method
    for name, part in {"zero_shot": {"name": "zero_shot"}, method["name"]: method, **configs}.items():
        progress(name)
        works.append((name, *_rehearse(context, engine, part, private=":" not in name)))
    lower, kept = _lower_layers(context, engine)
    rates = {kind: _seconds_per_position(real, queries) for kind, queries in engine.asked.items()}
    if kept > experiment.engine.keep_mb << 20:  # lower layers are computed at each assignment; the timings hold them
        kept = experiment.engine.keep_mb << 20
    methods = [
        MethodPlan(name, rounds, _seconds(begun, rates), _seconds(train, rates), _seconds(finish, rates), clients)
        for name, rounds, (begun, train, finish), clients in works
    ]
    return Plan(
        device=str(real.backbone.device), dtype=context.experiment.backbone.dtype, chunk_tokens=real.chunk_tokens,
        checkpoint=bool(real.checkpoint), weights=weights, forward=_forward_bytes(context, engine), kept=kept,
        program=program, clients=max(method.clients for method in methods), free=free, seconds_load=load,
        seconds_lower=lower, methods=methods,
    )  # fmt: skip


def _rehearse(
    context: ExperimentContext, engine: PlanningEngine, part: Any, private: bool
) -> tuple[int, tuple[Work, Work, Work], int]:
    """Returns the rounds of a method, the work of its three phases, and the bytes of its clients' states."""
    federation, every = context.experiment.federation, context.experiment.federation.evaluate_every
    # evaluations are counted apart
    without = {"federation": federation.model_copy(update={"evaluate_every": every and federation.num_rounds + 1})}
    context = replace(context, experiment=context.experiment.model_copy(update=without))
    with TemporaryDirectory(prefix="ficpd-plan-") as folder:
        clients = SimulatedClients(None, private)
        with engine.counting() as prepare:
            runner = Runner(context, part, RunDir(Path(folder)), clients, private)
            runner.prepare()
        planned, rounds = runner.schedule.num_rounds, []
        loop, seen, engine.items = runner.train(), engine.items, set()
        for _ in range(min(planned, 2)):
            with engine.counting() as done:
                next(loop, None)
            rounds.append(done)
        del loop
        engine.grow(sum(len(shard.train) for shard in runner.shards.values()), len(rounds), planned)
        engine.items |= seen
        times_evaluated = (planned - 1) // every if every and planned else 0
        with engine.counting() as evaluated:
            if times_evaluated:
                asked = runner.method, runner.state, clients.tested, engine, 1
                score_sample(*asked, clients.sample) if clients.sample else evaluate(*asked)
        with engine.counting() as finish:
            runner.finish()
        states = [client.client_state for client in clients.clients.values() if client.client_state]
    size = (
        sum(array.nbytes for state in states for array in state.values()) * len(clients.clients) // max(len(states), 1)
    )
    train = Work()
    for work, times in zip(rounds, (1, planned - 1), strict=False):
        train = train.plus(work, times)
    if planned > 2 and runner.schedule.everyone_last:  # as the first
        train = train.plus(rounds[0]).plus(rounds[1], -1)
    return planned, (prepare, train.plus(evaluated, times_evaluated), finish), size


def _seconds(work: Work, rates: dict[Kind, float]) -> float:
    return work.seconds + sum(count * rates[kind] for kind, count in work.positions.items() if count)


def _seconds_per_position(real: QueryEngine, queries: list[Query]) -> float:
    """Asks the backbone twice, and takes the second time: the first one fills the cache of lower layers."""
    counted = PlanningEngine(real)
    positions = sum(map(counted._positions, queries))
    real.answer(queries)
    began = time.perf_counter()
    real.answer(queries)[0].loss_KB.cpu()
    return (time.perf_counter() - began) / positions


def _lower_layers(context: ExperimentContext, engine: PlanningEngine) -> tuple[float, int]:
    """Returns the seconds and the bytes of the lower layers of all records."""
    layer, backbone, items = context.start.enters_at, engine.backbone, engine.items
    text = backbone.modality == "text"
    if (layer <= 0 and text) or not items or not isinstance(backbone.model, nn.Module):
        return 0.0, 0
    some = list(itertools.islice(items, 128))
    began = time.perf_counter()
    states = HiddenStateCache(0, engine.chunk_tokens).fetch(some, layer, backbone)
    one = (time.perf_counter() - began) / len(some)
    size = sum(state.nbytes for state in states) / len(some)
    number = len(items) + engine.trained
    return one * number, int(size * number)


def _forward_bytes(context: ExperimentContext, engine: PlanningEngine) -> int:
    """Returns the bytes of the largest forward and backward, on all cores."""
    real, backbone = engine.real, engine.backbone
    if not isinstance(backbone.model, nn.Module):
        return 0
    rows = max(real.chunk_tokens // engine.longest, 1)
    grad = any(kind.grad for kind in engine.asked)
    layer = max(context.start.enters_at, 0)
    one = footprint(backbone).forward_bytes(rows, engine.longest, layer, grad, bool(real.checkpoint), engine.scored)
    return int(one) * real.workers
