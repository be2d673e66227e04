"""The tables of methods against one another in README.md and docs/results.md, from `results/compare_*.json`, and that of
what a library is worth to newcomers, from `results/unseen_*.json`.

python bench/tables.py [--check]

Each stands between `<!-- compare PART -->` (or `first`, `unseen`, `ablation`, `defaults`, `shared`, `engine`,
`design_PART`) and `<!-- end -->`, and is written anew; `--check` only says if one would be another. Means over seeds
of the figure in percent, in bold the best of a column's methods (lines left out); after it, over several seeds, the
standard deviation.
"""

import argparse
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import design_tables
from design_tables import shown_bytes
from measure import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
NAMES = {
    "zero_shot": "zero-shot",
    "local": "local only",
    "centralized": "centralised",
    "linear_probe": "a local linear probe",
    "analytic": "analytic (one ridge head from sums)",
    "class_means": "class means from sums",
    "fedavg": "FedAvg",
    "fedavg, label prior": "FedAvg, label priors",
    "fedavg, label prior, extrapolated": "FedAvg, label priors, extrapolated steps",
    "fedprox": "FedProx",
    "fedhpl": "FedHPL (answers are shared, prompts stay)",
    "fedbpt": "FedBPT",
    "fedbpt, plain loss": "FedBPT, plain loss, first σ 0.3",
    "fedlora": "FedLoRA, rank 8",
    "feddtpt": "FedDTPT (prompts of words)",
    "icl": "examples before the text",
    "ficpd": "FICPD",
    "ficpd, number found": "FICPD, number of prototypes found",
    "ficpd, label prior": "FICPD, label priors",
    "ficpd, extrapolated": "FICPD, extrapolated steps",
    "ficpd, label prior, extrapolated": "FICPD, label priors, extrapolated steps",
    "ficpd, black box": "FICPD by losses alone (SPSA)",
    "ficpd, black box, label prior": "the same, label priors",
    "fpl": "FPL",
    "fpl, label prior": "FPL, label priors",
    "dp_fpl": "DP-FPL",
    "prompt_dpsgd": "PromptDPSGD (nothing leaves)",
    "dp_zo": "DP-ZO",
    "dp_cma_es": "DP-CMA-ES",
}
SKEW = "labels by Dirichlet 0.3"
FIRST = {
    "polarity": "polarity", "polarity, skewed": "polarity", "abstracts": "abstracts", "abstracts, skewed": "abstracts",
    "CLINC": "clinc", "CLINC, skewed": "clinc",
}  # fmt: skip
FIRST_METHODS = ("zero_shot", "local", "linear_probe", "analytic", "fedavg", "centralized", "ficpd")
"""Columns and lines of the README's table."""
GROUPS = {"polarity": "polarity", "abstracts": "abstracts", "clinc": "CLINC", "sib": "SIB", "banking": "Banking"}
"""The tasks of `library_defaults`."""
SHARED = {"shared_gaussian": "shared", "record_gaussian": "each its own"}
"""Mechanisms of `privacy_shared`."""
ENGINES = {"minilm": "MiniLM", "multilingual-e5-small": "E5", "smollm2": "SmolLM2"}
"""Backbones of `engine-NAME`."""
BARE = ("a forward for each thread", "forwards of all threads", "one padded batch")
"""The bare ways of `engine-NAME`."""
NEWCOMERS = {"languages": "a language", "domains": "a domain of polarity", "tasks": "a task of the mix"}
"""`unseen_PART`, and what was left out."""
SHOTS = (0, 4, 16, 64)
WAYS = {
    "no prompt": {
        "leave": "no prompt", "demonstrations 0.4": "no prompt, demonstrations", "ensemble": "no prompt, ensemble",
    },
    "none": {
        "leave": "the task's own words", "tune 4": "own words, 4 steps", "tune 20": "own words, 20 steps",
        "ensemble": "own words, ensemble",
    },
    "vocabulary": {
        "leave": "the public start", "tune 4": "public start, 4 steps", "tune 20": "public start, 20 steps",
        "ensemble": "public start, ensemble",
    },
    "library": {
        "leave": "library: unchanged", "nearest": "library: nearest", "tune 4": "library: 4 steps",
        "tune 20": "library: 20 steps", "head": "library: head", "demonstrations 0.4": "library: demonstrations",
        "mixture": "library: mixture", "ensemble": "**library: ensemble**", "auto": "library: `auto`",
    },
}  # fmt: skip
"""What stands beside whom in `unseen_*.json` and in the table: of demonstrations the smaller weight, 0.4."""
UNTUNED = {
    ("no prompt", "leave"): ("no prompt", "start"), ("none", "leave"): ("none", "start"),
    ("vocabulary", "leave"): ("library", "start"), ("library", "leave"): ("library", "global"),
    ("library", "nearest"): ("library", "nearest key"), ("library", "auto"): ("library", "auto"),
}  # fmt: skip
"""Where the figure without a record stands, of a way that needs none."""
Column = tuple[str, Callable[[str], tuple[float | None, str]], bool]
"""Heading; of a method the value and how it is shown; whether the best is marked."""


