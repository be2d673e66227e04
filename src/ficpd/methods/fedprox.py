"""FedProx on prompts: Li et al., MLSys 2020, arXiv 1812.06127.

FedAvg whose clients minimise h_k(w; w_t) = F_k(w) + μ/2 ‖w - w_t‖² (equation 2), so that short local runs on skewed data
drift less from where the round began.
"""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.federation.aggregation.robust import Means, Robust
from ficpd.interfaces import ClientSide, Model
from ficpd.optimizers import Training, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Query, Setup, State


class Config(BaseModel):
    """`proximal_weight` is the paper's μ (it tries 0.001 to 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    proximal_weight: float = Field(default=0.01, ge=0)
    robust: Robust = Robust()


def build(config: Config, training: Training) -> "FedProx":
    return FedProx(config, training)


class FedProx:
    name, pools_data, trains, releases, gathers = "fedprox", False, True, True, False

    def __init__(self, config: Config, training: Training):
        self.config, self.training, self.sums = config, training, config.robust.sums

    def init(self, setup: Setup) -> State:
        return State({"prompt": setup.start.vectors_PD}, {"num_rounds": setup.num_rounds})

    def work(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, {"rate": rate})

    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = order.arrays["prompt"]
        weight = self.config.proximal_weight
        tuned = yield from tune(self.training, client, order, prompt, proximal_weight=weight)  # ∇F_k(w) + μ(w - w_t)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["prompt"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means = Means(self.config.robust, updates)
        return State({"prompt": state.arrays["prompt"] + means.everyone()}, {**state.facts, **means.facts})

    def prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        return order.arrays["prompt"]

    def basis(self, state: State) -> Mapping[str, Tensor]:
        return {"global": state.arrays["prompt"]}
