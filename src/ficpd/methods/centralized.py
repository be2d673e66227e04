"""Centralised: one prompt tuned on everybody's records in one place. The upper line that no federation may draw.

It sees as many records a round as the whole cohort does, in batches of `batch_size`. Of several tasks each is one pool, and
the pools' prompts are averaged every round.
"""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.federation.aggregation.mean import weighted_mean
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Query, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    batch_size: int = Field(default=32, ge=1)


def build(config: Config, training: LocalTrainingConfig) -> "Centralized":
    return Centralized(config, training)


class Centralized:
    name, centralized, trains, releases, linear, full_first_round = "centralized", True, True, True, False, False

    def __init__(self, config: Config, training: LocalTrainingConfig):
        self.config, self.training = config, training

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
        tuned = yield from tune(
            self.training, client, assignment, prompt, memory=client.client_state, steps=steps, batch_size=size
        )
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["prompt"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return State({"prompt": state.arrays["prompt"] + weighted_mean(updates, "delta")}, state.facts)

    def global_prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return assignment.arrays["prompt"]

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        return {"global": state.arrays["prompt"]}
