"""A client of the federation, and its session during one assignment."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng
from ficpd.data.subjects import group_by_subject, subject_numbers, take_whole
from ficpd.errors import BackboneError, PrivacyError
from ficpd.federation.secure_sum.member import Member
from ficpd.federation.units import Units, units_of
from ficpd.interfaces import Backbone, Compression, Mechanism, NoiseSource, ReleaseKind, Subspace, Task, Vocabulary
from ficpd.privacy.ledger import Account
from ficpd.privacy.noise import SecureNoise, SeededNoise
from ficpd.privacy.none import NoPrivacy
from ficpd.privacy.shared_gaussian import GRADIENT
from ficpd.tasks import corrupt_words
from ficpd.types import (
    Batch,
    ClientCard,
    PrivacyCost,
    Prompt,
    Record,
)

Encodings = dict[tuple, tuple[Sequence[Record], Batch]]
LABELS = "labels"
"""The statistic of `label_prior`."""
STATISTIC = "statistic/"
"""Prefix of released statistics in a client's state. A method neither reads nor writes these."""
MIN_HOLDOUT_RECORDS = 20
"""Clients with fewer records have no holdout."""


@dataclass(eq=False)
class Client:
    """One client. `start` has the prompt's shape and layer. `client_state` stays at the client between rounds.

    private_seed: feeds record sampling and simulated noise. The server must not be able to derive it.
    account: its ledger account; None only without privacy.
    pending_costs: further costs that the next assignment pays.
    query_counts: forward queries and gradients by round, each of one candidate on one record. They never leave the
        client, because the number of records in a Poisson sample is private.
    member: its half of secure sums, with its keys.
    """

    card: ClientCard
    train: Sequence[Record]
    test: Sequence[Record]
    task: Task
    backbone: Backbone
    mechanism: Mechanism
    compression: Compression
    start: Prompt
    private_seed: int
    account: Account | None = None
    pending_costs: Sequence[PrivacyCost] = ()
    client_state: Mapping[str, Tensor] = field(default_factory=dict)
    encodings: Encodings = field(default_factory=dict, repr=False)
    query_counts: dict[int, list[int]] = field(default_factory=dict, repr=False)
    member: "Member | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.mechanism.unit != "none" and self.account is None:
            raise PrivacyError(
                f"{self.name} has a {self.mechanism.unit}-level mechanism and no ledger; give it an account"
            )
        self.units  # noqa: B018  raises where records and mechanism have other units

    @property
    def units(self) -> Units:
        """Returns the units that the mechanism samples."""
        return units_of(self.name, self.train, self.mechanism)

    @property
    def name(self) -> str:
        return self.card.name

    def encoded(self, part: str = "train") -> Batch:
        """Encodes all records of a part, once, because `HiddenStateCache` finds them by identity.

        Clients that share `encodings` (one client under several methods) encode the same list of records once.
        """
        key, records = self._encoding(part)
        if key not in self.encodings or self.encodings[key][0] is not records:
            self.encodings[key] = records, self.task.encode(records, self.backbone, self.start)
        return self.encodings[key][1]

    def set_encoding(self, part: str, batch: Batch) -> None:
        """Sets the encoded records of a part, if they exist already."""
        key, records = self._encoding(part)
        self.encodings[key] = records, batch

    def _encoding(self, part: str) -> tuple[tuple, Sequence[Record]]:
        start, records = self.start, self.train if part == "train" else self.test
        return (self.name, part, len(start.vectors_PD), start.head_rows, start.enters_at), records

    def noise_source(self, method: str, round: int) -> NoiseSource:
        """Returns the private stream of one method's round. Streams of two methods differ, so that noise does not cancel."""
        if self.mechanism.noise == "cryptographic":
            return SecureNoise()
        return SeededNoise(self.private_seed, "noise", method, round)


