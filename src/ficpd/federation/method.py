"""The base class of federated methods, with the defaults of one soft prompt that all clients share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from ficpd.errors import CodecError
from ficpd.federation.validation import RATE, validate_facts, validate_prompts
from ficpd.interfaces import Backbone, ClientContext, Model, Subspace, Task
from ficpd.types import (
    Answer,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    FederationInfo,
    Predictor,
    Prompt,
    Query,
    Readout,
    Record,
    State,
    UpdateSpec,
)


class DemonstrationEncoder(Protocol):
    """Encodes records together with examples, which the model sees with every text."""

    def encode(
        self, task: Task, records: Sequence[Record], backbone: Backbone, prompt: Prompt, encoded: Batch | None = None
    ) -> Batch:
        """Encodes records together with the examples; `encoded`: the records without them, if available."""
        ...


@dataclass(frozen=True)
class Capabilities:
    """Declares the properties of a method. Privacy plans, schedules and query budgets use only these.

    The defaults are strict: no private form, no statistics, not linear, releases.
    """

    private_units: tuple[Literal["record", "client"], ...] = ()
    """Privacy units for which the method has a private form."""
    not_private: str = "it declares none (Capabilities.private_units); run it with privacy.name = 'none'"
    """Explains a refused unit and names an alternative."""
    releases: bool = True
    """Whether clients release values that depend on records, to the server or to users."""
    linear: bool = False
    """`aggregate` needs only the weighted sum of the updates (`cluster_sums`): central noise is possible."""
    gradient_sum: bool = False
    """`aggregate` needs only the sum of all clients' gradients at the prompts sent: secure sums are possible."""
    statistics_per_round: Mapping[str, float] = field(default_factory=dict)
    """Totals over records released in every assignment, with their default shares of a record-level budget."""
    statistics_once: Mapping[str, float | None] = field(default_factory=dict)
    """Totals over records released once, with their default shares; None: `privacy.statistics` states the share."""
    subspace: bool = True
    """Clients tune a soft prompt by gradients, so `compression.name = "auto"` may choose a subspace."""
    learns_readout: bool = False
    """The server learns readouts, and needs the label texts' and public features (`FederationInfo`)."""
    centralized: bool = False
    """One client per task holds all records: the upper bound."""
    trains: bool = True
    rounds: int | None = None
    """Rounds that the method needs; None: as many as the experiment has."""
    full_first_round: bool = False
    """The first round samples every client."""
    full_last_round: bool = False
    """The last round samples every client."""
    prompt_type: Literal["soft", "tokens", "lora"] = "soft"
    """Other types start from `init_prompt`. "tokens": token ids, int64 [P, 1], at layer 0, which take no noise."""
    learning_rate: float | None = None
    """Replaces `training.learning_rate`."""
    record_clip_norm: float | None = None
    """Replaces an open `privacy.clip_norm` of a method without gradients."""
    means_per_update: int = 0
    """Directional derivatives in one update; 0: the method sends the change of a prompt."""
    candidates: float | None = None
    """Queries about each record of a step; None: those of `training.optimizer`."""


GROUP = "group:"
"""Prefix of a group's name among a method's clients."""


def group_card(group: str) -> ClientCard:
    """Returns the client that stands for a group. In a secure sum, the group's sum is its update."""
    return ClientCard(GROUP + group, {"group": group} if group else {})


def group_of(card: ClientCard, groups: Collection[str]) -> str:
    """Returns the name of the `group_card` of a client's group."""
    named = str(card.metadata.get("group", ""))
    return GROUP + (named if named in groups else "")


