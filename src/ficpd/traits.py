"""What a task or a method may be besides its seam (`seams.py`): small protocols, asked for with `isinstance`."""

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ficpd.interfaces import Backbone, ClientContext, Subspace, Task
from ficpd.types import JSON, Answer, Assignment, Batch, ClientUpdate, ModelOutput, Prompt, Query, Record, State


@runtime_checkable
class MakesUp(Protocol):
    """A task whose records are more than a text and a target."""

    def synthetic_fields(self, place: int) -> Mapping[str, JSON]:
        """The further fields of the place-th record that is made up: public, and nobody's."""
        ...


@runtime_checkable
class Classifies(Protocol):
    """A task whose records have one of a few labels, and whose logits heed `LABEL_PRIOR`; `Batch.targets` are places."""

    @property
    def num_labels(self) -> int: ...
    def logits(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """[R, C] in the labels' order."""
        ...


@runtime_checkable
class SumsByPart(Protocol):
    """A method whose `sums` holds of each of several parts: a client's update counts in one of them, which is public."""

    def cluster_sums(self, state: State) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the one sum over all clients."""
        ...

    def in_cluster_sum(self, state: State, update: ClientUpdate) -> ClientUpdate:
        """The update as it enters that sum: zero in all parts but its own."""
        ...


@runtime_checkable
class Calibrates(Protocol):
    """A method by which a client may use more than a prompt: what it knows of its own records."""

    statistics: Sequence[str]
    """The totals that its clients ask for; at the record level each needs a share of the budget."""

    def local_batch(self, client: ClientContext, batch: Batch) -> Batch:
        """Records of the client's own as it asks about them."""
        ...


@runtime_checkable
class Particular(Protocol):
    """A method that is not for every task and backbone."""

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        """Raises `ConfigError` where it is not for these."""
        ...


class Shown(Protocol):
    """Examples that stand beside every text."""

    def encode(
        self, task: Task, records: Sequence[Record], backbone: Backbone, prompt: Prompt, encoded: Batch | None = None
    ) -> Batch:
        """Records as they are asked about with the examples beside them; `encoded`: without them, if that was done."""
        ...


@runtime_checkable
class Demonstrates(Protocol):
    """A method whose clients show examples of their own beside each text that they ask about."""

    def demonstrate(
        self, task: Task, records: Sequence[Record], batch: Batch, prompt: Prompt, backbone: Backbone
    ) -> Generator[Query, Answer, Shown]:
        """What a client shows of its training records; `batch` is all of them, encoded."""
        ...


@runtime_checkable
class ReleasesTotals(Protocol):
    """A method whose clients release totals over their records in every order."""

    totals: Mapping[str, float]
    """By name, the share of a record-level budget that each takes over all orders."""


@runtime_checkable
class Unprotected(Protocol):
    """A method that runs without a guarantee only."""

    unprotected: str
    """Why, and what to do instead."""


@runtime_checkable
class Rebuilds(Protocol):
    """A method whose clients send numbers that its server makes a prompt of, in the run's coordinates."""

    subspace: Subspace | None
    """Those that the clients have; whoever builds the method says which."""
    steps: int
    """So many vectors of slopes stand side by side in what a client sends."""
    client_clip_norm: float | None
    """What they are clipped to together where whole clients are protected; None: found. The settings' is for prompts."""


@runtime_checkable
class ChecksOrders(Protocol):
    """A method whose orders are no prompts."""

    def validate_assignment(self, order: Assignment, start: Prompt) -> None:
        """Raises `CodecError` for an order that the server's half would not make, before a record is touched."""
        ...


@runtime_checkable
class StartsElsewhere(Protocol):
    """A method that does not start from the experiment's prompt, nor at its learning rate (None: at that)."""

    learning_rate: float | None

    def init_prompt(self, prompt: Prompt, backbone: Backbone, seed: int) -> Prompt:
        """What everybody starts from instead, given the experiment's prompt; of what it has returned, the same again."""
        ...


@runtime_checkable
class TunesWords(StartsElsewhere, Protocol):
    """One whose prompts are token ids, int64 [P, 1], at layer 0: without a tuned head, and no noise can be added to them."""

    clip_norm: float
    """What a record's contribution to `mean` is clipped to, where `privacy.clip_norm` is open: there are no gradients."""
