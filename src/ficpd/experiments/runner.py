"""Run an experiment: the method, then its baselines, each resumable, each leaving a result."""

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from ficpd.backbones.autotune import machine
from ficpd.errors import BudgetError
from ficpd.evaluation.evaluate import Evaluation, evaluate, score_everyone
from ficpd.evaluation.fairness import over_clients, over_groups, worse_off
from ficpd.evaluation.metrics import main_metric
from ficpd.evaluation.personalization import at_newcomers, levels
from ficpd.experiments.build import World, build_world
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.experiments.distillation import DISTILLED, check_refine
from ficpd.experiments.report.build import PAGE, write_page
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.setup import (
    VERSIONS,
    clusters_of,
    knowing_the_noise,
    labels_of,
    library_of,
    method_of,
    refined_of,
    schedule_of,
    settings_of,
)
from ficpd.federation.client import Client, kept_arrays, restore_kept
from ficpd.federation.privacy_plan import NONE, build_guard, part_for, public_seed
from ficpd.federation.query_budget import Queries
from ficpd.federation.rounds import Round, federate
from ficpd.interfaces import Engine, Method
from ficpd.registry import checked, load
from ficpd.types import ClientCard, Setup, Shard, State

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as (method, rounds done, rounds planned, figures to show)."""


def silent(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
    """No progress."""


def run(experiment: Experiment, out: Path, resume: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """The main method's result; those of the baselines lie in `out/baselines`. Raises `RunError` if `out` is taken."""
    directory = RunDir(out)
    with directory.held():
        directory.check(to_toml(experiment), resume)
        return _run(experiment, directory, progress)


def _run(experiment: Experiment, directory: RunDir, progress: Progress) -> dict[str, Any]:
    out, done = directory.path, directory.result()
    names = [experiment.method["name"], *experiment.baselines]
    if (
        done
        and (out / PAGE).exists()
        and all(RunDir(out / "baselines" / name.replace(":", "-")).result() for name in experiment.baselines)
    ):
        return done
    resolved = out / "resolved.toml"  # a resumed run goes on with what was chosen when it began
    world = build_world(parse(resolved.read_text(), resolved.name) if resolved.exists() else experiment)
    for place, name in enumerate(names):
        method = method_of(world, part_of(world.experiment, name) if place else world.experiment.method)
        world.start_of(method)
        part_for(method, NONE if ":" in name else world.experiment.privacy)
        check_refine(world, method)
    directory.write("experiment.toml", to_toml(experiment))  # only now: a mistake in it leaves no directory behind
    directory.write("resolved.toml", to_toml(world.experiment))
    zero_shot = RunDir(out / "baselines" / "zero_shot")
    if zero_shot.result() is None:
        one_method(world, {"name": "zero_shot"}, zero_shot, None, progress)
    floor = (zero_shot.result() or {})["metrics"]["global"]
    result = one_method(world, world.experiment.method, directory, floor, progress)
    for name in names[1:]:
        beside = RunDir(out / "baselines" / name.replace(":", "-"))
        one_method(world, part_of(world.experiment, name), beside, floor, progress, private=":" not in name)
    alone = RunDir(out / "baselines" / "local").result()
    if alone:
        scores = [found["metrics"]["per_client"] for found in (result, alone)]
        result.setdefault("fairness", {})["worse_off_than_local"] = worse_off(*scores)
        directory.write("result.json", json.dumps(result, indent=2) + "\n")
    write_page(out)
    return result


def part_of(experiment: Experiment, baseline: str) -> Mapping[str, Any]:
    """The settings of a baseline: its method's defaults, but of the run's own method without privacy ("ficpd:none") the
    run's, so that the two tell what privacy costs."""
    name, _, without = baseline.partition(":")
    return experiment.method if without and name == experiment.method["name"] else {"name": name}


