"""The tables of `design.py`, from `results/design_*.json`; `tables.py` puts them into the pages."""

import json
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev

from measure import RESULTS

Figures = Mapping[str, float]
Runs = Mapping[str, Mapping[str, Figures]]
"""Cell to seed to figures."""
METHODS = {
    "zero_shot": "zero-shot", "local": "local only", "linear_probe": "a local linear probe",
    "analytic": "analytic (one ridge head from sums)", "centralized": "centralised", "fedavg": "FedAvg", "ficpd": "FICPD",
    "fpl": "FPL", "fedhpl": "FedHPL", "fedbpt": "FedBPT, plain loss", "feddtpt": "FedDTPT",
    "class_means": "class means from sums",
    "dp_cma_es": "DP-CMA-ES (FedBPT's private form)",
}  # fmt: skip
LINES = ("zero_shot", "centralized")
"""Methods that are no rivals: without a prompt, or with all records in one place."""
SETS = {
    "abstracts": "abstracts, skewed", "xnli": "XNLI, 15 languages", "pawsx": "PAWS-X, 7 languages", "pubmedqa": "PubMedQA",
    "medmcqa": "MedMCQA, 4 specialties",
}  # fmt: skip
GROUPED = {"xnli": "XNLI", "pawsx": "PAWS-X", "medmcqa": "MedMCQA"}
"""Sets whose groups are compared."""


def tables() -> dict[str, str]:
    """All tables, by the name of their place in the pages."""
    return {
        "design_methods": methods(),
        "design_fairness": fairness(),
        "design_rounds": rounds(),
        "design_shape": shape(),
        "design_epsilon": epsilon(),
        "design_attacks": attacks(),
        "design_server": server(),
    }


def methods() -> str:
    """A line a method: the mean client of each set, clients worse off, and the rounds to the best pooled method."""
    runs = load("design_methods")
    rows = []
    for method, said in METHODS.items():
        cells = {name: runs.get(f"{name}, {method}") for name in SETS}
        if not any(cells.values()):
            continue
        shown = [_accuracy(runs, name, method) for name in SETS]
        harmed = [worse_off(runs, name, method) for name, cell in cells.items() if cell]
        sent = fmean(f["bytes up"] for cell in cells.values() if cell for f in cell.values())
        off = "–" if method in ("local", *LINES) else f"{sum(a for a, _ in harmed)} of {sum(b for _, b in harmed)}"
        rows.append([said, *shown, off, shown_bytes(sent)])
    return drawn(["", *SETS.values(), "worse off", "bytes up a client, in all"], rows)


def _accuracy(runs: Runs, name: str, method: str) -> str:
    cell = runs.get(f"{name}, {method}")
    if not cell:
        return "–"
    rivals = [m for m in METHODS if m not in LINES and f"{name}, {m}" in runs]
    best = max(rivals, key=lambda rival: mean(runs[f"{name}, {rival}"], "own"))
    return f"**{spread(cell, 'own')}**" if method == best else spread(cell, "own")


def worse_off(runs: Runs, name: str, method: str) -> tuple[int, int]:
    """Clients below the better of `local` and the probe by more than a standard error of its own, and all clients."""
    harmed = clients = 0
    for seed, found in runs[f"{name}, {method}"].items():
        others = [runs.get(f"{name}, {rival}", {}) for rival in ("local", "linear_probe")]
        rivals = [of[seed] for of in others if seed in of]
        if not rivals:  # a seed that few methods were run on
            continue
        for client in (key for key in found if key.startswith("of ")):
            alone = max(rival[client] for rival in rivals) / 100
            error = sqrt(alone * (1 - alone) / found[f"tests {client}"])
            harmed += found[client] / 100 < alone - error - 1e-9
            clients += 1
    return harmed, clients


def fairness() -> str:
    """A line a method: the worst tenth of each set; of the sets with groups the two gaps."""
    runs = load("design_methods")
    heads = ["", *(f"worst tenth, {said}" for said in ("abstracts", *GROUPED.values()))]
    heads += [f"equalised odds, {said}" for said in GROUPED.values()]
    heads += [f"demographic parity, {said}" for said in GROUPED.values()]
    rows = []
    for method, said in METHODS.items():
        asked = [(name, "worst tenth") for name in ("abstracts", *GROUPED)]
        asked += [(name, gap) for gap in ("odds gap", "parity gap") for name in GROUPED]
        shown = [figure(runs.get(f"{name}, {method}"), key) for name, key in asked]
        rows += [[said, *shown]] if any(text != "–" for text in shown) else []
    return drawn(heads, rows)


