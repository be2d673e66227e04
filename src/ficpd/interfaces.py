"""Interfaces. Backbones and tasks extend a base class with defaults (methods: `method.py`); the rest are protocols."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ficpd.errors import BackboneError
from ficpd.rng import NoiseSource
from ficpd.types import (
    JSON,
    Answer,
    ArraySpec,
    Batch,
    ClientCard,
    ClientUpdate,
    EncodedInput,
    ModelOutput,
    Objective,
    PrivacyCost,
    Prompt,
    Query,
    Record,
    Reply,
    Score,
    UpdateSpec,
)


class Vocabulary(Protocol):
    """The vocabulary of prompts of words: one token id per position."""

    @property
    def size(self) -> int:
        """Ids are 0 to `size` - 1."""
        ...

    def ids(self, text: str) -> list[int]: ...
    def text(self, ids: Sequence[int]) -> str: ...
    def vectors(self, ids: Tensor) -> Tensor:
        """Returns the words' vectors, [...] to [..., D] float32. Raises `BackboneError` for an id out of range."""
        ...

    def embed_for_prompt(self, ids_RP: Tensor) -> Tensor:
        """Turns prompts of words [R, P] into the input of `Backbone.forward` at layer 0."""
        ...

    def proposals(self, ids: Sequence[int], place: int, number: int, seed: int) -> list[int]:
        """Proposes at most `number` ids of whole words to replace the one at a place of a prompt."""
        ...


