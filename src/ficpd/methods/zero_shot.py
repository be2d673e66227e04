"""Zero-shot: the frozen backbone and the answers' texts, no prompt, no training. The line under every table."""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Query, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config, training: LocalTrainingConfig) -> "ZeroShot":
    return ZeroShot()


class ZeroShot:
    name, centralized, trains, releases, linear, full_first_round = "zero_shot", False, False, False, False, False

    def init(self, setup: FederationInfo) -> State:
        """No virtual tokens; the head rows, if the task has any, as they start."""
        start = setup.start
        return State({"prompt": start.vectors_PD[len(start.vectors_PD) - start.head_rows :]})

    def local_workload(self, state: State) -> tuple[int, int]:
        return 0, 1

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, state.arrays)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        return ClientUpdate(client.id, {})
        yield

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return state

    def global_prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return assignment.arrays["prompt"]

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        return {}
