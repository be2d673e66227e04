"""Runs a method in three phases, `prepare`, `train` and `finish`, and an experiment: its method and baselines.

`Clients` holds the differences between `SimulatedClients` and the `Sites` of `deployment.coordinator`.
"""

import platform
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ficpd.backbones.autotune import machine_info
from ficpd.errors import BudgetError, ConfigError
from ficpd.evaluation.evaluate import draw_sample, evaluate, score_everyone, score_sample
from ficpd.evaluation.fairness import over_clients, over_groups, share_worse_off
from ficpd.evaluation.metrics import main_metric
from ficpd.evaluation.personalization import personalization_levels, unseen_client_scores
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import STANDARD_BASELINES, Experiment, to_toml
from ficpd.experiments.distillation import DISTILLED, distill_library
from ficpd.experiments.facts import PAGE, installed_version
from ficpd.experiments.report.page import end_with_page
from ficpd.experiments.results import BackboneInfo, Bytes, Metrics, RunResult, Seconds
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.setup import (
    VERSIONS,
    build_library,
    build_method,
    build_schedule,
    check_method,
    cluster_report,
    federation_info,
    tasks_of,
    with_noise_scale,
)
from ficpd.federation.client_states import ClientStates
from ficpd.federation.privacy_plan import NONE, PrivacyPlan, plan_privacy
from ficpd.federation.query_budget import QueryBudget
from ficpd.federation.rounds import Round, RoundHooks, require_updates, run_rounds
from ficpd.interfaces import Engine
from ficpd.registry import build_config, load, validate
from ficpd.types import Prompt, Score, State

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as (method, rounds done, rounds planned, figures to show)."""


OWN = ""
"""The experiment's own method among the names of its baselines."""
SAMPLE = "sample"
"""The curve of a sample in `Round.metrics`: `sample_accuracy`."""


def no_progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
    """Shows nothing."""


class Clients(ABC):
    """The differences between a simulation and a run among real sites. The defaults fit real sites."""

    run_spec_bytes: int = 0
    """Bytes that each client receives once, before its first assignment."""

    @abstractmethod
    def plan_privacy(self, run: "Runner", state: State) -> PrivacyPlan: ...
    @abstractmethod
    def build_engine(self, run: "Runner", states: int) -> Engine:
        """Returns the engine of the round loop. `states`: clients with a state at the checkpoint."""

    def before_round(self, round: int, cohort: Sequence[str]) -> None:
        """Raises `BudgetError` to end the run before a round."""

    def after_round(self, run: "Runner", done: Round) -> None:
        """Adds figures to a round's record, before it is saved."""

    def save_states(self, round: int) -> int:
        """Writes the clients' states, before the round's checkpoint; returns how many have one."""
        return 0

    def close(self) -> None:
        """Closes the files of the clients' states."""

    @abstractmethod
    def evaluate(self, run: "Runner") -> dict[str, Any]:
        """Returns the fields of the result that depend on the kind of clients."""

    def score(self, run: "Runner", prompt: Prompt) -> Score | None:
        """Scores one prompt on all test records; None if they stay with the clients."""
        return None


