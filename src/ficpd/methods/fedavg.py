"""FedAvg on soft prompts: McMahan et al., AISTATS 2017, arXiv 1602.05629; Lester et al., EMNLP 2021, arXiv 2104.08691."""

from collections.abc import Generator, Sequence

from ficpd.federation.aggregation.robust import MEAN, RobustAggregator, RobustConfig
from ficpd.federation.method import Capabilities, Method
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientUpdate, Query, State


class Config(FrozenConfig):
    robust: RobustConfig = MEAN


def build(config: Config, training: LocalTrainingConfig) -> "FedAvg":
    return FedAvg(training, config.robust)


class FedAvg(Method):
    name = "fedavg"

    def __init__(self, training: LocalTrainingConfig, robust: RobustConfig = MEAN, proximal_weight: float = 0.0):
        super().__init__(training)
        self.robust, self.proximal_weight = robust, proximal_weight
        self.capabilities = Capabilities(
            private_units=("record", "client"), linear=robust.sums, gradient_sum=robust.sums
        )

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt, weight = assignment.arrays[self.array], self.proximal_weight
        tuned = yield from tune(self.training, client, assignment, prompt, proximal_weight=weight)  # w_k
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means = RobustAggregator(self.robust, updates)
        shared = state.arrays[self.array] + means.mean_all()  # w_{t+1} <- Σ n_k/n w_k
        return State({self.array: shared}, {**state.facts, **means.facts})
