"""Centralised: one prompt tuned on everybody's records in one place. The upper line that no federation may draw.

It sees as many records a round as the whole cohort does, in batches of `batch_size`. Of several tasks each is one pool, and
the pools' prompts are averaged every round.
"""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.federation.aggregation.mean import weighted_mean
from ficpd.interfaces import ClientSide, Model
from ficpd.optimizers import Training, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Query, Setup, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    batch_size: int = Field(default=32, ge=1)


def build(config: Config, training: Training) -> "Centralized":
    return Centralized(config, training)


class Centralized:
    name, pools_data, trains, releases, sums, gathers = "centralized", True, True, True, False, False

    def __init__(self, config: Config, training: Training):
        self.config, self.training = config, training

    def init(self, setup: Setup) -> State:
        records = setup.cohort * self.training.local_steps * self.training.batch_size
        facts = {"num_rounds": setup.num_rounds, "steps": max(1, records // self.config.batch_size)}
        return State({"prompt": setup.start.vectors_PD}, facts)

    def work(self, state: State) -> tuple[int, int]:
        return state.facts["steps"], self.config.batch_size

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment:
        facts = {"rate": self.training.rate(round, state.facts["num_rounds"]), "steps": state.facts["steps"]}
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, facts)

    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt, steps, size = order.arrays["prompt"], order.facts["steps"], self.config.batch_size
        tuned = yield from tune(self.training, client, order, prompt, memory=client.kept, steps=steps, batch_size=size)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["prompt"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return State({"prompt": state.arrays["prompt"] + weighted_mean(updates, "delta")}, state.facts)

    def prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        return order.arrays["prompt"]

    def basis(self, state: State) -> Mapping[str, Tensor]:
        return {"global": state.arrays["prompt"]}
