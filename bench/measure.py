"""What every benchmark shares: timing in pairs, and a result file that says which machine and commit it is from."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from ficpd.backbones.autotune import machine_info
from ficpd.experiments import config
from ficpd.experiments.results import RunResult, Scores

RESULTS = Path(os.environ.get("FICPD_BENCH_RESULTS") or Path(__file__).parent / "results")
CHANGES = os.environ.get("FICPD_BENCH_CHANGES", "").splitlines()
"""Settings `a.b=c` that replace those of every experiment of a bench, to run it at toy size."""
MOST_RECORDS = int(os.environ.get("FICPD_BENCH_RECORDS", "0")) or None
"""Most training records of a client, for a bench at toy size."""
if (CHANGES or MOST_RECORDS) and not os.environ.get("FICPD_BENCH_RESULTS"):
    raise SystemExit(
        "FICPD_BENCH_CHANGES or _RECORDS without FICPD_BENCH_RESULTS: toy figures need a folder of their own"
    )


def parse(text: str, changes: Iterable[str] = (), records: bool = True) -> config.Experiment:
    """The experiment of a TOML text, with `changes` and then `CHANGES`."""
    return config.parse(text, "bench", [*changes, *CHANGES], records)


def read(recipe: str, changes: Iterable[str] = ()) -> config.Experiment:
    """The experiment of a recipe of the package, with `changes` and then `CHANGES`."""
    return config.read(recipe, [*changes, *CHANGES])


def of_everyone(result: RunResult) -> Scores:
    """The scores of a run's one prompt on all test records."""
    assert result.scores.global_prompt is not None, f"{result.method} shares no prompt"
    return result.scores.global_prompt


def paired(works: Mapping[str, Callable[[], object]], repeats: int = 7, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each work, taken in turn (A B C A B C ...), after one unmeasured turn: drift hits all alike."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def quietness(seconds: float = 2.0) -> dict[str, float | bool]:
    """Whether the machine is quiet enough for timings.

    others: the share of the processors that other work took while this process slept. noise: the spread of twenty equal
    matrix products, the 90th percentile over the median less 1. A machine is quiet under 5 % and 10 %.
    """
    psutil.cpu_percent()
    time.sleep(seconds)
    others = psutil.cpu_percent() / 100
    left = torch.ones(384, 384)
    products = paired({"product": lambda: [left.mm(left) for _ in range(100)]}, 20)["product"]
    noise = statistics.quantiles(products, n=10)[-1] / statistics.median(products) - 1
    found = {"load": round(os.getloadavg()[0], 2), "others": round(others, 3), "noise": round(noise, 3)}
    quiet = others < 0.05 and noise < 0.1
    if not quiet:
        print(
            f"This machine is not quiet: {found}. The seconds are not to be trusted, and the ratios little.", flush=True
        )
    return {**found, "quiet": quiet}


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Median, least and largest of the ratio `over / under`, turn by turn."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    return {"median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)}


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation (n - 1) over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "sd": round(deviation, 4), "n": len(values)}


Runs = dict[str, dict[str, dict[str, float]]]
"""Cell to seed to figures: what a bench keeps of every single run, so that seeds can be added to it later."""


def before(name: str, setting: str) -> Runs:
    """The runs that `results/NAME.json` holds of this very setting; none of another."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found.get("runs", {}) if found.get("setting") == setting else {}


def table(runs: Runs) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and spread over its seeds of every figure that all of a cell's runs have."""
    return {
        cell: {
            key: spread([figures[key] for figures in seeds.values()])
            for key in next(iter(seeds.values()))
            if all(key in figures for figures in seeds.values())
        }
        for cell, seeds in runs.items()
    }


class Cells:
    """The runs of one bench: each is made once, and saved as soon as it is there."""

    def __init__(self, name: str, setting: str):
        self.name, self.setting, self.runs = name, setting, before(name, setting)

    def has(self, cell: str, seed: int) -> bool:
        return str(seed) in self.runs.get(cell, {})

    def add(self, cell: str, seed: int, run: Callable[[], dict[str, float]]) -> None:
        if self.has(cell, seed):
            return
        of_cell = self.runs.setdefault(cell, {})
        began = time.time()
        of_cell[str(seed)] = {name: round(value, 4) for name, value in run().items()}
        print(f"{seed} {cell:44} {of_cell[str(seed)]} {time.time() - began:.0f} s", flush=True)
        save(self.name, {"setting": self.setting, "cells": table(self.runs), "runs": self.runs})


def save(name: str, result: Mapping[str, Any], device: str = "cpu") -> Path:
    """`results/NAME.json`, with machine, commit and date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    whole = {
        "bench": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "machine": machine_info(torch.device(device)),
        **result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=2) + "\n")
    print(f"saved {path}")
    return path