class Runner(RoundHooks):
    """Runs one method with one group of clients, from the last checkpoint on."""

    def __init__(
        self, context: ExperimentContext, config: Mapping[str, Any], directory: RunDir, clients: Clients,
        private: bool = True, progress: Progress = no_progress,
    ):  # fmt: skip
        self.config, self.directory, self.clients, self.progress = config, directory, clients, progress
        self.method = build_method(context, config)
        self.context = context.with_method(self.method, private)
        self.privacy = self.context.experiment.privacy if private else NONE
        self.shards = self.context.shards_for(self.method.capabilities.centralized)
        self.label = self.method.name if private else f"{self.method.name}, no privacy"
        self.stopped: str | None = None
        self.result = directory.result()
        """The stored result of a finished run, which `finish` returns; the other phases have nothing to do then."""

    @property
    def last_release(self) -> int:
        """Returns the last round that released anything."""
        return max((done.round for done in self.rounds if done.updates), default=0)

    def prepare(self) -> None:
        """Loads or initializes the state, plans privacy, checks the ledgers and builds the engine."""
        if self.result:
            return
        context, method, directory = self.context, self.method, self.directory
        self.schedule = build_schedule(context, method)
        saved = directory.load()
        state, states, self.rounds, self.seconds = saved or (
            method.init(federation_info(context, method, self.shards, self.privacy)), 0, [],
            {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0},
        )  # fmt: skip
        self.plan = self.clients.plan_privacy(self, state)
        accounts = [*self.plan.accounts.values(), *([self.plan.central.account] if self.plan.central else [])]
        directory.check_ledgers(accounts, method.name, len(self.rounds))
        self.state = with_noise_scale(context, method, state, self.plan, self.privacy)
        self.engine = self.clients.build_engine(self, states)
        directory.write_rounds(self.rounds)
        self.progress(self.label, len(self.rounds), self.schedule.num_rounds, {})

    def train(self) -> Iterator[tuple[State, Round]]:
        """Yields each round once its checkpoint is saved. An exhausted budget ends the run; `stopped` states why."""
        if self.result:
            return iter(())
        return run_rounds(
            self.method, self.engine, self.context.model, self.state, self.schedule, self.context.compression,
            len(self.rounds) + 1, self.plan.central, self.plan.secure, self,
        )  # fmt: skip

    def before_round(self, round: int, cohort: Sequence[str]) -> None:
        self.clients.before_round(round, cohort)

    def after_round(self, state: State, done: Round) -> None:
        self.state = state
        self.clients.after_round(self, done)
        self.rounds.append(done)
        self.seconds["train"] += done.seconds_train
        self.seconds["aggregate"] += done.seconds_aggregate
        self.directory.save(state, self.clients.save_states(done.round), self.rounds, self.seconds)
        self.progress(self.label, done.round, self.schedule.num_rounds, _main_figure(done.metrics))

    def stop(self, error: BudgetError) -> None:
        self.stopped = str(error)
        self.progress(self.label, len(self.rounds), self.schedule.num_rounds, {"stopped: the budget is spent": 1})

    def finish(self) -> RunResult:
        """Evaluates and distils; saves the library and the result."""
        if self.result:
            return self.result
        context, method, experiment, rounds = self.context, self.method, self.context.experiment, self.rounds
        found, clusters = self.clients.evaluate(self), cluster_report(context, self.state)
        refined = None
        if clusters and experiment.distillation.how != "none":
            basis = {n: context.start.with_vectors(v) for n, v in method.library_prompts(self.state).items()}
            sizes = Counter(f"prototype-{cluster}" for cluster in clusters.member.values())
            groups = tasks_of(context, self.state, list(context.tasks))
            refined = distill_library(context, basis, groups, sizes, self.directory)
        if refined and (scores := self.clients.score(self, refined.prompt)):
            found["metrics"] = found["metrics"].model_copy(update={"distilled": scores})
        result = RunResult(
            method=method.name,
            label=self.label,
            backbone=BackboneInfo(
                name=experiment.backbone.name, fingerprint=context.start.backbone, dtype=experiment.backbone.dtype,
                attention=experiment.backbone.attention, enters_at=context.start.enters_at,
            ),
            task=experiment.tasks_in_words,
            num_clients=len(self.shards),
            num_rounds=len(rounds),
            seed=experiment.seed,
            bytes=_bytes(rounds, self.clients.run_spec_bytes),
            seconds=Seconds(**self.seconds),
            dropped_updates=sum(len(done.dropped) for done in rounds),
            excluded_updates=Counter(name for done in rounds for name in done.excluded_updates),
            underfilled_means=Counter(name for done in rounds for name in done.underfilled_means),
            compression=experiment.compression,
            settings=build_config("methods", self.config)[1].model_dump(mode="json"),
            clusters=clusters,
            distillation=refined.facts if refined else None,
            stopped=self.stopped,
            machine={**machine_info(context.model.backbone.device), "system": platform.system()},
            versions={name: version for name in VERSIONS if (version := installed_version(name))},
            **found,
        )  # fmt: skip
        self.plan.close()
        self.clients.close()
        library = build_library(context, method, self.state, result, {DISTILLED: refined.prompt} if refined else {})
        library.save(self.directory.path / "library")
        result.save(self.directory.path)
        planned, own = self.schedule.num_rounds, result.metrics.per_client_mean if result.metrics else {}
        self.progress(self.label, len(rounds), planned, {result.main.name: own[result.main.name]} if own else {})
        return result


