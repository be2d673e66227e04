"""Accuracy against what it costs: bytes, and privacy."""

import math
from collections.abc import Sequence
from typing import Any

from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Figure, Section, Table, Text, TwoColumn
from ficpd.experiments.report.load import Finished
from ficpd.experiments.report.overview import number
from ficpd.experiments.results import PrivacyReport


def costs(run: Finished) -> Section | None:
    if len(run.results) < 2:
        return None
    said = "Compared by the mean client's own test, which every method has."
    return Section(
        "costs", "What accuracy costs", [Text(said), TwoColumn([_against_bytes(run), _against_epsilon(run)])]
    )


def _scores(run: Finished) -> list[float]:
    return [run.main.scale * r.scores.per_client_mean[run.main.name] for r in run.results]


def _against_bytes(run: Finished) -> Figure:
    names, ys = [r.label for r in run.results], _scores(run)
    sent = [r.bytes.up_per_client_round for r in run.results]
    texts = [f"{number(y, run.main.digits)}{run.main.unit} for {b:,.0f} bytes" for y, b in zip(ys, sent, strict=True)]
    xs, axis = logarithmic(sent)
    y, marks = f"own test {run.main.name}{run.main.unit}", marks_of(run)
    return Figure(
        "against-bytes", "Against bytes", f"{y[0].upper()}{y[1:]}, by the bytes that a client sends up in a round.",
        f"Bubble chart of {y} against bytes up: " + "; ".join(f"{n} {t}" for n, t in zip(names, texts, strict=True)) + ".",
        figures.bubbles(names, xs, ys, sizes(run), texts, "bytes up, a client and round", y, marks, axis),
        Table(f"{y} and bytes", ["method", y, "bytes up, a client and round"],
              [[n, number(v, run.main.digits), f"{b:,.0f}"] for n, v, b in zip(names, ys, sent, strict=True)],
              frozenset({run.place})),
    )  # fmt: skip


def marks_of(run: Finished) -> list[tuple[int, int]]:
    places = [run.places[result.label] for result in run.results]
    return list(zip(places, places, strict=True))


def sizes(run: Finished) -> list[float]:
    """Larger what the page is about, so that one which lies on it is seen."""
    return [24 if i == run.place else 14 for i in range(len(run.results))]


def logarithmic(values: Sequence[float]) -> tuple[list[float], dict[str, Any]]:
    """Places on a logarithmic axis that has nought, too, a decade below the least value, and the axis."""
    positive = [value for value in values if value > 0] or [1.0]
    least, most = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    decades = range(least, max(most, least + 1) + 1)
    nought = [least - 1] if min(values) <= 0 else []
    ticks = [*nought, *decades]
    axis = {
        "tickvals": ticks, "ticktext": ["0" if t in nought else short(10**t) for t in ticks],
        "range": [ticks[0] - 0.5, ticks[-1] + 0.5],
    }  # fmt: skip
    return [math.log10(value) if value > 0 else nought[0] for value in values], axis


def short(value: float) -> str:
    """
    >>> short(100), short(10_000), short(1_000_000)
    ('100', '10 k', '1 M')
    """
    for step, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= step:
            return f"{value / step:g} {letter}"
    return f"{value:g}"


def _against_epsilon(run: Finished) -> Figure:
    names, ys = [r.label for r in run.results], _scores(run)
    kinds = [promise(r.privacy) for r in run.results]
    order = sorted(set(kinds), key=lambda kind: (kind[0], kind[1]))
    texts = [f"{number(y, run.main.digits)}{run.main.unit}, {kind[1]}" for y, kind in zip(ys, kinds, strict=True)]
    y = f"own test {run.main.name}{run.main.unit}"
    axis = {"tickvals": list(range(len(order))), "ticktext": [kind[1] for kind in order],
            "range": [-0.5, len(order) - 0.5]}  # fmt: skip
    xs, marks = [float(order.index(kind)) for kind in kinds], marks_of(run)
    return Figure(
        "against-epsilon", "Against privacy", f"{y[0].upper()}{y[1:]}, by what is promised, the strongest on the left.",
        f"Bubble chart of {y} against privacy: " + "; ".join(f"{n} {t}" for n, t in zip(names, texts, strict=True)) + ".",
        figures.bubbles(names, xs, ys, sizes(run), texts, "privacy", y, marks, axis),
        Table(f"{y} and privacy", ["method", y, "privacy"],
              [[n, number(v, run.main.digits), k[1]] for n, v, k in zip(names, ys, kinds, strict=True)],
              frozenset({run.place})),
    )  # fmt: skip


def promise(privacy: PrivacyReport) -> tuple[float, str]:
    """Where a guarantee stands among others, and its name on an axis."""
    if privacy.epsilon is None:
        return math.inf, "no privacy"
    if privacy.noise is None:
        return 0.0, "nothing leaves"
    return privacy.epsilon, f"ε = {privacy.epsilon:.2f}"
