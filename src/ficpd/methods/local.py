"""Local only: every client tunes its own prompt on its own records; nothing that depends on a record ever leaves.

The line that a federation has to beat at home. The prompt and Adam's moments stay at the client over the rounds.
"""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.federation.validation import RATE, check_arrays, check_facts
from ficpd.interfaces import ClientSide, Model
from ficpd.optimizers import Training, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Prompt, Query, Setup, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config, training: Training) -> "Local":
    return Local(training)


class Local:
    name, pools_data, trains, releases, sums, gathers = "local", False, True, False, False, False

    def __init__(self, training: Training):
        self.training = training

    def init(self, setup: Setup) -> State:
        return State({}, {"num_rounds": setup.num_rounds})

    def work(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, {}, {"rate": self.training.rate(round, state.facts["num_rounds"])})

    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = self.personal(client, order)
        client.kept["prompt"] = yield from tune(self.training, client, order, prompt, memory=client.kept)
        return ClientUpdate(client.id, {})

    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return state

    def prompt(self, state: State) -> None:
        return None

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        return client.kept.get("prompt", client.start)

    def check_order(self, order: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless a rate is all that it has."""
        check_facts(order, RATE)
        check_arrays(order, {})

    def basis(self, state: State) -> Mapping[str, Tensor]:
        """Nothing that anybody shares."""
        return {}
