"""A client: its records, its mechanism, its book of releases; and `participate`, the one door out."""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng, storage
from ficpd.errors import BackboneError, CodecError, LedgerError, PolicyError, PrivacyError
from ficpd.federation.method import Method
from ficpd.interfaces import TOTAL, Backbone, Compression, Mechanism, NoiseSource, Subspace, Task, Vocabulary
from ficpd.optimizers.search_space import clip_scale
from ficpd.privacy.ledger import Account
from ficpd.privacy.noise import SecureNoise, SeededNoise
from ficpd.privacy.none import NoPrivacy
from ficpd.tasks import corrupt_words
from ficpd.types import (
    LORA,
    Answer,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    PrivacyCost,
    Prompt,
    Query,
    Record,
    State,
)

Encodings = dict[tuple, tuple[Sequence[Record], Batch]]
LABELS = "labels"
"""The name of the total that `label_prior` is made of."""
MIN_HOLDOUT_RECORDS = 20
"""Of fewer records none can be spared to choose by."""


@dataclass(eq=False)
class Client:
    """One member of the federation. `start` tells the prompt's shape and layer; `kept` is what stays here over rounds.

    `private_seed` feeds record sampling and simulated noise. It must not be derivable from anything the server knows; a
    mechanism with cryptographic noise does not use it. `book` is where releases are paid; None only without privacy. `owed`:
    what the next order pays beside its own releases.
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
    client_state: dict[str, Tensor] = field(default_factory=dict)
    encodings: Encodings = field(default_factory=dict, repr=False)
    query_counts: dict[int, list[int]] = field(default_factory=dict, repr=False)
    """By round: how many forward queries and how many gradients (one candidate on one record each) its orders asked for. It
    never leaves: how many records a Poisson sample has is private."""

    def __post_init__(self) -> None:
        if self.mechanism.unit != "none" and self.account is None:
            raise PrivacyError(f"{self.name} has a {self.mechanism.unit}-level mechanism and no ledger; give it a book")

    @property
    def name(self) -> str:
        return self.card.name

    def encoded(self, part: str = "train") -> Batch:
        """All records of a part, encoded once: their items' identity is what the kept lower layers go by. Clients that
        share `encodings` (the same member under another method) share them where it is the very same list of records."""
        key, records = self._encoding(part)
        if key not in self.encodings or self.encodings[key][0] is not records:
            self.encodings[key] = records, self.task.encode(records, self.backbone, self.start)
        return self.encodings[key][1]

    def set_encoding(self, part: str, batch: Batch) -> None:
        """Use these encoded records, which somebody has already, for a part's own."""
        key, records = self._encoding(part)
        self.encodings[key] = records, batch

    def _encoding(self, part: str) -> tuple[tuple, Sequence[Record]]:
        start, records = self.start, self.train if part == "train" else self.test
        return (self.name, part, len(start.vectors_PD), start.head_rows, start.enters_at), records

    def noise_source(self, method: str, round: int) -> NoiseSource:
        """The private stream of one method's round: two methods' noises do not cancel."""
        if self.mechanism.noise == "cryptographic":
            return SecureNoise()
        return SeededNoise(self.private_seed, "noise", method, round)


