"""FedProx on prompts: Li et al., MLSys 2020, arXiv 1812.06127.

FedAvg whose clients minimise h_k(w; w_t) = F_k(w) + μ/2 ‖w - w_t‖² (equation 2), so that short local runs on skewed data
drift less from where the round began.
"""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Query, State


class Config(BaseModel):
    """`proximal_weight` is the paper's μ (it tries 0.001 to 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    proximal_weight: float = Field(default=0.01, ge=0)
    robust: RobustConfig = RobustConfig()


def build(config: Config, training: LocalTrainingConfig) -> "FedProx":
    return FedProx(config, training)


class FedProx:
    name, centralized, trains, releases, full_first_round = "fedprox", False, True, True, False

    def __init__(self, config: Config, training: LocalTrainingConfig):
        self.config, self.training, self.linear = config, training, config.robust.sums

    def init(self, setup: FederationInfo) -> State:
        return State({"prompt": setup.start.vectors_PD}, {"num_rounds": setup.num_rounds})

    def local_workload(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, {"rate": rate})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = assignment.arrays["prompt"]
        weight = self.config.proximal_weight
        tuned = yield from tune(
            self.training, client, assignment, prompt, proximal_weight=weight
        )  # ∇F_k(w) + μ(w - w_t)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["prompt"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means = RobustAggregator(self.config.robust, updates)
        return State({"prompt": state.arrays["prompt"] + means.mean_all()}, {**state.facts, **means.facts})

    def global_prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return assignment.arrays["prompt"]

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        return {"global": state.arrays["prompt"]}
