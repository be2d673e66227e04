"""Divides one data set among the clients of a federation.

The label skew is that of Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks" (ICML 2019,
arXiv 1905.12022): for every label, the clients' shares of it are drawn from Dirichlet(concentration). Hsu et al. (2019,
arXiv 1909.06335) instead draw a mixture of labels for every client, with clients of equal size.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field, model_validator

from ficpd.data.subjects import group_by_subject
from ficpd.data.tables import read_files
from ficpd.data.untyped import is_regression_target, parse_cell, parse_number
from ficpd.errors import DataError, did_you_mean
from ficpd.registry import FrozenConfig, check_arguments, load, validate
from ficpd.rng import derive_seed
from ficpd.types import ClientData, Record

KINDS = ("column", "dirichlet", "iid", "column_dirichlet")
NUM_BINS = 10
"""The number of quantile bins, which are the labels of real-valued targets."""

NUM_DRAWS = 1000
"""The maximum number of draws of the shares to reach `min_records`."""


class Config(FrozenConfig):
    """Sets how records are divided among clients. A client's public card has its value of `column`.

    kind: "column": one client per value of a column. "iid": equal, random shares. "dirichlet": label skew.
        "column_dirichlet": every value of a column becomes several clients with label skew. A dotted name: the module's
        `build(config)` returns a function from the data set and a seed to `ClientData` by client name.
    column: the column of "column" and "column_dirichlet".
    num_clients: the number of clients; not for "column".
    concentration: the parameter of the Dirichlet distribution; a smaller one gives more skew.
    publish: columns for the cards. Each must have one value in all records of a client.
    cards: a table with a column `client` and a column for each public fact (language, specialty, beds, ...).
    options: the settings of the module that `kind` names.
    """

    kind: str
    column: str | None = None
    num_clients: int | None = Field(default=None, ge=1)
    concentration: float = Field(default=0.5, gt=0, le=1e6)
    min_records: int = Field(default=1, ge=1, description="train records that every client has at least")
    publish: tuple[str, ...] = ()
    cards: str | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> "Config":
        if "." in self.kind:
            for name in ("column", "num_clients"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"kind {self.kind!r} does not use {name!r}; settings of your module go into partition.options"
                    )
            return self
        if self.kind not in KINDS or self.options:
            given = "options are for a dotted name" if self.kind in KINDS else did_you_mean("kind", self.kind, KINDS)
            raise ValueError(f"{given} (or the dotted name of a module of yours)")
        for name, used in {"column": "column" in self.kind, "num_clients": self.kind != "column"}.items():
            if (getattr(self, name) is not None) != used:
                raise ValueError(f"kind {self.kind!r} {'needs' if used else 'does not use'} {name!r}")
        return self


class SplitRecords(Protocol):
    """Train and test records to divide."""

    @property
    def train(self) -> Sequence[Record]: ...
    @property
    def test(self) -> Sequence[Record]: ...


def partition(config: Config, data: SplitRecords, target: str, seed: int) -> dict[str, ClientData]:
    """Assigns every train and test record to exactly one client. Returns the clients, sorted by name.

    The random kinds keep subjects whole. A column may divide a subject between two of its values.

    Test records have the same shares as train records, so that a client is tested on its own skew. A client may have no
    test records. With kind "column" it may have only test records: then it takes no part in a federation. `target`: the
    field of the label. Raises `DataError` if a record has no value in the column or the target, or if a client would have
    fewer than `min_records` train records.

    >>> from types import SimpleNamespace
    >>> rows = [Record(f"row {i}", {"site": "ab"[i % 2]}) for i in range(6)]
    >>> data = SimpleNamespace(train=rows[:4], test=rows[4:])
    >>> shards = partition(Config(kind="column", column="site"), data, "target", seed=0)
    >>> {name: (len(shard.train), len(shard.test)) for name, shard in shards.items()}
    {'a': (2, 1), 'b': (2, 1)}
    """
    if not data.train:
        raise DataError("there are no train records to partition; the source must hold at least one")
    shards = {"client": ClientData(list(data.train), list(data.test), {})}
    if "." in config.kind:
        shards = _by_module(config, shards["client"], seed)
    if config.column is not None:
        shards = _by_column(config.column, shards["client"])
    if config.num_clients is not None:
        counts = _clients_of(config, config.num_clients, shards)
        dealt = [_deal(config, name, group, counts[name], target, seed) for name, group in shards.items()]
        shards = {name: shard for part in dealt for name, shard in part.items()}
    served = {n for n, s in shards.items() if s.test and not s.train and config.kind == "column"}
    _check(config, {name: len(shard.train) for name, shard in shards.items() if name not in served})
    for name, shard in shards.items():
        shard.metadata.update({column: _agreed(name, shard, column) for column in config.publish})
    if config.cards is not None:
        for name, facts in read_cards(config.cards).items():
            if name not in shards:
                raise DataError(
                    f"{config.cards}: {did_you_mean('client', name, shards)}; cards name the clients of the partition"
                )
            shards[name].metadata.update(facts)
    return dict(sorted(shards.items()))


def _by_module(config: Config, data: ClientData, seed: int) -> dict[str, ClientData]:
    """Divides by a module outside the package. Raises `DataError` unless each record gets exactly one client.

    Calls the function twice, and raises `DataError` if the results differ."""
    module, place = load("partitions", config.kind), f"partition.kind = {config.kind!r}"
    settings = validate(module.Config, config.options, "partition.options")

    def divide() -> Any:
        function = module.build(settings)
        check_arguments(f"{place}: {module.__file__}", "build(config)", function, "data, seed")
        return function(ClientData(list(data.train), list(data.test), {}), derive_seed(seed, "partition"))

    shards = divide()
    _check_shards(place, shards, data)
    if _keys(shards) != _keys(divide()):
        raise DataError(
            f"{place}: it divides anew at each call; expected the same clients for one seed. Draw by "
            "numpy.random.default_rng(seed) alone"
        )
    return dict(shards)


def _keys(shards: Mapping[str, ClientData]) -> dict[str, list[list[str]]]:
    """Returns the keys of each client's train and test records, in order."""
    return {name: [[record.key for record in side] for side in (s.train, s.test)] for name, s in shards.items()}


