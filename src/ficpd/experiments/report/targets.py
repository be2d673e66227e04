"""What a comparison says of costs: Pareto fronts, curves over the rounds, and what it takes to reach a target."""

from collections.abc import Sequence
from statistics import fmean

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.schema import ComparisonResult, Condition, Front
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Collapsible, Figure, Section, Table, Text
from ficpd.experiments.report.comparison import (
    AS_GIVEN,
    MOST_FIGURES,
    condition_name,
    finished,
    named,
    places_of,
    same_setting,
)
from ficpd.experiments.report.costs import logarithmic
from ficpd.experiments.report.overview import number, of_curves, paired

COSTS = {"bytes": "bytes of all clients, up and down", "epsilon": "ε", "queries": "queries"}


# ---------------------------------------------------------------- fronts


def fronts(tree: ComparisonResult) -> Section:
    found = [front for front in tree.fronts if len({p.cost for p in front.points}) > 1]
    drawn = [_front(tree, place, front) for place, front in enumerate(found[:MOST_FIGURES])]
    blocks: list[Block] = paired(drawn)
    if drawn:
        blocks.insert(0, Text("Means over seeds. On the line: nobody is better at that cost or less."))
    if len(found) > len(drawn):
        blocks.append(Text(f"The first {len(drawn)} of {len(found)} are drawn; all are in compare.json."))
    return Section("fronts", "What accuracy costs", blocks)


def _front(tree: ComparisonResult, place: int, front: Front) -> Figure:
    metric = tree.tasks[front.task].metric or Metric("figure")
    points, of_methods = front.points, places_of(tree)
    settings = list(dict.fromkeys((p.budget, str(p.sweep)) for p in points))
    marks = [(of_methods[p.method], settings.index((p.budget, str(p.sweep)))) for p in points]
    ys = [metric.scale * p.value for p in points]
    names = [named(p.method, p.budget, sweep=p.sweep) for p in points]
    against = f"against {front.cost.replace('epsilon', 'ε')}"
    where = named(front.task, front.partition, sweep={})
    title = against.capitalize() if where == AS_GIVEN else f"{where}: {against}"
    x, y = COSTS[front.cost], f"{metric.name}{metric.unit}"
    shown = [f"{cost(p.cost)}, {v:.{metric.digits}f}" for p, v in zip(points, ys, strict=True)]
    xs, axis = logarithmic([p.cost for p in points])
    plot = figures.bubbles(names, xs, ys, [18 if p.on_front else 11 for p in points], shown, x, y, marks, axis)
    on = sorted((a, b) for a, b, p in zip(xs, ys, points, strict=True) if p.on_front)
    plot.add_scatter(
        mode="lines", x=[a for a, _ in on], y=[b for _, b in on], hoverinfo="skip", showlegend=False,
        line={"color": figures.GREY, "width": 1.5, "shape": "hv"},
    )  # fmt: skip
    cells = [
        [name, f"{v:.{metric.digits}f}", cost(p.cost), "yes" if p.on_front else "no"]
        for name, v, p in zip(names, ys, points, strict=True)
    ]
    best = ", ".join(name for name, p in zip(names, points, strict=True) if p.on_front)
    return Figure(
        f"front-{place}", title, f"{y[0].upper()}{y[1:]} against {x}. A method has its colour, a budget its shape.",
        f"Scatter plot of {y} against {x}. On the front: {best}.",
        plot, Table(f"{title}: {y}, {x}", ["method", y, x, "on the front"], cells),
    )  # fmt: skip


def cost(value: float) -> str:
    """
    >>> cost(1234567.0), cost(1.98765)
    ('1,234,567', '1.99')
    """
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


# ---------------------------------------------------------------- on the way: curves and targets


def on_the_way(tree: ComparisonResult) -> Section:
    known = finished(tree)
    found = [figure for place, (at, metric) in enumerate(known) for figure in _curves(tree, place, at, metric)]
    blocks: list[Block] = paired(found[:MOST_FIGURES])
    if len(found) > MOST_FIGURES:
        blocks.append(Text(f"The first {MOST_FIGURES} of {len(found)} conditions are drawn; all are in compare.json."))
    return Section("curves", "Round by round", blocks)


def _curves(tree: ComparisonResult, place: int, at: Condition, metric: Metric) -> list[Figure]:
    """Means over seeds, of the rounds that every finished seed of a method has."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for label in tree.methods:
        seeds = [
            {point.round: getattr(point, tree.figure) for point in cell.curve}
            for cell in tree.cells
            if cell.status == "done" and cell.method == label and same_setting(cell, at) and cell.task == at.task
        ]
        rounds = sorted(set.intersection(*map(set, seeds))) if seeds else []
        rounds = [r for r in rounds if all(seed[r] is not None for seed in seeds)]
        if len(rounds) > 1:
            curves[label] = rounds, [metric.scale * fmean(seed[r] for seed in seeds) for r in rounds]
    if not curves:
        return []
    where = condition_name(at)
    ends = "; ".join(f"{name} ends at {ys[-1]:.{metric.digits}f}" for name, (_, ys) in curves.items())
    return [
        Figure(
            f"way-{place}", where, f"{metric.name.capitalize()}{metric.unit} by round, mean over seeds.",
            f"Line chart of {metric.name} by round. {ends}.",
            figures.lines(curves, metric.name + metric.unit, None, places_of(tree)),
            of_curves(f"{metric.name}{metric.unit} by round: {where}", curves, metric.digits),
        )
    ]  # fmt: skip


def targets(tree: ComparisonResult) -> Section:
    blocks: list[Block] = []
    for at, metric in finished(tree):
        own = [t for t in tree.targets if t.task == at.task and same_setting(t, at)]
        cells = [
            [f"{label}, {100 * t.share:g} %", number(metric.scale * t.target, metric.digits),
             f"{of.reached} of {len(of.of)}", number(of.rounds, 0), number(of.bytes, 0),
             number(of.queries, 0), number(of.seconds, 1)]
            for label in tree.methods for t in own if t.target is not None and (of := t.methods.get(label))
        ]  # fmt: skip
        if cells:
            heads = ["method and share", f"{metric.name}{metric.unit} to reach", "seeds that reached it", "rounds", "bytes",
                     "queries", "seconds"]  # fmt: skip
            blocks.append(
                Collapsible(condition_name(at), [Table(f"{condition_name(at)}: medians over seeds", heads, cells)])
            )
    if blocks:
        blocks.insert(
            0, Text("What it takes to come within a share of the centralised line; a dash where not every seed did.")
        )
    return Section("targets", "Reaching a target", blocks)
