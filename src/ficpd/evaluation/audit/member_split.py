"""Splits records into members and non-members with the members' labels."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ficpd import rng
from ficpd.data.loading import ROLES
from ficpd.data.subjects import group_by_subject, take_whole
from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.attack_metrics import label_matched
from ficpd.evaluation.audit.canary_injection import has_labels
from ficpd.evaluation.audit.report import FEW
from ficpd.interfaces import Task
from ficpd.types import Record

POPULATION = 500


@dataclass(frozen=True)
class Split:
    """Members and non-members.

    members: training records.
    outside: non-members to score.
    population, pool: the attacker's records; shadows train on `shadow_size` of the pool.
    """

    members: Sequence[Record]
    outside: Sequence[Record]
    population: Sequence[Record]
    pool: Sequence[Record]
    shadow_size: int


def split_records(task: Task, train: Sequence[Record], spare: Sequence[Record], limit: int, seed: int) -> Split:
    """Takes at most `limit` members of `train`. Half of `spare` is scored; the attacker has the other half.

    Drops from `spare` duplicates, records of `train`, and records of subjects in `train`. No subject is in both halves.
    Raises `PrivacyError` if too few are left.
    """
    seen, known = {_contents(record) for record in train}, {record.subject for record in train} - {None}
    new = {_contents(r): r for r in spare if _contents(r) not in seen and r.subject not in known}
    fresh = _shuffled(new.values(), seed, "halves")
    groups = group_by_subject(fresh)
    taken = set(take_whole(range(len(groups)), groups, len(fresh) // 2))
    mine = [record for place, record in enumerate(fresh) if place in taken]
    outside = [record for place, record in enumerate(fresh) if place not in taken]
    members = _shuffled(train, seed, "members")[:limit]
    outside = _alike(task, members, outside, max(limit, FEW), seed)
    if min(len(members), len(outside), len(mine)) < 2:
        raise PrivacyError(
            f"{len(members)} members and {len(fresh)} distinct non-members: expected at least 2 and 4. Set a larger "
            "data.test_fraction, or data.max_records, to hold out more records"
        )
    rest = mine[POPULATION:]
    pool = rest if len(rest) >= len(train) else mine
    return Split(members, outside, mine[:POPULATION], pool, min(len(train), len(pool)))


def _contents(record: Record) -> str:
    """Returns a record's fields as text, without its client."""
    return repr([record.fields.get(role) for role in ROLES if role != "client"])


def _alike(task: Task, members: Sequence[Record], others: Sequence[Record], limit: int, seed: int) -> list[Record]:
    """Returns about `limit` of the others, with the members' label shares. Numeric targets are not matched."""
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