class ClientSession:
    """One client carrying out one order: what a method sees (`ClientSide`). Nothing is kept until the order is done."""

    def __init__(self, client: Client, round: int, method: str = "", statistics: Collection[str] = ()):
        """`statistics`: totals that the method declares; no other is released."""
        self.client, self.id, self._order = client, client.name, (round, method)
        self._statistics = {"weight", *statistics}
        self.client_state = dict(client.client_state)
        self.noise = client.noise_source(method, round)
        self.expected_batch = 1
        self.costs: list[PrivacyCost] = []
        self.totals: list[str] = []
        self._open: int | None = None
        self._drawn: Tensor | None = None
        self._masked: dict[float, Batch] = {}

    @property
    def start(self) -> Tensor:
        return self.client.start.vectors_PD

    @property
    def subspace(self) -> Subspace | None:
        return self.client.compression.subspace

    @property
    def weight(self) -> float:
        """The record count where no privacy is asked; its noised total where it has a share of the budget; else 1."""
        if self.client.mechanism.unit == "none":
            return float(len(self.client.train))
        if self.client.mechanism.cost(TOTAL + "weight") is None:
            return 1.0
        if "weight" not in self.client_state:
            self.client_state["weight"] = self.private_sum("weight", torch.ones(len(self.client.train), 1)).clamp(
                min=1.0
            )
        return float(self.client_state["weight"])

    @property
    def label_prior(self) -> Tensor:
        """[C]: see `ClientSide`. Under a record-level mechanism the noised counts are kept and not paid for again."""
        batch = self.client.encoded()
        assert batch.task.num_labels, "checked before the run"
        assert batch.targets is not None
        counts_BC = F.one_hot(batch.targets, batch.task.num_labels).float()
        if self.client.mechanism.unit != "record":
            return log_label_prior(counts_BC.sum(0))
        if LABELS not in self.client_state:
            self.client_state[LABELS] = self.private_sum(LABELS, counts_BC).clamp(min=0.0)
        return log_label_prior(self.client_state[LABELS])

    @property
    def vocabulary(self) -> Vocabulary:
        words = self.client.backbone.vocabulary
        if words is None:
            raise BackboneError(f"{self.client.backbone.name} knows no words for a prompt to be made of")
        return words

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        """`steps` batches of `batch_size` records in expectation (all records, if there are fewer). All are paid for
        before the first is drawn: `BudgetError` if the budget does not allow them."""
        self.expected_batch = min(batch_size, len(self.client.train))
        self.charge("step", steps)
        records = self.client.encoded()
        for rows in self.client.mechanism.sample(len(records), self.expected_batch, steps, self.noise):
            self._open, self._drawn = len(rows), rows
            yield records.select(rows)

    def corrupted_batch(self, share: float) -> Batch:
        """See `ClientSide`. All records' twins are made once for each visit."""
        assert self._drawn is not None, "of the batch that was drawn last"
        if share not in self._masked:
            client, words = self.client, rng.derive_seed(self.client.private_seed, "masked", *self._order)
            twins = corrupt_words(client.train, share, client.backbone, words)
            self._masked[share] = client.task.encode(twins, client.backbone, client.start)
        return self._masked[share].select(self._drawn)

    def private_mean(self, values_KB: Tensor) -> Tensor:
        """[K, B, ...] to [K, ...] on the CPU, by the client's mechanism: the only way records are averaged."""
        if self._open != values_KB.shape[1]:
            given = (
                f"{values_KB.shape[1]} records where the last batch has {self._open}" if self._open is not None else ""
            )
            raise PrivacyError(
                f"a method averages {given or 'a batch twice, or none that was drawn'}; each batch is paid for once: "
                "average it once, whole, before the next is drawn"
            )
        self._open = None
        units = torch.ones(())
        if self.subspace and values_KB.shape[2:] == self.subspace.grad_scale.shape:
            units = clip_scale(self.subspace)
        values_KB = values_KB * units.to(values_KB.device)
        return self.client.mechanism.noisy_mean(values_KB, self.expected_batch, self.noise).cpu() / units

    def private_sum(self, name: str, values_BN: Tensor) -> Tensor:
        """[B, N] over all of the client's records to [N] on the CPU: a statistic with a ledger line of its own."""
        if len(values_BN) != len(self.client.train):
            raise PrivacyError(f"the total {name!r} was given {len(values_BN)} rows, one per record was expected")
        if name not in self._statistics and self.client.mechanism.unit != "none":
            raise PrivacyError(
                f"the total {name!r} is not declared in the method's Capabilities, so it is not released"
            )
        self.charge(TOTAL + name, 1)
        self.totals.append(name)
        return self.client.mechanism.noisy_sum(name, values_BN, self.noise).cpu()

    def full_batch(self) -> Batch:
        return self.client.encoded()

    def release(self, update: ClientUpdate) -> ClientUpdate:
        """Projected, then clipped and noised as the mechanism does, then packed for the wire. With privacy, the weight
        is this visit's own, whatever the method made up."""
        if self.client.mechanism.unit != "none":
            update = replace(update, weight=self.weight)
        compression = self.client.compression
        projected = replace(update, arrays=compression.project(update.arrays))
        released = self.client.mechanism.privatize_update(projected, self.noise)
        return replace(released, arrays=compression.pack(released.arrays))

    def local_context(self, held_back: float = 0.0) -> "LocalSession":
        return LocalSession(self, *self._order, held_back)

    def charge(self, door: str, count: int) -> None:
        """Put a passage on this visit's bill, before it takes place. Raises `BudgetError` if it cannot be paid."""
        price = self.client.mechanism.cost(door)
        if price is not None and self.client.account is not None:
            self.client.account.check_budget([*self.costs, price._replace(count=count)])
            self.costs.append(price._replace(count=count))


