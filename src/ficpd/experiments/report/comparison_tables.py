"""Makes the tables of a comparison from its `compare.json`."""

from pathlib import Path

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.overrides import DEFAULT, format_value
from ficpd.experiments.comparison.schema import (
    Against,
    CellResult,
    ComparisonResult,
    Condition,
    Front,
    FrontPoint,
    MethodTarget,
    Setting,
    Summary,
    Target,
)
from ficpd.experiments.report.blocks import Table
from ficpd.experiments.report.summary import NONE, format_bytes, format_number
from ficpd.experiments.report.table_formats import as_csv, as_latex, as_markdown, safe_csv
from ficpd.storage import atomic_write

SURE = 0.05
"""The threshold of corrected p-values."""
COSTS = {"bytes": "bytes of all clients, up and down", "epsilon": "ε", "queries": "queries"}

Placed = CellResult | Condition | Setting | Target
"""Results with a place in the grid."""


def overviews(found: ComparisonResult) -> list[Table]:
    """Makes one table for each setting: a row for each method, a column for each task."""
    return [_overview(found, setting) for setting in found.settings]


def results(found: ComparisonResult) -> list[Table]:
    """Makes one table for each condition: a row for each method."""
    return [_condition(found, condition) for condition in found.conditions]


def _overview(found: ComparisonResult, setting: Setting) -> Table:
    """Makes a table of means and intervals. With a single task it has no ranks."""
    tasks, reference, several = list(found.tasks), found.reference, len(found.tasks) > 1
    conditions = {c.task: c for c in found.conditions if same_setting(c, setting)}
    tasks = [task for task in tasks if task in conditions]
    heads = [
        "method", *(f"{_task(found, t) if several else metric_of(found, t).name}{metric_of(found, t).unit}" for t in tasks),
        *(["mean rank"] if several else []), f"minus {reference}", "p (Holm)", "bytes",
    ]  # fmt: skip
    lines = []
    for label in found.methods:
        own = [conditions[task].methods[label] for task in tasks]
        entry, one = setting.methods[label], metric_of(found, tasks[0])
        sent = [summary.bytes for summary in own if summary.bytes is not None]
        lines.append([
            label,
            *(_mean(summary, metric_of(found, task)) for task, summary in zip(tasks, own, strict=True)),
            *([NONE if entry.rank is None else f"{entry.rank:.2f}"] if several else []),
            _difference(entry.against, one),
            _p(entry.against and entry.against.p_holm),
            format_bytes(sum(sent) / len(sent) if sent else None),
        ])  # fmt: skip
    friedman = setting.friedman
    ranks = f" Friedman's test of the ranks over {len(setting.ranked)} tasks: p = {_p(friedman.p)}." if friedman else ""
    whose = "Own test, mean over clients" if found.figure == "own" else "Everyone's test"
    note = (
        f"{whose}, mean [95 % interval] over {len(found.seeds)} seeds; difference and p: paired t test over "
        f"seeds{' and tasks' * several}, Holm's correction over all rows. ▲: better than {reference}"
        f"{' on that task' * several} (p below {SURE:g}); ▼: worse.{ranks}"
    )
    last = setting is found.settings[-1]
    return Table(title(found, setting), heads, lines, _marked(found), note if last else "")


def _condition(found: ComparisonResult, condition: Condition) -> Table:
    metric, reference = metric_of(found, condition.task), found.reference
    counted = any(s.queries is not None for s in condition.methods.values())
    heads = [
        "method", f"{metric.name}{metric.unit} [95 %]", "everyone's test", "worst client", "ε", "seeds",
        f"minus {reference}", "p", "p (Holm)", "bytes up", "bytes down", *(["queries"] if counted else []), "seconds",
    ]  # fmt: skip
    lines = []
    for label, s in condition.methods.items():
        lines.append([
            label, format_number(s.mean, metric, s.interval),
            format_number(s.everyone, metric), format_number(s.worst, metric), _epsilon(found, condition, label),
            str(s.n), _difference(s.against, metric), _p(s.against and s.against.p), _p(s.against and s.against.p_holm),
            format_bytes(s.bytes_up), format_bytes(s.bytes_down),
            *([NONE if s.queries is None else f"{s.queries:,.0f}"] if counted else []),
            NONE if s.seconds is None else _few(s.seconds),
        ])  # fmt: skip
    whose = "own test" if found.figure == "own" else "everyone's test"
    why = sorted({s.against.why for s in condition.methods.values() if s.against and s.against.why})
    no_test = f" No p: {'; '.join(why)}." if why else ""
    note = f"{metric.name} is that of {whose}; difference and p in pairs of the same seed.{no_test}"
    return Table(title(found, condition), heads, lines, _marked(found), note, folded=True)


