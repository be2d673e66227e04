"""The values that travel. The seams they travel through are in `seams`.

Shapes are suffixes: K candidate prompts, B records, R rows (K x B of all clients), S sequences (a row has one or
several), T positions, P virtual tokens (with the head rows, if the prompt has any), D width of the backbone, C answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from ficpd.interfaces import Task

JSON = Any
Score = dict[str, float]
LORA = -1
"""In the place of a layer (`enters_at`): the rows are no virtual tokens but low-rank changes of the weights."""

MAX_PROMPT_NORM_RATIO = 10.0
"""How far from zero a site is asked about prompts, in lengths of the start's longest row. Far outside of what the backbone
has seen, rounding alone makes one record's gradient, or loss, depend on which others share its forward."""
LABEL_PRIOR = "label_prior"
"""In `Batch.extra`: [B, C], the logarithm of each label's share, which a classification adds to its logits."""

# ---------------------------------------------------------------- values: records and what a backbone reads of them


@dataclass(frozen=True, slots=True)
class Record:
    """One example as its owner wrote it.

    `key` says where it came from (`ratings.csv row 17`): errors name it. `fields` are keyed by role: `text`, `text_pair`,
    `target`, later `options`, `image`, `references`; columns that a partition uses keep their own name.
    """

    key: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class EncodedInput:
    """One sequence that a backbone reads. Its identity is the key under which its lower layers' output is kept.

    `content` is the backbone's own: token ids, or an image that can be opened. Nothing between task and backbone looks
    inside. `scored` > 0 asks for the likelihood of the last `scored` positions instead of a feature at the reading position.
    """

    content: Any
    length: int
    scored: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """B records, encoded, and where a prompt joins them.

    `items` has one tuple per record: one sequence, or one per candidate answer. `targets` is [B], or None when they are
    not known. `readout_CD` turns features into scores. `extra` holds further per-record tensors ([B, ...]) for a loss
    of one's own, such as a teacher's outputs.
    """

    task: "Task"
    items: tuple[tuple[EncodedInput, ...], ...]
    targets: Tensor | None
    readout_CD: Tensor | None
    enters_at: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def select(self, index: Sequence[int] | Tensor) -> "Batch":
        """The records at these places, in this order."""
        places = [int(i) for i in index]
        rows = torch.as_tensor(places, dtype=torch.long)
        return replace(
            self,
            items=tuple(self.items[i] for i in places),
            targets=None if self.targets is None else self.targets[rows],
            extra={name: value[rows] for name, value in self.extra.items()},
        )

    def with_prior(self, log_shares_C: Tensor) -> "Batch":
        """The same records of a client whose labels are known to have these shares."""
        return replace(self, extra={**self.extra, LABEL_PRIOR: log_shares_C.expand(len(self), -1)})


@dataclass(frozen=True)
class HiddenStates:
    """What enters a layer: `states_STD`, and `mask_ST` (True where there is a token)."""

    states_STD: Tensor
    mask_ST: Tensor

    @staticmethod
    def of(states: Sequence[Tensor], left: bool = False) -> "HiddenStates":
        """Pad ragged [T, D] states; on the left for a causal backbone, so that the last position is in one column."""
        lengths = torch.tensor([len(s) for s in states])
        states_STD = pad_sequence(list(states), batch_first=True, padding_side="left" if left else "right")
        places = torch.arange(states_STD.shape[1])
        mask_ST = places >= states_STD.shape[1] - lengths[:, None] if left else places < lengths[:, None]
        return HiddenStates(states_STD, mask_ST.to(states_STD.device))

    def joined(self, prompts_SPD: Tensor) -> tuple[Tensor, Tensor]:
        """States and mask with each sequence's own prompt in front."""
        states = torch.cat([prompts_SPD.to(self.states_STD.dtype), self.states_STD], dim=1)
        return states, torch.cat([self.mask_ST.new_ones(prompts_SPD.shape[:2]), self.mask_ST], dim=1)


@dataclass(frozen=True)
class ModelOutput:
    """What a backbone says of R rows, always float32 and always one row each.

    `features_RD`: at the reading position. `scores_RN`: mean log-likelihood per token of each candidate's scored
    positions (None if no row has any; `-inf` where a row has fewer candidates). `readout_RCD`: the readout that
    travelled with the prompt, when it did.
    """

    features_RD: Tensor
    scores_RN: Tensor | None = None
    readout_RCD: Tensor | None = None

    def select(self, rows: Tensor) -> "ModelOutput":
        return ModelOutput(*(None if t is None else t[rows.to(t.device)] for t in self.parts()))  # type: ignore[arg-type]

    def parts(self) -> tuple[Tensor | None, ...]:
        return self.features_RD, self.scores_RN, self.readout_RCD


# ---------------------------------------------------------------- values: prompts, questions and what is sent