def table(found: Mapping[str, Any]) -> str:
    """All that one comparison found."""
    columns = [column for build in (accuracies, costs, reached) for column in build(found)]
    labels = sorted(found["methods"], key=lambda label: (_place(label), list(found["methods"]).index(label)))
    return drawn(columns, labels, found["lines"])


def first(found: Mapping[str, Any]) -> str:
    """The README's table: accuracies of a few methods, without spreads, and the bytes that a client sends in all."""
    columns: list[Column] = []
    for heading, task in FIRST.items():
        wanted = {"task": task, "partition": SKEW if "skewed" in heading else "alike"}
        (one,) = [one for one in found["conditions"] if wanted.items() <= one.items()]
        columns.append((heading, partial(_accuracy, one, spread=False), True))
    clients = found["partitions"]["alike"]["num_clients"]
    (up,) = [show for heading, show, _ in costs(found, clients) if heading == "bytes up"]

    def sent(label: str) -> tuple[float | None, str]:
        return (None, "–") if label in found["lines"] else up(label)

    return drawn([*columns, ("sent by a client, in all", sent, False)], FIRST_METHODS, found["lines"])


def drawn(columns: Sequence[Column], labels: Sequence[str], lines: Container[str]) -> str:
    """A line a method that has a figure, the best that is no line marked."""
    cells = {label: [show(label) for _, show, _ in columns] for label in labels}
    for place, (_, _, marked) in enumerate(columns):
        values = {label: row[place][0] for label, row in cells.items() if label not in lines}
        known = [value for value in values.values() if value is not None]
        for label, value in values.items():
            if marked and known and value is not None and round(value, 3) == round(max(known), 3):
                cells[label][place] = value, f"**{cells[label][place][1]}**"
    rows = [["", *(heading for heading, _, _ in columns)], ["---"] * (len(columns) + 1)]
    told = [label for label in labels if any(text != "–" for _, text in cells[label])]
    rows += [[NAMES.get(label, label), *(text for _, text in cells[label])] for label in told]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _place(label: str) -> int:
    return {"zero_shot": 0, "local": 1, "centralized": 3}.get(label, 2)


def accuracies(found: Mapping[str, Any]) -> list[Column]:
    """A column for each condition, named by what there is more than one of."""
    axes = [axis for axis in ("task", "partition", "budget") if len({one[axis] for one in found["conditions"]}) > 1]

    return [
        (", ".join(str(one[axis]) for axis in axes) or "accuracy", partial(_accuracy, one), True)
        for one in found["conditions"]
    ]


def _accuracy(one: Mapping[str, Any], label: str, spread: bool = True) -> tuple[float | None, str]:
    figure = one["methods"].get(label)
    if not figure or figure["mean"] is None:
        return None, "–"
    after = f" ± {100 * figure['sd']:.1f}" if spread and figure["sd"] is not None else ""
    return figure["mean"], f"{100 * figure['mean']:.1f}{after}"


