"""What a run came to: the sentence, the table, what was run, how it went over the rounds, and what it cost."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Code, Collapsible, Figure, KeyValues, Section, Table, Text, TwoColumn
from ficpd.experiments.report.load import Finished
from ficpd.experiments.report.summary import results_table
from ficpd.federation.rounds import Round
from ficpd.types import LORA

WAYS = {"own": "Own test, mean client", "global": "Everyone's test, one prompt"}
"""What the figures of `rounds.jsonl` are of (`SimulatedClients.after_round`)."""


# ---------------------------------------------------------------- the first screen


def headline(run: Finished) -> str:
    """The result in one sentence."""
    own = run.own
    if own.metrics is None:
        rounds, sites = own.num_rounds, own.num_clients
        return f"{own.method} ran {rounds} rounds among {sites} sites; their scores stay with them."
    main, everyone, zero = run.main, own.scores.global_prompt, own.scores.zero_shot
    if not everyone:
        mean = own.scores.per_client_mean[main.name]
        return f"{own.label}: {with_unit(main, mean)} {main.name} for the mean client on its own test records."
    score = f"{with_unit(main, everyone[main.name])} {main.name}"
    said = f"With one prompt for all, {own.label} has {score} on everyone's test"
    if not zero or run.own.method == "zero_shot":
        return f"{said}."
    return f"{said}: {format_gap(main, everyone[main.name], zero[main.name])} no prompt at all."


def format_gap(main: Metric, value: float, other: float) -> str:
    """How far a figure is from another one, in a reader's words.

    >>> format_gap(Metric("accuracy", 100, 1, " %"), 0.769, 0.713), format_gap(Metric("rmse", less_is_better=True), 1.2, 1.2)
    ('5.6 points above', 'the same as')
    """
    gap = main.shown(abs(value - other))
    if not float(gap):
        return "the same as"
    return f"{gap}{' points' if main.unit == ' %' else ''} {'above' if value > other else 'below'}"


def with_unit(main: Metric, value: float) -> str:
    return main.shown(value) + main.unit


def summary_blocks(run: Finished) -> list[Block]:
    """The figures to see first, and how far to trust them."""
    own, pairs = run.own, []
    if own.metrics:
        main, scores = run.main, own.scores
        if scores.global_prompt:
            pairs.append((f"everyone's test {main.name}", with_unit(main, scores.global_prompt[main.name])))
        pairs.append(("own test, mean client", with_unit(main, scores.per_client_mean[main.name])))
        pairs.append(("own test, worst client", with_unit(main, scores.per_client_worst[main.name])))
        if run.alone:
            of_alone = run.alone.scores.per_client_mean[main.name]
            pairs.append(("own test, each client alone", with_unit(main, of_alone)))
    at_most = "at most " if own.privacy.at_most and own.privacy.epsilon is not None else ""
    strength, _, kind = own.privacy.guarantee.partition(" per ")
    pairs.append((f"per {kind}" if kind else "privacy", at_most + strength))
    pairs.append(("bytes up, a client and round", f"{own.bytes.up_per_client_round:,.0f}"))
    blocks: list[Block] = [KeyValues(pairs, large=True)]
    if own.stopped:
        blocks.append(Text(f"Stopped early. {own.stopped}", alarm=True))
    if own.metrics:
        blocks.append(Text("One run with one seed: a point or two of difference may be chance."))
    return blocks


# ---------------------------------------------------------------- the table


def methods(run: Finished) -> Section | None:
    if not run.results:
        return None
    heads, cells = results_table(run.results)
    marked = frozenset({run.place})
    shown = Table("Every method on the same clients and records", heads, cells, marked)
    said = (
        "Everyone's test: one prompt for all test records. Own test: each client's prompt on its own test records, the mean "
        f"over clients and the worst client. {run.own.dropped_updates} updates were dropped."
    )
    return Section("methods", "The methods compared", [_at_a_glance(run), shown, Text(said), *_robust(run)])


def _robust(run: Finished) -> list[Block]:
    """Names the clients that a robust rule left out or cut, and the means that had too few updates for it."""
    blocks: list[Block] = []
    found = {
        "Left out or cut": run.own.excluded_updates,
        "Means of fewer updates than the rule needs": run.own.underfilled_means,
    }
    for what, counts in found.items():
        most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if most_first:
            rounds = ", ".join(f"{name} in {count}" for name, count in most_first)
            blocks.append(Text(f"{what} (method.robust), in how many of {run.own.num_rounds} rounds: {rounds}."))
    return blocks


def _at_a_glance(run: Finished) -> Figure:
    main, names = run.main, [result.label for result in run.results]

    def of(score: str) -> list[float | None]:
        found = [getattr(result.scores, score) for result in run.results]
        return [None if score is None else main.scale * score[main.name] for score in found]

    own = "own test, mean client"
    series = {
        "everyone's test": of("global_prompt"),
        own: of("per_client_mean"),
        "worst client": of("per_client_worst"),
    }
    best = series[own]
    good = [value for value in best if value is not None]
    top = names[best.index(min(good) if main.less_is_better else max(good))]
    cells = [[name, *(number(values[i], main.digits) for values in series.values())] for i, name in enumerate(names)]
    return Figure(
        "glance", "At a glance", f"{main.name.capitalize()}{main.unit} of each method, three views of the same records.",
        f"Dot plot of {main.name} by method. The best mean client on its own test records has {top}.",
        figures.dots(names, series, main.name + main.unit, shown=digits(main), marked=run.own.label),
        Table(f"{main.name}{main.unit} by method", ["method", *series], cells, frozenset({run.place})),
    )  # fmt: skip


def digits(main: Metric) -> str:
    return f".{main.digits}f"


def number(value: float | None, places: int = 1) -> str:
    return "–" if value is None else f"{value:,.{places}f}"


# ---------------------------------------------------------------- what was run


def settings(run: Finished) -> Section:
    own, recipe = run.own, tomllib.loads(run.recipe) if run.recipe else {}
    backbone, layer = own.backbone, own.backbone.enters_at
    records, machine = own.num_records, own.machine
    pairs = [
        ("experiment", recipe.get("name", "")),
        ("method", _described(recipe.get("method", {"name": own.method}))),
        ("task", own.task),
        ("backbone", f"{backbone.name} ({backbone.fingerprint})"),
        ("numbers", f"{backbone.dtype}, {backbone.attention}"),
        ("prompt", "LoRA weights of all layers" if layer == LORA else f"enters at layer {layer}"),
        ("data", _data(recipe)),
        ("records", f"{records.train:,} for training, {records.test:,} for tests" if records else ""),
        ("clients", f"{own.num_clients:,}" + _asked(recipe)),
        ("rounds", f"{own.num_rounds:,}"),
        ("training", _described(recipe.get("training", {}))),
        ("compression", _described(own.compression)),
        ("privacy", own.privacy.guarantee),
        ("seed", str(own.seed)),
        ("machine", ", ".join(f"{key} {value}" for key, value in machine.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in own.versions.items())),
    ]
    code = [Code("The whole experiment, every default resolved (resolved.toml)", run.recipe)] if run.recipe else []
    return Section("run", "What was run", [KeyValues([pair for pair in pairs if pair[1]]), *code])


def _described(part: Mapping[str, Any]) -> str:
    """A part of the experiment in a line, without what is nested in it."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in part.items()}
    words = [f"{key} {value}" for key, value in shown.items() if key != "name" and not isinstance(value, dict | list)]
    return ": ".join(filter(None, [str(part.get("name", "")), ", ".join(words)]))


