"""Describes run directories, finished or not, and this installation, without torch."""

import json
import os
import platform
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from ficpd import __version__, registry
from ficpd.backbones.catalog import NAMED
from ficpd.errors import RunError
from ficpd.library.card import guarantee

RECIPE, RESULT, PAGE = "experiment.toml", "result.json", "report.html"
REGISTRIES = ("methods", "tasks", "backbones", "optimizers", "privacy", "compression", "engines")
PACKAGES = ("torch", "transformers", "peft", "flwr", "fastapi", "openai", "tensorboard", "mlflow", "wandb")


def recipes(under: str = "") -> list[str]:
    """Lists the recipes of the package; under "compare", its comparisons."""
    folder = resources.files("ficpd.experiments") / "recipes" / under
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def run_facts(directory: Path) -> dict[str, Any]:
    """Returns the state and scores of a run, as JSON values; empty if the directory holds no run.

    Raises `RunError` if one of its files cannot be read.
    """
    if not (directory / RECIPE).is_file():
        return {}
    try:
        experiment = tomllib.loads((directory / RECIPE).read_text(encoding="utf-8"))
        rounds, planned = _count_rounds(directory), experiment["federation"]["num_rounds"]
        result = _read_json(directory / RESULT)
        facts = {
            "run": experiment["name"], "method": experiment["method"]["name"], "seed": experiment["seed"],
            "rounds": rounds, "planned_rounds": planned, "finished": bool(result) and (directory / PAGE).is_file(),
        }  # fmt: skip
        if not facts["finished"]:
            return {**facts, "continue": f"ficpd run --resume --out {directory}"}
        return {**facts, "guarantee": guarantee(result["privacy"]), "scores": _scores(result), **_stopped(result)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{directory} cannot be read as a run: {error!r}. Run it again in a new directory") from error


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the scores of a simulation; empty among real sites."""
    found = result.get("metrics") or {}
    names = {"own": "per_client_mean", "worst": "per_client_worst", "global": "global_prompt", "zero_shot": "zero_shot"}
    return {name: found[key] for name, key in names.items() if found.get(key)}


def _stopped(result: dict[str, Any]) -> dict[str, Any]:
    return {"stopped": result["stopped"]} if result.get("stopped") else {}


def _count_rounds(directory: Path) -> int:
    file = directory / "rounds.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def installation_facts() -> dict[str, Any]:
    """Returns the parts, backbones and recipes of this installation, and its machine, as JSON values."""
    return {
        "ficpd": __version__,
        **{kind: registry.names(kind) for kind in REGISTRIES},
        "named_backbones": {name: entry.about for name, entry in NAMED.items()},
        "recipes": recipes(),
        "comparisons": recipes("compare"),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "gpus": _gpus(),
    }


def installed_version(package: str) -> str | None:
    """Returns a package's version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(models, platform.processor() or platform.machine())


def _gpus() -> list[str]:
    """Lists the NVIDIA GPUs of Linux's driver. Elsewhere `ficpd info --verbose` asks torch."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