def costs(found: Mapping[str, Any], clients: int = 1) -> list[Column]:
    """Of a whole run, over all rounds and divided by `clients`; the mean over the conditions."""

    def column(heading: str, key: str, shown: Callable[[float], str]) -> Column:
        def show(label: str) -> tuple[float | None, str]:
            values = [(one["methods"].get(label) or {}).get(key) for one in found["conditions"]]
            known = [value for value in values if value is not None]
            return (None, shown(sum(known) / len(known) / clients)) if known else (None, "–")

        return heading, show, False

    return [
        column("bytes up", "bytes_up", shown_bytes),
        column("bytes down", "bytes_down", shown_bytes),
        column("queries", "queries", lambda value: f"{value / 1000:,.0f} k"),
    ]


def reached(found: Mapping[str, Any]) -> list[Column]:
    """Rounds to 95 % of the centralised line, where there is one condition."""
    if len(found["conditions"]) > 1:
        return []
    (target,) = [one for one in found["targets"] if one["share"] == 0.95] or [None]

    def show(label: str) -> tuple[float | None, str]:
        seen = target["methods"].get(label) if target else None
        if not seen or not seen["of"] or found["conditions"][0]["methods"][label]["mean"] is None:
            return None, "–"
        rounds = [str(seed["round"]) if seed else "never" for seed in seen["seeds"]]
        return None, ", ".join(rounds)

    return [("rounds to 95 % of centralised", show, False)]


# ---------------------------------------------------------------- newcomers


