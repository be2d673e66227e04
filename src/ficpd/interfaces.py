"""The seams: what a backbone, task, mechanism, method and engine have to be. Protocols of a few methods each, no trees."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ficpd.types import (
    JSON,
    Answer,
    ArrayKind,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    Item,
    Layout,
    Outputs,
    Prompt,
    Query,
    Record,
    Reply,
    Score,
    Setup,
    Spend,
    State,
)


class Words(Protocol):
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

    def entering(self, ids_RP: Tensor) -> Tensor:
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
    gives_gradients: bool
    writes: bool
    sees: bool
    """It looks at images (`look`) and reads no texts; else it reads (`read`)."""
    knows_words: bool
    """It can score answers by their texts; else a task on it has to tune a head."""
    gives_features: bool
    """`Outputs.features_RD` tell of the text; else of a text there is nothing but likelihoods and what is written."""
    device: torch.device

    @property
    def words(self) -> Words | None:
        """What a prompt of words is made of; None: it takes none."""
        ...

    def read(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> Item:
        """Encode one text (a pair, if given). With `answer`, the item asks for that answer's likelihood.

        Texts are cut so that `room` virtual tokens still fit; the instruction and the answer are never cut. `writes` > 0:
        the answer is a text that will be written in at most so many tokens, its end token among them; it is cut to them,
        and the room is kept free also without an answer. Raises `BackboneError` where the backbone cannot write.
        """
        ...

    def look(self, image: Any, room: int) -> Item:
        """One image, anything whose `open()` gives a PIL image in RGB; it is opened in `below`, and no pixels are kept.
        Raises `BackboneError` where the backbone sees nothing, or if `room` virtual tokens do not fit."""
        ...

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor | None:
        """[C, D] so that `features @ readout.T` scores the answers; None if they need likelihoods (several tokens).
        Raises `BackboneError` where the backbone knows no words."""
        ...

    def as_readout(self, rows_RCD: Tensor) -> Tensor:
        """A tuned head's rows as a readout; the inverse of what `start` stores for it."""
        ...

    def start(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """[num_tokens, D]: the real activations of a text, or (None) of words drawn from the vocabulary, at a layer. Where
        images are seen the text says nothing: those of made-up images."""
        ...

    def nonsense(self, number: int, seed: int) -> list[Any]:
        """Texts of words drawn from the vocabulary, or images of colours: public, and nobody's."""
        ...

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Which share of the tokens of these texts stands for what it cannot read, 0 to 1; 0.0 where nothing does (bytes
        or hashes for a vocabulary, or no texts at all: images)."""
        ...

    def below(self, items: Sequence[Item], layer: int) -> list[Tensor]:
        """The layers under the prompt's entry, [T, D] per item, unpadded: no prompt, no gradient, computed once, kept."""
        ...

    def above(self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[Item], layer: int) -> Outputs:
        """The prompt and the rest, one row per item (`scores_RN` has one column)."""
        ...

    def write(self, prompts_SPD: Tensor, items: Sequence[Item], layer: int, max_tokens: int) -> list[str]:
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
    writes: int

    @property
    def possible(self) -> Sequence:
        """Targets that a record may have, as its owner would write them."""
        ...

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch: ...

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
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

    def describe(self) -> Mapping[str, JSON]:
        """The task's configuration, enough to build it again for a library's user."""
        ...


class Noise(Protocol):
    """A client's private stream: which records, what noise. Never derivable from anything the server knows."""

    @property
    def kind(self) -> Literal["simulated", "cryptographic"]: ...
    def shuffled(self, number: int) -> Tensor:
        """0..number-1 in a random order."""
        ...

    def poisson(self, number: int, rate: float) -> Tensor:
        """Each of 0..number-1 independently with probability `rate`."""
        ...

    def gaussian(self, values: Tensor, deviation: float) -> Tensor:
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

    def price(self, door: str) -> Spend | None:
        """What one passage costs: door "step" (a `mean`), "release", "sum" (at the server), or `TOTAL` + name."""
        ...

    def planned(self) -> Sequence[Spend]:
        """All that the whole planned run costs."""
        ...

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: Noise) -> list[Tensor]:
        """Which records each step sees: [b] indices per step. Under Poisson sampling b varies and may be 0."""
        ...

    def mean(self, values_KB: Tensor, expected_batch: int, noise: Noise) -> Tensor:
        """[K, B, ...] to [K, ...]: the only average over records in the package."""
        ...

    def total(self, name: str, values_BN: Tensor, noise: Noise) -> Tensor:
        """[B, N] to [N]: the sum over all records, each row clipped to norm 1. Costs `price(TOTAL + name)`."""
        ...

    def release(self, update: ClientUpdate, noise: Noise) -> ClientUpdate: ...

    def noise_on(self, size: int) -> float | None:
        """The expected squared length of the noise in an update of `size` numbers, as the server may know it. None: it may
        not, because that noise goes by how many records there are."""
        ...

    def guarantee(self) -> Mapping[str, JSON]:
        """For the run's `privacy` block: mechanism, unit, neighbouring relation, delta, settings."""
        ...


