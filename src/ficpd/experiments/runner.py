"""Runs a method in three phases: `prepare`, `train`, `finish`; and an experiment: its method, then its baselines.

The clients are an object of their own: `SimulatedClients`, or the `Sites` of `deployment.coordinator`.
"""

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ficpd.backbones.autotune import machine_info
from ficpd.errors import BudgetError
from ficpd.evaluation.fairness import share_worse_off
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import Experiment, to_toml
from ficpd.experiments.distillation import DISTILLED
from ficpd.experiments.report.build import PAGE, write_page
from ficpd.experiments.results import BackboneInfo, Bytes, RunResult, Seconds
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.setup import (
    VERSIONS,
    build_library,
    build_method,
    build_schedule,
    check_method,
    cluster_report,
    distill_if_configured,
    federation_info,
    method_config,
    with_noise_scale,
)
from ficpd.experiments.simulated_clients import SimulatedClients
from ficpd.federation.privacy_plan import PrivacyPlan
from ficpd.federation.rounds import Round, run_rounds
from ficpd.interfaces import Engine
from ficpd.types import Prompt, Score, State

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as (method, rounds done, rounds planned, figures to show)."""


def no_progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
    """Shows nothing."""


class Clients(Protocol):
    """What differs between a simulation and a run among real sites."""

    run_spec_bytes: int
    """What each client gets once, before its first assignment."""

    def plan_privacy(self, run: "Runner", state: State) -> PrivacyPlan: ...
    def build_engine(self, run: "Runner", kept: Mapping[str, Tensor]) -> Engine:
        """Returns the engine of the round loop. `kept`: what the clients kept, from the checkpoint."""
        ...

    def before_round(self, round: int, cohort: Sequence[str]) -> None:
        """Raises `BudgetError` to end the run before a round."""
        ...

    def after_round(self, run: "Runner", done: Round) -> None:
        """Adds figures to a round's record, before it is saved."""
        ...

    def states(self) -> dict[str, Tensor]:
        """Returns what the clients keep between rounds, for the checkpoint."""
        ...

    def evaluate(self, run: "Runner") -> dict[str, Any]:
        """Returns the fields of the result that depend on the kind of clients."""
        ...

    def score(self, run: "Runner", prompt: Prompt) -> Score | None:
        """Scores one prompt on all test records; None where nobody may."""
        ...


class Runner:
    """One method with one group of clients. A run goes on from its last checkpoint."""

    def __init__(
        self,
        context: ExperimentContext,
        config: Mapping[str, Any],
        directory: RunDir,
        clients: Clients,
        private: bool = True,
    ):
        self.config, self.directory, self.clients = config, directory, clients
        self.method = build_method(context, config)
        self.context = context.with_method(self.method)
        self.shards = self.context.shards_for(self.method.capabilities.centralized)
        self.label = self.method.name if private else f"{self.method.name}, no privacy"
        self.stopped: str | None = None

    @property
    def last_release(self) -> int:
        """The last round that released anything."""
        return max((done.round for done in self.rounds if done.updates), default=0)

    def prepare(self) -> None:
        """Loads or makes the first state, plans privacy, checks the ledgers and builds the engine."""
        context, method, directory = self.context, self.method, self.directory
        self.schedule = build_schedule(context, method)
        saved = directory.load()
        state, kept, self.rounds, self.seconds = saved or (
            method.init(federation_info(context, self.shards)), {}, [],
            {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0},
        )  # fmt: skip
        self.plan = self.clients.plan_privacy(self, state)
        accounts = [*self.plan.accounts.values(), *([self.plan.central.account] if self.plan.central else [])]
        directory.check_ledgers(accounts, method.name, len(self.rounds))
        self.state = with_noise_scale(context, method, state, self.plan)
        self.engine = self.clients.build_engine(self, kept)
        directory.write_rounds(self.rounds)

    def train(self) -> Iterator[Round]:
        """Yields each round once its checkpoint is saved. A spent budget ends the run: `stopped` says why."""
        loop = run_rounds(
            self.method, self.engine, self.context.model, self.state, self.schedule, self.context.compression,
            len(self.rounds) + 1, self.plan.central, self.clients.before_round,
        )  # fmt: skip
        try:
            for self.state, done in loop:
                self.clients.after_round(self, done)
                self.rounds.append(done)
                self.seconds["train"] += done.seconds_train
                self.seconds["aggregate"] += done.seconds_aggregate
                self.directory.save(self.state, self.clients.states(), self.rounds, self.seconds)
                yield done
        except BudgetError as error:
            self.stopped = str(error)

    def finish(self) -> RunResult:
        """Evaluates and distils; leaves the library and the result."""
        context, method, experiment, rounds = self.context, self.method, self.context.experiment, self.rounds
        found, clusters = self.clients.evaluate(self), cluster_report(context, self.state)
        refined = distill_if_configured(context, method, self.state, self.directory) if clusters else None
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
            settings=method_config(self.config),
            clusters=clusters,
            distillation=refined.facts if refined else None,
            stopped=self.stopped,
            machine={**machine_info(context.model.backbone.device), "system": platform.system()},
            versions={name: metadata.version(name) for name in VERSIONS},
            **found,
        )  # fmt: skip
        self.plan.close()
        library = build_library(context, method, self.state, result, {DISTILLED: refined.prompt} if refined else {})
        library.save(self.directory.path / "library")
        result.save(self.directory.path)
        return result