def unseen() -> str:
    """A line for each way, a column for each kind of newcomer: the mean at each number of records, and the largest standard
    deviation of it over seeds."""
    parts = {part: _by_newcomer(part) for part in NEWCOMERS}
    heads = [f"{heading} ({len(parts[part])} newcomers)" for part, heading in NEWCOMERS.items()]
    rows = [["", *heads], ["---"] * (len(heads) + 1)]
    for side, ways in WAYS.items():
        for way, name in ways.items():
            rows.append([name, *(_at_shots(parts[part], side, way) for part in NEWCOMERS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _by_newcomer(part: str) -> dict[tuple[str, str], dict[tuple[int, str], Mapping[str, float]]]:
    """(who, seed) to (shots, side) to the figures; only of those who were measured at every number of shots."""
    found: dict[tuple[str, str], dict[tuple[int, str], Mapping[str, float]]] = {}
    for name, seeds in json.loads((RESULTS / f"unseen_{part}.json").read_text())["runs"].items():
        who, shots, side = name.split(", ", 2)
        for seed, figures in seeds.items():
            found.setdefault((who, seed), {})[int(shots.split()[0]), side] = figures
    return {who: at for who, at in found.items() if {shots for shots, _ in at} == set(SHOTS)}


def _at_shots(
    newcomers: Mapping[tuple[str, str], Mapping[tuple[int, str], Mapping[str, float]]], side: str, way: str
) -> str:
    shown, spreads = [], []
    for shots in SHOTS:
        of, name = (side, way) if shots else UNTUNED.get((side, way), ("", ""))
        by_seed: dict[str, list[float]] = {}
        for (_, seed), at in newcomers.items():
            if name in (figures := at.get((shots, of), {})):
                by_seed.setdefault(seed, []).append(figures[name])
        values = [value for found in by_seed.values() for value in found]
        whole = len(values) == len(newcomers)
        shown.append(f"{fmean(values):.1f}" if whole else "–")
        spreads += [stdev(map(fmean, by_seed.values()))] if whole and len(by_seed) > 1 else []
    return " / ".join(shown) + (f" ± {max(spreads):.1f}" if spreads else "")


def ablation() -> str:
    """A line for each number of prototypes: the mean client under its prototype. Then one prompt for all: the prototypes'
    plain mean, and what is distilled from them."""
    cells = json.loads((RESULTS / "library_ablation.json").read_text())["cells"]
    rows = [["prototypes", "mean client", "their mean for all", "distilled for all"], ["---"] * 4]
    for number in (1, 2, 5, 10, 20):
        found = cells[f"{number} prototypes, delta"]
        values = [found[name] for name in ("mean client", "global", "distilled")]
        rows.append([str(number), *(f"{value['mean']:.1f} ± {value['sd']:.1f}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def defaults() -> str:
    """A line for each method with its own defaults, of many tasks: the mean client, the mean of tasks, each task's, and the
    seeds."""
    cells = json.loads((RESULTS / "library_defaults.json").read_text())["cells"]
    heads = ["", "mean client", "mean of tasks", *GROUPS.values(), "bytes up, a round", "seeds"]
    rows = [heads, ["---"] * len(heads)]
    best = max(cell["mean client"]["mean"] for name, cell in cells.items() if "," not in name)
    for name, cell in cells.items():
        method, comma, rest = name.partition(",")
        mean = cell["mean client"]
        own = f"{mean['mean']:.1f}" + (f" ± {mean['sd']:.1f}" if mean["n"] > 1 else "")
        own = f"**{own}**" if not comma and mean["mean"] == best else own
        tasks = [cell[group]["mean"] for group in GROUPS]
        figures = [f"{value:.1f}" for value in (fmean(tasks), *tasks)]
        rows.append(
            [f"{NAMES[method]}{comma}{rest}", own, *figures, shown_bytes(cell["bytes up"]["mean"]), str(mean["n"])]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shared() -> str:
    """A line for each run, a column for each noise and ε: the mean client's own test; in brackets one prompt, everyone's."""
    cells = json.loads((RESULTS / "privacy_shared.json").read_text())["cells"]
    noises = {"none": "no noise"} | {
        f"{name}, epsilon {epsilon}": f"{said}, ε = {epsilon}" for name, said in SHARED.items() for epsilon in (4, 2, 1)
    }
    rows = [["", *noises.values()], ["---"] * (len(noises) + 1)]
    for run in dict.fromkeys(name.rpartition(", ")[2] for name in cells):
        found = [cells.get(f"{noise}, {run}") for noise in noises]
        shown = ["–" if c is None else f"{c['own test']['mean']:.1f} ({c['accuracy']['mean']:.1f})" for c in found]
        rows.append([run, *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def engine() -> str:
    """A line for each model, dtype and size; the bare backbone's seconds over the engine's, at layer 0 and in the middle.

    `reproducible`: the fastest bare way over the engine with its defaults.
    """
    ways = [*BARE, "reproducible"]
    rows = [["clients x records", *ways, *(f"the middle: {way}" for way in ways)]]
    rows.append(["---"] * len(rows[0]))
    for name, said in ENGINES.items():
        found = json.loads((RESULTS / f"engine-{name}.json").read_text())
        for dtype in (key for key in found if key in ("float32", "bfloat16")):
            cells = found[dtype]["efficiency"]
            layers = list(dict.fromkeys(cell.partition(", ")[0] for cell in cells))
            for size in dict.fromkeys(cell.partition(", ")[2] for cell in cells):
                found_here = [cells[f"{layer}, {size}"] for layer in layers]
                ratios = [r for c in found_here for r in (*(c["ratios"].get(way) for way in BARE), c["reproducible"])]
                shown = ["–" if ratio is None else f"{ratio['median']:.2f}" for ratio in ratios]
                rows.append([f"{said}, {dtype}, {size}", *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def written(text: str, tables: Mapping[str, str]) -> str:
    def between(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]}\n{match[3]}" if match[2] in tables else match[0]

    return re.sub(r"(<!-- compare (\w+) -->)\n.*?(<!-- end -->)", between, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table is another one")
    args = parser.parse_args(arguments)
    found = {
        path.stem.removeprefix("compare_"): json.loads(path.read_text())
        for path in sorted(RESULTS.glob("compare_*.json"))
    }
    tables = {part: table(one) for part, one in found.items()} | {
        "first": first(found["joining"]),
        "unseen": unseen(),
        "ablation": ablation(),
        "defaults": defaults(),
        "shared": shared(),
        "engine": engine(),
        **design_tables.tables(),
    }
    before = {page: page.read_text() for page in PAGES}
    after = {page: written(text, tables) for page, text in before.items()}
    if args.check:
        raise SystemExit(int(after != before))
    for page, text in after.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
