"""The tables of a comparison, from `compare.json` alone."""

from collections.abc import Callable, Sequence
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
)
from ficpd.experiments.report.comparison import same_setting
from ficpd.experiments.report.summary import format_interval
from ficpd.experiments.report.table_formats import Table, as_csv, as_latex, as_markdown
from ficpd.storage import atomic_write

NONE = "–"


def overviews(found: ComparisonResult) -> list[Table]:
    """One for each setting: methods down, tasks across; the README's."""
    return [_overview(found, setting) for setting in found.settings]


def all_tables(found: ComparisonResult) -> list[Table]:
    several = len(found.tasks) > 1
    return [
        *(overviews(found) if several else []),
        *(_condition(found, condition) for condition in found.conditions),
        *_targets(found),
        *(_front(found, front) for front in found.fronts),
    ]


def _overview(found: ComparisonResult, setting: Setting) -> Table:
    """Mean and half of the interval's width; with one task no ranks."""
    tasks, reference, several = list(found.tasks), found.reference, len(found.tasks) > 1
    conditions = {c.task: c for c in found.conditions if same_setting(c, setting)}
    tasks = [task for task in tasks if task in conditions]
    heads = [
        "method", *(f"{_task(found, task)}{_metric(found, task).unit}" for task in tasks),
        *(["mean rank"] if several else []), f"minus {reference}", "p (Holm)", "bytes",
    ]  # fmt: skip
    lines = []
    for label in found.methods:
        own = [conditions[task].methods[label] for task in tasks]
        entry, one = setting.methods[label], _metric(found, tasks[0])
        sent = [summary.bytes for summary in own if summary.bytes is not None]
        lines.append([
            label,
            *(_plus_minus(summary, _metric(found, task)) for task, summary in zip(tasks, own, strict=True)),
            *([NONE if entry.rank is None else f"{entry.rank:.2f}"] if several else []),
            _difference(entry.against, one),
            _p(entry.against and entry.against.p_holm),
            _bytes(sum(sent) / len(sent) if sent else None),
        ])  # fmt: skip
    friedman = setting.friedman
    ranks = f" Friedman's test of the ranks over {len(setting.ranked)} tasks: p = {_p(friedman.p)}." if friedman else ""
    test = "t" if found.test == "t" else "Wilcoxon's"
    note = (
        f"{_figure(found)}, mean ± half the 95 % interval over {len(found.seeds)} seeds; difference and p: paired {test} "
        f"test over seeds{' and tasks' * several}, Holm's correction.{ranks}"
    )
    return Table("overview", _title(found, setting), heads, lines, note)


def _condition(found: ComparisonResult, condition: Condition) -> Table:
    metric, reference = _metric(found, condition.task), found.reference
    counted = any(s.queries is not None for s in condition.methods.values())
    heads = [
        "method", "ε", f"{metric.name}{metric.unit} [95 %]", "everyone's test", "worst client", "seeds",
        f"minus {reference}", "p", "p (Holm)", "bytes up", "bytes down", *(["queries"] if counted else []), "seconds",
    ]  # fmt: skip
    lines = []
    for label, s in condition.methods.items():
        mean = NONE if s.mean is None else metric.shown(s.mean) + format_interval(s.interval, metric)
        lines.append([
            label, _epsilon(found, condition, label), mean,
            *(NONE if score is None else metric.shown(score) for score in (s.everyone, s.worst)),
            str(s.n), _difference(s.against, metric), _p(s.against and s.against.p), _p(s.against and s.against.p_holm),
            _bytes(s.bytes_up), _bytes(s.bytes_down),
            *([NONE if s.queries is None else f"{s.queries:,.0f}"] if counted else []),
            NONE if s.seconds is None else _few(s.seconds),
        ])  # fmt: skip
    whose = "own test" if found.figure == "own" else "everyone's test"
    why = sorted({s.against.why for s in condition.methods.values() if s.against and s.against.why})
    no_test = f" No p: {'; '.join(why)}." if why else ""
    note = f"{metric.name} is that of {whose}; difference and p in pairs of the same seed.{no_test}"
    return Table("results", _title(found, condition), heads, lines, note)


def _targets(found: ComparisonResult) -> list[Table]:
    """One for each condition: what it takes to reach each share."""
    tables = []
    for condition in found.conditions:
        metric = _metric(found, condition.task)
        own = [one for one in found.targets if same_setting(one, condition) and one.task == condition.task]
        lines = [
            [label, f"{100 * target.share:g} % ({metric.shown(target.target)})", f"{m.reached} of {len(m.of)}",
             *(_needed(m, key) for key in ("rounds", "bytes_up", "bytes_down", "queries", "seconds"))]
            for target in own
            for label, m in target.methods.items()
            if target.target is not None and m.of
        ]  # fmt: skip
        if all(target.target is None for target in own):
            continue
        heads = [
            "method",
            "of centralized",
            "seeds that reach it",
            "rounds",
            "bytes up",
            "bytes down",
            "queries",
            "seconds",
        ]
        note = "Medians over seeds, where every seed reached it: the first evaluated round at or beyond the target."
        tables.append(
            Table("targets", f"To reach the centralised line: {_title(found, condition)}", heads, lines, note)
        )
    return tables


def _needed(method: MethodTarget, key: str) -> str:
    value: float | None = getattr(method, key)
    if value is None:
        return "not reached" if method.reached < len(method.of) else NONE
    return _bytes(value) if key.startswith("bytes") else _few(value)