def _enters_at(backbone: Mapping[str, Any]) -> str:
    layer = backbone.get("enters_at", "")
    return "LoRA weights of all layers" if layer == LORA else f"enters at layer {layer}" if layer != "" else ""


def _data(recipe: Mapping[str, Any]) -> str:
    groups = recipe.get("groups") or {"": recipe}
    sources = {str(of["data"]["source"]).rstrip("/").rpartition("/")[2] for of in groups.values() if "data" in of}
    kinds = {of["partition"]["kind"] for of in groups.values() if "partition" in of}
    shared = f"; shared out by {', '.join(sorted(kinds))}" if kinds else ""
    return ", ".join(sorted(sources)) + shared if sources else ""


def _asked(recipe: Mapping[str, Any]) -> str:
    cohort = recipe.get("federation", {}).get("clients_per_round")
    return f", {cohort} asked a round" if cohort else ", all asked every round"


# ---------------------------------------------------------------- over the rounds


def over_rounds(run: Finished) -> Section | None:
    told = {label: lines for label, lines in run.rounds.items() if lines}
    if not told:
        return None
    curves = [figure for way in WAYS for figure in _curves(run, way)] if run.own.metrics else []
    costs = [_traffic(told, run.places), _seconds(told, run.places)]
    lines = told.get(run.own.label, [])
    heads = ["round", "updates", "bytes up", "bytes down", "seconds", "dropped"]
    cells = [
        [
            str(r.round), f"{r.updates} of {r.clients}", f"{r.bytes_up:,}", f"{r.bytes_down:,}",
            f"{r.seconds_train + r.seconds_aggregate:.1f}",
            "; ".join(f"{name}: {why}" for name, why in sorted(r.dropped.items())) or "–",
        ]
        for r in lines
    ]  # fmt: skip
    title = f"Every round of {run.own.label}"
    each = [Collapsible(title, [Table(title, heads, cells)])] if cells else []
    return Section("rounds", "Round by round", [*paired(curves), *paired(costs), *each])


