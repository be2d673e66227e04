"""Measures once which dtype and attention are fastest for a backbone on this machine, and caches the choice.

bfloat16 is faster on a CPU with matrix units for it and far slower on others. So the choice is measured.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from ficpd import storage
from ficpd.backbones.query_engine import THREADS, QueryEngine
from ficpd.interfaces import Backbone
from ficpd.types import Batch, ModelOutput, Objective, Prompt, Query

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS, TOKENS = 8, 32
REPEATS = 5


class ExecutionConfig(NamedTuple):
    dtype: str
    attention: str


def machine_info(device: torch.device) -> dict[str, str | int]:
    """Describes the parts of the machine and its packages that a timing depends on."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    cpu = next(models, platform.processor() or platform.machine())
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": f"{cpu} {capability}", "threads": THREADS, "torch": torch.__version__}


def autotune(
    load: Callable[[ExecutionConfig], Backbone], identity: str, device: torch.device, fixed: ExecutionConfig
) -> tuple[ExecutionConfig, Backbone | None]:
    """Returns the fastest choice for a training step, and the backbone if it is already loaded that way.

    Parts of `fixed` other than "auto" are not changed. The choice is cached by backbone and machine. Only one model at a
    time is in memory.
    """
    dtypes = [fixed.dtype] if fixed.dtype != "auto" else _dtypes(device)
    attentions = [fixed.attention] if fixed.attention != "auto" else ["eager", "sdpa"]
    candidates = [ExecutionConfig(dtype, attention) for dtype in dtypes for attention in attentions]
    if len(candidates) == 1:
        return candidates[0], None
    key, known, seconds, backbone = json.dumps([identity, machine_info(device), candidates]), {}, {}, None
    with suppress(OSError, ValueError):  # without the cache, this only takes longer
        known = json.loads((storage.cache_dir() / "speed.json").read_text(encoding="utf-8"))
    if key in known:
        return ExecutionConfig(*known[key]), None
    for dtype in dtypes:
        backbone = None  # frees the last one
        backbone = load(ExecutionConfig(dtype, attentions[0]))
        for attention in attentions:
            if backbone.set_attention(attention):
                seconds[ExecutionConfig(dtype, attention)] = step_seconds(backbone)
        backbone.set_attention(attentions[0])
    known[key] = min(seconds, key=lambda choice: seconds[choice])
    with suppress(OSError):
        path = storage.cache_dir() / "speed.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(known, indent=1), encoding="utf-8")
        beside.replace(path)
    return known[key], backbone if known[key] == (dtypes[-1], attentions[0]) else None


def _dtypes(device: torch.device) -> list[str]:
    """Returns the dtypes to try. A GPU with bfloat16 units tries no other: float32 weights may not fit."""
    if device.type == "cuda":
        return ["bfloat16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["float32"]
    return ["float32", "bfloat16"] if _bf16_pays(device) else ["float32"]


class _Sum(Objective):
    """The sum of the features, for timing."""

    def loss(self, outputs: ModelOutput, batch: Batch) -> torch.Tensor:
        return outputs.features_RD.sum(-1)


def step_seconds(backbone: Backbone, repeats: int = 3) -> float:
    """Returns the shortest time of a training step in seconds.

    The step has 8 rows of 32 tokens, or 8 images, and 10 virtual tokens at layer 0.
    """
    start = Prompt(backbone.init_prompt("word", 10, 0, 0), backbone.fingerprint)
    text = " ".join(["word"] * TOKENS)
    items = tuple(
        (
            backbone.preprocess_image(it, 10)
            if backbone.modality == "image"
            else backbone.tokenize(text, None, "", None, 10),
        )
        for it in backbone.synthetic_inputs(ROWS, 0)
    )
    query = Query(start.vectors_PD[None], Batch(_Sum(), items, torch.zeros(ROWS), None, 0), grad=True)
    model = QueryEngine(backbone)
    return least_seconds(lambda: model.answer([query])[0].loss_KB.cpu(), repeats)


def least_seconds(work: Callable[[], object], repeats: int) -> float:
    """Returns the shortest time in seconds of `repeats` calls after a first one. Other processes may slow some calls."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _bf16_pays(device: torch.device) -> bool:
    """Tells whether a small matrix product is faster in bfloat16 than in float32. If not, no backbone is tried in it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(256, 256, dtype=dtype, device=device) for _ in range(2))
        wait = torch.mps.synchronize if device.type == "mps" else torch.cpu.synchronize
        seconds[dtype] = least_seconds(lambda left=left, right=right, wait=wait: (left.mm(right), wait()), REPEATS)
    return seconds[torch.bfloat16] < seconds[torch.float32]