def _check_shards(place: str, shards: Any, data: ClientData) -> None:
    """Raises `DataError` unless this is `ClientData` by name, with every record at exactly one client."""
    if not isinstance(shards, Mapping):
        raise DataError(
            f"{place}: it returned a {type(shards).__name__}; expected a dict of client's name and ficpd.types.ClientData"
        )
    if odd := [name for name in shards if not isinstance(name, str)]:
        raise DataError(f"{place}: a client's name is {odd[0]!r}; expected text")
    if odd := [name for name, shard in shards.items() if not isinstance(shard, ClientData)]:
        raise DataError(
            f"{place}: client {odd[0]!r} is a {type(shards[odd[0]]).__name__}; expected "
            "ficpd.types.ClientData(train, test, metadata)"
        )
    for name, shard in shards.items():
        facts = shard.metadata.items() if isinstance(shard.metadata, Mapping) else [("metadata", shard.metadata)]
        if not isinstance(shard.metadata, Mapping) or any(not isinstance(v, (str, int, float)) for _, v in facts):
            raise DataError(f"{place}: client {name!r} has the public facts {shard.metadata!r:.80}; expected texts and "
                            "numbers by name, or {}")  # fmt: skip
    for side in ("train", "test"):
        records = [record for shard in shards.values() for record in getattr(shard, side)]
        if odd := [record for record in records if not isinstance(record, Record)]:
            raise DataError(
                f"{place}: a {side} record is a {type(odd[0]).__name__}; deal the records as they were given"
            )
        dealt, given = Counter(r.key for r in records), Counter(r.key for r in getattr(data, side))
        if wrong := [key for key in {**given, **dealt} if dealt[key] != given[key]]:
            raise DataError(
                f"{place}: expected every {side} record at exactly one client; {dealt.total()} were dealt, {given.total()} "
                f"were given. {wrong[0]} was dealt {dealt[wrong[0]]} times"
            )


def _agreed(client: str, shard: ClientData, column: str) -> str | float:
    """Returns the value that all records of a client have in a column. The value of a majority would leak."""
    records = [*shard.train, *shard.test]
    first = _field(records[0], column)
    for record in records:
        if _field(record, column) != first:
            raise DataError(
                f"partition.publish: client {client!r} has {first!r} and {record.fields[column]!r} ({record.key}) in "
                f"{column!r}; expected one value in all of the client's records. Partition by that column, or state the "
                "fact in partition.cards"
            )
    return first if isinstance(first, (int, float)) else str(first)


def read_cards(path: str) -> dict[str, dict[str, str | float]]:
    """Reads the clients' public facts by client; leaves out empty cells. Raises `DataError` for an invalid table."""
    cards: dict[str, dict[str, str | float]] = {}
    for table in read_files(Path(path).expanduser()):
        if "client" not in table.columns:
            raise DataError(
                f"{table.name}: {did_you_mean('column', 'client', table.columns)}; cards need one that names the client"
            )
        for number, row in table.rows.items():
            name = str(row["client"])
            if name in cards:
                raise DataError(
                    f"{table.name} row {number}: client {name!r} has a card already; give each client one row"
                )
            facts = {key: parse_cell(value) for key, value in row.items() if key != "client"}
            cards[name] = {key: v for key, v in facts.items() if v is not None and v == v and str(v).strip()}
    return cards


def _by_column(column: str, data: ClientData) -> dict[str, ClientData]:
    """Returns one shard per value of the column."""
    groups: dict[str, ClientData] = {}
    for side in ("train", "test"):
        for record in getattr(data, side):
            value = str(_field(record, column))
            group = groups.setdefault(value, ClientData([], [], {column: value}))
            getattr(group, side).append(record)
    return groups


def _field(record: Record, name: str) -> Any:
    """Returns a field of a record. Raises `DataError` for None, NaN and blank text."""
    value = record.fields.get(name)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        fields = ", ".join(sorted(record.fields))
        raise DataError(
            f"{record.key}: no value in {name!r}, which the partition needs; the record's fields are {fields}. "
            f"Fill it in, keep that column when reading, or partition by another"
        )
    return value


