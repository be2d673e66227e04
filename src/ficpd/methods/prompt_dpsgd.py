"""PromptDPSGD: every client tunes a prompt of its own by DP-SGD, and nobody hears of it (Duan et al., "Flocks of Stochastic
Parrots", NeurIPS 2023, arXiv 2305.15594).

    per step  Poisson sample -> gradient of each record with respect to the prompt -> clip to C -> sum + N(0, σ²C²) -> step

`local` with the mechanism: no record is hidden from the server by it, for nothing leaves either way, but from whoever uses
the prompt. A service that answers with a prompt in front tells of the records that the prompt was tuned on (the paper's
membership inference); of this one it tells within (ε, δ), as if the prompt had been published. So its `releases` is true:
the prompt is what is paid for. Only a record-level mechanism makes it private; one on updates has nothing to noise.

The paper has one party and settings of its own for each task; here the experiment's start, optimizer and rates are used, as
in all methods, so that they can be compared.
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


def build(config: Config, training: LocalTrainingConfig) -> "PromptDpsgd":
    return PromptDpsgd(training)


class PromptDpsgd:
    """Guarantees (`tests/methods/test_prompt_dpsgd.py`): the prompt and the optimizer's moments depend on the records only
    through `ClientSide.mean`; each step is paid for; nothing leaves but that an order was carried out."""

    name, centralized, trains, releases, linear, full_first_round = "prompt_dpsgd", False, True, True, False, False

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