def _bytes(rounds: Sequence[Round], run_spec_bytes: int) -> Bytes:
    """Sums message sizes. Means are over received updates and over sent assignments."""
    up, down = sum(done.bytes_up for done in rounds), sum(done.bytes_down for done in rounds)
    return Bytes(
        up_per_client_round=up / max(sum(done.updates + len(done.dropped) for done in rounds), 1),
        down_per_client_round=down / max(sum(done.clients for done in rounds), 1),
        up_total=up,
        down_total=down,
        run_spec_per_client=run_spec_bytes,
    )


class SimulatedClients(Clients):
    """`zero_shot`: the score without a prompt; None: this run's. Not `private`: without the experiment's privacy."""

    def __init__(self, zero_shot: Score | None, private: bool):
        self.zero_shot, self.private = zero_shot, private

    def plan_privacy(self, run: Runner, state: State) -> PrivacyPlan:
        experiment = run.context.experiment
        plan = plan_privacy(
            run.privacy, run.method, state, run.shards, run.schedule, experiment.seed, run.directory.path,
            run.directory.run_id(), run.last_release, list(run.context.tasks),
        )  # fmt: skip
        masks = plan.secure is not None and bool(experiment.engine.options.get("masks"))
        return replace(plan, secure=replace(plan.secure, masked=True)) if masks else plan  # type: ignore[type-var]

    def build_engine(self, run: Runner, states: int) -> Engine:
        context, method, config = run.context, run.method, run.context.experiment.engine
        self.clients = context.clients(run.plan, method.capabilities.centralized)
        self.tested = context.clients() if method.capabilities.centralized else self.clients
        self.client_states = ClientStates(run.directory.path, len(run.rounds), states)
        self.client_states.restore(self.clients)
        federation = context.experiment.federation
        number = federation.evaluate_records if federation.evaluate_every else 0
        self.sample = draw_sample(self.tested, number, context.experiment.seed)
        self.queries = QueryBudget(method, run.state, self.clients, run.rounds, federation.max_queries)
        module = load("engines", config.name)
        options = validate(module.Config, config.options, "engine.options")
        return module.build(options, method, self.clients, context.model, context.experiment.backbone, config)

    def before_round(self, round: int, cohort: Sequence[str]) -> None:
        self.queries.before(round, cohort)

    def after_round(self, run: Runner, done: Round) -> None:
        self.queries.after(done)
        if done.round == 1 and "." in run.config["name"]:  # a module of one's own, and maybe a fault in it
            advice = "Look at local_update and update_spec; `ficpd run -v` prints the traceback of an error"
            require_updates(run.method.name, done, advice)
        every, began = run.context.experiment.federation.evaluate_every, time.perf_counter()
        if every and done.round % every == 0 and done.round < run.schedule.num_rounds:
            asked = (run.method, run.state, self.tested, run.context.model, done.round)
            if self.sample:
                found = {SAMPLE: score_sample(*asked, self.sample)}
            else:
                whole = evaluate(*asked)
                found = {"own": whole.mean, "global": whole.everyone or {}}
            done.metrics.update({f"{of}_{name}": v for of, score in found.items() for name, v in score.items()})
            run.seconds["evaluate"] += time.perf_counter() - began

    def save_states(self, round: int) -> int:
        return self.client_states.save(self.clients, round)

    def close(self) -> None:
        self.client_states.close()

    def evaluate(self, run: Runner) -> dict[str, Any]:
        context, method, experiment, began = run.context, run.method, run.context.experiment, time.perf_counter()
        asked = (method, run.state, self.tested, context.model, run.schedule.num_rounds + 1)
        found = evaluate(*asked)
        sample = score_sample(*asked, self.sample) if self.sample else None
        run.seconds["evaluate"] += time.perf_counter() - began
        personalization = unseen = None
        if method.capabilities.trains and not method.capabilities.centralized:
            personalization = personalization_levels(*asked, seed=experiment.seed, personal=found.models)
        if method.capabilities.trains and context.unseen:
            unseen = unseen_client_scores(method, run.state, context.unseen_clients(), *asked[3:])
        fairness: dict[str, Any] = {"clients": over_clients(found.own, experiment.seed)}
        if column := experiment.fairness.group:
            tasks = {group or str(task.to_config()["name"]): task for group, task in context.tasks.items()}
            groups = over_groups(found.predicted, self.tested, tasks, column, experiment.seed)
            fairness |= {"column": column, "groups": groups}
        return {
            "num_records": {
                kind: sum(len(getattr(shard, kind)) for shard in run.shards.values()) for kind in ("train", "test")
            },
            "metrics": Metrics(
                global_prompt=found.everyone,
                per_client=dict(found.own),
                per_client_mean=found.mean,
                per_client_worst=found.worst,
                zero_shot=self.zero_shot if self.zero_shot is not None else found.everyone,
                test_records={name: len(self.tested[name].test) for name in found.own},
                sample=sample,
            ),
            "personalization": personalization,
            "unseen_clients": unseen and {"global_prompt": unseen["global"], "assigned": unseen["assigned"]},
            "fairness": fairness,
            "privacy": run.plan.to_report(),
            "queries": self.queries.to_report(),
        }

    def score(self, run: Runner, prompt: Prompt) -> Score | None:
        return score_everyone(prompt.vectors_PD, run.method, run.state, self.tested, run.context.model)


