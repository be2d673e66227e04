"""A comparison's grid: means with intervals and tests by task, every condition, and ranks over the tasks."""

from collections.abc import Sequence
from typing import Any

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.schema import Against, ComparisonResult, Condition, Setting
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Collapsible, Figure, Section, Table, Text
from ficpd.experiments.report.comparison import (
    GIVEN,
    MOST_FIGURES,
    condition_name,
    finished,
    mean_of,
    named,
    same_setting,
    verdict,
)
from ficpd.experiments.report.overview import number, paired
from ficpd.experiments.report.summary import format_interval

# ---------------------------------------------------------------- the grid


def grid(tree: ComparisonResult) -> Section:
    blocks: list[Block] = []
    known = finished(tree)
    for setting in tree.settings:
        own = [(at, metric) for at, metric in known if same_setting(at, setting)]
        if own:
            blocks.append(_matrix(tree, setting, own))
    blocks.append(Text(
        f"Mean over seeds and its interval. ▲: better than {tree.reference} beyond chance; ▼: worse; no sign: undecided."
    ))  # fmt: skip
    shown = known[:MOST_FIGURES]
    blocks += paired([_dots(tree, place, at, metric) for place, (at, metric) in enumerate(shown)])
    if len(known) > len(shown):
        blocks.append(Text(f"The first {len(shown)} of {len(known)} conditions are drawn; all are below."))
    blocks += [Collapsible(f"All figures: {condition_name(at)}", [_table(tree, at, metric)]) for at, metric in known]
    return Section("grid", "The grid", blocks)


def _matrix(tree: ComparisonResult, setting: Setting, own: Sequence[tuple[Condition, Metric]]) -> Table:
    """Methods by tasks, of one setting."""
    heads = ["method", *(_of_task(at.task, metric) for at, metric in own)]
    labels = [label for label in tree.methods if any(label in at.methods for at, _ in own)]

    def cell(label: str, at: Condition, metric: Metric) -> str:
        of = at.methods.get(label)
        return "–" if of is None else mean_of(of, metric) + {1: " ▲", -1: " ▼", 0: ""}[verdict(of.against, metric)]

    cells = [[label, *(cell(label, at, metric) for at, metric in own)] for label in labels]
    marked = frozenset({labels.index(tree.reference)} if tree.reference in labels else ())
    return Table(f"By task: {named(setting.partition, setting.budget, sweep=setting.sweep)}", heads, cells, marked)


def _of_task(task: str, metric: Metric) -> str:
    return f"{metric.name}{metric.unit}" if task == GIVEN else f"{task}: {metric.name}{metric.unit}"


def _dots(tree: ComparisonResult, place: int, at: Condition, metric: Metric) -> Figure:
    means = {n: of.mean for n in tree.methods if (of := at.methods.get(n)) and of.mean is not None}
    names, values = list(means), [metric.scale * mean for mean in means.values()]
    ends = [of and [metric.scale * v for v in of] for of in (at.methods[label].interval for label in names)]
    own = means.get(tree.reference)
    plot = figures.dots(
        names, {metric.name: values}, metric.name + metric.unit, ends, None if own is None else metric.scale * own,
        f".{metric.digits}f", tree.reference,
    )  # fmt: skip
    cells = [[label, mean_of(at.methods[label], metric)] for label in names]
    return Figure(
        f"condition-{place}", condition_name(at), f"Means over seeds with their intervals. Dashed: {tree.reference}.",
        f"Dot plot of {metric.name}{metric.unit}: " + "; ".join(" ".join(line) for line in cells) + ".",
        plot, Table(f"{metric.name}{metric.unit}: {condition_name(at)}", ["method", "mean"], cells),
    )  # fmt: skip


def _table(tree: ComparisonResult, at: Condition, metric: Metric) -> Table:
    heads = ["method", f"{metric.name}{metric.unit}", "seeds", f"less {tree.reference}", "p (Holm)",
             f"everyone's test{metric.unit}", f"worst client{metric.unit}", "bytes", "queries", "ε", "seconds"]  # fmt: skip
    cells = []
    for label in (label for label in tree.methods if label in at.methods):
        of = at.methods[label]
        both = [
            number(None if score is None else metric.scale * score, metric.digits) for score in (of.everyone, of.worst)
        ]
        cells.append([
            label, mean_of(of, metric), str(of.n), _difference(of.against, metric), _tested(of.against), *both,
            number(of.bytes, 0), number(of.queries, 0), number(of.epsilon, 2), number(of.seconds, 1),
        ])  # fmt: skip
    return Table(f"{condition_name(at)}: means over seeds", heads, cells)


def _difference(against: Against | None, metric: Metric) -> str:
    if not against or against.difference is None:
        return "–"
    ends = format_interval(against.interval, metric)
    return f"{metric.scale * against.difference:+.{metric.digits}f}{ends}"


def _tested(against: Against | None) -> str:
    if not against:
        return "–"
    return against.why or "–" if against.p_holm is None else f"{against.p_holm:.3g}"


# ---------------------------------------------------------------- ranks


def ranks(tree: ComparisonResult) -> Section | None:
    drawn: list[Figure] = []
    for place, setting in enumerate(tree.settings):
        ranked = {label: of.rank for label, of in setting.methods.items() if of.rank is not None}
        if len(ranked) < 2 or len(setting.ranked) < 2:
            continue
        order = sorted(ranked, key=lambda label, ranked=ranked: (ranked[label], label))
        where = named(setting.partition, setting.budget, sweep=setting.sweep)
        values = [ranked[label] for label in order]
        cells = [[label, f"{ranked[label]:.2f}", _tested(setting.methods[label].against)] for label in order]
        friedman = setting.friedman
        said = f"Over {len(setting.ranked)} tasks; 1 is the best." + (
            f" Friedman's test: {friedman.statistic:.2f}, p = {friedman.p:.3g}." if friedman else ""
        )
        if len(drawn) < MOST_FIGURES:
            drawn.append(Figure(
                f"rank-{place}", f"Mean rank: {where}", said,
                "Dot plot of mean ranks: " + "; ".join(f"{n} {v:.2f}" for n, v in zip(order, values, strict=True)) + ".",
                figures.dots(order, {"mean rank": values}, "mean rank", shown=".2f", marked=tree.reference),
                Table(f"Mean rank: {where}", ["method", "mean rank", "p (Holm), over seeds and tasks"], cells),
            ))  # fmt: skip
    return Section("ranks", "Ranks over the tasks", paired(drawn))


# ---------------------------------------------------------------- for other tools


def csv_lines(tree: ComparisonResult) -> list[dict[str, Any]]:
    """A line for each method of each condition, unrounded."""
    keys = ("n", "mean", "sd", "everyone", "worst", "bytes", "queries", "seconds", "epsilon")
    return [
        {"task": at.task, "partition": at.partition, "budget": at.budget, **at.sweep, "method": label,
         "metric": metric.name, **{key: getattr(of, key) for key in keys},
         "low": (of.interval or [None, None])[0], "high": (of.interval or [None, None])[1],
         "difference": of.against and of.against.difference, "p_holm": of.against and of.against.p_holm}
        for at, metric in finished(tree) for label, of in at.methods.items()
    ]  # fmt: skip


def matrices(tree: ComparisonResult) -> list[Table]:
    return [block for block in grid(tree).blocks if isinstance(block, Table)]
