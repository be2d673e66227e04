"""Mislabels records as canaries and adds them to random clients."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ficpd import rng
from ficpd.data.subjects import group_by_subject
from ficpd.interfaces import Task
from ficpd.tasks.multiple_choice import Option
from ficpd.types import ClientData, Record


def make_mislabelled_canaries(
    task: Task, records: Sequence[Record], shards: Mapping[str, ClientData], seed: int
) -> list[Record]:
    """Returns the records with wrong targets: another label, or the number mirrored in the observed range.

    For a generation task it swaps the targets of the records.
    """
    train = [record for shard in shards.values() for record in shard.train]
    if task.max_new_tokens:
        turned = [*records[1:], *records[:1]] if len(records) > 1 else []
        targets = [{name: other.fields.get(name) for name in ("target", "references")} for other in turned]
        return [replace(r, fields={**r.fields, **swapped}) for r, swapped in zip(records, targets, strict=False)]
    seen = sorted(set(task.targets(train)))
    if len(seen) < 2:
        return []
    random, truths = np.random.default_rng(rng.derive_seed(seed, "labels")), task.targets(records) if records else []
    if has_labels(task, train):
        options = [range(truth.of) if isinstance(truth, Option) else seen for truth in truths]
        wrong = [random.choice([o for o in of if o != t]).item() for of, t in zip(options, truths, strict=True)]
    else:
        wrong = [seen[0] + seen[-1] - truth for truth in truths]
    return [replace(r, fields={**r.fields, "target": target}) for r, target in zip(records, wrong, strict=True)]


def inject_canaries(shards: Mapping[str, ClientData], records: Sequence[Record], seed: int) -> dict[str, ClientData]:
    """Adds each record, or all records of a subject, to the training records of a random client."""
    names, random = list(shards), np.random.default_rng(rng.derive_seed(seed, "sites"))
    given: dict[str, list[Record]] = {name: [] for name in names}
    for group in group_by_subject(records):
        given[names[random.integers(len(names))]].extend(records[place] for place in group)
    return {name: replace(shard, train=[*shard.train, *given[name]]) for name, shard in shards.items()}


def has_labels(task: Task, records: Sequence[Record]) -> bool:
    """Tells whether targets are classes or options, not numbers."""
    return isinstance(task.targets(records[:1])[0], (str, Option))