def run(experiment: Experiment, out: Path, resume: bool = False, progress: Progress = no_progress) -> RunResult:
    """Runs the method and its baselines (`out/baselines`). Raises `RunError` if `out` holds another run or is in use."""
    directory = RunDir(out)
    with directory.lock():
        directory.check(to_toml(experiment), resume)
        resolved, done = directory.resolved(experiment), directory.result()
        if (
            done
            and (directory.path / PAGE).exists()
            and all(RunDir(directory.baseline(name)).result() for name in resolved.baselines)
        ):
            return done
        context = build_context(resolved)
        method = context.experiment.method
        context, configs = resolve_baselines(context)
        directory.begin(experiment, context.experiment)  # only now, so that a refused setting creates no directory
        results: dict[str, RunResult] = {}
        for name, config in {"zero_shot": {"name": "zero_shot"}, OWN: method, **configs}.items():
            where = directory if name == OWN else RunDir(directory.baseline(name))
            floor, private = results["zero_shot"].scores.global_prompt if results else None, ":" not in name
            runner = Runner(context, config, where, SimulatedClients(floor, private), private, progress)
            runner.prepare()
            for _ in runner.train():
                pass
            results[name] = runner.finish()
        result = results[OWN]
        if "local" in results and result.fairness:
            worse = share_worse_off(result.scores.per_client, results["local"].scores.per_client)
            fairness = result.fairness.model_dump() | {"worse_off_than_local": worse}
            result = RunResult.model_validate(result.model_dump() | {"fairness": fairness})
            result.save(directory.path)
        end_with_page(directory.path)
        return result


def resolve_baselines(context: ExperimentContext) -> tuple[ExperimentContext, dict[str, Mapping[str, Any]]]:
    """Returns the context with the names of its baselines, and their settings by name; checks them and the method."""
    method = context.experiment.method
    check_method(context, method)
    context, own = _with_standard_baselines(context), f"{method['name']}:none"
    configs: dict[str, Mapping[str, Any]] = {
        n: method if n == own else {"name": n.partition(":")[0]} for n in context.experiment.baselines
    }
    for name, config in configs.items():
        check_method(context, config, private=":" not in name)
    return context, configs


def _with_standard_baselines(context: ExperimentContext) -> ExperimentContext:
    """Replaces "auto" by the standard baselines that fit the tasks; the run's own method is none of them."""
    experiment = context.experiment
    if experiment.baselines != "auto":
        return context
    found = []
    for name in STANDARD_BASELINES:
        try:
            check_method(context, {"name": name})
        except ConfigError:
            continue
        if name != experiment.method["name"]:
            found.append(name)
    return replace(context, experiment=experiment.model_copy(update={"baselines": tuple(found)}))


def run_method(
    context: ExperimentContext, config: Mapping[str, Any], directory: RunDir, zero_shot: Score | None,
    progress: Progress, private: bool = True,
) -> RunResult:  # fmt: skip
    """Runs one method in a simulation. Not `private`: without the experiment's privacy."""
    runner = Runner(context, config, directory, SimulatedClients(zero_shot, private), private, progress)
    runner.prepare()
    for _ in runner.train():
        pass
    return runner.finish()


def _main_figure(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the main metric of a round's curve; {} if the round has no point."""
    if not metrics:
        return {}
    main = main_metric(name.partition("_")[2] for name in metrics).name
    return {main: next(value for name, value in metrics.items() if name.partition("_")[2] == main)}
