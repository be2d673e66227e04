"""Who is served how well: each client, together and alone, each level of the prompts, and the groups of a public column."""

from ficpd.evaluation.evaluate import client_mean
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Figure, Section, Table, Text
from ficpd.experiments.report.load import Finished
from ficpd.experiments.report.overview import digits, number
from ficpd.experiments.report.summary import PERCENT, format_interval, format_score
from ficpd.experiments.results import ClientSpread, Gap, RunResult

GAPS = {"accuracy": "accuracy", "demographic_parity": "demographic parity", "equalised_odds": "equalised odds"}
MOST = 200
"""Clients that a table of numbers lists one by one."""


def clients(run: Finished) -> Section | None:
    if run.own.metrics is None:
        return _shared_scores(run.own)
    blocks = [_said(run), _spread(run), _worst_tenths(run), *_against_alone(run)]
    return Section("clients", "Client by client", [block for block in blocks if block])


def _shared_scores(own: RunResult) -> Section | None:
    """Shows the scores that sites share."""
    kinds = sorted({kind for scores in own.shared_scores.values() for kind in scores})
    cells = []
    for kind in kinds:
        scores = {site: of[kind] for site, of in own.shared_scores.items() if kind in of}
        mean = ", ".join(f"{metric} {value:.3f}" for metric, value in client_mean(scores).items())
        cells.append([kind, str(len(scores)), mean])
    table = Table("Scores that sites chose to share", ["prompt", "sites", "mean over them"], cells)
    return Section("clients", "Shared scores", [table]) if cells else None


def own_scores(result: RunResult, main: Metric) -> dict[str, float]:
    """By client, as shown to a person."""
    return {
        name: main.scale * score[main.name] for name, score in result.scores.per_client.items() if main.name in score
    }


def _said(run: Finished) -> Text | None:
    main, found = run.main, _spread_of(run.own, run.main)
    if run.own.fairness is None or found is None:
        return None
    worse = run.own.fairness.worse_off_than_local.get(main.name)
    few = " Of so few clients the intervals are too narrow." if 1 < found.clients < 10 else ""
    alone = (
        f" Worse off than alone: {len(worse.worse)} of {worse.clients}, {PERCENT.shown(worse.share)} %"
        f"{format_interval(worse.interval, PERCENT)}." if worse else ""
    )  # fmt: skip
    mean = main.shown(found.mean) + format_interval(found.mean_interval, main)
    tail = main.shown(found.worst_tenth) + format_interval(found.worst_tenth_interval, main)
    return Text(
        f"{run.own.label}, own test {main.name}{main.unit} of {found.clients} clients: mean {mean}, worst "
        f"{main.shown(found.worst)} ({found.worst_client}), worst tenth {tail}, best {main.shown(found.best)}. "
        f"In brackets: 95 % intervals.{few}{alone}"
    )


def _spread_of(result: RunResult, main: Metric) -> ClientSpread | None:
    return result.fairness.clients.get(main.name) if result.fairness else None


def _spread(run: Finished) -> Figure:
    main = run.main
    values = {result.label: own_scores(result, main) for result in run.results}
    tails = {r.label: main.scale * found.worst_tenth for r in run.results if (found := _spread_of(r, main))}
    own = values[run.own.label]
    ranked = sorted(own, key=lambda name: own[name])
    cells = [[name, *(number(of.get(name), main.digits) for of in values.values())] for name in ranked[:MOST]]
    more = f" (the {MOST} lowest of {len(ranked)})" if len(ranked) > MOST else ""
    said = f"Each dot is a client's own test {main.name}{main.unit}; the box holds the middle half."
    return Figure(
        "spread", "How clients differ", said + (" The upright stroke is the mean of the worst tenth." if tails else ""),
        f"Box plot of {len(own)} clients by method. {run.own.label}: from {number(own[ranked[0]], main.digits)} "
        f"({ranked[0]}) to {number(own[ranked[-1]], main.digits)} ({ranked[-1]}).",
        figures.spread(values, tails, f"{main.name}{main.unit}", digits(main), run.places),
        Table(f"own test {main.name}{main.unit} by client{more}", ["client", *values], cells),
    )  # fmt: skip


def _worst_tenths(run: Finished) -> Table | None:
    main, cells, marked = run.main, [], set()
    for result in run.results:
        found = _spread_of(result, main)
        if found:
            marked |= {len(cells)} if result.label == run.own.label else set()
            cells.append([
                result.label, main.shown(found.mean) + format_interval(found.mean_interval, main),
                main.shown(found.worst_tenth) + format_interval(found.worst_tenth_interval, main),
                main.shown(found.worst), found.worst_client, main.shown(found.best),
                "–" if found.deviation is None else main.shown(found.deviation),
            ])  # fmt: skip
    heads = ["method", "mean", "worst tenth", "worst", "who", "best", "standard deviation"]
    return (
        Table(f"Clients' own test {main.name}{main.unit}, 95 % intervals", heads, cells, frozenset(marked))
        if cells
        else None
    )