def _bytes(rounds: Sequence[Round], run_spec_bytes: int) -> Bytes:
    """Sums what travelled. Means are over the updates that arrived, and over the assignments that were sent."""
    up, down = sum(done.bytes_up for done in rounds), sum(done.bytes_down for done in rounds)
    return Bytes(
        up_per_client_round=up / max(sum(done.updates + len(done.dropped) for done in rounds), 1),
        down_per_client_round=down / max(sum(done.clients for done in rounds), 1),
        up_total=up,
        down_total=down,
        run_spec_per_client=run_spec_bytes,
    )


def run(experiment: Experiment, out: Path, resume: bool = False, progress: Progress = no_progress) -> RunResult:
    """Runs the method and its baselines, which go to `out/baselines`. Raises `RunError` if `out` is taken."""
    directory = RunDir(out)
    with directory.lock():
        directory.check(to_toml(experiment), resume)
        return _run(experiment, directory, progress)


def _run(experiment: Experiment, directory: RunDir, progress: Progress) -> RunResult:
    folders = {name: RunDir(directory.path / "baselines" / name.replace(":", "-")) for name in experiment.baselines}
    done = directory.result()
    if done and (directory.path / PAGE).exists() and all(beside.result() for beside in folders.values()):
        return done
    context = build_context(directory.resolved(experiment))
    configs = {name: baseline_method_config(context.experiment, name) for name in experiment.baselines}
    check_method(context, context.experiment.method)
    for name, config in configs.items():
        check_method(context, config, private=":" not in name)
    directory.begin(experiment, context.experiment)  # a setting that is refused above leaves no directory
    zero_shot = RunDir(directory.path / "baselines" / "zero_shot")
    floor = run_method(context, {"name": "zero_shot"}, zero_shot, None, progress).scores.global_prompt
    result = run_method(context, context.experiment.method, directory, floor, progress)
    others = {
        name: run_method(context, configs[name], beside, floor, progress, private=":" not in name)
        for name, beside in folders.items()
    }
    if "local" in others and result.fairness:
        worse = share_worse_off(result.scores.per_client, others["local"].scores.per_client)
        fairness = result.fairness.model_dump() | {"worse_off_than_local": worse}
        result = RunResult.model_validate(result.model_dump() | {"fairness": fairness})
        result.save(directory.path)
    write_page(directory.path)
    return result


def baseline_method_config(experiment: Experiment, baseline: str) -> Mapping[str, Any]:
    """Returns the settings of a baseline: the defaults of its method; of "NAME:none" with the run's own method, the run's."""
    name, _, without = baseline.partition(":")
    return experiment.method if without and name == experiment.method["name"] else {"name": name}


def run_method(
    context: ExperimentContext, config: Mapping[str, Any], directory: RunDir, zero_shot: Score | None,
    progress: Progress, private: bool = True,
) -> RunResult:  # fmt: skip
    """Runs one method in a simulation. Not `private`: without the experiment's privacy."""
    if finished := directory.result():
        return finished
    runner = Runner(context, config, directory, SimulatedClients(zero_shot, private), private)
    runner.prepare()
    planned = runner.schedule.num_rounds
    progress(runner.label, len(runner.rounds), planned, {})
    for done in runner.train():
        progress(runner.label, done.round, planned, {"clients": done.clients, **done.metrics})
    if runner.stopped:
        progress(runner.label, len(runner.rounds), planned, {"stopped: the budget is spent": 1})
    result = runner.finish()
    scores, main = result.scores, result.main.name
    own = {f"{main}, own test": scores.per_client_mean[main]}
    everyone = {f"{main}, everyone's test": scores.global_prompt[main]} if scores.global_prompt else {}
    progress(runner.label, planned, planned, everyone | own)
    return result
