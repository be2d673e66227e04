"""The seams: what a backbone, task, mechanism, method and engine have to be. Protocols of a few methods each, no trees."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ficpd.types import (
    JSON,
    Answer,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    Item,
    Outputs,
    Prompt,
    Query,
    Record,
    Reply,
    Score,
    Setup,
    State,
)


class Backbone(Protocol):
    """The frozen model. Contract: rows never see each other; no dropout; padding is masked; no state between calls."""

    name: str
    fingerprint: str
    width: int
    depth: int
    max_tokens: int
    gives_gradients: bool
    device: torch.device

    def read(self, text: str, pair: str | None, instruction: str, answer: str | None, room: int) -> Item:
        """Encode one text (a pair, if given). With `answer`, the item asks for that answer's likelihood.

        Texts are cut so that `room` virtual tokens still fit; the instruction and the answer are never cut.
        """
        ...

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor | None:
        """[C, D] so that `features @ readout.T` scores the answers; None if they need likelihoods (several tokens)."""
        ...

    def as_readout(self, rows_RCD: Tensor) -> Tensor:
        """A tuned head's rows as a readout; the inverse of what `start` stores for it."""
        ...

    def start(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """[num_tokens, D]: the real activations of a text, or (None) of words drawn from the vocabulary, at a layer."""
        ...

    def below(self, items: Sequence[Item], layer: int) -> list[Tensor]:
        """The layers under the prompt's entry, [T, D] per item, unpadded: no prompt, no gradient, computed once, kept."""
        ...

    def above(self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[Item], layer: int) -> Outputs:
        """The prompt and the rest, one row per item (`scores_RN` has one column)."""
        ...

    def generate(self, prompt: Prompt, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Continue texts with the prompt in front. Raises `BackboneError` where the backbone cannot write."""
        ...


class Task(Protocol):
    """What a record means: how it is encoded, what is lost, predicted and scored."""

    head_rows: int

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch: ...

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """[R]: one loss per row, never reduced."""
        ...

    def predict(self, outputs: Outputs, batch: Batch) -> list: ...

    def targets(self, records: Sequence[Record]) -> list:
        """The truths to score predictions against, in `predict`'s own form."""
        ...

    def score(self, predictions: Sequence, targets: Sequence) -> Score: ...

    def readout(self, backbone: Backbone) -> Tensor | None:
        """[C, D] that a tuned head starts from; None where there is none."""
        ...

    def describe(self) -> Mapping[str, JSON]:
        """The task's configuration, enough to build it again for a library's user."""
        ...


class Mechanism(Protocol):
    """Noise and its price in one object. `mean` is where records meet; `release` is where a client meets the world."""

    @property
    def unit(self) -> Literal["none", "record", "client"]: ...

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: torch.Generator) -> list[Tensor]:
        """Which records each step sees: [b] indices per step. Under Poisson sampling b varies and may be 0."""
        ...

    def mean(self, values_KB: Tensor, expected_batch: int, noise: torch.Generator) -> Tensor:
        """[K, B, ...] to [K, ...]: the only average over records in the package."""
        ...

    def release(self, update: ClientUpdate, noise: torch.Generator) -> ClientUpdate: ...

    def guarantee(self) -> Mapping[str, JSON]:
        """The run's `privacy` block: unit, epsilon, delta."""
        ...


class ClientSide(Protocol):
    """What a method sees of the client it runs at, for the length of one order (`clients.Visit`)."""

    id: str
    weight: float
    """Its share in an average: the record count where no privacy is asked, else 1."""
    kept: dict[str, Tensor]
    """What stays at the client between rounds; written back only if the order is carried out to its end."""

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]: ...
    def mean(self, values_KB: Tensor) -> Tensor: ...


class Model(Protocol):
    """The one place where the backbone runs, as the server's half of a method may call it."""

    backbone: Backbone

    def answer(self, queries: Sequence[Query]) -> list[Answer]: ...


class Method(Protocol):
    """One paper, both halves, one file. A method's `pools_data` says that it is the centralised upper line."""

    name: str
    pools_data: bool
    trains: bool

    def init(self, setup: Setup) -> State: ...
    def assign(self, state: State, client: ClientCard, round: int) -> Assignment: ...
    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]: ...
    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the arrays of every update: what the codec checks arriving bytes against."""
        ...

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: "Model") -> State: ...
    def prompt(self, state: State) -> Tensor | None:
        """[P, D] for anyone; None if the method leaves nothing that all share."""
        ...

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        """[P, D] that this client would use, given what the server would send it now."""
        ...

    def basis(self, state: State) -> Mapping[str, Tensor]:
        """The prompts worth keeping in a library, each [P, D], by name."""
        ...


class Engine(Protocol):
    """One verb. Bytes go out and bytes come back, so every engine counts the same and the server trusts nobody."""

    def clients(self) -> Sequence[ClientCard]: ...
    def exchange(self, orders: Mapping[str, bytes]) -> Iterator[Reply]: ...