class ClientSession:
    """A method's view of one client during one assignment (`ClientContext`)."""

    def __init__(self, client: Client, round: int, method: str = "", declared: Collection[str] = ()):
        """`declared`: statistics that the method declares; no other is released."""
        self.client, self.id, self._assignment = client, client.name, (round, method)
        self._declared, self.units = {"weight", *declared}, client.units
        state = client.client_state
        self.released = {name: value for name, value in state.items() if name.startswith(STATISTIC)}
        self.client_state = {name: value for name, value in state.items() if name not in self.released}
        self.noise = client.noise_source(method, round)
        self.expected_batch = 1
        self.costs: list[PrivacyCost] = []
        self._open: int | None = None
        self._drawn: Tensor | None = None
        self._masked: dict[float, Batch] = {}
        self.terms: dict[str, Tensor] = {}
        """Terms of the round's secure sum by name, int64 [N], if the mechanism is `summed`."""

    @property
    def start(self) -> Tensor:
        return self.client.start.vectors_PD

    @property
    def subspace(self) -> Subspace | None:
        return self.client.compression.subspace

    @property
    def weight(self) -> float:
        """See `ClientContext`. The noisy sum is released once and kept."""
        if self.client.mechanism.unit == "none":
            return float(len(self.client.train))
        if self.client.mechanism.cost(ReleaseKind.STATISTIC, "weight") is None:
            return 1.0
        ones = torch.ones(len(self.client.train), 1)
        return float(self._released_once("weight", ones).clamp(min=1.0))

    @property
    def label_prior(self) -> Tensor:
        """[C]: see `ClientContext`. Noisy counts are released once and kept."""
        batch = self.client.encoded()
        assert batch.task.num_labels, "checked before the run"
        assert batch.targets is not None
        counts_BC = F.one_hot(batch.targets, batch.task.num_labels).float()
        if self.client.mechanism.unit != "record":
            return log_label_prior(counts_BC.sum(0))
        return log_label_prior(self._released_once(LABELS, counts_BC).clamp(min=0.0))

    def _released_once(self, name: str, values_BN: Tensor) -> Tensor:
        """Returns the noisy sum of an earlier assignment, else a new one."""
        if STATISTIC + name not in self.released:
            self.released[STATISTIC + name] = self.private_sum(name, values_BN)
        return self.released[STATISTIC + name]

    @property
    def vocabulary(self) -> Vocabulary:
        words = self.client.backbone.vocabulary
        if words is None:
            raise BackboneError(f"{self.client.backbone.name} has no vocabulary for token prompts")
        return words

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        """Draws `steps` batches of `batch_size` records (subjects) in expectation, or of all if there are fewer.

        Charges all steps before the first is drawn. Raises `BudgetError` if the budget does not allow them.
        """
        client = self.client
        self.expected_batch = min(batch_size, client.mechanism.public_units or self.units.number)
        self.charge(ReleaseKind.STEP, count=steps)
        records, of = client.encoded(), self.units.of(slice(None))
        for rows in client.mechanism.sample(len(records), self.expected_batch, steps, self.noise, **of):
            self._open, self._drawn = len(rows), rows
            yield records.select(rows)

    def corrupted_batch(self, share: float) -> Batch:
        """See `ClientContext`. All records are corrupted once in an assignment."""
        assert self._drawn is not None, "draw a batch first"
        if share not in self._masked:
            client, words = self.client, rng.derive_seed(self.client.private_seed, "masked", *self._assignment)
            twins = corrupt_words(client.train, share, client.backbone, words)
            self._masked[share] = client.task.encode(twins, client.backbone, client.start)
        return self._masked[share].select(self._drawn)

    def private_mean(self, values_KB: Tensor) -> Tensor:
        """Averages the last batch by the client's mechanism. No other code averages records for an update."""
        if (
            self._drawn is None or self._open != values_KB.shape[1]
        ):  # the numbers are private; the server gets this error
            given = (
                "other records than the last batch has" if self._open is not None else "records, and no batch is open"
            )
            raise PrivacyError(
                f"private_mean got {given}. Average each batch once and whole, before the next one is drawn"
            )
        self._open = None
        grad_scale = self.subspace.grad_scale if self.subspace else None
        if grad_scale is not None and values_KB.shape[2:] != grad_scale.shape:
            grad_scale = None
        of = self.units.of(self._drawn)
        found = self.client.mechanism.noisy_mean(values_KB, self.expected_batch, self.noise, grad_scale, **of)
        return self._kept(GRADIENT, found)

    def private_sum(self, name: str, values_BN: Tensor | Iterable[Tensor]) -> Tensor:
        """See `ClientContext`. Each statistic has a separate ledger line."""
        if name not in self._declared and self.client.mechanism.unit != "none":
            raise PrivacyError(
                f"the statistic {name!r} is not declared in the method's Capabilities, so it is not released"
            )
        if isinstance(values_BN, Tensor):
            self._check_rows(name, len(values_BN))
        self.charge(ReleaseKind.STATISTIC, name)
        given = 0

        def chunks() -> Iterator[Tensor]:
            nonlocal given
            for chunk in [values_BN] if isinstance(values_BN, Tensor) else values_BN:
                given += len(chunk)
                yield chunk

        of = self.units.of(slice(None))
        summed = self.client.mechanism.noisy_sum(name, chunks(), self.noise, **of).cpu()
        self._check_rows(name, given)
        return self._kept(name, summed)

    def _kept(self, name: str, released: Tensor) -> Tensor:
        """Keeps a term of a secure sum. Returns zeros, because nothing may depend on it before the sum."""
        if not self.client.mechanism.summed:
            return released
        term = released.flatten()
        self.terms[name] = self.terms[name] + term if name in self.terms else term
        return torch.zeros(released.shape)

    def _check_rows(self, name: str, given: int) -> None:
        if given != len(self.client.train):
            raise PrivacyError(f"the statistic {name!r} was given {given} rows, one per record was expected")

    def full_batch(self) -> Batch:
        return self.client.encoded()

    def local_context(self, held_back: float = 0.0) -> "LocalSession":
        return LocalSession(self, *self._assignment, held_back)

    def charge(self, kind: ReleaseKind, name: str = "", count: int = 1) -> None:
        """Adds the cost of releases in advance. Raises `BudgetError` if the budget does not allow them."""
        cost = self.client.mechanism.cost(kind, name)
        if cost is not None and self.client.account is not None:
            self.client.account.check_budget([*self.costs, cost._replace(count=count)])
            self.costs.append(cost._replace(count=count))