def targets(found: ComparisonResult) -> list[Table]:
    """Makes one table for each condition: the cost to reach each share of the centralised line."""
    costs = ["rounds", "bytes up", "bytes down", "queries", "seconds"]
    heads = ["method", "of centralized", "seeds that reach it", *costs]
    note = "Medians over seeds, where every seed reached it: the first evaluated round at or beyond the target."
    tables = []
    for at in found.conditions:
        metric = metric_of(found, at.task)
        lines = [
            [label, f"{100 * target.share:g} % ({metric.shown(target.target)})", f"{m.reached} of {len(m.of)}",
             *(_needed(m, cost.replace(" ", "_")) for cost in costs)]
            for target in found.targets
            if same_setting(target, at) and target.task == at.task and target.target is not None
            for label, m in target.methods.items()
            if m.of
        ]  # fmt: skip
        if lines:
            tables.append(
                Table(f"To reach the centralised line: {title(found, at)}", heads, lines, note=note, folded=True)
            )
    return tables


def _needed(method: MethodTarget, key: str) -> str:
    value: float | None = getattr(method, key)
    if value is None:
        return "not reached" if method.reached < len(method.of) else NONE
    return format_bytes(value) if key.startswith("bytes") else _few(value)


def fronts(found: ComparisonResult) -> list[Table]:
    """Makes one table for each task, partition and cost: all methods and budgets, by increasing cost."""
    tables = []
    for front in found.fronts:
        metric, how = metric_of(found, front.task), format_bytes if front.cost == "bytes" else _few
        lines = [
            [p.method, labels(p) or NONE, how(p.cost), metric.shown(p.value), "yes" if p.on_front else ""]
            for p in sorted(front.points, key=lambda p: (p.cost, p.method))
        ]
        heads = ["method", "at", COSTS[front.cost], f"{metric.name}{metric.unit}", "on the front"]
        tables.append(Table(front_title(found, front), heads, lines))
    return tables


# ---------------------------------------------------------------- words


def title(found: ComparisonResult, at: CellResult | Condition | Setting) -> str:
    """Joins the labels, without default labels and without a single task."""
    task = "" if isinstance(at, Setting) or (len(found.tasks) < 2 and labels(at)) else _task(found, at.task)
    return ", ".join(filter(None, [task, labels(at)])) or found.name


def front_title(found: ComparisonResult, front: Front) -> str:
    at = [_task(found, front.task), *([front.partition] if front.partition != DEFAULT else [])]
    return f"Against {COSTS[front.cost]}: {', '.join(at)}"


def same_setting(at: Placed, other: Placed) -> bool:
    return (at.partition, at.budget, at.sweep) == (other.partition, other.budget, other.sweep)


def cells_of(found: ComparisonResult, label: str, at: Condition) -> list[CellResult]:
    """Returns a method's cells of a condition, one for each seed."""
    return [c for c in found.cells if c.method == label and c.task == at.task and same_setting(c, at)]


def verdict(against: Against | None, metric: Metric) -> int:
    """Returns 1 if a method is significantly better than the reference, -1 if worse, else 0."""
    if not against or against.difference is None or against.p_holm is None or against.p_holm >= SURE:
        return 0
    return -1 if (against.difference > 0) == metric.less_is_better else 1


def _marked(found: ComparisonResult) -> frozenset[int]:
    return frozenset(i for i, label in enumerate(found.methods) if label == found.reference)


def labels(at: CellResult | Condition | Setting | FrontPoint) -> str:
    axes = [at.budget] if isinstance(at, FrontPoint) else [at.partition, at.budget]
    swept = [f"{path} = {format_value(value)}" for path, value in at.sweep.items()]
    return ", ".join([*(label for label in axes if label != DEFAULT), *swept])


