"""Shows the scores by client, together and alone, by level of the prompts, and by group."""

from ficpd.evaluation.evaluate import client_mean
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Section, Table, Text
from ficpd.experiments.report.summary import PERCENT, format_interval, format_number, format_score
from ficpd.experiments.results import Gap, RunResult

GAPS = {"accuracy": "accuracy", "demographic_parity": "demographic parity", "equalised_odds": "equalised odds"}


def clients(run: FinishedRun) -> Section | None:
    if run.result.metrics is None:
        return _shared_scores(run.result)
    values = {r.label: own_scores(r, run.main) for r in run.results}
    said = "Each dot is a client's own test; the box holds the middle half. The stroke: the mean of the worst tenth."
    drawn = figures.spread("spread", "How clients differ", said, values, run.main, run.places)
    return Section("clients", "Client by client", [drawn, *_against_alone(run), *_worst_tenths(run)])


def _shared_scores(own: RunResult) -> Section | None:
    """Shows the scores that sites shared."""
    kinds = sorted({kind for scores in own.shared_scores.values() for kind in scores})
    cells = []
    for kind in kinds:
        scores = {site: of[kind] for site, of in own.shared_scores.items() if kind in of}
        mean = ", ".join(f"{metric} {value:.3f}" for metric, value in client_mean(scores).items())
        cells.append([kind, str(len(scores)), mean])
    table = Table("Scores that sites chose to share", ["prompt", "sites", "mean over them"], cells)
    return Section("clients", "Shared scores", [table]) if cells else None


def own_scores(result: RunResult, main: Metric) -> dict[str, float]:
    return {name: score[main.name] for name, score in result.scores.per_client.items() if main.name in score}


def _worst_tenths(run: FinishedRun) -> list[Table]:
    main, cells, marked, note = run.main, [], set(), "In brackets: 95 % intervals."
    for result in run.results:
        found = result.fairness.clients.get(main.name) if result.fairness else None
        if not found:
            continue
        if result.label == run.result.label:
            marked.add(len(cells))
            note += " With so few clients they are too narrow." if 1 < found.clients < 10 else ""
        cells.append([
            result.label, format_number(found.mean, main, found.mean_interval),
            format_number(found.worst_tenth, main, found.worst_tenth_interval),
            main.shown(found.worst), found.worst_client, main.shown(found.best),
            format_number(found.deviation, main),
        ])  # fmt: skip
    worse = run.result.fairness.worse_off_than_local.get(main.name) if run.result.fairness else None
    if worse:
        share = PERCENT.shown(worse.share) + " %" + format_interval(worse.interval, PERCENT)
        note += f" Worse off than alone: {len(worse.worse)} of {worse.clients} clients, {share}."
    heads = ["method", "mean", "worst tenth", "worst", "who", "best", "standard deviation"]
    table = Table(f"Clients' own test {main.name}{main.unit}", heads, cells, frozenset(marked), note)
    return [table] if cells else []


def _against_alone(run: FinishedRun) -> list[Block]:
    if not run.alone or run.result.method == "local":
        return []
    main = run.main
    xs, ys = own_scores(run.alone, main), own_scores(run.result, main)
    both = {name: (xs[name], ys[name]) for name in sorted(ys) if name in xs}
    if len(both) < 2:
        return []
    better = sum(y < x if main.less_is_better else y > x for x, y in both.values())
    worse = sum(y > x if main.less_is_better else y < x for x, y in both.values())
    where = "below" if main.less_is_better else "above"
    said = (
        f"Each dot is a client. Those {where} the line are better off in the federation "
        f"than tuning a prompt alone: {better} of {len(both)}; {worse} are worse off, the rest as well off."
    )
    return [figures.against("alone", "Together or alone", said, both, ("alone", run.result.label), main)]


# ---------------------------------------------------------------- levels of a prompt, groups of people


def levels(run: FinishedRun) -> Section | None:
    """Shows each level of the prompts: on own and other records, and for new clients."""
    found, unseen = run.result.personalization or {}, run.result.unseen_clients
    if len(found) < 2 and not unseen:
        return None
    main, clusters = run.main, run.result.clusters
    blocks: list[Block] = []
    if len(found) > 1:
        elsewhere = "other clusters" if clusters and clusters.number > 1 else "other clients"
        cells = [[name, format_score(of.own, main), format_score(of.others, main)] for name, of in found.items()]
        heads = ["prompt", "own test", f"test of {elsewhere}"]
        blocks.append(Table(f"Mean client {main.name}{main.unit}, by level of the prompt", heads, cells))
    if unseen:
        blocks.append(Text(
            f"Clients that took no part: {format_score(unseen.global_prompt, main)}{main.unit} with the global prompt, "
            f"{format_score(unseen.assigned, main)}{main.unit} with the prompt assigned to their card."
        ))  # fmt: skip
    return Section("levels", "Shared and personal prompts", blocks)


def groups(run: FinishedRun) -> Section | None:
    fairness = run.result.fairness
    if fairness is None or fairness.column is None:
        return None
    blocks: list[Block] = [Text(
        f"The largest gaps between groups by {fairness.column}, in points; own prompts, own test records. Where base "
        "rates differ, demographic parity contradicts accuracy: read it together with equalised odds. An interval is for "
        "the two named groups. They have the largest gap, so with many groups or answers the interval is too narrow."
    )]  # fmt: skip
    for task, found in fairness.groups.items():
        cells = [
            [f"{name}{' (few)' if name in found.few else ''}", f"{one.records:,}",
             format_number(one.accuracy, PERCENT, one.interval)]
            for name, one in found.groups.items()
        ]  # fmt: skip
        if cells:
            heads = [fairness.column, "test records", "accuracy %"]
            blocks.append(Table(f"{task}: accuracy by {fairness.column}", heads, cells))
        if found.said:
            blocks.append(Text(found.said.capitalize() + "."))
        else:
            gaps = [[gap, _format_gap(getattr(found, key))] for key, gap in GAPS.items()]
            blocks.append(Table(f"{task}: the largest gaps", ["gap", "how large, and between whom"], gaps))
    return Section("groups", "Groups of people", blocks)


def _format_gap(gap: Gap | None) -> str:
    """Describes a gap between two groups, with its interval or the reason for a missing one."""
    if gap is None:
        return "no two groups to compare"
    what = f"; answer {gap.label!r}" + (f" among {gap.among}" if gap.among else "") if gap.label is not None else ""
    most, least = gap.between
    interval = format_interval(gap.interval, PERCENT) or " (no interval: too few records, or all of them alike)"
    records = " and ".join(map(str, gap.records))
    return f"{PERCENT.shown(gap.gap)}{interval}, {most} over {least} ({records} records{what})"