class Method(ABC):
    """A federated method: its server half and its client half. The defaults share one soft prompt.

    A subclass inherits the `capabilities` of its base, and declares its own if they differ.
    """

    name: str
    capabilities = Capabilities()
    array = "prompt"
    """Name of the tuned array in states and assignments."""
    subspace: Subspace | None = None

    def __init__(self, training: Any):
        """`training`: an `optimizers.LocalTrainingConfig`."""
        self.training = training

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        """Raises `ConfigError` for tasks or a backbone that the method cannot use."""

    def adapt_to(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        """Drops capabilities that none of the tasks can use, so that no budget is reserved for them."""

    def bind(self, subspace: Subspace | None) -> None:
        """Receives the run's subspace, before any other call, for servers that rebuild prompts in it."""
        self.subspace = subspace

    def init_prompt(self, prompt: Prompt, backbone: Backbone, seed: int) -> Prompt:
        """Makes the initial prompt of a `prompt_type` other than "soft" from the experiment's prompt. Idempotent."""
        return prompt

    # ------------------------------------------------------------ server

    def init(self, setup: FederationInfo) -> State:
        """Makes the first state: the initial prompt, and the facts that `make_assignment` reads."""
        return State({self.array: setup.start.vectors_PD}, {"num_rounds": setup.num_rounds})

    def local_workload(self, state: State) -> tuple[int, int]:
        """Returns steps and batch size of one assignment, for the privacy plan."""
        return self.training.local_steps, self.training.batch_size

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        """Makes the message to one client. Nothing else of the state is sent."""
        rate = self.training.rate(round, state.facts["num_rounds"])
        return Assignment(self.name, round, {self.array: state.arrays[self.array]}, {"rate": rate})

    def update_spec(self, state: State) -> UpdateSpec:
        """Returns names and shapes of the arrays of every update. The codec checks received bytes against them."""
        return {"delta": tuple(state.arrays[self.array].shape)}

    def cluster_sums(self, state: State) -> UpdateSpec:
        """Returns names and shapes of the sum over all clients to which central noise is added."""
        return self.update_spec(state)

    def in_cluster_sum(self, state: State, update: ClientUpdate) -> ClientUpdate:
        """Returns the update as a term of that sum. With clusters, all parts but its cluster's are zero."""
        return update

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        """Combines updates into the next state.

        The facts `excluded_updates` (reasons by client) and `underfilled_means` (by mean) reach the round's record.
        """

    def global_prompt(self, state: State) -> Tensor | None:
        """Returns the shared prompt [P, D]; None if there is none."""
        return state.arrays.get(self.array)

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        """Returns the prompts for a library, each [P, D], by name."""
        shared = self.global_prompt(state)
        return {} if shared is None else {"global": shared}

    # ------------------------------------------------------------ client

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` for an assignment that the server half never makes, before any record is read."""
        validate_facts(assignment, RATE)
        validate_prompts(assignment, start, (self.array,))

    @abstractmethod
    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        """Yields queries, receives their answers, and returns the update: the arrays of `update_spec`."""
        ...

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        """Returns this client's prompt [P, D], given its next assignment."""
        return assignment.arrays[self.array]

    def local_model(
        self, client: ClientContext, assignment: Assignment
    ) -> Generator[Query, Answer, Sequence[Predictor]]:
        """Builds the mixture with which this client predicts, given its next assignment. It is not sent."""
        yield from ()
        return [Predictor(self.personal_prompt(client, assignment))]

    def readout(self, state: State, client: ClientCard) -> Readout | None:
        """Returns the readout of the shared prompts for this client's task; None: its label texts."""
        return None

    def demonstrate(
        self, task: Task, records: Sequence[Record], encoded: Callable[[], Batch], prompt: Prompt, backbone: Backbone
    ) -> Generator[Query, Answer, DemonstrationEncoder] | None:
        """Chooses demonstrations from a client's training records; `encoded` returns the records as one batch."""
        return None


def validate_assignment(assignment: Assignment, method: Method, start: Prompt, last: int) -> None:
    """Raises `CodecError` for an assignment that this run never sends: another method, round or shape."""
    if assignment.method != method.name:
        raise CodecError(f"assignment.method = {assignment.method!r}, expected the run's {method.name!r}")
    if type(assignment.round) is not int or not 1 <= assignment.round <= last + 1:
        raise CodecError(f"assignment.round = {assignment.round!r}, expected 1 to {last}")
    method.validate_assignment(assignment, start)