class Coordinates(Protocol):
    """A subspace that a prompt is tuned in: orthonormal directions from a public seed."""

    @property
    def size(self) -> int: ...
    @property
    def typical(self) -> Tensor:
        """[size], positive and public: about how long a record's gradient is in each direction (ones: not known)."""
        ...

    def down(self, values: Tensor) -> Tensor:
        """[..., P, D] to [..., size]."""
        ...

    def up(self, values: Tensor) -> Tensor:
        """[..., size] to [..., P, D]; `down(up(z)) == z`."""
        ...


class Compression(Protocol):
    """What of an update travels, and how it is brought back. Public, from a seed all know: it is no privacy."""

    @property
    def coordinates(self) -> Coordinates | None:
        """What the tuner moves in instead of the whole prompt; None: the whole prompt."""
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

    def wire(self, layout: Layout) -> dict[str, ArrayKind]:
        """What `pack` makes of arrays of this layout."""
        ...


class ClientSide(Protocol):
    """What a method sees of the client it runs at, for the length of one order (`clients.Visit`)."""

    id: str
    kept: dict[str, Tensor]
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
    def coordinates(self) -> Coordinates | None: ...
    @property
    def words(self) -> Words:
        """The backbone's, which are public. Raises `BackboneError` if it has none."""
        ...

    @property
    def start(self) -> Tensor:
        """[P, D] that the whole run began with: public, and known to everybody."""
        ...

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]: ...
    def masked(self, share: float) -> Batch:
        """The batch that was drawn last, with this share of its texts' words replaced by random ones; the same in every
        step of an order. Raises `BackboneError` for images."""
        ...

    def mean(self, values_KB: Tensor) -> Tensor:
        """Once per batch, before the next is drawn."""
        ...

    def total(self, name: str, values_BN: Tensor) -> Tensor:
        """[B, N] over all of the client's records to [N]; a statistic that the plan names, its own ledger line."""
        ...

    def whole(self) -> Batch:
        """All of the client's records, to make the rows of a `total` of."""
        ...

    def home(self, held_back: float = 0.0) -> "AtHome":
        """The same client without privacy, for what never leaves: nothing made with it may enter an update, or a prompt
        that is asked about with records whose average will."""
        ...


class AtHome(ClientSide, Protocol):
    """A client among its own: what it learns here stays here."""

    def unlearnt(self) -> Batch:
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
    pools_data: bool
    trains: bool
    releases: bool
    sums: bool
    gathers: bool

    def init(self, setup: Setup) -> State: ...
    def work(self, state: State) -> tuple[int, int]:
        """Steps and batch size of one order: what the privacy of a run is planned from."""
        ...

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment: ...
    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]: ...
    def layout(self, state: State) -> Layout:
        """Names and shapes of the arrays of every update: what the codec checks arriving bytes against."""
        ...

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: "Model") -> State:
        """The facts `set_aside` (by client, why) and `too_few` (by mean) of the new state reach the round's record."""
        ...

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
