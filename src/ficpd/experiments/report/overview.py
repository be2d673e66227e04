"""What a run came to: the sentence, the table, what was run, how it went over the rounds, and what it cost."""

import math
import tomllib
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import (
    Block,
    Code,
    Collapsible,
    Figure,
    KeyValues,
    Section,
    Table,
    Text,
    TwoColumn,
    paired,
)
from ficpd.experiments.report.summary import results_table, verdict
from ficpd.types import LORA

WAYS = {"own": "Own test, mean client", "global": "Everyone's test, one prompt"}
"""What the figures of `rounds.jsonl` are of (`SimulatedClients.after_round`)."""


# ---------------------------------------------------------------- the first screen


def headline(run: FinishedRun) -> str:
    """The verdict's first words; its figures follow in the lead."""
    own = run.result
    if own.privacy.rehearsed:
        names = ", ".join(own.privacy.rehearsed)
        return f"REHEARSAL, nothing is protected: somebody knows the seed of the noise of {names}."
    if own.metrics is None:
        rounds, sites = own.num_rounds, own.num_clients
        return f"{own.method} ran {rounds} rounds among {sites} sites; their scores stay with them."
    return verdict(run.results)[0].partition(": ")[0].removesuffix(".") + "."


def with_unit(main: Metric, value: float) -> str:
    return main.shown(value) + main.unit


def summary_blocks(run: FinishedRun) -> list[Block]:
    """The figures to see first, and how far to trust them."""
    own, pairs = run.result, []
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
        first, *rest = verdict(run.results)
        figures = first.partition(": ")[2]
        blocks.append(Text(" ".join([figures[:1].upper() + figures[1:], *rest]).strip()))
        blocks.append(Text("One run with one seed: a point or two of difference may be chance."))
    return blocks


# ---------------------------------------------------------------- the table


def methods(run: FinishedRun) -> Section | None:
    if not run.results:
        return None
    heads, cells = results_table(run.results)
    marked = frozenset({len(run.results) - 1})
    shown = Table("Every method on the same clients and records", heads, cells, marked)
    said = (
        "Everyone's test: one prompt for all test records. Own test: each client's prompt on its own test records, the mean "
        f"over clients and the worst client. {run.dropped or 'No update was dropped.'}"
    )
    return Section("methods", "The methods compared", [_at_a_glance(run), shown, Text(said), *_robust(run)])


def _robust(run: FinishedRun) -> list[Block]:
    """Names the clients that a robust rule left out or cut, and the means that had too few updates for it."""
    blocks: list[Block] = []
    found = {
        "Left out or cut": run.result.excluded_updates,
        "Means of fewer updates than the rule needs": run.result.underfilled_means,
    }
    for what, counts in found.items():
        most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if most_first:
            rounds = ", ".join(f"{name} in {count}" for name, count in most_first)
            blocks.append(Text(f"{what} (method.robust), in how many of {run.result.num_rounds} rounds: {rounds}."))
    return blocks


def _at_a_glance(run: FinishedRun) -> Figure:
    main, names = run.main, [result.label for result in run.results]
    views = {
        "everyone's test": "global_prompt",
        "own test, mean client": "per_client_mean",
        "worst client": "per_client_worst",
    }
    series = {
        view: [score and score[main.name] for score in (getattr(result.scores, key) for result in run.results)]
        for view, key in views.items()
    }
    said = f"{main.name.capitalize()}{main.unit} of each method, three views of the same records."
    return figures.dots("glance", "At a glance", said, names, series, main, marked=run.result.label)


def costs(run: FinishedRun) -> Section | None:
    """Draws the mean client's own test against bytes and against ε."""
    if len(run.results) < 2:
        return None
    names, own = [r.label for r in run.results], [r.scores.per_client_mean[run.main.name] for r in run.results]
    marks = [(run.places[name], run.places[name]) for name in names]
    epsilons = [math.inf if r.privacy.epsilon is None else r.privacy.epsilon for r in run.results]
    bytes_up = [r.bytes.up_per_client_round for r in run.results]
    said = "Own test of the mean client, which every method has."
    drawn = [
        figures.bubbles(id, title, said, names, own, run.main, values, cost, marks, frozenset({len(run.results) - 1}))
        for id, title, values, cost in (
            ("against-bytes", "Against bytes", bytes_up, Metric("bytes up, a client and round", digits=0)),
            ("against-epsilon", "Against privacy", epsilons, Metric("ε", digits=2)),
        )
    ]
    return Section("costs", "What accuracy costs", [TwoColumn(drawn)])


