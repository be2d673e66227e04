"""Measures fairness over clients, and over the groups of a public column. For simulations.

Three gaps between groups are measured. *Accuracy*: the share of correct answers. *Demographic parity*: the share of
records that get an answer, correct or not. *Equalised odds* (Hardt, Price, Srebro, NeurIPS 2016, arXiv 1610.02413): the
share that gets an answer, among the records with that label and among the others.

If base rates differ between groups, a perfect classifier violates demographic parity but has equalised odds. So a
demographic parity gap alone is not evidence of unfairness.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap

from ficpd.errors import DataError, needs
from ficpd.evaluation.metrics import less_is_better
from ficpd.federation.client import Client
from ficpd.interfaces import Task
from ficpd.rng import derive_seed
from ficpd.types import JSON, Record, Score

FEW = 10
"""The minimum number of records for a bootstrap interval."""
LEVEL = 0.95
RESAMPLES = 2000


class ConditionalRate(NamedTuple):
    """The rate of `hit_N` among the records `over_N` (booleans); `of` describes it."""

    hit_N: np.ndarray
    over_N: np.ndarray
    of: Mapping[str, JSON]


def over_clients(scores: Mapping[str, Score], seed: int) -> dict[str, JSON]:
    """Returns per metric, over clients: mean, deviation (n-1), best, worst, and the mean of the worst tenth.

    The worst tenth is rounded up to whole clients. The worst value of an error is the highest. Intervals (95 %, 2,000
    resamples of the clients) are too narrow for few clients: that of the worst tenth ends at the worst client. One client
    has no deviation and no interval (None).
    """
    names = sorted({name for score in scores.values() for name in score})
    return {
        name: _spread({c: score[name] for c, score in scores.items() if name in score}, less_is_better(name), seed)
        for name in names
    }


def share_worse_off(scores: Mapping[str, Score], alone: Mapping[str, Score]) -> dict[str, JSON]:
    """Returns per metric the share of clients with a worse score than `alone`, with Wilson's interval (1927).

    A bootstrap interval would have length 0 for a share of 0.
    """
    found = {}
    for name in sorted({name for score in scores.values() for name in score}):
        sign = -1 if less_is_better(name) else 1
        both = [client for client in scores if name in scores[client] and name in alone.get(client, {})]
        if both:
            worse = sorted(client for client in both if sign * (scores[client][name] - alone[client][name]) < 0)
            found[name] = {"clients": len(both), "worse": worse, **_share(len(worse), len(both), "share")}
    return found


def groups_of(records: Sequence[Record], column: str) -> list[str]:
    """Returns each record's group as text. Raises `DataError` for a record without one."""
    for record in records:
        if record.fields.get(column) is None:
            state = "empty" if column in record.fields else "missing"
            raise DataError(
                f"{record.key}, column {column!r}: {state}; fairness.group needs a value in every test record. Name the "
                "column in data.keep, or leave fairness.group out"
            )
    return [str(record.fields[column]) for record in records]


def over_groups(
    predicted: Mapping[str, list], clients: Mapping[str, Client], tasks: Mapping[str, Task], column: str, seed: int
) -> dict[str, JSON]:
    """Returns, per task, the `group_gaps` of all clients' test records; no figures for a task without accuracy."""
    found = {}
    for name, task in tasks.items():
        own = [client for client in predicted if clients[client].task is task]
        records = [record for client in own for record in clients[client].test]
        answers, truths = [p for client in own for p in predicted[client]], task.targets(records)
        if not records or "accuracy" not in task.score(answers, truths):
            found[name] = {"groups": {}, "said": "no test records with an accuracy: no figures by group"}
        else:
            found[name] = group_gaps(answers, truths, groups_of(records, column), seed)
    return found


def group_gaps(answers: Sequence, truths: Sequence, groups: Sequence[str], seed: int) -> dict[str, JSON]:
    """Returns the accuracy per group with Wilson's interval, and the largest gap of each of the three kinds.

    Labels are compared one against the rest, and the label with the largest gap is named. For multiple choice a label is a
    position, which needs equal options in all records. A rate leaves out groups without records for it. `few` names the
    groups of fewer than 10 records. A gap is None if no two groups can be compared.
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
        return found | {"said": f"all {len(groups)} test records are in one group: no comparison"}
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


def fairlearn() -> Any:
    """Returns the module `fairlearn.metrics`. Raises `PackageError` if it is missing."""
    with needs("fairness.group", "fairness"):
        return import_module("fairlearn.metrics")


def _largest(rates: Sequence[ConditionalRate], group_N: np.ndarray, seed: int) -> dict[str, JSON] | None:
    """Returns the rate with the largest gap between two groups, the gap, and its interval.

    The interval ignores the choice among rates and groups, so with many it is too narrow and biased upwards. It is None if
    a group has fewer than 10 records, or if resampling cannot change the rates.
    """
    metrics, compared = fairlearn(), []
    for rate in rates:
        hits, groups = rate.hit_N[rate.over_N], group_N[rate.over_N]
        if len(np.unique(groups)) > 1:
            frame = metrics.MetricFrame(
                metrics=metrics.selection_rate, y_true=hits, y_pred=hits, sensitive_features=groups
            )
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
    """Returns the bootstrap percentile interval of a statistic; None if a sample has fewer than two values."""
    if min(map(len, samples)) < 2:
        return None
    random = np.random.default_rng(derive_seed(seed, "resampled"))
    settings: Any = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "batch": 100}
    drawn = bootstrap(samples, statistic, rng=random, **settings).confidence_interval
    return [float(drawn.low), float(drawn.high)]
