"""The seams: what a backbone, task, mechanism, method and engine have to be. Protocols of a few methods each, no trees."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ficpd.types import (
    JSON,
    Answer,
    ArraySpec,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    EncodedInput,
    FederationInfo,
    ModelOutput,
    PrivacyCost,
    Prompt,
    Query,
    Record,
    Reply,
    Score,
    State,
    UpdateSpec,
)


class Vocabulary(Protocol):
    """A vocabulary that a prompt can be made of: one token id a place."""

    @property
    def size(self) -> int:
        """Ids are 0 to `size` - 1."""
        ...

    def ids(self, text: str) -> list[int]: ...
    def text(self, ids: Sequence[int]) -> str: ...
    def vectors(self, ids: Tensor) -> Tensor:
        """[...] to [..., D], float32: the words' own vectors. Raises `BackboneError` for an id out of range."""
        ...

    def embed_for_prompt(self, ids_RP: Tensor) -> Tensor:
        """[R, P] to what `Backbone.above` takes at layer 0 for prompts of these words."""
        ...

    def proposals(self, ids: Sequence[int], place: int, number: int, seed: int) -> list[int]:
        """At most `number` different ids of whole words that might stand at a place of a prompt instead of the one there."""
        ...


class Backbone(Protocol):
    """The frozen model. Contract: rows never see each other; no dropout; padding is masked; no state between calls."""

    name: str
    fingerprint: str
    width: int
    depth: int
    max_tokens: int
    supports_gradients: bool
    can_generate: bool
    sees_images: bool
    """It looks at images (`look`) and reads no texts; else it reads (`read`)."""
    has_text_encoder: bool
    """It can score answers by their texts; else a task on it has to tune a head."""
    supports_features: bool
    """`Outputs.features_RD` tell of the text; else of a text there is nothing but likelihoods and what is written."""
    device: torch.device

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What a prompt of words is made of; None: it takes none."""
        ...

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """Encode one text (a pair, if given). With `answer`, the item asks for that answer's likelihood.

        Texts are cut so that `room` virtual tokens still fit; the instruction and the answer are never cut. `writes` > 0:
        the answer is a text that will be written in at most so many tokens, its end token among them; it is cut to them,
        and the room is kept free also without an answer. Raises `BackboneError` where the backbone cannot write.
        """
        ...

    def preprocess_image(self, image: Any, room: int) -> EncodedInput:
        """One image, anything whose `open()` gives a PIL image in RGB; it is opened in `below`, and no pixels are kept.
        Raises `BackboneError` where the backbone sees nothing, or if `room` virtual tokens do not fit."""
        ...

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor | None:
        """[C, D] so that `features @ readout.T` scores the answers; None if they need likelihoods (several tokens).
        Raises `BackboneError` where the backbone knows no words."""
        ...

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """A tuned head's rows as a readout; the inverse of what `start` stores for it."""
        ...

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """[num_tokens, D]: the real activations of a text, or (None) of words drawn from the vocabulary, at a layer. Where
        images are seen the text says nothing: those of made-up images."""
        ...

    def synthetic_inputs(self, number: int, seed: int) -> list[Any]:
        """Texts of words drawn from the vocabulary, or images of colours: public, and nobody's."""
        ...

    def unk_rate(self, texts: Sequence[str]) -> float:
        """Which share of the tokens of these texts stands for what it cannot read, 0 to 1; 0.0 where nothing does (bytes
        or hashes for a vocabulary, or no texts at all: images)."""
        ...

    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        """The layers under the prompt's entry, [T, D] per item, unpadded: no prompt, no gradient, computed once, kept."""
        ...

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """The prompt and the rest, one row per item (`scores_RN` has one column)."""
        ...

    def generate_greedy(
        self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int, max_tokens: int
    ) -> list[str]:
        """One text per item behind its own prompt: what follows the part before the scored tail, the likeliest token at
        every step. Raises `BackboneError` where the backbone cannot write."""
        ...

    def generate(
        self, prompt: Prompt, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Continue texts with the prompt in front: the likeliest tokens, or (temperature > 0) drawn ones. The same seed
        gives the same texts, whatever texts stand beside them. Raises `BackboneError` where the backbone cannot write."""
        ...


class Task(Protocol):
    """What a record means: how it is encoded, what is lost, predicted and scored.

    `writes`: how many tokens `predict` wants written after each record; 0 where it reads the outputs instead.
    """

    head_rows: int
    max_new_tokens: int

    @property
    def label_space(self) -> Sequence:
        """Targets that a record may have, as its owner would write them."""
        ...

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch: ...

    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """[R]: one loss per row, never reduced."""
        ...

    def predict(self, answer: Answer, batch: Batch) -> list:
        """One prediction per record from the answer for one candidate prompt."""
        ...

    def targets(self, records: Sequence[Record]) -> list:
        """The truths to score predictions against, in `predict`'s own form (of a text: all its references)."""
        ...

    def score(self, predictions: Sequence, targets: Sequence) -> Score: ...

    def readout(self, backbone: Backbone) -> Tensor | None:
        """[C, D] that a tuned head starts from; None where there is none."""
        ...

    def to_config(self) -> Mapping[str, JSON]:
        """The task's configuration, enough to build it again for a library's user."""
        ...


class NoiseSource(Protocol):
    """A private random stream for sampling and noise. The server knows nothing that it could be derived from."""

    @property
    def kind(self) -> Literal["simulated", "cryptographic"]: ...
    def permutation(self, number: int) -> Tensor:
        """Returns 0..number-1 in a random order."""
        ...

    def poisson_sample(self, number: int, rate: float) -> Tensor:
        """Draws each of 0..number-1 independently with probability `rate`."""
        ...

    def add_gaussian(self, values: Tensor, deviation: float) -> Tensor:
        """Adds Gaussian noise of this standard deviation; the result is float32 on the CPU."""
        ...


class ReleaseKind(Enum):
    """What is released, each kind with a cost of its own."""

    STEP = "step"
    """The noisy mean over one step's records."""
    UPDATE = "update"
    """One client's update."""
    SUM = "sum"
    """The server's noisy sum over a round's updates."""
    STATISTIC = "statistic"
    """A named noisy sum over all of a client's records."""


class Mechanism(ABC):
    """Clips and noises what one client releases, and states what each release costs.

    `unit`: what the guarantee is for. `noise`: the source that its randomness has to come from.
    """

    unit: Literal["none", "record", "client"]
    noise: Literal["simulated", "cryptographic"]

    @abstractmethod
    def cost(self, kind: ReleaseKind, name: str = "") -> PrivacyCost | None:
        """Returns the cost of one release, or None where it has none. `name` is the statistic's."""

    @abstractmethod
    def planned_costs(self) -> Sequence[PrivacyCost]:
        """Returns the costs of the whole planned run."""

    @abstractmethod
    def sample(self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource) -> list[Tensor]:
        """Draws the records of each step, [b] indices. Under Poisson sampling b varies and may be 0."""

    def bound_query(self, query: Query, start: Prompt) -> Query:
        """Bounds the prompts of a query before the model answers it."""
        return query

    @abstractmethod
    def noisy_mean(
        self, values_KB: Tensor, expected_batch: int, noise: NoiseSource, grad_scale: Tensor | None = None
    ) -> Tensor:
        """Averages records, [K, B, ...] to [K, ...] on the CPU. `grad_scale` is the subspace's, for values in it."""

    @abstractmethod
    def noisy_sum(self, name: str, values_BN: Tensor, noise: NoiseSource) -> Tensor:
        """Sums a statistic over all records, [B, N] to [N]. Each row is clipped to norm 1."""

    @abstractmethod
    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        """Clips and noises a whole update, where the unit is the client."""

    @abstractmethod
    def expected_noise_norm_sq(self, size: int) -> float | None:
        """Returns the noise's expected squared length in an update of `size` numbers.

        None at the record level: the server must not know it, since it depends on the number of records.
        """

    @abstractmethod
    def guarantee(self) -> Mapping[str, JSON]:
        """Describes mechanism, unit, neighbouring relation, delta and settings for the run's `privacy` block."""


class Subspace(Protocol):
    """A subspace that a prompt is tuned in: orthonormal directions from a public seed."""

    @property
    def size(self) -> int: ...
    @property
    def grad_scale(self) -> Tensor:
        """[size], positive and public: about how long a record's gradient is in each direction (ones: not known)."""
        ...

    def project(self, values: Tensor) -> Tensor:
        """[..., P, D] to [..., size]."""
        ...

    def lift(self, values: Tensor) -> Tensor:
        """[..., size] to [..., P, D]; `project(lift(z)) == z`."""
        ...


class Compression(Protocol):
    """What of an update travels, and how it is brought back. Public, from a seed all know: it is no privacy."""

    @property
    def subspace(self) -> Subspace | None:
        """What the optimizer moves in instead of the whole prompt; None: the whole prompt."""
        ...

    def project(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """At the client, before clip and noise: float32."""
        ...

    def pack(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """At the client, after the noise (post-processing): what is encoded."""
        ...

    def unpack(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """At the server: float32 arrays of the method's own layout."""
        ...

    def encoded_spec(self, layout: UpdateSpec) -> dict[str, ArraySpec]:
        """What `pack` makes of arrays of this layout."""
        ...


class ClientContext(Protocol):
    """A client as a method sees it during one assignment (`federation.client.ClientSession`)."""

    id: str
    client_state: dict[str, Tensor]
    """What the client keeps between rounds. It is stored only if the assignment is completed."""

    @property
    def weight(self) -> float:
        """The record count without privacy, its noisy sum if it is one of the plan's statistics, else 1."""
        ...

    @property
    def label_prior(self) -> Tensor:
        """[C]: logarithms of the labels' shares, of a task that `Classifies`; see `log_label_prior`.

        The counts are exact without record-level privacy. With it they are a noisy sum, which is released once.
        """
        ...

    @property
    def subspace(self) -> Subspace | None: ...
    @property
    def vocabulary(self) -> Vocabulary:
        """The backbone's vocabulary, which is public. Raises `BackboneError` if it has none."""
        ...

    @property
    def start(self) -> Tensor:
        """[P, D]: the public prompt that the run began with."""
        ...

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]: ...
    def corrupted_batch(self, share: float) -> Batch:
        """The last batch, with this share of its texts' words replaced at random.

        The replacement is the same in all steps of an assignment. Raises `BackboneError` for images.
        """
        ...

    def private_mean(self, values_KB: Tensor) -> Tensor:
        """Averages the last batch, once, before the next is drawn."""
        ...

    def private_sum(self, name: str, values_BN: Tensor) -> Tensor:
        """Sums a statistic of the plan over all of the client's records, [B, N] to [N]."""
        ...

    def full_batch(self) -> Batch:
        """All of the client's records, from which the rows of a `private_sum` are made."""
        ...

    def local_context(self, held_back: float = 0.0) -> "LocalContext":
        """The same client without privacy, for what it never sends.

        Nothing made with it may enter an update, or a prompt of a query whose answer is averaged for an update.
        """
        ...


class LocalContext(ClientContext, Protocol):
    """A client that tunes for itself. It sends none of the results."""

    def holdout(self) -> Batch:
        """The records that `batches` leaves out, for model selection; empty for clients with few records."""
        ...


class Model(Protocol):
    """The one place where the backbone runs, as the server's half of a method may call it."""

    backbone: Backbone

    def answer(self, queries: Sequence[Query]) -> list[Answer]: ...


class Method(Protocol):
    """One paper, both halves, one file.

    `pools_data`: it is the centralised upper line. `trains`: it has rounds. `releases`: something that depends on
    records leaves its clients. `sums`: `aggregate` depends on the updates only through their weighted sum, so that one
    noised sum may stand for all of them (client-level privacy at the server). `gathers`: everybody is asked in the
    first round.
    """

    name: str
    centralized: bool
    trains: bool
    releases: bool
    linear: bool
    full_first_round: bool

    def init(self, setup: FederationInfo) -> State: ...
    def local_workload(self, state: State) -> tuple[int, int]:
        """Steps and batch size of one order: what the privacy of a run is planned from."""
        ...

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment: ...
    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]: ...
    def update_spec(self, state: State) -> UpdateSpec:
        """Names and shapes of the arrays of every update: what the codec checks arriving bytes against."""
        ...

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: "Model") -> State:
        """The facts `set_aside` (by client, why) and `too_few` (by mean) of the new state reach the round's record."""
        ...

    def global_prompt(self, state: State) -> Tensor | None:
        """[P, D] for anyone; None if the method leaves nothing that all share."""
        ...

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        """[P, D] that this client would use, given what the server would send it now."""
        ...

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        """The prompts worth keeping in a library, each [P, D], by name."""
        ...


class Engine(Protocol):
    """One verb. Bytes go out and bytes come back, so every engine counts the same and the server trusts nobody."""

    def clients(self) -> Sequence[ClientCard]: ...
    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]: ...
