"""Tunes one prompt on the pooled records of all clients: the upper bound.

A round reads as many records as the whole cohort would. With several tasks, each task is one pool, and the prompts of
the pools are averaged every round.
"""

from collections.abc import Generator, Sequence

from pydantic import Field

from ficpd.federation.aggregation.mean import weighted_mean
from ficpd.federation.method import Capabilities, Method
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Query, State


class Config(FrozenConfig):
    """batch_size: number of records in a step."""

    batch_size: int = Field(default=32, ge=1)


def build(config: Config, training: LocalTrainingConfig) -> "Centralized":
    return Centralized(config, training)


class Centralized(Method):
    name = "centralized"
    capabilities = Capabilities(private_units=("record",), centralized=True)

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config

    def init(self, setup: FederationInfo) -> State:
        records = setup.cohort * self.training.local_steps * self.training.batch_size
        facts = {"num_rounds": setup.num_rounds, "steps": max(1, records // self.config.batch_size)}
        return State({"prompt": setup.start.vectors_PD}, facts)

    def local_workload(self, state: State) -> tuple[int, int]:
        return state.facts["steps"], self.config.batch_size

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        facts = {"rate": self.training.rate(round, state.facts["num_rounds"]), "steps": state.facts["steps"]}
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, facts)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt, steps, size = assignment.arrays["prompt"], assignment.facts["steps"], self.config.batch_size
        state = client.client_state
        tuned = yield from tune(self.training, client, assignment, prompt, memory=state, steps=steps, batch_size=size)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return State({"prompt": state.arrays["prompt"] + weighted_mean(updates, "delta")}, state.facts)