# ---------------------------------------------------------------- what was run


def settings(run: FinishedRun) -> Section:
    own, recipe = run.result, tomllib.loads(run.recipe) if run.recipe else {}
    backbone, layer = own.backbone, own.backbone.enters_at
    records, machine = own.num_records, own.machine
    cohort = recipe.get("federation", {}).get("clients_per_round")
    pairs = [
        ("experiment", recipe.get("name", "")),
        ("method", described(recipe.get("method", {"name": own.method}))),
        ("task", own.task),
        ("backbone", f"{backbone.name} ({backbone.fingerprint})"),
        ("numbers", f"{backbone.dtype}, {backbone.attention}"),
        ("prompt", "LoRA weights of all layers" if layer == LORA else f"enters at layer {layer}"),
        ("records", f"{records.train:,} for training, {records.test:,} for tests" if records else ""),
        ("clients", f"{own.num_clients:,}, {f'{cohort} asked a round' if cohort else 'all asked every round'}"),
        ("rounds", f"{own.num_rounds:,}"),
        ("compression", described(own.compression)),
        ("privacy", own.privacy.guarantee),
        ("seed", str(own.seed)),
        ("machine", ", ".join(f"{key} {value}" for key, value in machine.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in own.versions.items())),
    ]
    code = [Code("The whole experiment, every default resolved (resolved.toml)", run.recipe)] if run.recipe else []
    return Section("run", "What was run", [KeyValues([pair for pair in pairs if pair[1]]), *code])


def described(part: Mapping[str, Any]) -> str:
    """A part of the experiment in a line, without what is nested in it."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in part.items()}
    words = [f"{key} {value}" for key, value in shown.items() if key != "name" and not isinstance(value, dict | list)]
    return ": ".join(filter(None, [str(part.get("name", "")), ", ".join(words)]))


# ---------------------------------------------------------------- over the rounds


def over_rounds(run: FinishedRun) -> Section | None:
    told = {label: lines for label, lines in run.rounds.items() if lines}
    if not told:
        return None
    curves = [figure for way in WAYS for figure in _curves(run, way)] if run.result.metrics else []
    traffic = {
        label: dict(enumerate(accumulate(r.bytes_up + r.bytes_down for r in of), 1)) for label, of in told.items()
    }
    seconds = {
        label: dict(enumerate(accumulate(r.seconds_train + r.seconds_aggregate for r in of), 1))
        for label, of in told.items()
    }
    costs = [
        figures.lines("traffic", "What travelled", "Kilobytes of all clients together, summed over the rounds.", traffic,
                      Metric("kB, up and down", 0.001, 1), run.places),
        figures.lines("seconds", "How long it took", "Training and aggregation on this machine, summed over the rounds.",
                      seconds, Metric("seconds", digits=1), run.places),
    ]  # fmt: skip
    heads = ["round", "updates", "bytes up", "bytes down", "seconds", "dropped"]
    cells = [
        [
            str(r.round), f"{r.updates} of {r.clients}", f"{r.bytes_up:,}", f"{r.bytes_down:,}",
            f"{r.seconds_train + r.seconds_aggregate:.1f}",
            "; ".join(f"{name}: {why}" for name, why in sorted(r.dropped.items())) or "–",
        ]
        for r in told.get(run.result.label, [])
    ]  # fmt: skip
    title = f"Every round of {run.result.label}"
    each = [Collapsible(title, Table(title, heads, cells))] if cells else []
    return Section("rounds", "Round by round", [*paired(curves), *paired(costs), *each])


def _curves(run: FinishedRun, way: str) -> list[Figure]:
    """Draws one figure, or none where no round was scored. The last point is the result's."""
    main, key = run.main, f"{way}_{run.main.name}"
    last = {r.label: r.scores.global_prompt if way == "global" else r.scores.per_client_mean for r in run.results}
    curves: dict[str, dict[int, float]] = {}
    for label, of in run.rounds.items():
        at = {r.round: r.metrics[key] for r in of if key in r.metrics}
        if at and (end := last.get(label)):
            curves[label] = at | {len(of): end[main.name]}
    if not curves:
        return []
    zero = run.result.scores.zero_shot if way == "global" else None
    level = zero[main.name] if zero else None
    said = f"{main.name.capitalize()}{main.unit}, round by round.{' Dashed: no prompt at all.' if zero else ''}"
    return [figures.lines(f"curve-{way}", WAYS[way], said, curves, main, run.places, level)]