class LocalSession(ClientSession):
    """The same records without mechanism, ledger or compression: for what a client tunes for itself. Whatever was made with
    it may only go into `kept`, never into an update, nor into a prompt that is asked about with records that will.

    `held_back`: the share of the records, the same in every order, that `batches` leaves out and `unlearnt` gives; of fewer
    than `FEW` records none.
    """

    def __init__(self, session: ClientSession, round: int, method: str, held_back: float):
        super().__init__(replace(session.client, mechanism=NoPrivacy(), account=None), round, f"{method} at home")
        self.client_state = session.client_state
        records = len(self.client.train)
        assignment = SeededNoise(self.client.private_seed, "held back").permutation(records)
        held = int(records * held_back + 0.5) if records >= MIN_HOLDOUT_RECORDS else 0
        self._unlearnt, self._learnt = assignment[:held], assignment[held:]

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        records = self.client.encoded().select(self._learnt)
        self.expected_batch = min(batch_size, len(records))
        for rows in self.client.mechanism.sample(len(records), self.expected_batch, steps, self.noise):
            self._open, self._drawn = len(rows), self._learnt[rows]
            yield records.select(rows)

    def holdout(self) -> Batch:
        return self.client.encoded().select(self._unlearnt)

    @property
    def subspace(self) -> None:
        return None


def log_label_prior(counts_C: Tensor) -> Tensor:
    """[C]: logarithms of shares, with half a record more for each label."""
    return ((counts_C + 0.5) / (counts_C + 0.5).sum()).log()


def execute_assignment(
    method: Method, client: Client, assignment: Assignment
) -> Generator[Query, Answer, ClientUpdate]:
    """Carry out an order. The one door out: what leaves is what the mechanism released, whatever the method returned,
    and only after its price stands in the ledger. An order that was carried out before is answered as it was then; one of
    an earlier round, whose answer is not kept any more, is refused with `PolicyError`: it would be paid for twice. One that
    fails once records were drawn is paid for and not tried again: that it failed may tell of the records.
    """
    if client.account is not None:
        if (stored := client.account.stored_answer(assignment.round, assignment.method)) is not None:
            return restore_update(client, stored, assignment.round)
        if assignment.round < (newest := client.account.last_round(assignment.method)):
            raise PolicyError(
                f"{client.name} got round {assignment.round} of {assignment.method} after round {newest} was answered; that "
                "round is over, and nothing was spent on it. Ask for the next one"
            )
    declared = method.capabilities.statistics_per_round.keys() | set(method.capabilities.statistics_once)
    session = ClientSession(client, assignment.round, assignment.method, declared)
    asked = client.query_counts.setdefault(assignment.round, [0, 0])
    session.costs.extend(client.pending_costs)
    session.charge("release", 1)
    try:
        near = client.start if client.mechanism.unit == "record" else None
        update = yield from count_queries(method.local_update(session, assignment), asked, near)
        if update.arrays and not method.capabilities.releases:
            raise PrivacyError(f"{method.name} declares Capabilities.releases = False, and its update has arrays")
        released = session.release(update)
    except PrivacyError:  # a price that is too high, or a method that is not sound: so for any records
        raise
    except Exception:
        if client.account is not None and client.mechanism.unit != "none":
            kept = client.client_state | {
                name: session.client_state[name] for name in session.totals if name in session.client_state
            }
            failed = _stored(ClientUpdate(client.name, {}), kept, asked, failed=True)
            client.account.commit(assignment.round, assignment.method, session.costs, failed)
            client.client_state, client.pending_costs = kept, ()
        raise
    if client.account is not None:
        client.account.commit(
            assignment.round, assignment.method, session.costs, _stored(released, session.client_state, asked)
        )
    client.client_state, client.pending_costs = session.client_state, ()
    return released


