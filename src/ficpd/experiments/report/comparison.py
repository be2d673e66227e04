"""Builds the page of a comparison from its `compare.json`."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.overrides import DEFAULT
from ficpd.experiments.comparison.schema import ComparisonResult, Condition, Front
from ficpd.experiments.report import comparison_tables as tables
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Code, Downloads, Figure, KeyValues, Section, Text
from ficpd.experiments.report.comparison_tables import SURE, cells_of, front_title, metric_of, title, verdict
from ficpd.experiments.report.overview import described, with_unit
from ficpd.library.card import join_names

MOST_FIGURES, MOST_NAMES = 12, 8
"""The maximum numbers of figures and of names in a headline. A large grid has more in its tables."""
EPSILON = "privacy.epsilon"


def places_of(tree: ComparisonResult) -> dict[str, int]:
    """Returns the index of each method's colour and symbol in all figures. The reference is the first."""
    others = [label for label in tree.methods if label != tree.reference]
    return {label: place for place, label in enumerate([tree.reference, *others])}


def finished(tree: ComparisonResult) -> list[tuple[Condition, Metric]]:
    """Returns the conditions with at least one finished cell, and the metric of their task."""
    found = [(at, tree.tasks[at.task].metric) for at in tree.conditions]
    return [(at, metric) for at, metric in found if metric and any(of.n for of in at.methods.values())]


# ---------------------------------------------------------------- the first screen


def headline(tree: ComparisonResult) -> str:
    """Returns a sentence on the reference against every other method and baseline, over all conditions."""
    reference, known = tree.reference, finished(tree)
    found: dict[str, list[int]] = {}
    for at, metric in known:
        for label, of in at.methods.items():
            if of.against and of.against.difference is not None:
                found.setdefault(label, []).append(verdict(of.against, metric))
    if not found:
        own = [(of.mean, m) for at, m in known if (of := at.methods.get(reference)) and of.mean is not None]
        means = ", ".join(f"{with_unit(metric, mean)} {metric.name}" for mean, metric in own[:MOST_FIGURES])
        return f"{tree.name}: {reference} {f'has {means}' if own else 'has not finished anything yet'}."

    def counted(sign: int) -> str:
        named = [f"{label} ({of.count(sign)} of {len(of)})" for label, of in found.items() if sign in of]
        return join_names(named, MOST_NAMES)

    parts = {"beats": -1, "is beaten by": 1, "is not significantly different from": 0}
    return (
        f"{reference} " + "; ".join(f"{word} {counted(n)}" for word, n in parts.items() if counted(n) != "none") + "."
    )


def summary_blocks(tree: ComparisonResult) -> list[Block]:
    counts = tree.counts
    axes = {axis: len(getattr(tree, axis)) for axis in ("tasks", "partitions", "budgets", "seeds")}
    sizes = {"methods": len(tree.methods) - len(tree.lines), **axes}
    pairs = [
        ("cells finished", f"{counts.get('done', 0):,} of {sum(counts.values()):,}"),
        *((axis if size != 1 else axis.removesuffix("s"), str(size)) for axis, size in sizes.items()),
    ]
    figure = {
        "own": "Each client's prompt on its own test records, the mean over clients",
        "everyone": "One prompt on everyone's test records",
    }[tree.figure]
    said = (
        f"{figure}. Paired t-tests over seeds against {tree.reference}, with Holm's correction. A method beats "
        f"another if p is below {SURE:g}. In brackets: the number of tables below with this result. Intervals at "
        f"{100 * tree.confidence:g} %."
    )
    blocks: list[Block] = [KeyValues(pairs, large=True), Text(said)]
    if counts.get("failed"):
        blocks.append(Text(f"Failed cells: {counts['failed']}; the reasons are below.", alarm=True))
    return blocks


# ---------------------------------------------------------------- the grid, ranks


def grid(tree: ComparisonResult) -> Section:
    drawn = [_dots(tree, place, at, metric) for place, (at, metric) in enumerate(finished(tree))]
    return Section("grid", "The grid", [*tables.overviews(tree), *_limited(drawn), *tables.results(tree)])


