"""A client: its records, its mechanism, its private seed; and `participate`, the one door out."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ficpd import seeds
from ficpd.seams import Backbone, Mechanism, Method, Task
from ficpd.types import Answer, Assignment, Batch, ClientCard, ClientUpdate, Prompt, Query, Record


@dataclass(eq=False)
class Client:
    """One member of the federation. `start` tells the prompt's shape and layer; `kept` is what stays here over rounds.

    `private_seed` feeds record sampling and noise. It must not be derivable from anything the server knows; in
    simulation it is derived from the experiment's seed, and the result says so.
    """

    card: ClientCard
    train: Sequence[Record]
    test: Sequence[Record]
    task: Task
    backbone: Backbone
    mechanism: Mechanism
    start: Prompt
    private_seed: int
    kept: dict[str, Tensor] = field(default_factory=dict)
    _encoded: dict[str, Batch] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.card.name

    def encoded(self, part: str = "train") -> Batch:
        """All records of a part, encoded once: their items' identity is what the kept lower layers go by."""
        if part not in self._encoded:
            records = self.train if part == "train" else self.test
            self._encoded[part] = self.task.encode(records, self.backbone, self.start)
        return self._encoded[part]


class Visit:
    """One client carrying out one order: what a method sees (`ClientSide`). Nothing is kept until the order is done."""

    def __init__(self, client: Client, round: int):
        self.client, self.id = client, client.name
        self.weight = float(len(client.train)) if client.mechanism.unit == "none" else 1.0
        self.kept = dict(client.kept)
        self.noise = seeds.generator(client.private_seed, "noise", round)
        self.expected_batch = 1

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        """`steps` batches of `batch_size` records in expectation (all records, if there are fewer)."""
        records = self.client.encoded()
        self.expected_batch = min(batch_size, len(records))
        for rows in self.client.mechanism.sample(len(records), self.expected_batch, steps, self.noise):
            yield records.take(rows)

    def mean(self, values_KB: Tensor) -> Tensor:
        """[K, B, ...] to [K, ...] on the CPU, by the client's mechanism: the only way records are averaged."""
        return self.client.mechanism.mean(values_KB, self.expected_batch, self.noise).cpu()


def participate(method: Method, client: Client, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
    """Carry out an order. The one door out: what leaves is what the mechanism released, whatever the method returned."""
    visit = Visit(client, order.round)
    update = yield from method.train(visit, order)
    released = client.mechanism.release(update, visit.noise)
    client.kept = visit.kept
    return released


def personal_prompt(method: Method, client: Client, order: Assignment) -> Tensor:
    """[P, D] this client would use now; a question to the client, nothing leaves."""
    return method.personal(Visit(client, order.round), order)


def kept_arrays(clients: Mapping[str, Client]) -> dict[str, Tensor]:
    """All that clients keep, as one flat mapping `client/name`, for a simulation's checkpoint."""
    return {f"{name}/{key}": value for name, client in clients.items() for key, value in client.kept.items()}


def restore_kept(clients: Mapping[str, Client], arrays: Mapping[str, Tensor]) -> None:
    """The inverse of `kept_arrays`."""
    for path, value in arrays.items():
        name, _, key = path.rpartition("/")
        clients[name].kept[key] = value
