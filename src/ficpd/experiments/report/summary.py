"""The results of a run directory, and their table as the screen and the page show it."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ficpd.errors import ConfigError
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.results import PrivacyReport, RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.registry import validated_section

PERCENT = Metric("share", 100, 1)


def load_results(out: Path) -> list[RunResult]:
    """Reads the results of a run directory: zero-shot first, the run's own method last."""
    own, order = RunDir(out).result(), ["zero_shot", "local", "centralized"]
    results = [result for _, result in load_baselines(out, own)]
    results.sort(key=lambda r: (order.index(r.method) if r.method in order else len(order), r.label))
    return results + ([own] if own else [])


def load_baselines(out: Path, own: RunResult | None) -> list[tuple[Path, RunResult]]:
    """Reads folder and result of each baseline.

    A repetition of the run's own method is left out. If the run changes settings of that method, the baseline's label
    says "default settings".
    """
    found = []
    for file in sorted((Path(out) / "baselines").glob("*/result.json")):
        result = RunResult.load(file.parent)
        name = result.method
        if own and name == own.method:
            if "-" not in file.parent.name and not _has_default_settings(out, name):
                label = f"{name}, default settings{result.label.removeprefix(name)}"
                result = result.model_copy(update={"label": label})
            elif result.label == own.label:
                continue
        found.append((file.parent, result))
    return found


def _has_default_settings(out: Path, method: str) -> bool:
    """False too where the settings cannot be read."""
    try:
        given = tomllib.loads(load_recipe(out)).get("method", {})
        return validated_section("methods", given, "method") == validated_section(
            "methods", {"name": method}, "baselines"
        )
    except ConfigError:
        return False


def load_recipe(out: Path) -> str:
    """Reads the whole experiment of a run; empty if there is none."""
    files = [Path(out) / name for name in ("resolved.toml", "experiment.toml")]
    return next((file.read_text(encoding="utf-8") for file in files if file.exists()), "")


def results_table(results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells of the results.

    Accuracy of a single task with a chance level has its 95 % interval.
    """
    main, first = results[0].main, results[0].scores.zero_shot or {}
    guessed = "chance" in first and ":" not in results[0].task
    chance = f" [95 %], chance {main.shown(first['chance'])}" if guessed else ""

    def everyone(score: Mapping[str, float] | None) -> str:
        ends = [score[f"{main.name}_{end}"] for end in ("low", "high")] if guessed and score else None
        return format_score(score, main) + format_interval(ends, main)

    heads = ["method", "privacy", f"everyone's test {main.name}{main.unit}{chance}", f"own test, mean client{main.unit}",
             f"worst client{main.unit}", "bytes up / client / round", "seconds"]  # fmt: skip
    cells = [
        [
            r.label,
            r.privacy.guarantee,
            everyone(r.scores.global_prompt),
            format_score(r.scores.per_client_mean, main),
            format_score(r.scores.per_client_worst, main),
            f"{r.bytes.up_per_client_round:,.0f}",
            f"{r.seconds.total:.0f}",
        ]
        for r in results
    ]
    return heads, cells


def format_score(score: Mapping[str, float] | None, metric: Metric) -> str:
    return format_number(score[metric.name] if score else None, metric)


def format_number(value: float | None, metric: Metric, interval: Sequence[float] | None = None) -> str:
    """
    >>> format_number(0.5, PERCENT, [0.25, 0.75]), format_number(None, PERCENT)
    ('50.0 [25.0, 75.0]', '–')
    """
    return "–" if value is None else metric.shown(value) + format_interval(interval, metric)


def format_interval(interval: Sequence[float] | None, metric: Metric) -> str:
    return f" [{', '.join(map(metric.shown, interval))}]" if interval else ""


def format_noise_multipliers(privacy: PrivacyReport) -> str:
    """Formats the range of the members' noise multipliers."""
    least, most = privacy.noise_multiplier or (None, None)
    if least is None or most is None:
        return "–"
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