def count_queries(
    work: Generator[Query, Answer, ClientUpdate], asked: list[int], near: Prompt | None = None
) -> Generator[Query, Answer, ClientUpdate]:
    """The same work; what it asks for is added to `asked`: forward queries, gradients. Prompts farther off than `near`
    reaches are asked about where its reach ends."""
    try:
        query = next(work)
        while True:
            if near is not None and near.enters_at != LORA:
                query = query._replace(prompts_KPD=near.clip_to_max_norm(query.prompts_KPD))
            asked[query.grad] += len(query.prompts_KPD) * len(query.batch)
            query = work.send((yield query))
    except StopIteration as end:
        return end.value


def _stored(update: ClientUpdate, kept: Mapping[str, Tensor], asked: list[int], failed: bool = False) -> bytes:
    arrays = {f"sent/{name}": array for name, array in update.arrays.items()}
    arrays |= {f"kept/{name}": array for name, array in kept.items()}
    return storage.encode_state(State(arrays), {"weight": update.weight, "failed": failed, "asked": asked})


def restore_update(client: Client, body: bytes, round: int | None = None) -> ClientUpdate:
    """The update that was released then; the client keeps what it kept then, and has asked in its `round` what it asked
    then. Raises `PolicyError` if it failed."""
    try:
        state, extra = storage.decode_state(body, own=True)
    except CodecError as error:
        raise LedgerError(f"the stored answer of {client.name} cannot be read: {error}") from error
    parts = {"sent": {}, "kept": {}}
    for path, array in state.arrays.items():
        part, _, name = path.partition("/")
        parts[part][name] = array
    client.client_state = parts["kept"]
    if round is not None:
        client.query_counts[round] = list(extra.get("asked", (0, 0)))
    if extra["failed"]:
        raise PolicyError(f"this order failed at {client.name} and is not tried again; ask for the next round")
    return ClientUpdate(client.name, parts["sent"], extra["weight"])


def personal_prompt(method: Method, client: Client, assignment: Assignment) -> Tensor:
    """[P, D] this client would use now; a question to the client, nothing leaves."""
    return method.personal_prompt(ClientSession(client, assignment.round), assignment)


def calibrated_batch(method: Method, client: Client, batch: Batch) -> Batch:
    """Records of its own as this client would ask about them, by a method that knows more of it than a prompt."""
    return method.local_batch(ClientSession(client, 0).local_context(), batch)


def client_states(clients: Mapping[str, Client]) -> dict[str, Tensor]:
    """All that clients keep, as one flat mapping `client/name`, for a simulation's checkpoint."""
    return {f"{name}/{key}": value for name, client in clients.items() for key, value in client.client_state.items()}


def load_client_states(clients: Mapping[str, Client], arrays: Mapping[str, Tensor]) -> None:
    """The inverse of `client_states`."""
    for path, value in arrays.items():
        name, _, key = path.rpartition("/")
        clients[name].client_state[key] = value
