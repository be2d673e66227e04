"""FedAvg on LoRA weights, the line that prompts are compared with: McMahan et al., AISTATS 2017, arXiv 1602.05629, with
low-rank changes of the model's weights (Hu et al., ICLR 2022, arXiv 2106.09685) as the only parameters.

A and B are averaged each by itself (as in FedIT, Zhang et al., 2023, arXiv 2305.05644), which is not the mean of the
products B A. They stand in the prompt's place, so that they are tuned, clipped, noised and sent as one is. What was chosen
for a prompt does not fit them: `training.learning_rate` and `privacy.clip_norm` are not used, the clip norm is found anew.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.backbones import lora
from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig
from ficpd.interfaces import Backbone, ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.types import LORA, Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Prompt, Query, State


class Config(BaseModel):
    """`rank` of the change of each query and value projection, whose scale alpha/rank is `lora.SCALE`. `learning_rate` is
    Adam's, as it is, and our own choice; it falls over the rounds as `training.decay` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    robust: RobustConfig = RobustConfig()


def build(config: Config, training: LocalTrainingConfig) -> "FedLora":
    return FedLora(config, training)


class FedLora:
    name, centralized, trains, releases, full_first_round = "fedlora", False, True, True, False

    def __init__(self, config: Config, training: LocalTrainingConfig):
        self.rank, self.learning_rate = config.rank, config.learning_rate
        self.robust, self.linear = config.robust, config.robust.sums
        self.training = training.model_copy(update={"learning_rate": config.learning_rate})

    def init_prompt(self, prompt: Prompt, backbone: Backbone, seed: int) -> Prompt:
        """Weights that change nothing yet, and a tuned head's rows as large as A's. `BackboneError` if it has no LoRA."""
        if prompt.enters_at == LORA:
            return prompt
        rows_PD = lora.lora_of(backbone).start(self.rank, seed)
        head_CD = prompt.vectors_PD[len(prompt.vectors_PD) - prompt.head_rows :]
        head_CD = head_CD / head_CD.square().mean().sqrt() / (3 * backbone.width) ** 0.5
        return replace(prompt, vectors_PD=torch.cat([rows_PD, head_CD]), enters_at=LORA)

    def init(self, setup: FederationInfo) -> State:
        return State({"weights": setup.start.vectors_PD}, {"num_rounds": setup.num_rounds})

    def local_workload(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        return Assignment(self.name, round, {"weights": state.arrays["weights"]}, {"rate": rate})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        weights = assignment.arrays["weights"]
        tuned = yield from tune(self.training, client, assignment, weights)
        return ClientUpdate(client.id, {"delta": tuned - weights}, client.weight)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["weights"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means = RobustAggregator(self.robust, updates)
        return State({"weights": state.arrays["weights"] + means.mean_all()}, {**state.facts, **means.facts})

    def global_prompt(self, state: State) -> Tensor:
        return state.arrays["weights"]

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return assignment.arrays["weights"]

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        return {"global": state.arrays["weights"]}
