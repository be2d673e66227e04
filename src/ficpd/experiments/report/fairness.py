"""How clients differ, method by method, in a comparison."""

from statistics import fmean

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison.schema import ComparisonResult, Condition
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Figure, Section, Table, Text
from ficpd.experiments.report.comparison import (
    MOST_FIGURES,
    condition_name,
    finished,
    places_of,
    same_setting,
)
from ficpd.experiments.report.overview import digits, number, paired

TENTH = 10


def spreads(tree: ComparisonResult) -> Section:
    known = [(place, at, metric) for place, (at, metric) in enumerate(finished(tree))]
    found = [figure for place, at, metric in known if (figure := _spread(tree, place, at, metric))]
    blocks: list[Block] = paired(found[:MOST_FIGURES])
    if found:
        blocks.insert(
            0, Text("Each dot is a client of one seed, by its own test. The stroke: the mean of the worst tenth.")
        )
    if len(found) > MOST_FIGURES:
        blocks.append(Text(f"The first {MOST_FIGURES} of {len(found)} conditions are drawn; all are in compare.json."))
    return Section("clients", "Client by client", blocks)


def _spread(tree: ComparisonResult, place: int, at: Condition, metric: Metric) -> Figure | None:
    """Of the clients of all finished seeds."""
    values: dict[str, dict[str, float]] = {label: {} for label in tree.methods}
    for cell in tree.cells:
        if cell.status == "done" and cell.task == at.task and same_setting(cell, at):
            scores = {name: score for name, score in cell.per_client.items() if score is not None}
            values[cell.method] |= {f"{n}, seed {cell.seed}": metric.scale * s for n, s in scores.items()}
    values = {label: of for label, of in values.items() if of}
    if not values:
        return None
    tails = {label: _worst_tenth(list(of.values()), metric) for label, of in values.items()}
    where, unit = condition_name(at), f"{metric.name}{metric.unit}"
    cells = [
        [label, str(len(of)), *(number(v, metric.digits) for v in (min(of.values()), tails[label], max(of.values())))]
        for label, of in values.items()
    ]
    ends = "; ".join(f"{label} from {low} to {high}" for label, _, low, _, high in cells)
    return Figure(
        f"clients-{place}", where, f"Own test {unit} of each client.", f"Box plot of clients by method. {ends}.",
        figures.spread(values, tails, unit, digits(metric), places_of(tree)),
        Table(f"{where}: own test {unit}", ["method", "clients", "lowest", "worst tenth, mean", "highest"], cells),
    )  # fmt: skip


def _worst_tenth(values: list[float], metric: Metric) -> float:
    ordered = sorted(values, reverse=metric.less_is_better)
    return fmean(ordered[: max(1, len(ordered) // TENTH)])
