"""The values that components exchange. The protocols are in `interfaces`.

Shape suffixes: K candidate prompts, B records, R rows (K x B of all clients), S sequences (one or several per row), T
positions, P virtual tokens (with the prompt's head rows), D width of the backbone, C answers.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

JSON = Any
Score = dict[str, float]
LORA = -1
"""Value of `enters_at` for prompts whose rows are low-rank weight changes instead of virtual tokens."""

MAX_PROMPT_NORM_RATIO = 10.0
"""Maximum norm of a queried prompt row, as a multiple of the longest row of the initial prompt.

Far outside the backbone's range, rounding makes one record's gradient depend on the other records of a forward pass."""
LABEL_PRIOR = "label_prior"
"""Key of `Batch.extra`: [B, C], log shares of the labels, which a classification adds to its logits."""

# ---------------------------------------------------------------- records and their encodings


@dataclass(frozen=True, slots=True)
class Record:
    """One raw example.

    `key`: its source, for errors (`ratings.csv row 17`). `fields`: values by role (`text`, `text_pair`, `target`,
    `options`, `image`, `references`); columns used by a partition keep their name. `subject`: the patient or customer
    of the record, if the data name one. Splits and record-level privacy keep a subject's records together.
    """

    key: str
    fields: Mapping[str, Any]
    subject: str | None = None


@dataclass(frozen=True, eq=False, slots=True)
class EncodedInput:
    """One sequence that a backbone reads. Its identity is the key of cached hidden states.

    `content`: token ids or a lazy image, opaque outside the backbone. `scored` > 0 requests the likelihood of the last
    `scored` positions instead of a feature.
    """

    content: Any
    length: int
    scored: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """B encoded records.

    items: one tuple per record, of one sequence or one per candidate answer.
    targets: [B], or None when unknown.
    readout_CD: maps features to scores.
    enters_at: the layer where a prompt joins.
    extra: further per-record tensors [B, ...] for a custom loss, such as a teacher's outputs.
    """

    task: "Objective"
    items: tuple[tuple[EncodedInput, ...], ...]
    targets: Tensor | None
    readout_CD: Tensor | None
    enters_at: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def select(self, index: Sequence[int] | Tensor) -> "Batch":
        """Returns the records at these indices, in this order."""
        places = [int(i) for i in index]
        rows = torch.as_tensor(places, dtype=torch.long)
        return replace(
            self,
            items=tuple(self.items[i] for i in places),
            targets=None if self.targets is None else self.targets[rows],
            extra={name: value[rows] for name, value in self.extra.items()},
        )

    def with_prior(self, log_shares_C: Tensor) -> "Batch":
        """Adds a term to the logits of the answers, such as the log label shares of the client."""
        prior_BC = self.extra.get(LABEL_PRIOR, 0.0) + log_shares_C.expand(len(self), -1)
        return replace(self, extra={**self.extra, LABEL_PRIOR: prior_BC})

    def with_readout(self, readout: "Readout | None") -> "Batch":
        """Replaces the task's readout by a learned one; None changes nothing."""
        if readout is None:
            return self
        rows_CD = readout.rows_CD
        if self.readout_CD is not None:
            rows_CD = rows_CD.to(self.readout_CD.device)
        return replace(self, readout_CD=rows_CD).with_prior(readout.bias_C)


@dataclass(frozen=True, eq=False)
class Readout:
    """A learned readout of one label set: logits = `features @ rows_CD.T + bias_C`.

    Rows are in the order of the task's labels. shares_C: label shares of the records that it was learned from.
    """

    rows_CD: Tensor
    bias_C: Tensor
    shares_C: Tensor


LENGTH_STEP = 8
"""Padded lengths are multiples of this."""