def _limited(found: Sequence[Figure]) -> list[Block]:
    more = f"The first {MOST_FIGURES} of {len(found)} figures are drawn; all numbers are in compare.json."
    return [*found[:MOST_FIGURES], *([Text(more)] if len(found) > MOST_FIGURES else [])]


def _scale(tree: ComparisonResult, metric: Metric, kind: str) -> list[float]:
    """Returns the ends of a common axis for all figures of a metric. kind: "means", "curves" or "clients"."""
    at = [condition for condition, of in finished(tree) if of.name == metric.name]
    if kind == "means":
        every = [of for condition in at for of in condition.methods.values()]
        return figures.extent([v for of in every for v in (of.mean, *(of.interval or ()))], metric)
    cells = [cell for cell in tree.cells if cell.status == "done" and any(cell.task == one.task for one in at)]
    if kind == "curves":
        return figures.extent([getattr(point, tree.figure) for cell in cells for point in cell.curve], metric)
    return figures.extent([value for cell in cells for value in cell.per_client.values()], metric)


def _dots(tree: ComparisonResult, place: int, at: Condition, metric: Metric) -> Figure:
    known = {label: of for label, of in at.methods.items() if of.mean is not None}
    own = known.get(tree.reference)
    said = f"Means over seeds with their intervals. Dashed: {tree.reference}."
    return figures.dots(
        f"condition-{place}", title(tree, at), said, list(known), {metric.name: [of.mean for of in known.values()]},
        metric, [of.interval for of in known.values()], own and own.mean, tree.reference, _scale(tree, metric, "means"),
    )  # fmt: skip


def by_epsilon(tree: ComparisonResult) -> Section:
    """Draws means over seeds by ε, if budgets or a sweep have different ε."""
    found: dict[str, tuple[Metric, dict[str, dict[float, float]]]] = {}
    for at, metric in finished(tree):
        rest = {path: value for path, value in at.sweep.items() if path != EPSILON}
        where = title(tree, at.model_copy(update={"budget": DEFAULT, "sweep": rest}))
        curves = found.setdefault(where, (metric, {}))[1]
        for label, of in at.methods.items():
            if of.mean is not None:
                curves.setdefault(label, {}).setdefault(_strength(tree, at), of.mean)
    drawn = [
        figures.lines(f"epsilon-{place}", where, "Means over seeds.", curves, metric, places_of(tree),
                      scale=_scale(tree, metric, "means"), x="ε")
        for place, (where, (metric, curves)) in enumerate(found.items())
        if len({x for curve in curves.values() for x in curve}) > 1
    ]  # fmt: skip
    return Section("privacy", "What privacy costs", _limited(drawn))


def _strength(tree: ComparisonResult, at: Condition) -> float:
    """Returns a condition's ε: the requested one, else the largest spent one; infinity without privacy."""
    asked = at.sweep.get(EPSILON) or tree.budgets[at.budget].epsilon
    spent = [of.epsilon for of in at.methods.values() if of.epsilon]
    return float(asked or max(spent, default=math.inf))


def ranks(tree: ComparisonResult) -> Section:
    drawn: list[Figure] = []
    for place, setting in enumerate(tree.settings):
        ranked = {label: of.rank for label, of in setting.methods.items() if of.rank is not None}
        if len(ranked) < 2 or len(setting.ranked) < 2:
            continue
        order = dict(sorted(ranked.items(), key=lambda pair: (pair[1], pair[0])))
        said = f"Over {len(setting.ranked)} tasks; 1 is the best."
        drawn.append(figures.dots(
            f"rank-{place}", f"Mean rank: {title(tree, setting)}", said, list(order), {"mean rank": list(order.values())},
            Metric("mean rank", digits=2), marked=tree.reference, scale=[0.5, len(tree.methods) + 0.5],
        ))  # fmt: skip
    return Section("ranks", "Ranks over the tasks", _limited(drawn))


# ---------------------------------------------------------------- costs, rounds, targets, clients


def fronts(tree: ComparisonResult) -> Section:
    found = [one for one in tree.fronts if one.cost != "epsilon" and len({p.cost for p in one.points}) > 1]
    return Section("fronts", "What accuracy costs", _limited([_front(tree, i, one) for i, one in enumerate(found)]))