class LocalSession(ClientSession):
    """The same records without mechanism, ledger and compression (`LocalContext`).

    `held_back`: the share of the records that `batches` leaves out and `holdout` returns, the same in all assignments.
    A subject's records are never divided. Clients with fewer than `MIN_HOLDOUT_RECORDS` records hold none back.
    """

    def __init__(self, session: ClientSession, round: int, method: str, held_back: float):
        super().__init__(replace(session.client, mechanism=NoPrivacy(), account=None), round, f"{method} at home")
        self.client_state = session.client_state
        records = len(self.client.train)
        groups, numbers = group_by_subject(self.client.train), subject_numbers(self.client.train)
        self.subject_B = None if numbers is None else torch.tensor(numbers, dtype=torch.long)
        order = SeededNoise(self.client.private_seed, "held back").permutation(len(groups)).tolist()
        held = int(records * held_back + 0.5) if records >= MIN_HOLDOUT_RECORDS else 0
        taken = take_whole(order, groups, held)
        apart = set(taken)
        rest = [place for group in order for place in groups[group] if place not in apart]
        self._held, self._learnt = (torch.tensor(places, dtype=torch.long) for places in (taken, rest))

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        records = self.client.encoded().select(self._learnt)
        self.expected_batch = min(batch_size, len(records))
        for rows in self.client.mechanism.sample(len(records), self.expected_batch, steps, self.noise):
            self._open, self._drawn = len(rows), self._learnt[rows]
            yield records.select(rows)

    def holdout(self) -> Batch:
        return self.client.encoded().select(self._held)

    @property
    def subspace(self) -> None:
        return None


def log_label_prior(counts_C: Tensor) -> Tensor:
    """Returns the log label shares [C], with half a record added to each label's count."""
    return ((counts_C + 0.5) / (counts_C + 0.5).sum()).log()
