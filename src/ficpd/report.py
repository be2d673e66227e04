"""What a run shows a person: the table on the screen, and `report.md`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ficpd.library import guarantee
from ficpd.metrics import main_metric
from ficpd.rundir import RunDir


def rows(out: Path) -> list[dict[str, Any]]:
    """The results in a run directory, zero-shot first, the method itself last."""
    directory = RunDir(out)
    folders = sorted((directory.path / "baselines").glob("*/result.json"))
    results = [json.loads(file.read_text()) for file in folders]
    own = directory.result()
    order = ["zero_shot", "local", "centralized"]
    results.sort(key=lambda r: (order.index(r["method"]) if r["method"] in order else len(order), r["label"]))
    return results + ([own] if own and own["label"] not in {r["label"] for r in results} else [])


def table(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: the task's main figure (`metrics.MAIN`), bytes as encoded."""
    main = main_metric(results[0]["metrics"]["per_client_mean"])

    def shown(score: Mapping[str, float] | None) -> str:
        return main.shown(score[main.name]) if score else "–"

    heads = ["method", "privacy", f"everyone's test {main.name}{main.unit}", f"own test, mean client{main.unit}",
             f"worst client{main.unit}", "bytes up / client / round", "seconds"]  # fmt: skip
    cells = [
        [
            r["label"],
            guarantee(r["privacy"]),
            shown(r["metrics"]["global"]),
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
    stopped = f"**Stopped early.** {own['stopped']}\n\n" if own["stopped"] else ""
    return (
        f"# {own['method']} on {backbone['name']}: {own['task']}\n\n"
        f"{own['num_clients']} clients, {own['num_rounds']} rounds, seed {own['seed']}, "
        f"{own['num_records']['train']:,} training and {own['num_records']['test']:,} test records; "
        f"prompt enters at layer {backbone['enters_at']}; {backbone['dtype']}, {backbone['attention']} attention.\n\n"
        + "\n".join(lines)
        + f"\n\n{own['dropped_updates']} updates were dropped. Everyone's test: one prompt for all test records. "
        "Own test: each client's prompt on its own test records, the mean over clients and the worst client.\n\n"
        + stopped
        + grouped(own)
        + paid(own)
    )