def _task(found: ComparisonResult, label: str) -> str:
    return found.tasks[label].task if label == DEFAULT else label


def metric_of(found: ComparisonResult, task: str) -> Metric:
    return found.tasks[task].metric or Metric("figure")


def _mean(summary: Summary, metric: Metric) -> str:
    sign = {1: " ▲", -1: " ▼", 0: ""}[verdict(summary.against, metric)]
    return format_number(summary.mean, metric, summary.interval) + sign


def _difference(against: Against | None, metric: Metric) -> str:
    if against is None or against.difference is None:
        return NONE
    return "+" * (against.difference > 0) + format_number(against.difference, metric, against.interval)


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _few(number: float) -> str:
    """
    >>> _few(0.25), _few(2.5), _few(3), _few(1234.5)
    ('0.25', '2.5', '3', '1,234')
    """
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def _epsilon(found: ComparisonResult, condition: Condition, label: str) -> str:
    """Returns the largest epsilon of the finished cells, or the cells' status if none is finished."""
    own = cells_of(found, label, condition)
    done = [c for c in own if c.status == "done"]
    if not done:
        return ", ".join(sorted({c.status for c in own}))
    spent = [c.epsilon for c in done if c.epsilon is not None]
    return f"{max(spent):.2f}" if len(spent) == len(done) else NONE


# ---------------------------------------------------------------- files


def write_tables(found: ComparisonResult, out: Path) -> None:
    """Writes `compare.md` and `tables/`."""
    makers = {"overview": overviews, "results": results, "targets": targets, "fronts": fronts}
    tables = {name: make(found) for name, make in makers.items()}
    for name, own in tables.items():
        atomic_write(out / "tables" / f"{name}.csv", as_csv(own))
        atomic_write(out / "tables" / f"{name}.tex", "\n".join(map(as_latex, own)))
    atomic_write(out / "tables" / "cells.csv", cells_csv(found))
    methods = ", ".join(label for label in found.methods if label not in found.lines)
    counts = ", ".join(f"{number} {status}" for status, number in found.counts.items())
    whys = "".join(f"- {why}\n" for why in without_figure(found))
    head = (
        f"# {found.name}\n\n{methods}; lines: {', '.join(found.lines)}. Seeds {', '.join(map(str, found.seeds))}; "
        f"cells: {counts}. Made by ficpd {found.ficpd}; docs/compare.md says how to read it.\n\n"
    )
    if len(found.tasks) == 1:
        del tables["overview"]
    drawn = "\n".join(as_markdown(table, "## ") for own in tables.values() for table in own)
    atomic_write(out / "compare.md", head + drawn + (f"\n## Cells without a figure\n\n{whys}" if whys else ""))


def without_figure(found: ComparisonResult) -> list[str]:
    """Returns a sentence for each method and condition with a missing figure, with the first reason."""
    seeds: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    for cell in found.cells:
        if cell.reason:
            at = f"{cell.method} ({title(found, cell)})"
            seeds.setdefault(f"{at} {cell.status}", []).append(cell.seed)
            first.setdefault(f"{at} {cell.status}", cell.reason)
    return [f"{at}, seeds {', '.join(map(str, seeds[at]))}: {first[at]}" for at in seeds]


def cells_csv(found: ComparisonResult) -> str:
    """Returns the numbers of every cell as CSV."""
    import pandas as pd

    lines = []
    for cell in found.cells:
        row = cell.model_dump()
        figures, sent = row["figures"] or {}, row["bytes"] or {}
        lines.append(
            {key: row[key] for key in ("method", "task", "partition", "budget")}
            | {path: cell.sweep.get(path) for path in found.sweeps}
            | {key: row[key] for key in ("seed", "status")}
            | {key: figures.get(key) for key in ("own", "everyone", "worst")}
            | {"at_round": cell.at_round, "bytes_up": sent.get("up"), "bytes_down": sent.get("down")}
            | {key: row[key] for key in ("queries", "seconds", "epsilon", "key", "reason")}
        )
    return safe_csv(pd.DataFrame(lines, dtype=object))
