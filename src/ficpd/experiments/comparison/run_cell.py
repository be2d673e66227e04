"""One run of a comparison: the run directory, and its outcome as `cells/KEY.json` keeps it."""

import gc
import hashlib
import json
import math
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.evaluation.evaluate import evaluate
from ficpd.evaluation.metrics import main_metric
from ficpd.experiments.build import ExperimentContext, build_context, with_config
from ficpd.experiments.comparison import SCHEMA
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.experiments.distillation import validate_distillation
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import Progress, run_method
from ficpd.experiments.setup import build_method
from ficpd.federation.privacy_plan import public_seed
from ficpd.library.card import guarantee
from ficpd.types import ClientCard, ClientData, FederationInfo, Score

Outcome = dict[str, Any]
"""Of `cells/KEY.json`: schema, ficpd, key, status ("done", "refused", "failed"), reason; and of one that is done metric,
task, backbone, figures, rounds, bytes, queries, gradients, seconds, epsilon, guarantee, stopped, per_client, data, curve,
each as `compare.json` has it, for the whole run."""


class ContextCache:
    """The world that was needed last: most cells need the same records and the same backbone as the one before them."""

    def __init__(self) -> None:
        self.ground, self.context, self.floor = "", None, None

    def of(self, experiment: Experiment, ground: str) -> ExperimentContext:
        """Raises whatever `build_context` raises. The old world is let go before the next one is built."""
        if self.context is None or ground != self.ground:
            self.ground, self.context, self.floor = ground, None, None
            gc.collect()
            self.context = build_context(experiment)
            return self.context
        return with_config(self.context, experiment)

    def zero_shot(self, context: ExperimentContext) -> Score | None:
        """What the frozen backbone scores on these records, which no prompt or training changes."""
        if self.floor is None:
            method = build_method(context, {"name": "zero_shot"})
            cards = [ClientCard(name, shard.metadata) for name, shard in context.shards.items()]
            state = method.init(FederationInfo(context.start, cards, 0, 1, public_seed(context.experiment.seed)))
            self.floor = evaluate(method, state, context.clients(), context.model, 1).everyone
        return self.floor


def run_cell(
    experiment: Experiment, key: str, ground: str, folder: Path, worlds: ContextCache, progress: Progress
) -> Outcome:
    """Begin or go on with the run in `folder/key`, to its end. What is seen to be wrong before leaves no directory."""
    directory = RunDir(folder / key)
    directory.check(to_toml(experiment), resume=True)
    resolved = directory.path / "resolved.toml"  # a run that goes on has what was chosen when it began
    context = worlds.of(parse(resolved.read_text(), resolved.name) if resolved.exists() else experiment, ground)
    method = build_method(context, context.experiment.method)
    context.init_prompt_for(method)
    validate_distillation(context, method)
    floor = worlds.zero_shot(context)
    directory.write("experiment.toml", to_toml(experiment))
    directory.write("resolved.toml", to_toml(context.experiment))
    result = run_method(context, context.experiment.method, directory, floor, progress)
    rounds = [json.loads(line) for line in (directory.path / "rounds.jsonl").read_text().splitlines()]
    figures = figures_of(result, rounds)
    ended: dict[str, str | None] = {"status": "done", "reason": None}
    if figures["figures"]["own"] is None:
        reason = "its figure is no number: the tuning went astray; try a smaller learning rate"
        ended = {"status": "failed", "reason": reason}
    return {"schema": SCHEMA, "ficpd": __version__, "key": key, **ended, **figures, "data": data_of(context.shards)}


def figures_of(result: Mapping[str, Any], rounds: list[Mapping[str, Any]]) -> Outcome:
    """What a comparison needs of a finished run."""
    scores, main = result["metrics"], main_metric(result["metrics"]["per_client_mean"])
    curve = curve_of(result, rounds, main.name)
    last = curve[-1]
    return {
        "metric": main._asdict(),
        "task": result["task"],
        "backbone": result["backbone"]["name"],
        "figures": {
            **{key: last[key] for key in ("own", "everyone")},
            "worst": finite(scores["per_client_worst"][main.name]),
        },
        "rounds": len(rounds),
        "bytes": {"up": last["bytes_up"], "down": last["bytes_down"], "total": last["bytes_up"] + last["bytes_down"]},
        "queries": last["queries"],
        "gradients": (result.get("queries") or {}).get("gradient"),
        "seconds": last["seconds"],
        "epsilon": result["privacy"].get("epsilon"),
        "guarantee": guarantee(result["privacy"]),
        "stopped": result["stopped"],
        "per_client": {
            name: finite(score[main.name]) for name, score in scores["per_client"].items() if main.name in score
        },
        "curve": curve,
    }


def curve_of(result: Mapping[str, Any], rounds: list[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The rounds that were evaluated and, last, the end of the run; with what had been spent by then."""
    scores = result["metrics"]
    up = [0, *accumulate(line["bytes_up"] for line in rounds)]
    down = [0, *accumulate(line["bytes_down"] for line in rounds)]
    seconds = [0.0, *accumulate(line["seconds_train"] + line["seconds_aggregate"] for line in rounds)]
    asked = [_asked(line) for line in rounds]
    queries = [0, *accumulate(asked)] if None not in asked else [None] * (len(rounds) + 1)  # type: ignore[arg-type]

    def point(place: int, own: float, everyone: float | None) -> dict[str, Any]:
        spent = {"bytes_up": up[place], "bytes_down": down[place], "queries": queries[place], "seconds": seconds[place]}
        at = rounds[place - 1]["round"] if place else 0
        return {"round": at, "own": finite(own), "everyone": finite(everyone), **spent}

    points = [
        point(place, line["metrics"][f"own_{metric}"], line["metrics"].get(f"global_{metric}"))
        for place, line in enumerate(rounds, 1)
        if place < len(rounds) and f"own_{metric}" in line["metrics"]
    ]
    everyone = scores["global"][metric] if scores["global"] else None
    return [*points, point(len(rounds), scores["per_client_mean"][metric], everyone)]


def finite(value: float | None) -> float | None:
    """JSON knows no other numbers."""
    return value if value is not None and math.isfinite(value) else None


def _asked(line: Mapping[str, Any]) -> int | None:
    """All queries of a round, with gradients and without; None where they were not counted."""
    queries = line.get("queries")
    return None if queries is None else sum(sum(kinds) for kinds in queries.values())


def data_of(shards: Mapping[str, ClientData]) -> str:
    """A hash of who holds which records. Equal grounds must have equal ones, unless a file was changed in between."""
    hashed = hashlib.sha256()
    for name, shard in sorted(shards.items()):
        for part, records in (("train", shard.train), ("test", shard.test)):
            hashed.update(f"{name} {part}\n".encode())
            for record in records:
                values = [f"{k}={v}" for k, v in sorted(record.fields.items()) if isinstance(v, str | int | float)]
                hashed.update("\x1f".join([record.key, *values, "\n"]).encode())
    return hashed.hexdigest()
