"""Describes this installation: its registries, recipes and machine."""

from typing import Any

import torch

from ficpd import __version__, registry
from ficpd.backbones.autotune import machine_info
from ficpd.backbones.catalog import NAMED
from ficpd.experiments.config import recipes


def environment_info() -> dict[str, Any]:
    """What this installation knows: the registries, recipes and the machine."""
    known = {
        kind: ", ".join(registry.names(kind))
        for kind in ("methods", "tasks", "backbones", "optimizers", "privacy", "engines")
    }
    named = "; ".join(f"{name}: {entry.about}" for name, entry in NAMED.items())
    return {
        "ficpd": __version__, **known, "named backbones": named, "recipes": ", ".join(recipes()),
        "machine": machine_info(torch.device("cpu")), "cuda": torch.cuda.is_available(),
    }  # fmt: skip