def rounds() -> str:
    """A line a run: the mean client of each column, its seconds as a share of FedAvg's (mean over all), bytes."""
    runs = load("design_rounds")
    columns = list(dict.fromkeys(", ".join(cell.split(", ")[:2]) for cell in runs))
    ended = list(dict.fromkeys(cell.partition(", ")[2].partition(", ")[2] for cell in runs))
    rows = []
    for run in ended:
        cells = [runs[f"{column}, {run}"] for column in columns]
        rivals = [runs[f"{column}, {ended[0]}"] for column in columns]
        shares = [
            figures["seconds"] / rival[seed]["seconds"]
            for cell, rival in zip(cells, rivals, strict=True)
            for seed, figures in cell.items()
        ]
        method, _, number = run.partition(", ")
        said = f"{METHODS[method]}, {number} round{'s' * (number != '1')}"
        sent = fmean(figures["bytes up"] for cell in cells for figures in cell.values())
        rows.append([said, *(spread(cell, "own") for cell in cells), f"{fmean(shares):.2f}", shown_bytes(sent)])
    return drawn(["", *columns, "seconds (the first row: 1)", "bytes up a client, in all"], rows)


def shape() -> str:
    """A line for each prompt length and number of released values, a column for each number of prototypes."""
    runs = load("design_shape")
    parts = [cell.split(", ") for cell in runs]
    numbers = list(dict.fromkeys(number for *_, number in parts))
    rows = [
        [*shaped, *(figure(runs.get(", ".join((*shaped, number))), "mean client") for number in numbers)]
        for shaped in dict.fromkeys((tokens, values) for tokens, values, _ in parts)
    ]
    return drawn(["prompt", "update", *numbers], rows)


def epsilon() -> str:
    runs = load("design_epsilon")
    budgets = ("ε = 1", "ε = 2", "ε = 4", "no privacy")
    rows = [
        [METHODS[method], *(figure(runs.get(f"{method}, {budget}"), "own") for budget in budgets)]
        for method in METHODS
        if any(f"{method}, {budget}" in runs for budget in budgets)
    ]
    return drawn(["", *budgets], rows)


def attacks() -> str:
    runs = load("design_attacks")
    rows = []
    for cell, seeds in runs.items():
        method, _, said = cell.partition(", ")
        low, high = (100 * fmean(f[end] for f in seeds.values()) for end in ("at least", "at most"))
        shown = f"{100 * mean(seeds, 'advantage'):.0f} ({low:.0f} to {high:.0f})"
        losses = " / ".join(f"{mean(seeds, side):.2f}" for side in ("members' loss", "others' loss"))
        rows.append([f"{METHODS[method]}, {said}", shown, f"{mean(seeds, 'auc'):.2f}", losses])
    return drawn(["", "advantage in percent (95 %)", "AUC", "loss of members / others"], rows)


def server() -> str:
    runs = load("design_server")
    rows = []
    for cell, seeds in runs.items():
        rows.append([cell, *(figure(seeds, key) for key in ("mean client", "global", "distilled"))])
    return drawn(
        ["", "mean client", "one averaged prompt, everyone's test", "one distilled prompt, everyone's test"], rows
    )


# ---------------------------------------------------------------- figures and lines


def load(name: str) -> Runs:
    return json.loads((RESULTS / f"{name}.json").read_text())["runs"]


def mean(cell: Mapping[str, Figures], key: str) -> float:
    return fmean(figures[key] for figures in cell.values())


def figure(cell: Mapping[str, Figures] | None, key: str) -> str:
    return spread(cell, key) if cell and all(key in figures for figures in cell.values()) else "–"


def spread(cell: Mapping[str, Figures], key: str) -> str:
    values = [figures[key] for figures in cell.values()]
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def drawn(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown_bytes(value: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:.0f} B"
