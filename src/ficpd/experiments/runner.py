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

from ficpd.backbones.autotune import machine_info
from ficpd.errors import BudgetError
from ficpd.evaluation.evaluate import Evaluation, evaluate, score_everyone
from ficpd.evaluation.fairness import over_clients, over_groups, share_worse_off
from ficpd.evaluation.metrics import main_metric
from ficpd.evaluation.personalization import personalization_levels, unseen_client_scores
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.experiments.distillation import DISTILLED, validate_distillation
from ficpd.experiments.report.build import PAGE, write_page
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.setup import (
    VERSIONS,
    build_library,
    build_method,
    build_schedule,
    cluster_report,
    distill_if_configured,
    method_config,
    num_labels_by_group,
    with_noise_scale,
)
from ficpd.federation.client import Client, client_states, load_client_states
from ficpd.federation.method import Method
from ficpd.federation.privacy_plan import NONE, plan_privacy, privacy_config_for, public_seed
from ficpd.federation.query_budget import QueryBudget
from ficpd.federation.rounds import Round, run_rounds
from ficpd.interfaces import Engine
from ficpd.registry import load, validate
from ficpd.types import ClientCard, ClientData, FederationInfo, State

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as (method, rounds done, rounds planned, figures to show)."""


def no_progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
    """No progress."""


def run(experiment: Experiment, out: Path, resume: bool = False, progress: Progress = no_progress) -> dict[str, Any]:
    """The main method's result; those of the baselines lie in `out/baselines`. Raises `RunError` if `out` is taken."""
    directory = RunDir(out)
    with directory.lock():
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
    context = build_context(parse(resolved.read_text(), resolved.name) if resolved.exists() else experiment)
    for place, name in enumerate(names):
        method = build_method(
            context, baseline_method_config(context.experiment, name) if place else context.experiment.method
        )
        context.init_prompt_for(method)
        privacy_config_for(method, NONE if ":" in name else context.experiment.privacy)
        validate_distillation(context, method)
    directory.write("experiment.toml", to_toml(experiment))  # only now: a mistake in it leaves no directory behind
    directory.write("resolved.toml", to_toml(context.experiment))
    zero_shot = RunDir(out / "baselines" / "zero_shot")
    if zero_shot.result() is None:
        run_method(context, {"name": "zero_shot"}, zero_shot, None, progress)
    floor = (zero_shot.result() or {})["metrics"]["global"]
    result = run_method(context, context.experiment.method, directory, floor, progress)
    for name in names[1:]:
        beside = RunDir(out / "baselines" / name.replace(":", "-"))
        run_method(
            context, baseline_method_config(context.experiment, name), beside, floor, progress, private=":" not in name
        )
    alone = RunDir(out / "baselines" / "local").result()
    if alone:
        scores = [found["metrics"]["per_client"] for found in (result, alone)]
        result.setdefault("fairness", {})["worse_off_than_local"] = share_worse_off(*scores)
        directory.write("result.json", json.dumps(result, indent=2) + "\n")
    write_page(out)
    return result


def baseline_method_config(experiment: Experiment, baseline: str) -> Mapping[str, Any]:
    """The settings of a baseline: its method's defaults, but of the run's own method without privacy ("ficpd:none") the
    run's, so that the two tell what privacy costs."""
    name, _, without = baseline.partition(":")
    return experiment.method if without and name == experiment.method["name"] else {"name": name}


