"""What a run shows a person: the table on the screen, and `report.md`."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ficpd.errors import ConfigError
from ficpd.evaluation.metrics import Metric, main_metric
from ficpd.experiments.run_directory import RunDir
from ficpd.library.card import guarantee
from ficpd.registry import validated_section
from ficpd.types import LORA

PERCENT = Metric("share", 100, 1)
GAPS = {"accuracy": "accuracy", "demographic_parity": "demographic parity", "equalised_odds": "equalised odds"}


def rows(out: Path) -> list[dict[str, Any]]:
    """The results in a run directory, zero-shot first, the method itself last."""
    own, order = RunDir(out).result(), ["zero_shot", "local", "centralized"]
    results = [result for _, result in beside(out, own)]
    results.sort(key=lambda r: (order.index(r["method"]) if r["method"] in order else len(order), r["label"]))
    return results + ([own] if own else [])


def beside(out: Path, own: Mapping[str, Any] | None) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and result of each baseline. One that is the run's `own` method once more is left out; if the method has
    settings of its own there, the baseline's label says that it has none."""
    found = []
    for file in sorted((Path(out) / "baselines").glob("*/result.json")):
        result = json.loads(file.read_text())
        name = result["method"]
        if own and name == own["method"]:
            if "-" not in file.parent.name and not _ran_as(out, name):
                result["label"] = f"{name}, default settings{result['label'].removeprefix(name)}"
            elif result["label"] == own["label"]:
                continue
        found.append((file.parent, result))
    return found


def _ran_as(out: Path, baseline: str) -> bool:
    """Whether the run's own method had a baseline's settings, the default ones; not if that cannot be told."""
    try:
        given = tomllib.loads(recipe(out)).get("method", {})
        return validated_section("methods", given, "method") == validated_section(
            "methods", {"name": baseline}, "baselines"
        )
    except ConfigError:
        return False


def recipe(out: Path) -> str:
    """The run's whole experiment, as far as it was written."""
    for name in ("resolved.toml", "experiment.toml"):
        if (Path(out) / name).exists():
            return (Path(out) / name).read_text(encoding="utf-8")
    return ""