def _clients_of(config: Config, num_clients: int, groups: Mapping[str, ClientData]) -> dict[str, int]:
    """Returns the number of clients of each group: equal, with the remainder for the largest groups."""
    if num_clients < len(groups):
        raise DataError(
            f"column {config.column!r} has {len(groups)} values, each of which becomes one client or more; "
            f"num_clients is {num_clients}: set it to {len(groups)} or more, or partition by another column"
        )
    each, more = divmod(num_clients, len(groups))
    by_size = sorted(groups, key=lambda name: (-len(groups[name].train), name))
    return {name: each + (place < more) for place, name in enumerate(by_size)}


def _deal(
    config: Config, group: str, data: ClientData, num_clients: int, target: str, seed: int
) -> dict[str, ClientData]:
    """Divides a group's records among its clients, label by label, by the shares drawn for the label.

    All records of a subject go to one client. A subject counts once, under the most common label of its records.
    """
    rng = np.random.default_rng(derive_seed(seed, "partition", group))
    names = [f"{group}-{i:0{len(str(num_clients - 1))}}" for i in range(num_clients)]
    shards = {name: ClientData([], [], dict(data.metadata)) for name in names}
    groups = {side: group_by_subject(getattr(data, side)) for side in ("train", "test")}
    labels = {
        side: [_most_common([of[i] for i in group]) for group in groups[side]]
        for side, of in _labels(config, data, target).items()
    }
    shares = _shares(config, labels, names, rng)
    for side in ("train", "test"):
        records, owner_of = getattr(data, side), {}
        for places, owner in zip(groups[side], _owners(labels[side], shares, rng), strict=True):
            owner_of |= dict.fromkeys(places, names[owner])
        for place, record in enumerate(records):
            getattr(shards[owner_of[place]], side).append(record)
    return shards


def _most_common(labels: Sequence[str]) -> str:
    return Counter(labels).most_common(1)[0][0]


def _labels(config: Config, data: ClientData, target: str) -> dict[str, list[str]]:
    """Returns the labels for the skew: the target, its quantile bin (for real numbers), or one label (iid).

    Targets of a file without types are numbers if all of them spell a number.
    """
    sides = {"train": data.train, "test": data.test}
    if config.kind == "iid":
        return {side: [""] * len(records) for side, records in sides.items()}
    values = {side: [_field(record, target) for record in records] for side, records in sides.items()}
    if is_regression_target(value for column in values.values() for value in column):
        numbers = {side: [parse_number(value) for value in column] for side, column in values.items()}
        edges = np.unique(np.quantile(numbers["train"], np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
        values = {side: np.digitize(column, edges).tolist() for side, column in numbers.items()}
    return {side: [str(value) for value in column] for side, column in values.items()}


def _shares(
    config: Config, labels: Mapping[str, Sequence[str]], names: Sequence[str], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draws each label's shares [C] of the clients, until every client has `min_records` train records (or subjects).

    The shares are equal for "iid", else from Dirichlet(concentration)."""
    sizes = Counter(labels["train"])
    known = sorted({*labels["train"], *labels["test"]})
    lengths = np.zeros(len(names), dtype=int)
    for _ in range(NUM_DRAWS):
        equal = np.ones(len(names))
        shares = {
            label: equal / len(names) if config.kind == "iid" else rng.dirichlet(equal * config.concentration)
            for label in known
        }
        lengths = np.sum([_counts(shares[label], sizes[label]) for label in known], axis=0)
        if np.min(lengths) >= config.min_records:
            return shares
    _check(config, dict(zip(names, lengths.tolist(), strict=True)))
    raise AssertionError("the last draw left no client short")


def _counts(shares_C: np.ndarray, total: int) -> np.ndarray:
    """Returns whole numbers [C] with the sum `total`, each at most 1 from its share."""
    return np.diff(np.round(np.cumsum(shares_C) * total), prepend=0).astype(int)


def _owners(labels: Sequence[str], shares: Mapping[str, np.ndarray], rng: np.random.Generator) -> list[int]:
    """Returns each record's client, at random within its label."""
    own = np.array(labels, dtype=object)
    owners = np.zeros(len(labels), dtype=int)
    for label, shares_C in shares.items():
        places = rng.permutation(np.flatnonzero(own == label))
        owners[places] = np.repeat(np.arange(len(shares_C)), _counts(shares_C, len(places)))
    return owners.tolist()


def _check(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises `DataError`, naming the smallest client, if it has too few train records."""
    name = min(sizes, key=lambda client: sizes[client])
    if sizes[name] < config.min_records:
        advice = "drop or merge that value" if config.kind == "column" else "set fewer num_clients"
        advice = f"let {config.kind} deal it more" if "." in config.kind else advice
        larger = f", a larger concentration ({NUM_DRAWS} draws failed)" if "dirichlet" in config.kind else ""
        raise DataError(
            f"client {name!r} of {len(sizes)} gets {sizes[name]} train records, fewer than min_records = "
            f"{config.min_records}: {advice}{larger} or a lower min_records"
        )