def _against_alone(run: Finished) -> list[Block]:
    if not run.alone or run.own.method == "local":
        return []
    main = run.main
    xs, ys = own_scores(run.alone, main), own_scores(run.own, main)
    both = sorted(name for name in ys if name in xs)
    if len(both) < 2:
        return []
    sign = -1 if main.less_is_better else 1
    better, worse = (sum(s * sign * (ys[n] - xs[n]) > 0 for n in both) for s in (1, -1))
    where = "below" if main.less_is_better else "above"
    return [
        Figure(
            "alone", "Together or alone",
            f"Each dot is a client. Those {where} the line are better off in the federation than tuning a prompt alone: "
            f"{better} of {len(both)}; {worse} are worse off, the rest as well off.",
            f"Scatter plot of {len(both)} clients' own test {main.name}, alone against together: {better} better off "
            f"together, {worse} worse off.",
            figures.against(xs, ys, f"alone{main.unit}", f"{run.own.label}{main.unit}", digits(main)),
            Table(f"own test {main.name}{main.unit}, alone and together", ["client", "alone", run.own.label],
                  [[n, number(xs[n], main.digits), number(ys[n], main.digits)] for n in both[:MOST]]),
        )
    ]  # fmt: skip


# ---------------------------------------------------------------- levels of a prompt, groups of people


def levels(run: Finished) -> Section | None:
    """What each level of the prompts is worth at home and elsewhere, and to clients that took no part."""
    found, unseen = run.own.personalization or {}, run.own.unseen_clients
    if len(found) < 2 and not unseen:
        return None
    main, clusters = run.main, run.own.clusters
    blocks: list[Block] = []
    if len(found) > 1:
        elsewhere = "other clusters" if clusters and clusters.number > 1 else "other clients"
        cells = [[name, format_score(of.own, main), format_score(of.others, main)] for name, of in found.items()]
        heads = ["prompt", "own test", f"test of {elsewhere}"]
        blocks.append(Table(f"Mean client {main.name}{main.unit}, by level of the prompt", heads, cells))
    if unseen:
        blocks.append(Text(
            f"Clients that took no part: {format_score(unseen.global_prompt, main)}{main.unit} with the global prompt, "
            f"{format_score(unseen.assigned, main)}{main.unit} with the one that their card gets them."
        ))  # fmt: skip
    return Section("levels", "Shared and personal prompts", blocks)


def groups(run: Finished) -> Section | None:
    fairness = run.own.fairness
    if fairness is None or fairness.column is None:
        return None
    blocks: list[Block] = [Text(
        f"The largest gaps between groups by {fairness.column}, in points; own prompts, own test records. Where base "
        "rates differ, demographic parity contradicts accuracy: read it beside equalised odds. An interval is of the two "
        "groups named. They were picked for differing most, so of many groups or answers it is too narrow."
    )]  # fmt: skip
    for task, found in fairness.groups.items():
        cells = [
            [f"{name}{' (few)' if name in found.few else ''}", f"{one.records:,}",
             f"{PERCENT.shown(one.accuracy)}{format_interval(one.interval, PERCENT)}"]
            for name, one in found.groups.items()
        ]  # fmt: skip
        if cells:
            blocks.append(
                Table(
                    f"{task}: accuracy by {fairness.column}",
                    [fairness.column, "test records", "accuracy %"],
                    cells,
                )
            )
        if found.said:
            blocks.append(Text(found.said.capitalize() + "."))
        else:
            gaps = [[gap, _format_gap(getattr(found, key))] for key, gap in GAPS.items()]
            blocks.append(Table(f"{task}: the largest gaps", ["gap", "how large, and between whom"], gaps))
    return Section("groups", "Groups of people", blocks)


def _format_gap(gap: Gap | None) -> str:
    """Describes a gap between two groups, with its interval or the reason why there is none."""
    if gap is None:
        return "no two groups to compare"
    what = f"; answer {gap.label!r}" + (f" among {gap.among}" if gap.among else "") if gap.label is not None else ""
    most, least = gap.between
    interval = format_interval(gap.interval, PERCENT) or " (no interval: too few records, or all of them alike)"
    records = " and ".join(map(str, gap.records))
    return f"{PERCENT.shown(gap.gap)}{interval}, {most} over {least} ({records} records{what})"
