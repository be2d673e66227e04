"""A run's directory and a comparison, written by hand: everything that a page can show, in a second."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ficpd import rng
from ficpd.evaluation.fairness import over_clients, share_worse_off
from ficpd.experiments.run_directory import RunDir
from ficpd.federation.rounds import Round
from ficpd.library.library import PromptLibrary
from ficpd.types import Prompt, State

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
LABEL = '<b onmouseover=window.hacked=3>&amp; "{{ 7 * 7 }}" \' \\u003c %{x} $1$ é 中文'
TOML = f"""name = "made up"
[method]
name = "ficpd"
[data]
source = "records.csv"
[partition]
kind = "column"
[task]
name = "classification"
labels = {{ good = {json.dumps(LABEL)} }}
"""


def run(folder: Path, clients: int = 12) -> Path:
    """Four methods, three rounds, two prototypes, a ledger of two lines, an audit and some synthetic examples."""
    names = [HOSTILE, *(f"site-{i}" for i in range(1, clients))]
    folder.mkdir(parents=True)
    own, alone = result("ficpd", names, 0.8, 2.0), result("local", names, 0.75, 0.0)
    of_own, of_alone = own["metrics"]["per_client"], alone["metrics"]["per_client"]
    own["fairness"]["worse_off_than_local"] = share_worse_off(of_own, of_alone)
    own |= {
        "clusters": {
            "member": {n: i % 2 for i, n in enumerate(names)}, "number": 2, "adjusted_rand": {"domain": 0.5, LABEL: None}
        },
        "personalization": {
            "cluster": {"own": {"accuracy": 0.8}, "others": {"accuracy": 0.7}},
            "global": {"own": {"accuracy": 0.75}, "others": None},
        },
        "unseen_clients": {"global_prompt": {"accuracy": 0.7}, "assigned": {"accuracy": 0.72}},
        "distillation": {"writer": LABEL, "how": "kl", "gained": True, "examples": {"all": "3 examples"}, "memorised": {}},
        "excluded_updates": {HOSTILE: 2},
    }  # fmt: skip
    own["metrics"]["distilled"] = {"accuracy": 0.7}
    write_result(folder, own)
    for other in (result("zero_shot", names, 0.6, 0.0), alone, result("fedavg", names, 0.78, None)):
        write_result(folder / "baselines" / other["method"], other)
    (folder / "experiment.toml").write_text(TOML)
    (folder / "resolved.toml").write_text(TOML)
    left(folder, names)
    examples = [{"text": HOSTILE, "label": LABEL, "prototype": "prototype-0", "agreement": 0.9}]
    examples += [{"text": f"text {i}", "label": "good", "prototype": "global", "agreement": 1.0} for i in range(50)]
    (folder / "synthetic.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (folder / "audit.json").write_text(json.dumps(audit()))
    return folder


def write_result(folder: Path, one: Mapping[str, Any]) -> None:
    directory = RunDir(folder)
    directory.write("result.json", json.dumps(one))
    directory.write_rounds(rounds_of(one["num_rounds"]))


def rounds_of(number: int) -> list[Round]:
    """Scored but for the last, as a run is."""
    scored = {"own_accuracy": 0.7, "global_accuracy": 0.65}
    scores = {r: scored if r < number else {} for r in range(1, number + 1)}
    return [Round(r, 12, 11, {HOSTILE: "no reply"}, 1000, 2000, 1.5, 0.5, found) for r, found in scores.items()]


def result(method: str, names: list[str], accuracy: float, epsilon: float | None) -> dict[str, Any]:
    """`epsilon` 0: nothing leaves; None: without privacy."""
    own = {n: {"accuracy": accuracy - 0.02 * i, "macro_f1": accuracy} for i, n in enumerate(names)}
    mean, worst = (f(s["accuracy"] for s in own.values()) for f in (lambda v: sum(v) / len(names), min))
    return {
        "method": method,
        "label": method,
        "backbone": {
            "name": "tiny", "fingerprint": "tiny-0", "dtype": "float32", "attention": "eager", "enters_at": 1
        },
        "task": "classification",
        "num_clients": len(names),
        "num_records": {"train": 1234, "test": 321},
        "num_rounds": 0 if method == "zero_shot" else 3,
        "seed": 0,
        "metrics": {
            "global_prompt": None if method == "local" else {"accuracy": accuracy},
            "per_client": own,
            "per_client_mean": {"accuracy": mean},
            "per_client_worst": {"accuracy": worst},
            "zero_shot": {"accuracy": 0.6},
        },
        "bytes": {
            "up_per_client_round": 0 if method == "zero_shot" else 289.0, "down_per_client_round": 1000.0,
            "up_total": 10_000, "down_total": 30_000,
        },
        "seconds": {"train": 4.0, "aggregate": 1.0},
        "dropped_updates": 3,
        "compression": {"name": "none", "bits": 32},
        "machine": {"cpu": "some"},
        "versions": {"ficpd": "0.1.0"},
        "clusters": None,
        "fairness": {"clients": over_clients(own, 0)},
        "privacy": privacy(names, epsilon),
        "stopped": None,
    }  # fmt: skip


def privacy(names: list[str], epsilon: float | None) -> dict[str, Any]:
    if epsilon is None:
        return {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None, "noise": None}
    if not epsilon:
        return {
            "mechanism": "none is needed: nothing leaves", "unit": "record", "epsilon": 0.0, "delta": 0.0,
            "noise": None,
        }  # fmt: skip
    line = {"releases": 6, "sampling_rate": 0.02, "noise_multiplier": 0.9, "epsilon_alone": 1.5, "share": 0.75}
    return {
        "mechanism": "record_gaussian", "unit": "record", "neighbouring": "add or remove one", "delta": 1e-5,
        "budget": 2.0, "clip_norm": 0.5, "noise": "simulated", "noise_multiplier": [0.5, 0.9], "accountant": "an accountant",
        "epsilon": epsilon, "site_that_spent_most": names[0],
        "epsilon_of_sites": {n: epsilon - 0.01 * i for i, n in enumerate(names)},
        "lines": [{"name": "step", **line}, {"name": "total:labels", **line, "share": 0.25, "epsilon_alone": 0.5}],
    }  # fmt: skip


def left(folder: Path, names: list[str]) -> None:
    """The library with two tasks' keys, and the checkpoint with how clients stood off the global prompt."""
    start = Prompt(torch.zeros(3, 8), "tiny-0", 1)

    def drawn(*what: object) -> torch.Tensor:
        return torch.randn(3, 8, generator=rng.make_generator("made up", *what))

    prompts = {name: start.with_vectors(drawn(name)) for name in ("global", "prototype-0", "prototype-1")}
    keys = {name: torch.nn.functional.normalize(drawn("key", name)[0], dim=0) for name in prompts}
    card = {"backbone": {"name": "tiny"}, "tasks": {LABEL: {"name": "classification"}}}
    PromptLibrary(start, prompts, card, keys).save(folder / "library")
    shared = prompts["global"].vectors_PD
    ways = {n: prompts[f"prototype-{i % 2}"].vectors_PD - shared for i, n in enumerate(names)}
    of_clients = {f"offset/{n}": way + 0.3 * drawn(n) for n, way in ways.items()}
    RunDir(folder).save(State({"global": shared, **of_clients}, {}), 0, rounds_of(3), {})


