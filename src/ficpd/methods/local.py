"""Local only: every client tunes its own prompt on its own records; nothing that depends on a record ever leaves.

The line that a federation has to beat at home. The prompt and Adam's moments stay at the client over the rounds.
"""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.seams import ClientSide, Model
from ficpd.tuners import Training, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Query, Setup, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config, training: Training) -> "Local":
    return Local(training)


class Local:
    name, pools_data, trains, releases, sums, gathers = "local", False, True, False, False, False

    def __init__(self, training: Training):
        self.training = training

    def init(self, setup: Setup) -> State:
        return State({"start": setup.start.vectors_PD}, {"num_rounds": setup.num_rounds, "started": []})

    def work(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment:
        """The start travels until the client has answered once."""
        arrays = {} if client.name in state.facts["started"] else {"start": state.arrays["start"]}
        return Assignment(self.name, round, arrays, {"rate": self.training.rate(round, state.facts["num_rounds"])})

    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = self.personal(client, order)
        client.kept["prompt"] = yield from tune(self.training, client, order, prompt, memory=client.kept)
        return ClientUpdate(client.id, {})

    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        started = sorted({*state.facts["started"], *(update.client for update in updates)})
        return State(state.arrays, {**state.facts, "started": started})

    def prompt(self, state: State) -> None:
        return None

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        return client.kept["prompt"] if "prompt" in client.kept else order.arrays["start"]

    def basis(self, state: State) -> Mapping[str, Tensor]:
        """Nothing that anybody shares."""
        return {}
