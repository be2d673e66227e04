"""The seams: what a backbone, task, mechanism, method and engine have to be. Protocols of a few methods each, no trees."""

from collections.abc import Generator, Iterator, Mapping, Sequence
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
    """A client's private stream: which records, what noise. Never derivable from anything the server knows."""

    @property
    def kind(self) -> Literal["simulated", "cryptographic"]: ...
    def permutation(self, number: int) -> Tensor:
        """0..number-1 in a random order."""
        ...

    def poisson_sample(self, number: int, rate: float) -> Tensor:
        """Each of 0..number-1 independently with probability `rate`."""
        ...

    def add_gaussian(self, values: Tensor, deviation: float) -> Tensor:
        """`values` plus Gaussian noise of this standard deviation, on the CPU, float32."""
        ...


TOTAL = "total:"
"""The door of a named total is this and its name."""


class Mechanism(Protocol):
    """Noise and its price in one object. `mean` is where records meet; `release` is where a client meets the world."""

    @property
    def unit(self) -> Literal["none", "record", "client"]: ...
    @property
    def noise(self) -> Literal["simulated", "cryptographic"]:
        """Which source its randomness must come from."""
        ...

    def cost(self, door: str) -> PrivacyCost | None:
        """What one passage costs: door "step" (a `mean`), "release", "sum" (at the server), or `TOTAL` + name."""
        ...

    def planned_costs(self) -> Sequence[PrivacyCost]:
        """All that the whole planned run costs."""
        ...

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource) -> list[Tensor]:
        """Which records each step sees: [b] indices per step. Under Poisson sampling b varies and may be 0."""
        ...

    def noisy_mean(self, values_KB: Tensor, expected_batch: int, noise: NoiseSource) -> Tensor:
        """[K, B, ...] to [K, ...]: the only average over records in the package."""
        ...

    def noisy_sum(self, name: str, values_BN: Tensor, noise: NoiseSource) -> Tensor:
        """[B, N] to [N]: the sum over all records, each row clipped to norm 1. Costs `price(TOTAL + name)`."""
        ...

    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate: ...

    def expected_noise_norm_sq(self, size: int) -> float | None:
        """The expected squared length of the noise in an update of `size` numbers, as the server may know it. None: it may
        not, because that noise goes by how many records there are."""
        ...

    def guarantee(self) -> Mapping[str, JSON]:
        """For the run's `privacy` block: mechanism, unit, neighbouring relation, delta, settings."""
        ...


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
    """What a method sees of the client it runs at, for the length of one order (`clients.Visit`)."""

    id: str
    client_state: dict[str, Tensor]
    """What stays at the client between rounds; written back only if the order is carried out to its end."""

    @property
    def weight(self) -> float:
        """Its share in an average: the record count where no privacy is asked, its noised total if paid for, else 1."""
        ...

    @property
    def label_prior(self) -> Tensor:
        """[C], the logarithms of its labels' shares, each counted half a record more than it is: exact where no privacy or
        a client's whole update is asked for, else from a noised total, which is paid once. Of a task that `Classifies`."""
        ...

    @property
    def subspace(self) -> Subspace | None: ...
    @property
    def vocabulary(self) -> Vocabulary:
        """The backbone's, which are public. Raises `BackboneError` if it has none."""
        ...

    @property
    def start(self) -> Tensor:
        """[P, D] that the whole run began with: public, and known to everybody."""
        ...

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]: ...
    def corrupted_batch(self, share: float) -> Batch:
        """The batch that was drawn last, with this share of its texts' words replaced by random ones; the same in every
        step of an order. Raises `BackboneError` for images."""
        ...

    def private_mean(self, values_KB: Tensor) -> Tensor:
        """Once per batch, before the next is drawn."""
        ...

    def private_sum(self, name: str, values_BN: Tensor) -> Tensor:
        """[B, N] over all of the client's records to [N]; a statistic that the plan names, its own ledger line."""
        ...

    def full_batch(self) -> Batch:
        """All of the client's records, to make the rows of a `total` of."""
        ...

    def local_context(self, held_back: float = 0.0) -> "LocalContext":
        """The same client without privacy, for what never leaves: nothing made with it may enter an update, or a prompt
        that is asked about with records whose average will."""
        ...


class LocalContext(ClientContext, Protocol):
    """A client among its own: what it learns here stays here."""

    def holdout(self) -> Batch:
        """The records that are held back from `batches`, to choose by; none of too few."""
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
        """The facts `excluded_updates` (by client, why) and `underfilled_means` (by mean) of the new state reach the round's record."""
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
