"""Canaries among real records: the same texts with a wrong label, put into sites by the flip of a coin."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ficpd import rng
from ficpd.interfaces import Task
from ficpd.tasks.multiple_choice import Option
from ficpd.types import ClientData, Record


def make_mislabelled_canaries(
    task: Task, records: Sequence[Record], shards: Mapping[str, ClientData], seed: int
) -> list[Record]:
    """The same records with another label of those seen, the number mirrored within the range seen, or, where texts are to
    be written, the target of another record."""
    train = [record for shard in shards.values() for record in shard.train]
    if task.max_new_tokens:
        turned = [*records[1:], *records[:1]] if len(records) > 1 else []
        return [
            replace(r, fields={**r.fields, **_targets_of(other)}) for r, other in zip(records, turned, strict=False)
        ]
    seen = sorted(set(task.targets(train)))
    if len(seen) < 2:
        return []
    random, truths = np.random.default_rng(rng.derive_seed(seed, "labels")), task.targets(records) if records else []
    if has_labels(task, train):
        wrong = [random.choice([label for label in _labels(truth, seen) if label != truth]).item() for truth in truths]
    else:
        wrong = [seen[0] + seen[-1] - truth for truth in truths]
    return [replace(r, fields={**r.fields, "target": target}) for r, target in zip(records, wrong, strict=True)]


def _targets_of(record: Record) -> dict[str, object]:
    return {name: record.fields.get(name) for name in ("target", "references")}


def inject_canaries(shards: Mapping[str, ClientData], records: Sequence[Record], seed: int) -> dict[str, ClientData]:
    """Each record goes to the training records of a client drawn at random."""
    names, random = list(shards), np.random.default_rng(rng.derive_seed(seed, "sites"))
    given: dict[str, list[Record]] = {name: [] for name in names}
    for record in records:
        given[names[random.integers(len(names))]].append(record)
    return {name: replace(shard, train=[*shard.train, *given[name]]) for name, shard in shards.items()}


def has_labels(task: Task, records: Sequence[Record]) -> bool:
    """Whether the truths are names (classes) or one of several options, and not numbers."""
    return isinstance(task.targets(records[:1])[0], (str, Option))


def _labels(truth: str | Option, seen: Sequence[str]) -> Sequence:
    """What might be said instead of a truth: another class, another of the record's own options."""
    return range(truth.of) if isinstance(truth, Option) else seen
