"""FedAvg on prompts: McMahan et al., AISTATS 2017, arXiv 1602.05629, with soft prompts (Lester et al., EMNLP 2021,
arXiv 2104.08691) as the only parameters."""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.federation.aggregation.robust import MEAN, Means, Robust
from ficpd.interfaces import ClientSide, Model
from ficpd.optimizers import Training, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Query, Setup, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    robust: Robust = MEAN


def build(config: Config, training: Training) -> "FedAvg":
    return FedAvg(training, config.robust)


class FedAvg:
    name, pools_data, trains, releases, gathers = "fedavg", False, True, True, False

    def __init__(self, training: Training, robust: Robust = MEAN):
        self.training, self.robust, self.sums = training, robust, robust.sums

    def init(self, setup: Setup) -> State:
        return State({"prompt": setup.start.vectors_PD}, {"num_rounds": setup.num_rounds})

    def work(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, {"rate": rate})

    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = order.arrays["prompt"]
        tuned = yield from tune(self.training, client, order, prompt)  # w_k <- ClientUpdate(k, w_t)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["prompt"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means = Means(self.robust, updates)
        prompt = state.arrays["prompt"] + means.everyone()  # w_{t+1} <- Σ n_k/n w_k
        return State({"prompt": prompt}, {**state.facts, **means.facts})

    def prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        return order.arrays["prompt"]

    def basis(self, state: State) -> Mapping[str, Tensor]:
        return {"global": state.arrays["prompt"]}
