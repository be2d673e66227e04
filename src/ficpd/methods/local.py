"""Local only: each client tunes its own prompt and sends nothing. A baseline without federation.

The prompt and Adam's moments stay on the client over the rounds.
"""

from collections.abc import Generator, Mapping, Sequence

from torch import Tensor

from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import RATE, validate_arrays, validate_facts
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Prompt, Query, State


class Config(FrozenConfig):
    """The method has no settings."""


def build(config: Config, training: LocalTrainingConfig) -> "Local":
    return Local(training)


class Local(Method):
    name, capabilities = "local", Capabilities(releases=False)

    def init(self, setup: FederationInfo) -> State:
        return State({}, {"num_rounds": setup.num_rounds})

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, {}, {"rate": self.training.rate(round, state.facts["num_rounds"])})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt = self.personal_prompt(client, assignment)
        tuned = yield from tune(self.training, client, assignment, prompt, memory=client.client_state)
        client.client_state["prompt"] = tuned
        return ClientUpdate(client.id, {})

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return state

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.client_state.get("prompt", client.start)

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        validate_facts(assignment, RATE)
        validate_arrays(assignment, {})
