"""Local only: every client tunes its own prompt on its own records; nothing that depends on a record ever leaves.

The line that a federation has to beat at home. The prompt and Adam's moments stay at the client over the rounds.
"""

from collections.abc import Generator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.federation.validation import RATE, validate_arrays, validate_facts
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Prompt, Query, State


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config, training: LocalTrainingConfig) -> "Local":
    return Local(training)


class Local:
    name, centralized, trains, releases, linear, full_first_round = "local", False, True, False, False, False

    def __init__(self, training: LocalTrainingConfig):
        self.training = training

    def init(self, setup: FederationInfo) -> State:
        return State({}, {"num_rounds": setup.num_rounds})

    def local_workload(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, {}, {"rate": self.training.rate(round, state.facts["num_rounds"])})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = self.personal_prompt(client, assignment)
        client.client_state["prompt"] = yield from tune(
            self.training, client, assignment, prompt, memory=client.client_state
        )
        return ClientUpdate(client.id, {})

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return state

    def global_prompt(self, state: State) -> None:
        return None

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.client_state.get("prompt", client.start)

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless a rate is all that it has."""
        validate_facts(assignment, RATE)
        validate_arrays(assignment, {})

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        """Nothing that anybody shares."""
        return {}