class Backbone(ABC):
    """A frozen model. Contract: rows never influence each other; no dropout; padding is masked; no state between calls.

    modality: "image" takes images (`preprocess_image`), "text" takes texts (`tokenize`).
    width, depth: D, and the number of layers. max_tokens: most positions of a row, virtual tokens too.
    can_generate: `generate` and `generate_greedy` exist. supports_gradients: false for black boxes.
    supports_features: `ModelOutput.features_RD` describes the text.
    has_text_encoder: texts of answers give a readout, so no head has to be tuned.
    about: describes the kind of model in errors.
    vocabulary: words for prompts of words, or None.
    adapters: a `backbones.lora.Adapters`, or None: no LoRA.
    model: the module that holds the weights; None: the model runs elsewhere.
    num_blocks: the number of blocks for `checkpoint_blocks`.
    chosen_options: the backbone's choice of options that were left open.
    """

    name: str
    fingerprint: str
    width: int
    depth: int
    max_tokens: int
    device: torch.device
    modality: Literal["text", "image"] = "text"
    can_generate: bool = False
    supports_gradients: bool = False
    supports_features: bool = True
    has_text_encoder: bool = True
    about: str = ""
    vocabulary: Vocabulary | None = None
    adapters: Any = None
    model: Any = None
    num_blocks: int = 0
    chosen_options: Mapping[str, JSON] = MappingProxyType({})

    @abstractmethod
    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """Encodes one text (a pair, if given). With `answer`, the item asks for that answer's likelihood.

        Texts are cut so that `room` virtual tokens still fit. The instruction and the answer are never cut. `writes` > 0:
        the answer is a text, cut to this number of tokens with its end token. These positions are reserved without an
        answer, too. Raises `BackboneError` if the backbone cannot generate.
        """

    def preprocess_image(self, image: Any, room: int) -> EncodedInput:
        """Encodes one image: an object whose `open()` returns a PIL image in RGB. `encode_prefix` opens it.

        Raises `BackboneError` if the backbone takes no images, or if `room` virtual tokens do not fit."""
        raise BackboneError(f"{self.name} reads texts and sees no images; for those use a vision backbone")

    @abstractmethod
    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor | None:
        """Returns [C, D] so that `features @ readout.T` scores the answers; None if they need likelihoods."""

    @abstractmethod
    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Turns a tuned head's rows into a readout."""

    @abstractmethod
    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """Makes a prompt [num_tokens, D] of activations at a layer. The input: a text, drawn words (None) or images."""

    @abstractmethod
    def synthetic_inputs(self, number: int, seed: int) -> list[Any]:
        """Draws public inputs: texts of random words, or images of random colours."""

    def unk_rate(self, texts: Sequence[str]) -> float:
        """Returns the share of unknown tokens in these texts, 0 to 1; 0.0 for bytes, hashes and images."""
        return 0.0

    @abstractmethod
    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        """Runs the layers below the prompt without gradient. Returns [T, D] per item, unpadded. Results are cached."""

    @abstractmethod
    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """Runs the prompt and the layers above it, one row per item (`scores_RN` has one column)."""

    def set_attention(self, attention: str) -> bool:
        """Changes to "eager" or "sdpa" without loading again. Returns whether the model has this kind."""
        return True

    def checkpoint_blocks(self, on: bool) -> None:
        """Keeps only each block's input. The backward computes the block again, with the same numbers."""

    def generate_greedy(
        self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int, max_tokens: int
    ) -> list[str]:
        """Generates one text per item after its prompt, by greedy decoding, before the scored positions."""
        raise self._cannot_write()

    def generate(
        self, prompt: Prompt, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Continues texts after the prompt, greedily or (temperature > 0) by tokens drawn from `seed`."""
        raise self._cannot_write()

    def _cannot_write(self) -> BackboneError:
        kind = f" is {self.about} and" if self.about else ""
        return BackboneError(f"{self.name}{kind} cannot write; use a causal_lm backbone for text")


class Task(Objective, ABC):
    """The meaning of a record: its encoding, its loss, its prediction and its score.

    `max_new_tokens`: tokens to generate after each record for `predict`; 0: it reads the outputs.
    """

    max_new_tokens: int = 0

    @property
    @abstractmethod
    def label_space(self) -> Sequence:
        """Targets that a record may have, as its owner would write them."""

    @abstractmethod
    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch: ...

    @abstractmethod
    def predict(self, answer: Answer, batch: Batch) -> list:
        """Returns one prediction per record from the answer for one candidate prompt."""

    @abstractmethod
    def targets(self, records: Sequence[Record]) -> list:
        """Returns the true values in `predict`'s form (of a text: all its references)."""

    @abstractmethod
    def score(self, predictions: Sequence, targets: Sequence) -> Score: ...

    def readout(self, backbone: Backbone) -> Tensor | None:
        """Returns the start [C, D] of a tuned head; None without one."""
        return None

    def synthetic_fields(self, place: int) -> Mapping[str, JSON]:
        """Returns the public fields of a synthetic record, without text and target."""
        return {}

    @abstractmethod
    def to_config(self) -> Mapping[str, JSON]:
        """Returns the configuration that builds the task again for a library's user."""


class ReleaseKind(Enum):
    """Names the kinds of release. Each has its own privacy cost.

    A step releases the noisy mean over its records. Other kinds are a client's update, the server's noisy sum over a
    round's updates, and a named noisy sum over all records of a client.
    """

    STEP = "step"
    UPDATE = "update"
    SUM = "sum"
    STATISTIC = "statistic"


class Mechanism(ABC):
    """Clips and noises the releases of one client, and states their costs.

    unit: the unit of the guarantee.
    noise: the required source of randomness.
    subjects: at the record level, whether the unit is a subject with all its records. The methods below then need
        `subject_B`: the number of each record's subject.
    summed: `noisy_mean` and `noisy_sum` return terms of a sum over clients, int64, which are sent only under masks.
    public_units: the minimum number of units of every client, which expected batches assume. None: not known.
    """

    unit: Literal["none", "record", "client"]
    noise: Literal["simulated", "cryptographic"]
    subjects: bool = False
    summed: bool = False
    public_units: int | None = None

    @abstractmethod
    def cost(self, kind: ReleaseKind, name: str = "") -> PrivacyCost | None:
        """Returns the cost of one release, or None if it has none. `name`: that of the statistic."""

    @abstractmethod
    def planned_costs(self) -> Sequence[PrivacyCost]:
        """Returns the costs of the whole planned run."""

    @abstractmethod
    def sample(
        self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource, subject_B: Tensor | None = None
    ) -> list[Tensor]:
        """Draws the records of each step, [b] indices. Under Poisson sampling b varies and may be 0."""

    @abstractmethod
    def bound_query(self, query: Query, start: Prompt) -> Query:
        """Bounds the prompts of a query before the model answers it, if the unit is the record (`clip_query`)."""

    @abstractmethod
    def noisy_mean(
        self, values_KB: Tensor, expected_batch: int, noise: NoiseSource, grad_scale: Tensor | None = None,
        subject_B: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Averages records, [K, B, ...] to [K, ...] on the CPU. `grad_scale`: that of the subspace, for values in it."""

    @abstractmethod
    def noisy_sum(
        self, name: str, chunks: Iterable[Tensor], noise: NoiseSource, subject_B: Tensor | None = None
    ) -> Tensor:
        """Sums a statistic over all records, chunks of [b, N] to [N]. Units are clipped to norm 1; noise is added once."""

    @abstractmethod
    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        """Clips and noises a whole update, if the unit is the client."""

    @abstractmethod
    def expected_noise_norm_sq(self, size: int) -> float | None:
        """Returns the expected squared norm of `size` noise values; None if it would reveal the number of records."""

    @abstractmethod
    def guarantee(self) -> Mapping[str, JSON]:
        """Describes mechanism, unit, neighbouring relation, delta and settings for the run's `privacy` block."""


class Subspace(Protocol):
    """A subspace that a prompt is tuned in: orthonormal directions from a public seed."""

    @property
    def size(self) -> int: ...
    @property
    def grad_scale(self) -> Tensor:
        """Returns the typical length of a record's gradient in each direction, [size], public (ones: not known)."""
        ...

    def project(self, values: Tensor) -> Tensor:
        """Projects [..., P, D] to [..., size]."""
        ...

    def lift(self, values: Tensor) -> Tensor:
        """Lifts [..., size] to [..., P, D]; `project(lift(z)) == z`."""
        ...


class Compression(Protocol):
    """Packs an update into fewer numbers and restores it. Its seed is public, so it protects nothing."""

    @property
    def subspace(self) -> Subspace | None:
        """Returns the subspace in which the prompt is tuned; None: the whole prompt."""
        ...

    def project(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Projects an update at the client, before clip and noise, in float32."""
        ...

    def pack(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Packs an update at the client, after the noise (post-processing), for encoding."""
        ...

    def unpack(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Restores the method's layout at the server, in float32."""
        ...

    def encoded_spec(self, layout: UpdateSpec) -> dict[str, ArraySpec]:
        """Returns the shapes of the packed arrays of a layout."""
        ...


class ClientContext(Protocol):
    """A client as a method sees it during one assignment (`federation.client.ClientSession`)."""

    id: str
    client_state: dict[str, Tensor]  # kept between rounds; stored only if the assignment is completed

    @property
    def weight(self) -> float:
        """Returns the record count without privacy. Else the noisy count of units, if that statistic is planned, or 1."""
        ...

    @property
    def label_prior(self) -> Tensor:
        """Returns the log label shares [C]. With record-level privacy they come from noisy counts, released once."""
        ...

    @property
    def subspace(self) -> Subspace | None: ...
    @property
    def vocabulary(self) -> Vocabulary:
        """Returns the backbone's vocabulary, which is public. Raises `BackboneError` if it has none."""
        ...

    @property
    def start(self) -> Tensor:
        """Returns the public initial prompt of the run, [P, D]."""
        ...

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]: ...
    def corrupted_batch(self, share: float) -> Batch:
        """Returns the last batch with a share of its words replaced at random, alike in all steps of an assignment."""
        ...

    def private_mean(self, values_KB: Tensor) -> Tensor:
        """Averages the last batch, once, before the next is drawn."""
        ...

    def private_sum(self, name: str, values_BN: Tensor | Iterable[Tensor]) -> Tensor:
        """Sums a statistic of the plan over all of the client's records, [B, N] to [N]. Long rows may come in chunks."""
        ...

    def full_batch(self) -> Batch:
        """Returns all records of the client, for the rows of a `private_sum`."""
        ...

    def local_context(self, held_back: float = 0.0) -> "LocalContext":
        """Returns a non-private view of this client. Its results must not enter an update.

        They must not enter the prompt of a query either, if its answer is averaged for an update.
        """
        ...


class LocalContext(ClientContext, Protocol):
    """A client that tunes its own models, and sends none. subject_B: each record's subject, if the data name them."""

    subject_B: Tensor | None

    def holdout(self) -> Batch:
        """Returns the records that `batches` leaves out, for model selection; empty for few records."""
        ...


class Model(Protocol):
    """Runs the backbone, for the server's half of a method."""

    backbone: Backbone

    def answer(self, queries: Sequence[Query]) -> list[Answer]: ...


class Engine(Protocol):
    """Exchanges bytes with clients. All engines then count bytes alike, and the server checks every update."""

    def clients(self) -> Sequence[ClientCard]: ...
    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]: ...
