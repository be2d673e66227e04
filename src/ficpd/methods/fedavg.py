"""FedAvg on prompts: McMahan et al., AISTATS 2017, arXiv 1602.05629, with soft prompts (Lester et al., EMNLP 2021,
arXiv 2104.08691) as the only parameters."""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.federation.aggregation.robust import MEAN, RobustAggregator, RobustConfig
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Query, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    robust: RobustConfig = MEAN


def build(config: Config, training: LocalTrainingConfig) -> "FedAvg":
    return FedAvg(training, config.robust)


class FedAvg:
    name, centralized, trains, releases, full_first_round = "fedavg", False, True, True, False

    def __init__(self, training: LocalTrainingConfig, robust: RobustConfig = MEAN):
        self.training, self.robust, self.linear = training, robust, robust.sums

    def init(self, setup: FederationInfo) -> State:
        return State({"prompt": setup.start.vectors_PD}, {"num_rounds": setup.num_rounds})

    def local_workload(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, {"rate": rate})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = assignment.arrays["prompt"]
        tuned = yield from tune(self.training, client, assignment, prompt)  # w_k <- ClientUpdate(k, w_t)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["prompt"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means = RobustAggregator(self.robust, updates)
        prompt = state.arrays["prompt"] + means.mean_all()  # w_{t+1} <- Σ n_k/n w_k
        return State({"prompt": prompt}, {**state.facts, **means.facts})

    def global_prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return assignment.arrays["prompt"]

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        return {"global": state.arrays["prompt"]}
