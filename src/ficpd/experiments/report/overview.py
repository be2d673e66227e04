"""Shows the outcome of a run: verdict, figures, curve, table and settings."""

import shlex
import tomllib
from collections.abc import Mapping
from typing import Any

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Block, Code, Downloads, KeyValues, Section, Table, Text
from ficpd.experiments.report.summary import format_bytes, results_table, standing, stopped_early, verdict
from ficpd.experiments.report.table_formats import safe_csv
from ficpd.types import LORA

CURVES = {
    "sample": (
        "On a sample of test records",
        "The same records in every round; each client's prompt as the server sends it.",
    ),
    "own": ("Own test, mean client", "Each client's own model."),
    "global": ("Everyone's test", "One prompt on all test records."),
}
"""Names and captions of the curves in `rounds.jsonl` (`SimulatedClients.after_round`)."""
NOISE = {None: "none", "simulated": "simulated", "cryptographic": "real"}


# ---------------------------------------------------------------- the first screen


def headline(run: FinishedRun) -> str:
    """Returns the verdict with all of its figures."""
    own = run.result
    if own.privacy.rehearsed:
        names = ", ".join(own.privacy.rehearsed)
        return f"REHEARSAL, nothing is protected: somebody knows the seed of the noise of {names}."
    if own.metrics is None:
        rounds, sites = own.num_rounds, own.num_clients
        return f"{own.method} ran {rounds} rounds among {sites} sites; their scores stay with them."
    return verdict(run.results)[0].rpartition(" (")[0] + "."


def with_unit(main: Metric, value: float) -> str:
    return main.shown(value) + main.unit


def summary_blocks(run: FinishedRun) -> list[Block]:
    """Shows the main figures and their uncertainty."""
    own, pairs = run.result, []
    if own.metrics:
        for name, result in standing(run.results).items():
            pairs.append((name, with_unit(run.main, result.scores.per_client_mean[run.main.name])))
    at_most = "at most " if own.privacy.at_most and own.privacy.epsilon is not None else ""
    strength, _, kind = own.privacy.guarantee.partition(", ")[0].partition(" per ")
    pairs += [
        (f"privacy, per {kind}" if kind else "privacy", at_most + strength),
        ("noise", NOISE.get(own.privacy.noise, str(own.privacy.noise))),
        ("up, a client and round", format_bytes(own.bytes.up_per_client_round)),
        ("down, a client and round", format_bytes(own.bytes.down_per_client_round)),
    ]
    blocks: list[Block] = [KeyValues([(name[:1].upper() + name[1:], value) for name, value in pairs], large=True)]
    blocks += stopped_early(own)
    if own.metrics:
        first, *rest = run.verdicts
        told = first.rpartition(" (")[2].removesuffix(").")
        blocks.append(Text(f"{told[:1].upper()}{told[1:]}. {' '.join(rest)} One run with one seed: a point or two of "
                           "difference may be chance."))  # fmt: skip
    return blocks


# ---------------------------------------------------------------- the curve, the table


def curves(run: FinishedRun) -> Section:
    """Draws the main metric by round. The last point is the score at the end of the run."""
    found = {way: of for way in CURVES if (of := _curves(run, way))} if run.result.metrics else {}
    levels = {way: zero[run.main.name] for way in found if way != "own" and (zero := _ends(run, way).get("zero_shot"))}
    values = [value for of in found.values() for curve in of.values() for value in curve.values()]
    scale = figures.extent([*levels.values(), *values], run.main) if found else None
    blocks: list[Block] = [
        figures.lines(f"curve-{way}", name, said + " Dashed: no prompt." * (way in levels), found[way], run.main, run.places,
                      levels.get(way), scale)
        for way, (name, said) in CURVES.items() if way in found
    ]  # fmt: skip
    if found:
        blocks.append(
            Text("A simulation's figures: sites share no test records, and no guarantee covers these scores.")
        )
    return Section("rounds", "Accuracy by round" if found else "Round by round", [*blocks, *_rounds(run)])


def _ends(run: FinishedRun, way: str) -> dict[str, Any]:
    """Returns each method's score at the end of the run, of the same kind as its curve."""
    field = {"sample": "sample", "own": "per_client_mean", "global": "global_prompt"}[way]
    return {r.label: getattr(r.scores, field) for r in run.results}


def _curves(run: FinishedRun, way: str) -> dict[str, dict[float, float]]:
    key, last = f"{way}_{run.main.name}", _ends(run, way)
    found: dict[str, dict[float, float]] = {}
    for label, of in run.rounds.items():
        at: dict[float, float] = {r.round: r.metrics[key] for r in of if key in r.metrics}
        if at and (end := last.get(label)):
            found[label] = at | {len(of): end[run.main.name]}
    return found


def _rounds(run: FinishedRun) -> list[Table]:
    heads = ["round", "updates", "bytes up", "bytes down", "seconds", "dropped"]
    cells = [
        [
            str(r.round), f"{r.updates} of {r.clients}", f"{r.bytes_up:,}", f"{r.bytes_down:,}",
            f"{r.seconds_train + r.seconds_aggregate:.1f}",
            "; ".join(f"{name}: {why}" for name, why in sorted(r.dropped.items())) or "–",
        ]
        for r in run.rounds.get(run.result.label, [])
    ]  # fmt: skip
    return [Table(f"Every round of {run.result.label}", heads, cells, folded=True)] if cells else []


def methods(run: FinishedRun) -> Section | None:
    if not run.results:
        return None
    main, names = run.main, [result.label for result in run.results]
    views = {
        "own test, mean client": "per_client_mean",
        "worst client": "per_client_worst",
        "everyone's test": "global_prompt",
    }
    series = {
        view: [score and score[main.name] for score in (getattr(result.scores, key) for result in run.results)]
        for view, key in views.items()
    }
    said = f"{main.name.capitalize()}{main.unit} of each method, three views of the same records."
    drawn = figures.dots("glance", "At a glance", said, names, series, main, marked=run.result.label)
    dropped = [Text(run.dropped)] if run.dropped else []
    return Section("methods", "The methods compared", [results_table(run.results), drawn, *dropped, *_robust(run)])


def _robust(run: FinishedRun) -> list[Text]:
    """Names the clients that a robust rule left out or clipped, and the means with too few updates."""
    blocks, found = [], {
        "Left out or cut": run.result.excluded_updates,
        "Means of fewer updates than the rule needs": run.result.underfilled_means,
    }  # fmt: skip
    for what, counts in found.items():
        most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if most_first:
            rounds = ", ".join(f"{name} in {count}" for name, count in most_first)
            blocks.append(Text(f"{what} (method.robust), in how many of {run.result.num_rounds} rounds: {rounds}."))
    return blocks


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
    blocks: list[Block] = [KeyValues([pair for pair in pairs if pair[1]])]
    if run.recipe:
        again = f"ficpd run {shlex.quote(str(run.directory / 'resolved.toml'))} --out NEW_FOLDER"
        blocks += [
            Code("The command that runs it again", again, folded=False),
            Code("The recipe, every default resolved (resolved.toml)", run.recipe),
        ]
    tables = {"results.csv": safe_csv(run.to_frame().reset_index())} if run.results else {}
    blocks.append(Downloads({**tables, "result.json": own.model_dump_json(indent=1)}))
    return Section("run", "What was run", blocks)


def described(part: Mapping[str, Any]) -> str:
    """Describes a section of the experiment in a line, without nested sections."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in part.items()}
    words = [f"{key} {value}" for key, value in shown.items() if key != "name" and not isinstance(value, dict | list)]
    return ": ".join(filter(None, [str(part.get("name", "")), ", ".join(words)]))