def _front(tree: ComparisonResult, place: int, front: Front) -> Figure:
    points, places = front.points, places_of(tree)
    settings = list(dict.fromkeys((p.budget, str(p.sweep)) for p in points))
    return figures.front(
        f"front-{place}", front_title(tree, front),
        "Means over seeds. Colour: method; shape: budget. On the line: no other is better at that cost or less.",
        [", ".join(filter(None, [p.method, tables.labels(p)])) for p in points], [p.value for p in points],
        metric_of(tree, front.task), [p.cost for p in points], tables.COSTS[front.cost],
        [(places[p.method], settings.index((p.budget, str(p.sweep)))) for p in points],
        frozenset(i for i, p in enumerate(points) if p.on_front),
    )  # fmt: skip


def on_the_way(tree: ComparisonResult) -> Section:
    """Draws means over seeds by round, for the rounds that all finished seeds of a method have."""
    drawn: list[Figure] = []
    for place, (at, metric) in enumerate(finished(tree)):
        curves: dict[str, dict[float, float]] = {}
        for label in tree.methods:
            own = [cell for cell in cells_of(tree, label, at) if cell.status == "done"]
            seeds = [{p.round: v for p in cell.curve if (v := getattr(p, tree.figure)) is not None} for cell in own]
            rounds = sorted(set.intersection(*map(set, seeds))) if seeds else []
            if len(rounds) > 1:
                curves[label] = {r: fmean(seed[r] for seed in seeds) for r in rounds}
        if curves:
            scale = _scale(tree, metric, "curves")
            drawn.append(figures.lines(
                f"way-{place}", title(tree, at), "Means over seeds.", curves, metric, places_of(tree), scale=scale
            ))  # fmt: skip
    return Section("curves", "Round by round", _limited(drawn))


def targets(tree: ComparisonResult) -> Section:
    return Section("targets", "Reaching a target", tables.targets(tree))


def spreads(tree: ComparisonResult) -> Section:
    said = "Own test of each client of each finished seed. The stroke: the mean of the worst tenth."
    drawn: list[Figure] = []
    for place, (at, metric) in enumerate(finished(tree)):
        values = {
            label: {
                f"{name}, seed {cell.seed}": score
                for cell in cells_of(tree, label, at) if cell.status == "done"
                for name, score in cell.per_client.items() if score is not None
            }
            for label in tree.methods
        }  # fmt: skip
        values = {label: of for label, of in values.items() if of}
        if values:
            drawn.append(figures.spread(
                f"clients-{place}", title(tree, at), said, values, metric, places_of(tree), _scale(tree, metric, "clients")
            ))  # fmt: skip
    return Section("clients", "Client by client", _limited(drawn))


# ---------------------------------------------------------------- what was compared, and what went wrong


def failures(tree: ComparisonResult) -> Section:
    return Section("failures", "What is missing", [Text(why) for why in tables.without_figure(tree)])


def settings(tree: ComparisonResult, text: str) -> Section:
    def of(entries: Mapping[str, Mapping[str, Any]]) -> str:
        return "; ".join(f"{label} ({described(entry) or 'as given'})" for label, entry in entries.items())

    pairs = [
        ("name", tree.name),
        ("methods", "; ".join(f"{label} ({about.name})" for label, about in tree.methods.items())),
        ("tasks", "; ".join(f"{label} ({about.task} on {about.backbone})" for label, about in tree.tasks.items())),
        ("partitions", of(tree.partitions)),
        ("budgets", of({label: budget.model_dump(exclude_none=True) for label, budget in tree.budgets.items()})),
        ("sweeps", of({path: {"values": ", ".join(map(str, values))} for path, values in tree.sweeps.items()})),
        ("seeds", ", ".join(map(str, tree.seeds))),
        ("version", f"ficpd {tree.ficpd}"),
    ]
    blocks: list[Block] = [KeyValues([pair for pair in pairs if pair[1]])]
    if text:
        blocks.append(Code("The command that continues it", "ficpd compare compare.toml --out FOLDER", folded=False))
        blocks.append(Code("The comparison (compare.toml)", text))
    files = {"cells.csv": tables.cells_csv(tree), "compare.json": tree.model_dump_json(indent=1)}
    return Section("compared", "What was compared", [*blocks, Downloads(files)])
