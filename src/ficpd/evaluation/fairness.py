"""Who is served how well: over clients, and over the groups of a public column. A simulation's view: nothing leaves.

Three gaps are measured between groups. *Accuracy*: who is answered rightly. *Demographic parity*: who is given an answer,
right or not. *Equalised odds* (Hardt, Price, Srebro, NeurIPS 2016, arXiv 1610.02413): who is given an answer among those
it is true of, and among those it is not. Where base rates differ, as an illness is more frequent with age, demographic
parity contradicts accuracy: a perfect answer violates it, and to meet it some group must be answered wrongly. A perfect
answer has equalised odds; so they stand beside it, and a demographic parity gap alone is no finding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap

from ficpd.errors import DataError
from ficpd.evaluation.metrics import less_is_better
from ficpd.federation.client import Client
from ficpd.interfaces import Task
from ficpd.rng import derive_seed
from ficpd.types import JSON, Record, Score

FEW = 10
"""Of fewer records a resampled interval says nothing."""
LEVEL = 0.95
RESAMPLES = 2000


class ConditionalRate(NamedTuple):
    """How often `hit_N` is true among the records `over_N`; `of` says in words of what it is the rate."""

    hit_N: np.ndarray
    over_N: np.ndarray
    of: Mapping[str, JSON]


def over_clients(scores: Mapping[str, Score], seed: int) -> dict[str, JSON]:
    """Per metric, over the clients that have it: mean, deviation (n-1; None of one client), best, worst, and the mean of
    the worst tenth, rounded up to whole clients. An error counts as worst where it is highest.

    The intervals (95 %, of 2,000 resamples of the clients; None of one client) are too narrow for few clients, and that of
    the worst tenth cannot reach below the worst client that was seen.
    """
    names = sorted({name for score in scores.values() for name in score})
    return {
        name: _spread({c: score[name] for c, score in scores.items() if name in score}, less_is_better(name), seed)
        for name in names
    }


def share_worse_off(scores: Mapping[str, Score], alone: Mapping[str, Score]) -> dict[str, JSON]:
    """Per metric, the share of clients that do worse, by however little, than `alone`; equal is not worse. Its interval
    is Wilson's (1927), for by resampling 0 of 20 would be none for certain."""
    found = {}
    for name in sorted({name for score in scores.values() for name in score}):
        sign = -1 if less_is_better(name) else 1
        both = [client for client in scores if name in scores[client] and name in alone.get(client, {})]
        if both:
            worse = sorted(client for client in both if sign * (scores[client][name] - alone[client][name]) < 0)
            found[name] = {"clients": len(both), "worse": worse, **_share(len(worse), len(both), "share")}
    return found


def groups_of(records: Sequence[Record], column: str) -> list[str]:
    """Each record's group, as text. Raises `DataError` for a record without one."""
    for record in records:
        if record.fields.get(column) is None:
            what = "is empty" if column in record.fields else "is not there"
            raise DataError(
                f"{record.key}, column {column!r}: {what}, and fairness.group goes by it; name it in data.keep and give "
                "every test record a value, or leave fairness.group out"
            )
    return [str(record.fields[column]) for record in records]


def over_groups(
    predicted: Mapping[str, list], clients: Mapping[str, Client], tasks: Mapping[str, Task], column: str, seed: int
) -> dict[str, JSON]:
    """Per task, what `group_gaps` says of all clients' test records, whoever holds them."""
    found = {}
    for name, task in tasks.items():
        own = [client for client in predicted if clients[client].task is task]
        records = [record for client in own for record in clients[client].test]
        answers, truths = [p for client in own for p in predicted[client]], task.targets(records)
        if not records or "accuracy" not in task.score(answers, truths):
            found[name] = {
                "groups": {},
                "said": "no test records whose answers are right or wrong: no figures by group",
            }
        else:
            found[name] = group_gaps(answers, truths, groups_of(records, column), seed)
    return found