def audit() -> dict[str, Any]:
    attack = {
        "auc": 0.52, "auc_interval": [0.5, 0.54], "advantage": 0.03, "advantage_interval": [0.0, 0.06],
        "tpr": {"0.01": 0.02, "0.001": None}, "tpr_interval": {"0.01": [0.01, 0.03], "0.001": None},
        "num_members": 500, "num_nonmembers": 400,
    }  # fmt: skip
    bound = {"epsilon": 2.5, "stated": 2.0, "delta": 1e-5, "reach": 6.0, "runs": 1000}
    return {
        "run": LABEL, "method": "ficpd", "prompt": "global", "guarantee": "ε = 2.00 per record",
        "epsilon": 2.0, "delta": 1e-5,
        "num_members": 500, "num_nonmembers": 400, "num_shadows": 4, "shadow_records": 100,
        "attacks": {"loss": attack, "likelihood ratio": attack}, "advantage": 0.03, "advantage_interval": [0.0, 0.06],
        "mechanism": bound, "planted": None, "seed": 0, "alarm": True,
    }  # fmt: skip


# ---------------------------------------------------------------- a comparison


def comparison(folder: Path) -> Path:
    """Three methods and a line on two tasks at two budgets, three seeds.

    The schema is `ficpd.experiments.comparison.schema`."""
    folder.mkdir(parents=True)
    methods = {"zero_shot": 0.6, HOSTILE: 0.7, "fedavg": 0.74, "ficpd": 0.8}
    seeds_, budgets, tasks = [0, 1, 2], {"strong": 1.0, "given": None}, ("abstracts", LABEL)
    where = [(task, budget) for budget in budgets for task in tasks]
    metric = {"name": "accuracy", "scale": 100, "digits": 1, "unit": " %", "less_is_better": False}
    tree = {
        "ficpd": "0.1.0", "name": LABEL, "figure": "own", "reference": "ficpd", "lines": ["zero_shot"],
        "confidence": 0.95, "seeds": seeds_,
        "methods": {m: {"name": "fedavg", "line": m == "zero_shot", "private": True, "settings": {}} for m in methods},
        "tasks": {task: {"task": "classification", "backbone": "tiny", "metric": metric} for task in tasks},
        "partitions": {"given": {}},
        "budgets": {
            name: {"epsilon": e, "rounds": 3, "bytes": None, "queries": None} for name, e in budgets.items()
        },
        "sweeps": {},
        "cells": [
            cell(method, task, budget, seed, value, budgets[budget])
            for task, budget in where for method, value in methods.items() for seed in seeds_
        ],
        "conditions": [
            {**at(task, budget), "methods": {m: summary(m, value, budgets[budget]) for m, value in methods.items()}}
            for task, budget in where
        ],
        "settings": [
            {
                "partition": "given", "budget": budget, "sweep": {}, "ranked": list(tasks),
                "friedman": {"statistic": 4.0, "p": 0.13},
                "methods": {
                    m: {"rank": None if m == "zero_shot" else 4.0 - i,
                        "against": None if m == "ficpd" else against(-0.05, 0.04)}
                    for i, m in enumerate(methods)
                },
            }
            for budget in budgets
        ],
        "fronts": [
            {
                "task": "abstracts", "partition": "given", "cost": cost,
                "points": [
                    {"method": m, "budget": "strong", "sweep": {}, "cost": 1000.0 * i, "value": v, "on_front": m != "fedavg"}
                    for i, (m, v) in enumerate(methods.items())
                ],
            }
            for cost in ("bytes", "epsilon")
        ],
        "targets": [
            {
                **at(task, budget), "share": share, "target": 0.75,
                "methods": {
                    m: {"seeds": [None] * 3, "of": seeds_, "reached": 3 if m == "ficpd" else 0,
                        **dict.fromkeys(
                            ("rounds", "bytes", "bytes_up", "bytes_down", "queries", "seconds"), 2 if m == "ficpd" else None
                        )}
                    for m in methods
                },
            }
            for task, budget in where for share in (0.9, 0.95)
        ],
        "counts": {"done": 47, "failed": 1},
    }  # fmt: skip
    tree["cells"][-1] |= {"status": "failed", "reason": HOSTILE, "figures": None, "curve": []}
    (folder / "compare.json").write_text(json.dumps(tree))
    (folder / "compare.toml").write_text(TOML)
    return folder