def padded_length(length: int) -> int:
    """Returns the next multiple of `LENGTH_STEP`. The shape of a sequence then depends only on its own length."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


@dataclass(frozen=True)
class HiddenStates:
    """A layer's input: `states_STD`, and `mask_ST` (True at tokens)."""

    states_STD: Tensor
    mask_ST: Tensor

    @staticmethod
    def of(states: Sequence[Tensor], left: bool = False, most: int | None = None) -> "HiddenStates":
        """Pads ragged [T, D] states to the longest `padded_length`, but not beyond `most`.

        Pads on the left for a causal backbone, so that last positions share a column.
        """
        lengths = torch.tensor([len(s) for s in states])
        states_STD = pad_sequence(list(states), batch_first=True, padding_side="left" if left else "right")
        own = states_STD.shape[1]
        longest = padded_length(own) if most is None else max(min(padded_length(own), most), own)
        states_STD = F.pad(states_STD, (0, 0, longest - own, 0) if left else (0, 0, 0, longest - own))
        places = torch.arange(longest)
        mask_ST = places >= longest - lengths[:, None] if left else places < lengths[:, None]
        return HiddenStates(states_STD, mask_ST.to(states_STD.device))

    def joined(self, prompts_SPD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns states and mask with each sequence's prompt in front."""
        states = torch.cat([prompts_SPD.to(self.states_STD.dtype), self.states_STD], dim=1)
        return states, torch.cat([self.mask_ST.new_ones(prompts_SPD.shape[:2]), self.mask_ST], dim=1)


@dataclass(frozen=True)
class ModelOutput:
    """A backbone's float32 output for R rows.

    features_RD: features at the reading position.
    scores_RN: mean log-likelihood per token of each candidate's scored positions; None without any, -inf for padding.
    readout_RCD: the readout that is part of the prompt, if any.
    """

    features_RD: Tensor
    scores_RN: Tensor | None = None
    readout_RCD: Tensor | None = None

    def select(self, rows: Tensor) -> "ModelOutput":
        return ModelOutput(*(None if t is None else t[rows.to(t.device)] for t in self.parts()))  # type: ignore[arg-type]

    def parts(self) -> tuple[Tensor | None, ...]:
        return self.features_RD, self.scores_RN, self.readout_RCD


class Objective(Protocol):
    """Computes losses, and logits if records have labels. `head_rows`: rows of a tuned readout."""

    head_rows: int = 0
    num_labels: int = 0
    """Number of labels of a classification. `Batch.targets` are their indices."""

    @abstractmethod
    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns one loss per row, [R], never reduced."""
        ...

    def logits(self, outputs: ModelOutput, batch: Batch) -> Tensor | None:
        """Returns logits [R, C], shifted by `LABEL_PRIOR`; None for a task without fixed answers."""
        return None


# ---------------------------------------------------------------- prompts, queries and messages


@dataclass(frozen=True)
class Prompt:
    """A soft prompt, float32 [P, D], or a prompt of words, int64 [P, 1] token ids.

    backbone: fingerprint. Prompts of different backbones or layers never mix.
    enters_at: layer whose input the virtual tokens join (0: ordinary prompt tuning). With `LORA` the rows are weights
        (`backbones/lora.py`).
    head_rows: the last rows, which are a tuned readout. They are sent, clipped and noised like the others.
    """

    vectors_PD: Tensor
    backbone: str
    enters_at: int = 0
    head_rows: int = 0

    @property
    def num_virtual_tokens(self) -> int:
        """Returns the number of positions that the prompt takes from a text."""
        return 0 if self.enters_at == LORA else len(self.vectors_PD) - self.head_rows

    @property
    def max_norm(self) -> float:
        """Returns `MAX_PROMPT_NORM_RATIO` times the norm of the longest row."""
        return MAX_PROMPT_NORM_RATIO * max(float(self.vectors_PD.norm(dim=-1).max()), 1e-6)

    def within_max_norm(self, rows: Tensor) -> bool:
        """Returns whether no row of [..., D] is longer than `max_norm`."""
        return not rows.numel() or float(rows.norm(dim=-1).max()) <= self.max_norm

    def with_vectors(self, vectors_PD: Tensor) -> "Prompt":
        floats = vectors_PD.to(torch.float32) if vectors_PD.is_floating_point() else vectors_PD
        return replace(self, vectors_PD=floats.detach())


class Query(NamedTuple):
    """Asks the backbone about K candidate prompts, [K, P, D] or of words [K, P, 1], on B records.

    loss: custom per-row loss, `(ModelOutput, Batch) -> [R]`; None: the task's.
    max_new_tokens: > 0 requests greedily generated text after each record, without gradients.
    """

    prompts_KPD: Tensor
    batch: Batch
    grad: bool = False
    outputs: bool = False
    loss: Callable[[ModelOutput, Batch], Tensor] | None = None
    max_new_tokens: int = 0


class Answer(NamedTuple):
    """Losses per candidate and record, with gradients, outputs or texts if requested. Never reduced over records."""

    loss_KB: Tensor
    grad_KBPD: Tensor | None = None
    outputs_KB: ModelOutput | None = None  # K x B rows, candidate by candidate
    texts_KB: list[list[str]] | None = None


@dataclass(frozen=True)
class Predictor:
    """One model of a client's mixture.

    weight: its share of the mixture's probabilities.
    logits: maps outputs and their batch to [R, C]; None: the task reads the outputs.
    """

    prompt_PD: Tensor
    logits: Callable[[ModelOutput, Batch], Tensor] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Assignment:
    """A server's message to a client: the prompts and settings of one round."""

    method: str
    round: int
    arrays: Mapping[str, Tensor]
    facts: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """A client's message to the server. Only the output of `Mechanism.privatize_update` is ever encoded."""

    client: str
    arrays: Mapping[str, Tensor]
    weight: float = 1.0


class ArraySpec(NamedTuple):
    """Shape and type of one encoded array."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


TOKEN_DTYPE = torch.int32  # of token ids, to which no compression applies
UpdateSpec = Mapping[str, tuple[int, ...] | ArraySpec]
"""Arrays by name: a shape for numbers, an `ArraySpec` for arrays that are never compressed, such as token ids."""


def zero_update(layout: UpdateSpec) -> dict[str, Tensor]:
    """Returns an update's arrays, all zero."""
    kinds = {name: kind if isinstance(kind, ArraySpec) else ArraySpec(tuple(kind)) for name, kind in layout.items()}
    return {name: torch.zeros(kind.shape, dtype=kind.dtype) for name, kind in kinds.items()}


class PrivacyCost(NamedTuple):
    """One line of a ledger: `count` Gaussian releases with noise of `noise_multiplier` times the sensitivity.

    Each release uses a Poisson sample of rate `sampling_rate` (1: all records). `name`: the released quantity.
    """

    name: str
    sampling_rate: float
    noise_multiplier: float
    count: int = 1  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True)
