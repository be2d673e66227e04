"""Zero-shot: the frozen backbone and the answers' texts, no prompt, no training. The line under every table."""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.interfaces import ClientSide, Model
from ficpd.optimizers import Training
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Query, Setup, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config, training: Training) -> "ZeroShot":
    return ZeroShot()


class ZeroShot:
    name, pools_data, trains, releases, sums, gathers = "zero_shot", False, False, False, False, False

    def init(self, setup: Setup) -> State:
        """No virtual tokens; the head rows, if the task has any, as they start."""
        start = setup.start
        return State({"prompt": start.vectors_PD[len(start.vectors_PD) - start.head_rows :]})

    def work(self, state: State) -> tuple[int, int]:
        return 0, 1

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, state.arrays)

    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        return ClientUpdate(client.id, {})
        yield

    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return state

    def prompt(self, state: State) -> Tensor:
        return state.arrays["prompt"]

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        return order.arrays["prompt"]

    def basis(self, state: State) -> Mapping[str, Tensor]:
        return {}