def paired(found: Sequence[Figure]) -> list[Block]:
    """Two and two; an odd one has the whole width."""
    return [TwoColumn(found[i : i + 2]) if len(found) > i + 1 else found[i] for i in range(0, len(found), 2)]


def _curves(run: Finished, way: str) -> list[Figure]:
    """One figure, or none where nothing was scored on the way. The last point is the result's."""
    main, key = run.main, f"{way}_{run.main.name}"
    last = {r.label: r.scores.global_prompt if way == "global" else r.scores.per_client_mean for r in run.results}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for label, lines in run.rounds.items():
        at = [(r.round, main.scale * r.metrics[key]) for r in lines if key in r.metrics]
        if at and (end := last.get(label)):
            at = [*(point for point in at if point[0] < len(lines)), (len(lines), main.scale * end[main.name])]
            curves[label] = [x for x, _ in at], [y for _, y in at]
    zero = run.own.scores.zero_shot
    if not curves:
        return []
    floor = main.scale * zero[main.name] if way == "global" and zero else None
    said = "" if floor is None else " Dashed: no prompt at all."
    return [
        Figure(
            f"curve-{way}", WAYS[way], f"{main.name.capitalize()}{main.unit}, round by round.{said}",
            f"Line chart of {main.name} by round; " + _from_to(curves, main.digits),
            figures.lines(curves, main.name + main.unit, floor, run.places),
            of_curves(f"{main.name}{main.unit} by round", curves, main.digits),
        )
    ]  # fmt: skip


def _from_to(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], places: int) -> str:
    return (
        "; ".join(f"{name} from {ys[0]:,.{places}f} to {ys[-1]:,.{places}f}" for name, (_, ys) in curves.items()) + "."
    )


def of_curves(caption: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], places: int) -> Table:
    at = sorted({x for xs, _ in curves.values() for x in xs})
    known = {name: dict(zip(xs, ys, strict=True)) for name, (xs, ys) in curves.items()}
    cells = [[f"{x:g}", *(number(known[name].get(x), places) for name in curves)] for x in at]
    return Table(caption, ["round", *curves], cells)


def _traffic(told: Mapping[str, Sequence[Round]], places: Mapping[str, int]) -> Figure:
    curves = {label: _summed([(r.bytes_up + r.bytes_down) / 1000 for r in lines]) for label, lines in told.items()}
    return Figure(
        "traffic", "What travelled", "Kilobytes of all clients together, up and down, summed over the rounds.",
        "Line chart of kilobytes by round; " + _from_to(curves, 1),
        figures.lines(curves, "kB, up and down", None, places),
        of_curves("kilobytes by round, up and down", curves, 1),
    )  # fmt: skip


def _seconds(told: Mapping[str, Sequence[Round]], places: Mapping[str, int]) -> Figure:
    curves = {label: _summed([r.seconds_train + r.seconds_aggregate for r in rs]) for label, rs in told.items()}
    return Figure(
        "seconds", "How long it took", "Seconds of training and aggregation on this machine, summed over the rounds.",
        "Line chart of seconds by round; " + _from_to(curves, 1),
        figures.lines(curves, "seconds", None, places), of_curves("seconds by round", curves, 1),
    )  # fmt: skip


def _summed(values: Sequence[float]) -> tuple[list[float], list[float]]:
    sums = [sum(values[: i + 1]) for i in range(len(values))]
    return [float(i + 1) for i in range(len(values))], sums
