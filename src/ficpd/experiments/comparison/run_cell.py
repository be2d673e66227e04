"""Runs one cell of a comparison and returns its outcome."""

import gc
import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from ficpd import __version__
from ficpd.evaluation.evaluate import evaluate
from ficpd.experiments.build import ExperimentContext, build_context, with_config
from ficpd.experiments.comparison.schema import BytesOfAll, Figures, Point, RunOutcome
from ficpd.experiments.config import Experiment, to_toml
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import Progress, run_method
from ficpd.experiments.setup import build_method, check_method
from ficpd.federation.privacy_plan import public_seed
from ficpd.federation.rounds import Round
from ficpd.types import ClientCard, ClientData, FederationInfo, Score


class ContextCache:
    """Keeps the last context, because most cells need the records and the backbone of the previous cell."""

    def __init__(self) -> None:
        self.ground, self.context, self.floor = "", None, None

    def of(self, experiment: Experiment, ground: str) -> ExperimentContext:
        """Returns the context of an experiment. Frees the old context before it builds another."""
        if self.context is None or ground != self.ground:
            self.ground, self.context, self.floor = ground, None, None
            gc.collect()
            self.context = build_context(experiment)
            return self.context
        return with_config(self.context, experiment)

    def zero_shot(self, context: ExperimentContext) -> Score | None:
        """Returns the frozen backbone's score on these records, computed once."""
        if self.floor is None:
            method = build_method(context, {"name": "zero_shot"})
            cards = [ClientCard(name, shard.metadata) for name, shard in context.shards.items()]
            state = method.init(FederationInfo(context.start, cards, 0, 1, public_seed(context.experiment.seed)))
            self.floor = evaluate(method, state, context.clients(), context.model, 1).everyone
        return self.floor


def run_cell(
    experiment: Experiment, key: str, ground: str, folder: Path, contexts: ContextCache, progress: Progress
) -> RunOutcome:
    """Runs or continues the cell in `folder/key`. A refused setting leaves no directory."""
    directory = RunDir(folder / key)
    directory.check(to_toml(experiment), resume=True)
    context = contexts.of(directory.resolved(experiment), ground)
    check_method(context, context.experiment.method)
    floor = contexts.zero_shot(context)
    directory.begin(experiment, context.experiment)
    result = run_method(context, context.experiment.method, directory, floor, progress)
    return outcome_of(key, result, directory.rounds(), data_of(context.shards))


def outcome_of(key: str, result: RunResult, rounds: Sequence[Round], data: str) -> RunOutcome:
    """Returns the outcome of a finished run for a comparison."""
    scores, main, curve = result.scores, result.main, curve_of(result, rounds)
    last = curve[-1]
    diverged = "its figure is no number: the tuning diverged; try a smaller learning rate"
    return RunOutcome(
        ficpd=__version__,
        key=key,
        status="failed" if last.own is None else "done",
        reason=diverged if last.own is None else None,
        metric=main,
        figures=Figures(own=last.own, everyone=last.everyone, worst=finite(scores.per_client_worst[main.name])),
        rounds=len(rounds),
        bytes=BytesOfAll(up=last.bytes_up, down=last.bytes_down, total=last.bytes),
        queries=last.queries,
        gradients=result.queries.gradient if result.queries else None,
        seconds=last.seconds,
        epsilon=result.privacy.epsilon,
        guarantee=result.privacy.guarantee,
        stopped=result.stopped,
        per_client={n: finite(score[main.name]) for n, score in scores.per_client.items() if main.name in score},
        data=data,
        curve=curve,
    )


def curve_of(result: RunResult, rounds: Sequence[Round]) -> list[Point]:
    """Returns the evaluated rounds and the end of the run, each with the sums of costs up to it."""
    scores, metric = result.scores, result.main.name
    up = [0, *accumulate(done.bytes_up for done in rounds)]
    down = [0, *accumulate(done.bytes_down for done in rounds)]
    seconds = [0.0, *accumulate(done.seconds_train + done.seconds_aggregate for done in rounds)]
    queries = [0, *accumulate(sum(sum(kinds) for kinds in done.queries.values()) for done in rounds)]

    def point(place: int, own: float, everyone: float | None) -> Point:
        return Point(
            round=rounds[place - 1].round if place else 0, own=finite(own), everyone=finite(everyone),
            bytes_up=up[place], bytes_down=down[place], queries=queries[place] if result.queries else None,
            seconds=seconds[place],
        )  # fmt: skip

    points = [
        point(place, done.metrics[f"own_{metric}"], done.metrics.get(f"global_{metric}"))
        for place, done in enumerate(rounds, 1)
        if place < len(rounds) and f"own_{metric}" in done.metrics
    ]
    everyone = scores.global_prompt[metric] if scores.global_prompt else None
    return [*points, point(len(rounds), scores.per_client_mean[metric], everyone)]


def finite(value: float | None) -> float | None:
    """Returns a finite number, else None: JSON has no infinity and NaN."""
    return value if value is not None and math.isfinite(value) else None


def data_of(shards: Mapping[str, ClientData]) -> str:
    """Hashes the records of each client. Cells of one ground have equal hashes, unless a file changed."""
    hashed = hashlib.sha256()
    for name, shard in sorted(shards.items()):
        for part, records in (("train", shard.train), ("test", shard.test)):
            hashed.update(f"{name} {part}\n".encode())
            for record in records:
                values = [f"{k}={v}" for k, v in sorted(record.fields.items()) if isinstance(v, str | int | float)]
                hashed.update("\x1f".join([record.key, *values, "\n"]).encode())
    return hashed.hexdigest()
