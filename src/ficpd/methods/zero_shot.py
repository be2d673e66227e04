"""Zero-shot: the frozen backbone without prompt and training, the lower baseline."""

from collections.abc import Generator, Mapping, Sequence

from torch import Tensor

from ficpd.federation.method import Capabilities, Method
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Query, State


class Config(FrozenConfig):
    """The method has no settings."""


def build(config: Config, training: LocalTrainingConfig) -> "ZeroShot":
    return ZeroShot(training)


class ZeroShot(Method):
    name, capabilities = "zero_shot", Capabilities(releases=False, trains=False, candidates=1)

    def init(self, setup: FederationInfo) -> State:
        start = setup.start  # without its virtual tokens
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

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        return {}