def one_method(
    world: World, part: Mapping[str, Any], directory: RunDir, zero_shot: Mapping | None, progress: Progress,
    private: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """One method from its last checkpoint to its result and library. Not `private`: without the experiment's privacy."""
    finished = directory.result()
    if finished is not None:
        return finished
    method = method_of(world, part)
    world = world.starting(method)
    experiment = world.experiment
    label = method.name if private else f"{method.name}, no privacy"
    schedule = schedule_of(world, method)
    holders, saved = world.holders(method.pools_data), directory.load()
    state, kept, rounds, totals = saved or _beginning(world, method, holders)
    guard = build_guard(
        experiment.privacy if private else NONE, method, state, holders, schedule, experiment.seed, directory.path,
        directory.run_id(), max((done.round for done in rounds if done.updates), default=0),
    )  # fmt: skip
    books = [*guard.books.values(), *([guard.central.book] if guard.central else [])]
    directory.check_books(books, method.name, len(rounds))
    state = knowing_the_noise(world, method, state, guard)
    clients = world.clients(guard, method.pools_data)
    tested = world.clients() if method.pools_data else clients  # one prompt, seen by each client on its own records
    restore_kept(clients, kept)
    directory.write_rounds(rounds)
    queries = Queries(method, state, clients, rounds, experiment.federation.max_queries)
    going = federate(
        method, _engine(world, method, clients), world.model, state, schedule, world.compression, len(rounds) + 1,
        guard.central, queries.before,
    )  # fmt: skip
    progress(label, len(rounds), schedule.num_rounds, {})
    stopped = None
    try:
        for after, done in going:
            state = after
            queries.after(done)
            every = experiment.federation.evaluate_every
            if every and done.round % every == 0 and done.round < schedule.num_rounds:
                done.metrics.update(_headline(evaluate(method, state, tested, world.model, done.round)))
            rounds.append(done)
            totals["train"] += done.seconds_train
            totals["aggregate"] += done.seconds_aggregate
            directory.save(state, kept_arrays(clients), rounds, totals)
            progress(label, done.round, schedule.num_rounds, {"clients": done.clients, **done.metrics})
    except BudgetError as error:
        stopped = str(error)
        progress(label, len(rounds), schedule.num_rounds, {"stopped: the budget is spent": 1})
    evaluation = _evaluated(world, method, state, tested, schedule.num_rounds + 1, totals)
    result = _result(world, method, label, clients, rounds, totals, evaluation, zero_shot)
    result |= {"clusters": clusters_of(world, state), "settings": settings_of(part)}
    if method.trains:
        asked = (method, state, clients, world.model, schedule.num_rounds + 1)
        result["levels"] = None if method.pools_data else levels(*asked, seed=experiment.seed)
        result["unseen"] = at_newcomers(method, state, world.newcomers(), *asked[3:]) if world.unseen else None
    result["fairness"] = _fairness(world, tested, evaluation)
    refined = refined_of(world, method, state, directory) if result["clusters"] else None
    if refined:
        result["distillation"] = refined.facts
        result["metrics"]["distilled"] = score_everyone(refined.prompt.vectors_PD, tested, world.model)
    result |= {"privacy": guard.block(), "queries": queries.block(), "stopped": stopped}
    guard.close()
    library_of(world, method, state, result, {DISTILLED: refined.prompt} if refined else {}).save(
        directory.path / "library"
    )
    directory.write("result.json", json.dumps(result, indent=2) + "\n")
    progress(label, schedule.num_rounds, schedule.num_rounds, _shown(evaluation))
    return result


def _engine(world: World, method: Method, clients: Mapping[str, Client]) -> Engine:
    config = world.experiment.engine
    module = load("engines", config.name)
    return module.build(checked(module.Config, config.options, "engine.options"), method, clients, world.model)


def _evaluated(world, method, state, clients, round: int, totals: dict[str, Any]) -> Evaluation:
    began = time.perf_counter()
    evaluation = evaluate(method, state, clients, world.model, round)
    totals["evaluate"] = time.perf_counter() - began
    return evaluation


def _beginning(
    world: World, method: Method, holders: Mapping[str, Shard]
) -> tuple[State, dict[str, Tensor], list[Round], dict[str, Any]]:
    """What a checkpoint would hold before the first round."""
    federation = world.experiment.federation
    cards = [ClientCard(name, shard.metadata) for name, shard in holders.items()]
    cohort = min(federation.clients_per_round or len(world.shards), len(world.shards))
    seed = public_seed(world.experiment.seed)
    setup = Setup(world.start, cards, federation.num_rounds, cohort, seed, labels_of(world))
    return method.init(setup), {}, [], {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0}


def _headline(evaluation: Evaluation) -> dict[str, float]:
    return {f"own_{name}": value for name, value in evaluation.mean.items()} | (
        {f"global_{name}": value for name, value in evaluation.everyone.items()} if evaluation.everyone else {}
    )


def _shown(evaluation: Evaluation) -> dict[str, float]:
    """The one figure that a progress line ends with: on everyone's test records and on each client's own."""
    main = main_metric(evaluation.mean).name
    own = {f"{main}, own test": evaluation.mean[main]}
    return own if evaluation.everyone is None else {f"{main}, everyone's test": evaluation.everyone[main], **own}


def _result(world, method, label, clients, rounds, totals, evaluation: Evaluation, zero_shot) -> dict[str, Any]:
    experiment = world.experiment
    exchanges = max(sum(done.clients for done in rounds), 1)
    answered = max(sum(done.updates + len(done.dropped) for done in rounds), 1)
    up, down = sum(done.bytes_up for done in rounds), sum(done.bytes_down for done in rounds)
    return {
        "method": method.name,
        "label": label,
        "backbone": {
            "name": experiment.backbone.name,
            "fingerprint": world.start.backbone,
            "dtype": experiment.backbone.dtype,
            "attention": experiment.backbone.attention,
            "enters_at": world.start.enters_at,
        },
        "task": ", ".join(
            f"{group}: {party.task['name']}" if group else party.task["name"]
            for group, party in experiment.parties.items()
        ),
        "num_clients": len(clients),
        "num_records": {
            "train": sum(len(c.train) for c in clients.values()),
            "test": sum(len(c.test) for c in clients.values()),
        },
        "num_rounds": len(rounds),
        "seed": experiment.seed,
        "metrics": {
            "global": evaluation.everyone,
            "per_client": dict(evaluation.own),
            "per_client_mean": evaluation.mean,
            "per_client_worst": evaluation.worst,
            "zero_shot": zero_shot if zero_shot is not None else evaluation.everyone,
        },
        "bytes": {
            "up_per_client_round": up / answered if rounds else 0,
            "down_per_client_round": down / exchanges if rounds else 0,
            "up_total": up,
            "down_total": down,
        },
        "seconds": dict(totals),
        "dropped_updates": sum(len(done.dropped) for done in rounds),
        "set_aside": Counter(name for done in rounds for name in done.set_aside),
        "too_few": Counter(name for done in rounds for name in done.too_few),
        "compression": experiment.compression,
        "machine": {**machine(world.model.backbone.device), "system": platform.system()},
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }


def _fairness(world: World, clients: Mapping[str, Client], evaluation: Evaluation) -> dict[str, Any]:
    """Over clients and, if the experiment asks for them, over the groups of a public column, task by task."""
    column, seed = world.experiment.fairness.group, world.experiment.seed
    found: dict[str, Any] = {"clients": over_clients(evaluation.own, seed)}
    if column:
        tasks = {group or str(task.describe()["name"]): task for group, task in world.tasks.items()}
        found |= {"column": column, "groups": over_groups(evaluation.predicted, clients, tasks, column, seed)}
    return found