def at(task: str, budget: str) -> dict[str, Any]:
    return {"task": task, "partition": "given", "budget": budget, "sweep": {}}


def cell(method: str, task: str, budget: str, seed: int, value: float, epsilon: float | None) -> dict[str, Any]:
    point = {"everyone": value, "bytes_up": 10, "bytes_down": 20, "queries": 5, "seconds": 1.0}
    return {
        **at(task, budget), "method": method, "seed": seed, "status": "done", "reason": None, "key": "k",
        "figures": {"own": value, "everyone": value, "worst": value - 0.1}, "at_round": 3, "rounds": 3,
        "bytes": {"up": 10, "down": 20, "total": 30}, "queries": 5, "seconds": 3.0, "epsilon": epsilon, "guarantee": "none",
        "stopped": None, "per_client": {f"site-{i}": value + (i - 2) / 20 for i in range(5)} | {HOSTILE: None}, "data": "0",
        "curve": [{**point, "round": r, "own": value - 0.05 * (3 - r) + 0.01 * seed} for r in (1, 2, 3)],
    }  # fmt: skip


def summary(method: str, value: float, epsilon: float | None) -> dict[str, Any]:
    return {
        "n": 3, "mean": value, "sd": 0.01, "interval": [value - 0.02, value + 0.02], "everyone": value, "worst": value - 0.1,
        "bytes": 30.0, "bytes_up": 10.0, "bytes_down": 20.0, "queries": 5.0, "seconds": 3.0, "epsilon": epsilon,
        "against": None if method == "ficpd" else against(value - 0.8, 0.01 if method == "fedavg" else 0.2),
    }  # fmt: skip


def against(difference: float, p: float) -> dict[str, Any]:
    interval = [difference - 0.02, difference + 0.02]
    return {"pairs": 3, "difference": difference, "interval": interval, "p": p, "p_holm": p, "why": None}