def table(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: the task's main figure (`metrics.MAIN`), bytes as encoded. One task that can be guessed at has its
    95 % interval and chance beside it."""
    main, first = main_metric(results[0]["metrics"]["per_client_mean"]), results[0]["metrics"]["zero_shot"] or {}
    guessed = "chance" in first and ":" not in results[0]["task"]
    beside = f" [95 %], chance {main.shown(first['chance'])}" if guessed else ""

    def shown(score: Mapping[str, float] | None) -> str:
        return main.shown(score[main.name]) if score else "–"

    def whole(score: Mapping[str, float] | None) -> str:
        ends = [score[f"{main.name}_{end}"] for end in ("low", "high")] if guessed and score else None
        return shown(score) + within(ends, main)

    heads = ["method", "privacy", f"everyone's test {main.name}{main.unit}{beside}", f"own test, mean client{main.unit}",
             f"worst client{main.unit}", "bytes up / client / round", "seconds"]  # fmt: skip
    cells = [
        [
            r["label"],
            guarantee(r["privacy"]),
            whole(r["metrics"]["global"]),
            shown(r["metrics"]["per_client_mean"]),
            shown(r["metrics"]["per_client_worst"]),
            f"{r['bytes']['up_per_client_round']:,.0f}",
            f"{sum(r['seconds'].values()):.0f}",
        ]
        for r in results
    ]
    return heads, cells


def paid(own: Mapping[str, Any]) -> str:
    """The guarantee in words, with the ledger's lines."""
    privacy = own["privacy"]
    if not privacy.get("lines"):
        return "What left the clients carries no guarantee.\n" if privacy["epsilon"] is None else ""
    lines = "".join(
        f"| {line['name']} | {line['releases']} | {line['sampling_rate']:.3g} | {line['noise_multiplier']:.3g} "
        f"| {line['epsilon_alone']:.3f} | {100 * line['share']:.0f} % |\n"
        for line in privacy["lines"]
    )
    budget = "no budget was set" if privacy["budget"] is None else f"of a budget of {privacy['budget']:g}"
    return (
        f"Privacy ({privacy['mechanism']}): ε = {privacy['epsilon']:.3f} {budget}, δ = {privacy['delta']:g}; the unit is "
        f"one {privacy['unit']} ({privacy['neighbouring']}). Clip norm {privacy['clip_norm']:g}, noise "
        f"{privacy['noise']}, multipliers {chosen(privacy)}; counted by {privacy['accountant']}. The member that spent most "
        f"({privacy['site_that_spent_most']}) released:\n\n"
        "| line | releases | sampling rate | noise multiplier | ε alone | share |\n|---|---|---|---|---|---|\n" + lines +
        "\nEach row of the first table is a run of its own: a member that took part in several would pay for each. "
        "Test scores are the simulation's own view; they do not leave a site.\n"
        + ("**Simulated noise**: drawn from the experiment's seed; whoever knows the seed can take it off. A real "
           "site uses `privacy.noise = \"cryptographic\"`.\n" if privacy["noise"] == "simulated" else "")
    )  # fmt: skip


def grouped(own: Mapping[str, Any]) -> str:
    """Who shares a prototype with whom, and how that fits what is publicly known of the clients."""
    clusters = own.get("clusters")
    if not clusters:
        return ""
    members: dict[int, list[str]] = {}
    for name, cluster in sorted(clusters["member"].items()):
        members.setdefault(cluster, []).append(name)
    lines = "".join(f"- prototype {k}: {', '.join(names)}\n" for k, names in sorted(members.items()))
    fits = [f"{key} {value:.2f}" for key, value in clusters["agreement"].items() if value is not None]
    rand = (
        f"Agreement with what is known of them (adjusted Rand index, 1: the same): {', '.join(fits)}.\n" if fits else ""
    )
    return f"Prototypes and their clients:\n\n{lines}\n{rand}\n{distilled(own)}"


def distilled(own: Mapping[str, Any]) -> str:
    """What the server's last step came to."""
    facts = own.get("distillation")
    if not facts:
        return ""
    main = main_metric(own["metrics"]["distilled"])
    made = "".join(f"- {group}: {said}\n" for group, said in facts["examples"].items())
    both = [main.shown(own["metrics"][name][main.name]) for name in ("global", "distilled")]
    outcome = "kept" if facts["gained"] else "nothing was gained on examples held back, so the global prompt is kept"
    return (
        f"Synthetic examples by {facts['writer']} (`synthetic.jsonl`):\n\n{made}\nDistilled ({facts['how']}): {outcome}; "
        f"everyone's test {main.name}{main.unit} {both[1]}, the global prompt {both[0]}.\n\n"
    )


def set_aside(own: Mapping[str, Any]) -> str:
    """Whom a robust rule left out or cut, and which means had too few updates for it: how is in `rounds.jsonl`."""
    said = ""
    for key, what in (("set_aside", "Left out or cut"), ("too_few", "Means of fewer updates than the rule needs")):
        most_first = sorted(own.get(key, {}).items(), key=lambda item: (-item[1], item[0]))
        if most_first:
            rounds = ", ".join(f"{name} in {count}" for name, count in most_first)
            said += f"{what} (`method.robust`), in how many of {own['num_rounds']} rounds: {rounds}.\n\n"
    return said


def clients_section(own: Mapping[str, Any]) -> str:
    """How evenly the clients are served."""
    fairness = own.get("fairness", {})
    if "clients" not in fairness:
        return ""
    main = main_metric(own["metrics"]["per_client_mean"])
    found, worse = fairness["clients"][main.name], fairness.get("worse_off_than_local", {}).get(main.name)
    deviation = "" if found["deviation"] is None else f", standard deviation {main.shown(found['deviation'])}"
    few = " Of so few clients the intervals are too narrow." if 1 < found["clients"] < 10 else ""
    alone = (
        f" Worse off than alone (`local`): {len(worse['worse'])} of {worse['clients']}, "
        f"{PERCENT.shown(worse['share'])} %{within(worse['interval'], PERCENT)}." if worse else ""
    )  # fmt: skip
    return (
        f"\n## Clients\n\nOwn test {main.name}{main.unit} of {found['clients']} clients (95 % intervals in brackets): mean "
        f"{main.shown(found['mean'])}{within(found['mean_interval'], main)}{deviation}, worst {main.shown(found['worst'])} "
        f"({found['worst_client']}), worst tenth {main.shown(found['worst_tenth'])}"
        f"{within(found['worst_tenth_interval'], main)}, best {main.shown(found['best'])}.{few}{alone}\n"
    )


def levels_section(own: Mapping[str, Any]) -> str:
    """What each level of the prompts is worth at home and elsewhere, and to clients that took no part."""
    levels, unseen = own.get("levels") or {}, own.get("unseen") or {}
    if len(levels) < 2 and not unseen:
        return ""
    main = main_metric(own["metrics"]["per_client_mean"])

    def shown(score: Mapping[str, float] | None) -> str:
        return main.shown(score[main.name]) if score else "–"

    elsewhere = "other clusters" if own.get("clusters") and own["clusters"]["number"] > 1 else "other clients"
    lines = "".join(f"| {name} | {shown(of['own'])} | {shown(of['others'])} |\n" for name, of in levels.items())
    table = f"| prompt | own test | test of {elsewhere} |\n|---|---|---|\n{lines}" if len(levels) > 1 else ""
    newcomers = (
        f"\nClients that took no part: {shown(unseen['global'])} with the global prompt, {shown(unseen['assigned'])} with "
        "the one that their card gets them.\n" if unseen else ""
    )  # fmt: skip
    return f"\n## Levels\n\nMean client {main.name}{main.unit}:\n\n{table}{newcomers}"


def groups_section(own: Mapping[str, Any]) -> str:
    """How evenly the groups of a public column are served, task by task."""
    fairness = own.get("fairness", {})
    if "groups" not in fairness:
        return ""
    parts = []
    for task, found in fairness["groups"].items():
        lines = "".join(
            f"| {name} | {one['records']}{' (few)' if name in found['few'] else ''} "
            f"| {PERCENT.shown(one['accuracy'])}{within(one['interval'], PERCENT)} |\n"
            for name, one in found["groups"].items()
        )
        table = f"| {fairness['column']} | test records | accuracy % |\n|---|---|---|\n{lines}\n" if lines else ""
        said = f"{found['said'].capitalize()}.\n" if "said" in found else "".join(
            f"- {gap}: {gap_in_words(found[key])}\n" for key, gap in GAPS.items()
        )  # fmt: skip
        parts.append(f"{task}:\n\n{table}{said}\n")
    return (
        f"\n## Groups\n\nThe largest gaps between groups by {fairness['column']}, in points; own prompts, own test records. "
        "An interval is of the two groups named: they were picked for differing most, so of many groups or answers it is "
        "too narrow. Where base rates differ, demographic parity contradicts accuracy: read it beside equalised odds.\n\n"
        + "".join(parts)
    )


def gap_in_words(gap: Mapping[str, Any] | None) -> str:
    """A gap between groups, with its interval or why there is none."""
    if gap is None:
        return "no two groups to compare"
    what = f"; answer {gap['label']!r}" + (f" among {gap['among']}" if "among" in gap else "") if "label" in gap else ""
    most, least = gap["between"]
    interval = within(gap["interval"], PERCENT) or " (no interval: too few records, or all of them alike)"
    records = " and ".join(map(str, gap["records"]))
    return f"{PERCENT.shown(gap['gap'])}{interval}, {most} over {least} ({records} records{what})"


def within(interval: list[float] | None, metric: Metric) -> str:
    """
    >>> within([0.5, 0.75], PERCENT), within(None, PERCENT)
    (' [50.0, 75.0]', '')
    """
    return f" [{', '.join(map(metric.shown, interval))}]" if interval else ""


def chosen(privacy: Mapping[str, Any]) -> str:
    """The noise multipliers of all members: each has its own, because each has its own sampling rate.

    >>> chosen({"noise_multiplier": [0.561, 0.904]})
    '0.561 to 0.904'
    """
    least, most = privacy["noise_multiplier"]
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"


def report(directory: RunDir) -> str:
    """`report.md`: the table, and what it is a table of."""
    results = rows(directory.path)
    own = directory.result() or results[-1]
    heads, cells = table(results)
    lines = ["| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *cells]]
    backbone = own["backbone"]
    layer = backbone["enters_at"]
    where = "LoRA weights of all layers" if layer == LORA else f"prompt enters at layer {layer}"
    stopped = f"**Stopped early.** {own['stopped']}\n\n" if own["stopped"] else ""
    return (
        f"# {own['method']} on {backbone['name']}: {own['task']}\n\n"
        f"{own['num_clients']} clients, {own['num_rounds']} rounds, seed {own['seed']}, "
        f"{own['num_records']['train']:,} training and {own['num_records']['test']:,} test records; "
        f"{where}; {backbone['dtype']}, {backbone['attention']} attention.\n\n"
        + "\n".join(lines)
        + f"\n\n{own['dropped_updates']} updates were dropped. Everyone's test: one prompt for all test records. "
        "Own test: each client's prompt on its own test records, the mean over clients and the worst client.\n\n"
        + set_aside(own)
        + stopped
        + grouped(own)
        + paid(own)
        + levels_section(own)
        + clients_section(own)
        + groups_section(own)
    )