def run_method(
    context: ExperimentContext, part: Mapping[str, Any], directory: RunDir, zero_shot: Mapping | None, progress: Progress,
    private: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """One method from its last checkpoint to its result and library. Not `private`: without the experiment's privacy."""
    finished = directory.result()
    if finished is not None:
        return finished
    method = build_method(context, part)
    context = context.with_method(method)
    experiment = context.experiment
    label = method.name if private else f"{method.name}, no privacy"
    schedule = build_schedule(context, method)
    holders, saved = context.shards_for(method.capabilities.centralized), directory.load()
    state, kept, rounds, totals = saved or _beginning(context, method, holders)
    plan = plan_privacy(
        experiment.privacy if private else NONE, method, state, holders, schedule, experiment.seed, directory.path,
        directory.run_id(), max((done.round for done in rounds if done.updates), default=0),
    )  # fmt: skip
    accounts = [*plan.accounts.values(), *([plan.central.account] if plan.central else [])]
    directory.check_ledgers(accounts, method.name, len(rounds))
    state = with_noise_scale(context, method, state, plan)
    pooled = method.capabilities.centralized
    clients = context.clients(plan, pooled)
    tested = context.clients() if pooled else clients  # one prompt, seen by each client on its own records
    load_client_states(clients, kept)
    directory.write_rounds(rounds)
    queries = QueryBudget(method, state, clients, rounds, experiment.federation.max_queries)
    going = run_rounds(
        method, _engine(context, method, clients), context.model, state, schedule, context.compression, len(rounds) + 1,
        plan.central, queries.before,
    )  # fmt: skip
    progress(label, len(rounds), schedule.num_rounds, {})
    stopped = None
    try:
        for after, done in going:
            state = after
            queries.after(done)
            every = experiment.federation.evaluate_every
            if every and done.round % every == 0 and done.round < schedule.num_rounds:
                done.metrics.update(_headline(evaluate(method, state, tested, context.model, done.round)))
            rounds.append(done)
            totals["train"] += done.seconds_train
            totals["aggregate"] += done.seconds_aggregate
            directory.save(state, client_states(clients), rounds, totals)
            progress(label, done.round, schedule.num_rounds, {"clients": done.clients, **done.metrics})
    except BudgetError as error:
        stopped = str(error)
        progress(label, len(rounds), schedule.num_rounds, {"stopped: the budget is spent": 1})
    evaluation = _evaluated(context, method, state, tested, schedule.num_rounds + 1, totals)
    result = _result(context, method, label, clients, rounds, totals, evaluation, zero_shot)
    result |= {"clusters": cluster_report(context, state), "settings": method_config(part)}
    if method.capabilities.trains:
        asked = (method, state, clients, context.model, schedule.num_rounds + 1)
        result["levels"] = (
            None if method.capabilities.centralized else personalization_levels(*asked, seed=experiment.seed)
        )
        result["unseen"] = (
            unseen_client_scores(method, state, context.unseen_clients(), *asked[3:]) if context.unseen else None
        )
    result["fairness"] = _fairness(context, tested, evaluation)
    refined = distill_if_configured(context, method, state, directory) if result["clusters"] else None
    if refined:
        result["distillation"] = refined.facts
        result["metrics"]["distilled"] = score_everyone(refined.prompt.vectors_PD, tested, context.model)
    result |= {"privacy": plan.to_report(), "queries": queries.to_report(), "stopped": stopped}
    plan.close()
    build_library(context, method, state, result, {DISTILLED: refined.prompt} if refined else {}).save(
        directory.path / "library"
    )
    directory.write("result.json", json.dumps(result, indent=2) + "\n")
    progress(label, schedule.num_rounds, schedule.num_rounds, _shown(evaluation))
    return result


def _engine(context: ExperimentContext, method: Method, clients: Mapping[str, Client]) -> Engine:
    config = context.experiment.engine
    module = load("engines", config.name)
    return module.build(validate(module.Config, config.options, "engine.options"), method, clients, context.model)


def _evaluated(context, method, state, clients, round: int, totals: dict[str, Any]) -> Evaluation:
    began = time.perf_counter()
    evaluation = evaluate(method, state, clients, context.model, round)
    totals["evaluate"] = time.perf_counter() - began
    return evaluation


def _beginning(
    context: ExperimentContext, method: Method, holders: Mapping[str, ClientData]
) -> tuple[State, dict[str, Tensor], list[Round], dict[str, Any]]:
    """What a checkpoint would hold before the first round."""
    federation = context.experiment.federation
    cards = [ClientCard(name, shard.metadata) for name, shard in holders.items()]
    cohort = min(federation.clients_per_round or len(context.shards), len(context.shards))
    seed = public_seed(context.experiment.seed)
    setup = FederationInfo(context.start, cards, federation.num_rounds, cohort, seed, num_labels_by_group(context))
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


def _result(context, method, label, clients, rounds, totals, evaluation: Evaluation, zero_shot) -> dict[str, Any]:
    experiment = context.experiment
    exchanges = max(sum(done.clients for done in rounds), 1)
    answered = max(sum(done.updates + len(done.dropped) for done in rounds), 1)
    up, down = sum(done.bytes_up for done in rounds), sum(done.bytes_down for done in rounds)
    return {
        "method": method.name,
        "label": label,
        "backbone": {
            "name": experiment.backbone.name,
            "fingerprint": context.start.backbone,
            "dtype": experiment.backbone.dtype,
            "attention": experiment.backbone.attention,
            "enters_at": context.start.enters_at,
        },
        "task": ", ".join(
            f"{group}: {party.task['name']}" if group else party.task["name"]
            for group, party in experiment.all_groups.items()
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
        "machine": {**machine_info(context.model.backbone.device), "system": platform.system()},
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }


def _fairness(context: ExperimentContext, clients: Mapping[str, Client], evaluation: Evaluation) -> dict[str, Any]:
    """Over clients and, if the experiment asks for them, over the groups of a public column, task by task."""
    column, seed = context.experiment.fairness.group, context.experiment.seed
    found: dict[str, Any] = {"clients": over_clients(evaluation.own, seed)}
    if column:
        tasks = {group or str(task.to_config()["name"]): task for group, task in context.tasks.items()}
        found |= {"column": column, "groups": over_groups(evaluation.predicted, clients, tasks, column, seed)}
    return found
