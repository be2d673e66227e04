"""A comparison as a page, from its `compare.json`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.schema import (
    Against,
    CellResult,
    ComparisonResult,
    Condition,
    Setting,
    Summary,
    Sweep,
    Target,
)
from ficpd.experiments.report.blocks import Block, Code, KeyValues, Section, Table, Text
from ficpd.experiments.report.overview import format_gap, with_unit
from ficpd.experiments.report.summary import format_interval

GIVEN, AS_GIVEN = "given", "as given"
SURE = 0.05
"""Of a corrected p-value."""
MOST_FIGURES = 12
"""Of one kind: a large grid has its numbers in tables."""

Placed = CellResult | Condition | Setting | Target
"""What stands somewhere in the grid."""


# ---------------------------------------------------------------- words


def named(*labels: str, sweep: Sweep) -> str:
    """Says where in the grid something stands. What the file leaves open is not named.

    >>> named("abstracts", "given", sweep={"prompt.num_tokens": 5})
    'abstracts, prompt.num_tokens = 5'
    """
    words = [label for label in labels if label != GIVEN]
    return ", ".join([*words, *(f"{path} = {value}" for path, value in sweep.items())]) or AS_GIVEN


def condition_name(at: Condition | CellResult) -> str:
    return named(at.task, at.partition, at.budget, sweep=at.sweep)


def same_setting(at: Placed, other: Placed) -> bool:
    return (at.partition, at.budget, at.sweep) == (other.partition, other.budget, other.sweep)


def places_of(tree: ComparisonResult) -> dict[str, int]:
    """Which colour and symbol each method has in every figure: the reference the first."""
    others = [label for label in tree.methods if label != tree.reference]
    return {label: place for place, label in enumerate([tree.reference, *others])}


def finished(tree: ComparisonResult) -> list[tuple[Condition, Metric]]:
    """Returns the conditions of which anything is known, and the figure of their task."""
    found = [(at, tree.tasks[at.task].metric) for at in tree.conditions]
    return [(at, metric) for at, metric in found if metric and any(of.n for of in at.methods.values())]


def mean_of(summary: Summary, metric: Metric) -> str:
    if summary.mean is None:
        return "–"
    return metric.shown(summary.mean) + format_interval(summary.interval, metric)


def verdict(against: Against | None, metric: Metric) -> int:
    """Returns 1 where a method is better than the reference beyond chance, -1 where it is worse, 0 where that is open."""
    if not against or against.difference is None or against.p_holm is None or against.p_holm >= SURE:
        return 0
    return -1 if (against.difference > 0) == metric.less_is_better else 1


# ---------------------------------------------------------------- the first screen


def headline(tree: ComparisonResult) -> str:
    """How the reference does against all others, in one sentence."""
    reference, known = tree.reference, finished(tree)
    lines = {label for label, about in tree.methods.items() if about.line}
    pairs = [
        (of.against, of.against.difference, metric)
        for at, metric in known
        for label, of in at.methods.items()
        if label != reference and label not in lines and of.against and of.against.difference is not None
    ]
    if not pairs:
        return f"{tree.name}: {_alone(reference, known)}"
    tested = [(against, metric) for against, _, metric in pairs if against.p_holm is not None]
    if not tested:
        ahead = sum((difference < 0) != metric.less_is_better for _, difference, metric in pairs)
        return f"{reference} is ahead in {ahead} of {len(pairs)} comparisons with other methods; too few seeds to test any."
    if len(pairs) == 1:
        against, difference, metric = pairs[0]
        (other,) = [label for at, _ in known for label in at.methods if label not in lines | {reference}]
        sure = "beyond chance" if verdict(against, metric) else "which may be chance"
        return f"{reference} is {format_gap(metric, 0.0, difference)} {other}, {sure}."
    verdicts = [verdict(against, metric) for against, metric in tested]
    return (
        f"{reference} beats other methods in {verdicts.count(-1)} of {len(verdicts)} comparisons, is beaten in "
        f"{verdicts.count(1)}, and {verdicts.count(0)} are undecided."
    )


def _alone(reference: str, known: Sequence[tuple[Condition, Metric]]) -> str:
    """What can be said of a method that is compared to nobody, but for the line without a prompt."""
    means = [[of.mean if (of := at.methods.get(n)) else None for n in (reference, "zero_shot")] for at, _ in known]
    found = [(mean, zero, metric) for (mean, zero), (_, metric) in zip(means, known, strict=True) if mean is not None]
    if not found:
        return f"{reference} has not finished anything yet."
    mean, zero, metric = found[0]
    beside = "" if zero is None else f", {format_gap(metric, mean, zero)} no prompt at all"
    where = f" in the first of {len(found)} conditions" if len(found) > 1 else ""
    return f"{reference} has {with_unit(metric, mean)} {metric.name}{beside}{where}."


def summary_blocks(tree: ComparisonResult) -> list[Block]:
    counts = tree.counts
    numbers = {
        "method": sum(not about.line for about in tree.methods.values()),
        **{axis: len(getattr(tree, f"{axis}s")) for axis in ("task", "partition", "budget", "seed")},
    }
    pairs = [
        ("cells finished", f"{counts.get('done', 0):,} of {sum(counts.values()):,}"),
        *((axis if number == 1 else f"{axis}s", str(number)) for axis, number in numbers.items()),
    ]
    tested = {"t": "Paired t-tests", "wilcoxon": "Wilcoxon's signed-rank tests"}[tree.test]
    figure = {
        "own": "Each client's prompt on its own test records, the mean over clients",
        "everyone": "One prompt on everyone's test records",
    }[tree.figure]
    said = (
        f"{figure}. {tested} over seeds against {tree.reference}, corrected after Holm; beaten or "
        f"beating means p below {SURE:g}. Intervals at {100 * tree.confidence:g} %."
    )
    blocks: list[Block] = [KeyValues(pairs, large=True), Text(said)]
    if counts.get("failed"):
        failed = "1 cell" if counts["failed"] == 1 else f"{counts['failed']} cells"
        blocks.append(Text(f"{failed} failed; why is said below.", alarm=True))
    return blocks


# ---------------------------------------------------------------- what was compared, and what went wrong


def failures(tree: ComparisonResult) -> Section:
    lost = [cell for cell in tree.cells if cell.status in ("failed", "refused", "missing")]
    cells = [[cell.method, condition_name(cell), str(cell.seed), cell.status, cell.reason or "–"] for cell in lost]
    table = Table("Cells without a figure", ["method", "where", "seed", "what", "why"], cells)
    return Section("failures", "What is missing", [table] if cells else [])


def settings(tree: ComparisonResult, text: str) -> Section:
    pairs = [
        ("name", tree.name),
        ("methods", "; ".join(f"{label} ({about.name})" for label, about in tree.methods.items())),
        (
            "tasks",
            "; ".join(f"{label} ({about.task} on {about.backbone})" for label, about in tree.tasks.items()),
        ),
        ("partitions", _described(tree.partitions)),
        ("budgets", _described({label: budget.model_dump() for label, budget in tree.budgets.items()})),
        ("sweeps", _described({path: {"values": ", ".join(map(str, of))} for path, of in tree.sweeps.items()})),
        ("seeds", ", ".join(map(str, tree.seeds))),
        ("version", f"ficpd {tree.ficpd}"),
    ]
    code: list[Block] = [Code("The comparison (compare.toml)", text)] if text else []
    return Section("compared", "What was compared", [KeyValues([pair for pair in pairs if pair[1]]), *code])


def _described(entries: Mapping[str, Mapping[str, Any]]) -> str:
    def about(entry: Mapping[str, Any]) -> Iterable[str]:
        return (
            f"{key} {value}" for key, value in entry.items() if value is not None and not isinstance(value, dict | list)
        )

    return "; ".join(f"{label} ({', '.join(about(entry)) or 'as given'})" for label, entry in entries.items())
