"""Reads the files of a sentence-transformers folder: pooling, dense layers, prompts, length limit.

https://sbert.net/docs/sentence_transformer/usage/custom_models.html describes the files.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ficpd.backbones.weights import json_file
from ficpd.errors import BackboneError, BackboneWarning

POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "lasttoken"}
"""The names in a Pooling configuration (`pooling_mode_NAME`) to those of its later form (`pooling_mode`)."""
ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda values: values, "GELU": nn.functional.gelu, "ReLU": torch.relu}


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation, behind the pooling."""

    weight_OD: Tensor
    bias_O: Tensor | None
    activation: str

    def __call__(self, pooled_SD: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](nn.functional.linear(pooled_SD, self.weight_OD, self.bias_O))


@dataclass(frozen=True)
class SentenceFiles:
    """The settings in the files.

    pooling: cls, mean, max or lasttoken.
    prompt: the text before every input.
    max_tokens: the longest input in tokens; None: no limit.
    """

    pooling: str = "mean"
    dense: tuple[Dense, ...] = ()
    prompt: str = ""
    lower_case: bool = False
    max_tokens: int | None = None


def read_sentence_files(folder: Path, name: str, prefix: str | None, device: torch.device) -> SentenceFiles:
    """Reads the files; `prefix` replaces the folder's prompt.

    Raises `BackboneError` for unsupported modules, poolings or activations.
    """
    modules = [
        (part["type"].rpartition(".")[2], folder / part["path"]) for part in json_file(folder / "modules.json", list)
    ]
    unknown = {kind for kind, _ in modules} - {"Transformer", "Pooling", "Dense", "Normalize"}
    if unknown:
        raise BackboneError(
            f"backbone.name = {name!r}: its modules.json has {', '.join(sorted(unknown))}; expected Transformer, Pooling, "
            "Dense and Normalize. Use another model."
        )
    own = next((place for kind, place in modules if kind == "Transformer"), folder)
    limits, pools = (
        json_file(own / "sentence_bert_config.json"),
        [place for kind, place in modules if kind == "Pooling"],
    )
    return SentenceFiles(
        _pooling(json_file(pools[0] / "config.json"), name) if pools else "mean",
        tuple(_dense(place, name, device) for kind, place in modules if kind == "Dense"),
        _prompt(json_file(folder / "config_sentence_transformers.json"), name) if prefix is None else prefix,
        bool(limits.get("do_lower_case")),
        limits.get("max_seq_length"),
    )


def _pooling(config: dict[str, Any], name: str) -> str:
    modes = [
        mode.removeprefix("pooling_mode_") for mode, on in config.items() if mode.startswith("pooling_mode_") and on
    ]
    modes = [POOLINGS.get(mode, mode) for mode in modes] or [config.get("pooling_mode", "mean")]
    if len(modes) != 1 or modes[0] not in POOLINGS.values() or config.get("include_prompt") is False:
        raise BackboneError(
            f"backbone.name = {name!r}: its pooling is {modes}, include_prompt = {config.get('include_prompt', True)}; "
            f"expected one of {', '.join(POOLINGS.values())}, prompt included. Use another model."
        )
    return modes[0]


def _dense(folder: Path, name: str, device: torch.device) -> Dense:
    activation = str(json_file(folder / "config.json").get("activation_function", "Tanh")).rpartition(".")[2]
    file = folder / "model.safetensors"
    if activation not in ACTIVATIONS or not file.exists():
        raise BackboneError(
            f"backbone.name = {name!r}: {folder.name} has the activation {activation} and the files "
            f"{sorted(f.name for f in folder.glob('*'))}; expected one of {', '.join(ACTIVATIONS)} and model.safetensors. "
            "Save it with a current sentence-transformers, or use another model."
        )
    arrays = {key: value.float().to(device) for key, value in load_file(file).items()}
    return Dense(arrays["linear.weight"], arrays.get("linear.bias"), activation)


def _prompt(config: dict[str, Any], name: str) -> str:
    """Returns the default prompt. Warns if the model has prompts, but no default."""
    prompts = {key: text for key, text in (config.get("prompts") or {}).items() if text}
    default = config.get("default_prompt_name")
    if prompts and default not in prompts:
        warnings.warn(
            f"{name} was trained with a prompt before each text, {prompts}, and names no default; none is used. Choose "
            'one: --set "backbone.options.prefix=..." (an empty one hides this warning)',
            BackboneWarning,
            stacklevel=2,
        )
    return prompts.get(default, "")


def pool(states_STD: Tensor, mask_ST: Tensor, lengths: Sequence[int], pooling: str) -> Tensor:
    """Pools the text's states [S, T, D], without the prompt's, to [S, D] in float32."""
    states_STD = states_STD.float()
    if pooling == "cls":
        return states_STD[:, 0]
    if pooling == "lasttoken":
        return states_STD[range(len(lengths)), [length - 1 for length in lengths]]
    if pooling == "max":
        return states_STD.masked_fill(~mask_ST[..., None], -torch.inf).amax(1)
    weight = mask_ST[..., None].float()
    return (states_STD * weight).sum(1) / weight.sum(1)