class ClientWorkload:
    """The planned releases of one client in a whole run, from which its noise is chosen.

    sampling_rate: Poisson sampling rate of its units in each of the `steps` of an assignment. The units are its
        `num_subjects` subjects, or (None: the data name none) its `num_records` records.
    participations: assignments that it executes.
    cohort_rate: probability that one of `num_clients` clients joins one of `num_rounds` rounds.
    totals: sums that every assignment releases, with their shares of the budget over the run.
    once: sums that are released once, with their shares.
    most_participations: the largest number of assignments that any client executes.
    """

    num_records: int
    sampling_rate: float
    steps: int
    participations: int
    num_clients: int
    cohort_rate: float
    num_rounds: int
    totals: Mapping[str, float] = field(default_factory=dict)
    once: Mapping[str, float] = field(default_factory=dict)
    num_subjects: int | None = None
    most_participations: int | None = None

    @property
    def num_units(self) -> int:
        return self.num_records if self.num_subjects is None else self.num_subjects


@dataclass(frozen=True)
class ClientCard:
    """A client's name and public metadata, which do not depend on its records."""

    name: str
    metadata: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A method's server state between two rounds, as tensors and JSON, so that it can be saved as a checkpoint."""

    arrays: Mapping[str, Tensor]
    facts: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class FederationInfo:
    """The inputs of a method's initial state.

    start: the shared initial prompt, from public text and seed.
    cohort: clients per round.
    num_labels: labels of each group's task (0: no labels). A federation of one task has the group "".
    texts: the label texts' readout [C, D] of each group whose labels are read from features.
    features_MD: features of synthetic records at the start prompt, for methods that learn a readout; else None.
    unit: the unit of privacy.
    """

    start: Prompt
    clients: Sequence[ClientCard]
    num_rounds: int
    cohort: int
    seed: int
    num_labels: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    features_MD: Tensor | None = None
    unit: Literal["none", "record", "client"] = "none"


@dataclass(frozen=True)
class Reply:
    """One client's encoded update, or its error. `refused`: its budget does not allow the release."""

    client: str
    body: bytes | None
    error: str | None = None
    refused: bool = False


@dataclass(frozen=True)
class ClientData:
    """One client's records. `metadata` is public, for its card."""

    train: list[Record]
    test: list[Record]
    metadata: dict[str, str | float]
