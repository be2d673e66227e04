"""The clients of a simulation: they have records, keep state, count queries and are scored."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ficpd.evaluation.evaluate import evaluate, score_everyone
from ficpd.evaluation.fairness import over_clients, over_groups
from ficpd.evaluation.personalization import personalization_levels, unseen_client_scores
from ficpd.experiments.results import Metrics
from ficpd.federation.client import client_states, load_client_states
from ficpd.federation.privacy_plan import NONE, PrivacyPlan, plan_privacy
from ficpd.federation.query_budget import QueryBudget
from ficpd.federation.rounds import Round
from ficpd.interfaces import Engine
from ficpd.registry import load, validate
from ficpd.types import Prompt, Score, State

if TYPE_CHECKING:
    from ficpd.experiments.runner import Runner


class SimulatedClients:
    """`zero_shot`: the score without a prompt (None: that of this run). Not `private`: without the experiment's privacy."""

    run_spec_bytes = 0

    def __init__(self, zero_shot: Score | None, private: bool):
        self.zero_shot, self.private = zero_shot, private

    def plan_privacy(self, run: "Runner", state: State) -> PrivacyPlan:
        experiment = run.context.experiment
        return plan_privacy(
            experiment.privacy if self.private else NONE, run.method, state, run.shards, run.schedule, experiment.seed,
            run.directory.path, run.directory.run_id(), run.last_release,
        )  # fmt: skip

    def build_engine(self, run: "Runner", kept: Mapping[str, Tensor]) -> Engine:
        context, method, config = run.context, run.method, run.context.experiment.engine
        self.clients = context.clients(run.plan, method.capabilities.centralized)
        self.tested = context.clients() if method.capabilities.centralized else self.clients
        load_client_states(self.clients, kept)
        most = context.experiment.federation.max_queries
        self.queries = QueryBudget(method, run.state, self.clients, run.rounds, most)
        module = load("engines", config.name)
        options = validate(module.Config, config.options, "engine.options")
        return module.build(options, method, self.clients, context.model)

    def before_round(self, round: int, cohort: Sequence[str]) -> None:
        self.queries.before(round, cohort)

    def after_round(self, run: "Runner", done: Round) -> None:
        self.queries.after(done)
        every = run.context.experiment.federation.evaluate_every
        if every and done.round % every == 0 and done.round < run.schedule.num_rounds:
            found = evaluate(run.method, run.state, self.tested, run.context.model, done.round)
            done.metrics.update({f"own_{name}": value for name, value in found.mean.items()})
            done.metrics.update({f"global_{name}": value for name, value in (found.everyone or {}).items()})

    def states(self) -> dict[str, Tensor]:
        return client_states(self.clients)

    def evaluate(self, run: "Runner") -> dict[str, Any]:
        context, method, experiment, began = run.context, run.method, run.context.experiment, time.perf_counter()
        asked = (method, run.state, self.tested, context.model, run.schedule.num_rounds + 1)
        found = evaluate(*asked)
        run.seconds["evaluate"] = time.perf_counter() - began
        personalization = unseen = None
        if method.capabilities.trains and not method.capabilities.centralized:
            personalization = personalization_levels(*asked, seed=experiment.seed)
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
            ),
            "personalization": personalization,
            "unseen_clients": unseen and {"global_prompt": unseen["global"], "assigned": unseen["assigned"]},
            "fairness": fairness,
            "privacy": run.plan.to_report(),
            "queries": self.queries.to_report(),
        }

    def score(self, run: "Runner", prompt: Prompt) -> Score | None:
        return score_everyone(prompt.vectors_PD, self.tested, run.context.model)
