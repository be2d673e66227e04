"""Who is a member, and who stands beside them: records that nobody trained on, with the members' labels."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ficpd import rng
from ficpd.data.loading import ROLES
from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.attack_metrics import label_matched
from ficpd.evaluation.audit.canary_injection import has_labels
from ficpd.evaluation.audit.report import FEW
from ficpd.interfaces import Task
from ficpd.types import Record

POPULATION = 500


@dataclass(frozen=True)
class Split:
    """`members` were trained on; nobody trained on the others. `outside` are scored beside the members, `population` and
    `pool` are the attacker's own: the pool trains shadows, each on `shadow_size` of its records."""

    members: Sequence[Record]
    outside: Sequence[Record]
    population: Sequence[Record]
    pool: Sequence[Record]
    shadow_size: int


def split_records(task: Task, train: Sequence[Record], spare: Sequence[Record], limit: int, seed: int) -> Split:
    """At most `limit` members of `train`; of `spare`, one half to score, the other for the attacker.

    A spare record that reads like a training record, or like another, is left out of the halves. Raises `PrivacyError` if
    too few are left.
    """
    seen = {_contents(record) for record in train}
    fresh = _shuffled({_contents(r): r for r in spare if _contents(r) not in seen}.values(), seed, "halves")
    mine, outside = fresh[: len(fresh) // 2], fresh[len(fresh) // 2 :]
    members = _shuffled(train, seed, "members")[:limit]
    outside = _alike(task, members, outside, max(limit, FEW), seed)
    if min(len(members), len(outside), len(mine)) < 2:
        raise PrivacyError(
            f"{len(members)} members and {len(fresh)} records that nobody trained on were found, expected at least 2 "
            "and 4 that differ from them; in a run a larger data.test_fraction, or data.max_records, sets more aside"
        )
    rest = mine[POPULATION:]
    pool = rest if len(rest) >= len(train) else mine
    return Split(members, outside, mine[:POPULATION], pool, min(len(train), len(pool)))


def _contents(record: Record) -> str:
    """What a record says, whoever holds it."""
    return repr([record.fields.get(role) for role in ROLES if role != "client"])


def _alike(task: Task, members: Sequence[Record], others: Sequence[Record], limit: int, seed: int) -> list[Record]:
    """At most about `limit` of the others, with the members' share of each label. Numbers are not matched."""
    if not has_labels(task, members) or not others:
        return list(others[:limit])
    wanted, labels, room, kept = task.targets(members), task.targets(others), Counter(), []
    for label, count in Counter(wanted).items():
        room[label] = math.ceil(count / len(wanted) * limit)
    for record, label in zip(others, labels, strict=True):
        if room[label] > 0:
            room[label] -= 1
            kept.append(record)
    return [kept[i] for i in label_matched(wanted, task.targets(kept), seed)]


def _shuffled(things: Iterable[Record], seed: int, what: str) -> list[Record]:
    kept = list(things)
    return [kept[i] for i in torch.randperm(len(kept), generator=rng.make_generator(seed, "audit", what)).tolist()]