def _front(found: ComparisonResult, front: Front) -> Table:
    metric = _metric(found, front.task)
    at = ", ".join([_task(found, front.task), *([front.partition] if front.partition != DEFAULT else [])])
    how: Callable[[float], str] = {"bytes": _bytes, "epsilon": "{:.3g}".format, "queries": "{:,.0f}".format}[front.cost]
    lines = [
        [p.method, _labels(p) or NONE, how(p.cost), metric.shown(p.value),
         "yes" if p.on_front else ""]
        for p in sorted(front.points, key=lambda p: (p.cost, p.method))
    ]  # fmt: skip
    heads = ["method", "at", front.cost.replace("epsilon", "ε"), f"{metric.name}{metric.unit}", "on the front"]
    return Table("fronts", f"Against {front.cost}: {at}", heads, lines)


# ---------------------------------------------------------------- words


def _title(found: ComparisonResult, at: CellResult | Condition | Setting) -> str:
    """Joins the labels, without those of an axis that has no entries."""
    task = "" if isinstance(at, Setting) else _task(found, at.task)
    return ", ".join(filter(None, [task, _labels(at)])) or found.name


def _labels(at: CellResult | Condition | Setting | FrontPoint) -> str:
    axes = [at.budget] if isinstance(at, FrontPoint) else [at.partition, at.budget]
    swept = [f"{path} = {format_value(value)}" for path, value in at.sweep.items()]
    return ", ".join([*(label for label in axes if label != DEFAULT), *swept])


def _task(found: ComparisonResult, label: str) -> str:
    return found.tasks[label].task if label == DEFAULT else label


def _metric(found: ComparisonResult, task: str) -> Metric:
    return found.tasks[task].metric or Metric("figure")


def _figure(found: ComparisonResult) -> str:
    return "Own test, mean over clients" if found.figure == "own" else "Everyone's test"


def _plus_minus(summary: Summary, metric: Metric) -> str:
    if summary.mean is None:
        return NONE
    ends = summary.interval
    return metric.shown(summary.mean) + (f" ± {metric.shown((ends[1] - ends[0]) / 2)}" if ends else "")


def _difference(against: Against | None, metric: Metric) -> str:
    if against is None or against.difference is None:
        return NONE
    sign = "+" if against.difference > 0 else ""
    return sign + metric.shown(against.difference) + format_interval(against.interval, metric)


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _bytes(count: float | None) -> str:
    """
    >>> _bytes(0), _bytes(950), _bytes(12_345), _bytes(3_400_000), _bytes(None)
    ('0 B', '950 B', '12.3 kB', '3.40 MB', '–')
    """
    if count is None:
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count >= 10 * size else f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _few(number: float) -> str:
    """
    >>> _few(0.25), _few(2.5), _few(3), _few(1234.5)
    ('0.25', '2.5', '3', '1,234')
    """
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def _epsilon(found: ComparisonResult, condition: Condition, label: str) -> str:
    """As its finished cells say."""
    own = [c for c in found.cells if c.method == label and same_setting(c, condition) and c.task == condition.task]
    done = [c for c in own if c.status == "done"]
    if not done:
        return ", ".join(sorted({c.status for c in own}))
    spent = [c.epsilon for c in done if c.epsilon is not None]
    return f"{max(spent):.2f}" if len(spent) == len(done) else NONE


# ---------------------------------------------------------------- files


def write_tables(found: ComparisonResult, out: Path) -> None:
    """`compare.md` and `tables/`."""
    tables = all_tables(found)
    atomic_write(out / "compare.md", page(found, tables))
    for name in ("overview", "results", "targets", "fronts"):
        own = [table for table in (overviews(found) if name == "overview" else tables) if table.name == name]
        atomic_write(out / "tables" / f"{name}.csv", as_csv(own))
        atomic_write(out / "tables" / f"{name}.tex", "\n".join(map(as_latex, own)))
    atomic_write(out / "tables" / "cells.csv", cells_csv(found))


def page(found: ComparisonResult, tables: Sequence[Table]) -> str:
    methods = ", ".join(label for label in found.methods if label not in found.lines)
    said = ", ".join(f"{number} {status}" for status, number in found.counts.items())
    whys = "".join(f"- {why}\n" for why in without_figure(found))
    return (
        f"# {found.name}\n\n{methods}; beside {', '.join(found.lines)}. Seeds {', '.join(map(str, found.seeds))}; "
        f"cells: {said}. Made by ficpd {found.ficpd}; docs/compare.md says how to read it.\n\n"
        + "\n".join(as_markdown(table, "## ") for table in tables)
        + (f"\n## Cells without a figure\n\n{whys}" if whys else "")
    )


def without_figure(found: ComparisonResult) -> list[str]:
    """One sentence for each method and condition that has cells with a reason, with the first of them: seeds fail alike."""
    seeds: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    for cell in found.cells:
        if cell.reason:
            at = f"{cell.method} ({_title(found, cell)})"
            seeds.setdefault(f"{at} {cell.status}", []).append(cell.seed)
            first.setdefault(f"{at} {cell.status}", cell.reason)
    return [f"{at}, seeds {', '.join(map(str, seeds[at]))}: {first[at]}" for at in seeds]


def cells_csv(found: ComparisonResult) -> str:
    """Every cell, in numbers."""
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
    return pd.DataFrame(lines, dtype=object).to_csv(index=False)