@dataclass(frozen=True)
class Prompt:
    """What is tuned, sent, clustered, kept: float32 [P, D]; of words int64 [P, 1], their token ids.

    `backbone` is a fingerprint: prompts of different backbones or layers never mix. `enters_at` is the layer whose
    input the virtual tokens join (0: ordinary prompt tuning). The last `head_rows` rows are no virtual tokens but the
    readout of a task that tunes one; they travel, are clipped and noised like the rest. Where `enters_at` is `LORA`, the
    other rows are weights (`backbones/lora.py`).
    """

    vectors_PD: Tensor
    backbone: str
    enters_at: int = 0
    head_rows: int = 0

    @property
    def num_virtual_tokens(self) -> int:
        """How many virtual tokens a text must leave room for."""
        return 0 if self.enters_at == LORA else len(self.vectors_PD) - self.head_rows

    @property
    def max_norm(self) -> float:
        """`FARTHEST` times as long as the longest row."""
        return MAX_PROMPT_NORM_RATIO * max(float(self.vectors_PD.norm(dim=-1).max()), 1e-6)

    def within_max_norm(self, rows: Tensor) -> bool:
        """Whether no row of these [..., D] is longer than `reach`."""
        return not rows.numel() or float(rows.norm(dim=-1).max()) <= self.max_norm

    def with_vectors(self, vectors_PD: Tensor) -> "Prompt":
        floats = vectors_PD.to(torch.float32) if vectors_PD.is_floating_point() else vectors_PD
        return replace(self, vectors_PD=floats.detach())


class Query(NamedTuple):
    """A question to the backbone: K candidate prompts, [K, P, D] or of words [K, P, 1], on B records. The only thing a
    client ever asks.

    `loss` is a per-row loss of one's own, `(Outputs, Batch) -> [R]`; None means the task's. `write` > 0 asks for a text
    of at most so many tokens after each record, the likeliest token at every step; such a query gives no gradients.
    """

    prompts_KPD: Tensor
    batch: Batch
    grad: bool = False
    outputs: bool = False
    loss: Callable[[ModelOutput, Batch], Tensor] | None = None
    max_new_tokens: int = 0


class Answer(NamedTuple):
    """One loss per candidate and record and, if asked for, one gradient, output or text. Never reduced over records."""

    loss_KB: Tensor
    grad_KBPD: Tensor | None = None
    outputs_KB: ModelOutput | None = None  # K x B rows, candidate by candidate
    texts_KB: list[list[str]] | None = None


@dataclass(frozen=True)
class Assignment:
    """Server to client: what to start from."""

    method: str
    round: int
    arrays: Mapping[str, Tensor]
    facts: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """Client to server. A method returns one; only what `Mechanism.release` let through is ever encoded."""

    client: str
    arrays: Mapping[str, Tensor]
    weight: float = 1.0


class ArraySpec(NamedTuple):
    """Shape and type of one array as it travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


TOKEN_DTYPE = torch.int32
"""As what token ids travel: no compression touches them."""
UpdateSpec = Mapping[str, tuple[int, ...] | ArraySpec]
"""Arrays by name: the shape of one of numbers, or what travels as it is, such as token ids."""


def zero_update(layout: UpdateSpec) -> dict[str, Tensor]:
    """An update's arrays, all zero."""
    kinds = {name: kind if isinstance(kind, ArraySpec) else ArraySpec(tuple(kind)) for name, kind in layout.items()}
    return {name: torch.zeros(kind.shape, dtype=kind.dtype) for name, kind in kinds.items()}


class PrivacyCost(NamedTuple):
    """What a release costs: `count` Gaussian releases, each on a Poisson sample of rate `sampling_rate` (1: on all),
    with noise of `noise_multiplier` times the sensitivity. One line of a ledger; `name` says what was released."""

    name: str
    sampling_rate: float
    noise_multiplier: float
    count: int = 1  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True)
class ClientWorkload:
    """What a whole run asks of one client, as far as its privacy is concerned.

    `participations` times an order of `steps` steps, each on a Poisson sample of rate `sampling_rate` of its `num_records`
    records; `num_clients` clients, of whom each joins one of `num_rounds` rounds with probability `cohort_rate`. `totals`:
    those that every order releases, and the share of the budget that each takes over all orders.
    """

    num_records: int
    sampling_rate: float
    steps: int
    participations: int
    num_clients: int
    cohort_rate: float
    num_rounds: int
    totals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientCard:
    """What everybody may know of a client: its name and public metadata, nothing that depends on records."""

    name: str
    metadata: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """All that a method's server half knows between two rounds: tensors and JSON, so that every round is a checkpoint."""

    arrays: Mapping[str, Tensor]
    facts: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class FederationInfo:
    """What a method starts from: the shared start (from public text and seed), clients, rounds, clients a round; how many
    labels the task of each group has (0: it has none; the group of a federation with one task is called "")."""

    start: Prompt
    clients: Sequence[ClientCard]
    num_rounds: int
    cohort: int
    seed: int
    num_labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What came back from one client: encoded bytes, or why there are none. `refused`: its budget does not allow it."""

    client: str
    body: bytes | None
    error: str | None = None
    refused: bool = False


@dataclass(frozen=True)
class ClientData:
    """One client's records. `metadata` is public: what its card says."""

    train: list[Record]
    test: list[Record]
    metadata: dict[str, str | float]