def group_gaps(answers: Sequence, truths: Sequence, groups: Sequence[str], seed: int) -> dict[str, JSON]:
    """Accuracy per group with Wilson's interval, and the largest gap in each of the three senses above.

    Labels are taken one against the rest and the one with the largest gap is named (of a multiple choice that is a place,
    which says something only where all records have the same options). A group without a record that a rate is over (none
    that the label is true of) has no such rate and is left out of it. `few` names the groups of fewer than 10 records. A gap
    is None where no two groups can be compared.
    """
    group_N, right_N = np.array(groups), np.array([a == t for a, t in zip(answers, truths, strict=True)])
    whole_N = np.ones(len(groups), dtype=bool)
    sizes = {str(name): int((group_N == name).sum()) for name in np.unique(group_N)}
    found: dict[str, JSON] = {
        "groups": {
            name: {"records": size, **_share(int(right_N[group_N == name].sum()), size, "accuracy")}
            for name, size in sizes.items()
        },
        "few": [name for name, size in sizes.items() if size < FEW],
    }
    if len(sizes) < 2:
        return found | {"said": f"all {len(groups)} test records are of one group: nothing to compare"}
    given, odds = [], []
    for label in sorted({*answers, *truths}):
        given_N, true_N = np.array([a == label for a in answers]), np.array([t == label for t in truths])
        given.append(ConditionalRate(given_N, whole_N, {"label": label}))
        odds.append(ConditionalRate(given_N, true_N, {"label": label, "among": "those it is true of"}))
        odds.append(ConditionalRate(given_N, ~true_N, {"label": label, "among": "those it is not true of"}))
    return found | {
        "accuracy": _largest([ConditionalRate(right_N, whole_N, {})], group_N, seed),
        "demographic_parity": _largest(given, group_N, seed),
        "equalised_odds": _largest(odds, group_N, seed),
    }


def _largest(rates: Sequence[ConditionalRate], group_N: np.ndarray, seed: int) -> dict[str, JSON] | None:
    """The rate that differs most between two groups, its gap, and the interval of the difference of just these two. They
    were picked for differing most, so of many groups or labels the interval is too narrow, and leans upwards. None in its
    place where one of the two has fewer than 10 such records, or where resampling would change nothing."""
    from fairlearn.metrics import MetricFrame, selection_rate

    compared = []
    for rate in rates:
        hits, groups = rate.hit_N[rate.over_N], group_N[rate.over_N]
        if len(np.unique(groups)) > 1:
            frame: Any = MetricFrame(metrics=selection_rate, y_true=hits, y_pred=hits, sensitive_features=groups)
            compared.append((rate, sorted((float(share), str(name)) for name, share in frame.by_group.items())))
    if not compared:
        return None
    rate, shares = max(compared, key=lambda pair: pair[1][-1][0] - pair[1][0][0])
    (low, least), (high, most) = shares[0], shares[-1]
    samples = [rate.hit_N[rate.over_N & (group_N == name)].astype(float) for name in (most, least)]
    telling = min(map(len, samples)) >= FEW and any(0 < sample.mean() < 1 for sample in samples)
    return {
        "gap": high - low,
        **rate.of,
        "between": [most, least],
        "records": [len(sample) for sample in samples],
        "interval": _interval(samples, lambda a, b, axis: a.mean(axis) - b.mean(axis), seed) if telling else None,
    }


def _spread(values: Mapping[str, float], less: bool, seed: int) -> dict[str, JSON]:
    ranked = sorted(values, key=lambda client: values[client], reverse=less)
    worst_first = np.array([values[client] for client in ranked])
    tenth = -(-len(ranked) // 10)

    def worst_tenth(sample: np.ndarray, axis: int = -1) -> np.ndarray:
        ordered = np.sort(sample, axis)
        return (ordered[..., -tenth:] if less else ordered[..., :tenth]).mean(axis)

    return {
        "clients": len(ranked),
        "mean": float(worst_first.mean()),
        "mean_interval": _interval([worst_first], np.mean, seed),
        "deviation": float(worst_first.std(ddof=1)) if len(ranked) > 1 else None,
        "worst": float(worst_first[0]),
        "worst_client": ranked[0],
        "worst_tenth": float(worst_tenth(worst_first)),
        "worst_tenth_interval": _interval([worst_first], worst_tenth, seed),
        "best": float(worst_first[-1]),
    }


def _share(count: int, number: int, name: str) -> dict[str, JSON]:
    return {name: count / number, "interval": list(binomtest(count, number).proportion_ci(LEVEL, "wilson"))}


def _interval(samples: Sequence[np.ndarray], statistic: Callable[..., Any], seed: int) -> list[float] | None:
    """The percentile interval of a statistic, each sample resampled on its own; None where one has a single value."""
    if min(map(len, samples)) < 2:
        return None
    random = np.random.default_rng(derive_seed(seed, "resampled"))
    settings: Any = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "batch": 100}
    drawn = bootstrap(samples, statistic, rng=random, **settings).confidence_interval
    return [float(drawn.low), float(drawn.high)]
