"""Loads quantised checkpoints, and quantises weights when a model is loaded.

Rows stay independent. LLM.int8() handles the columns that are large in any row of a batch separately (Dettmers et al.,
NeurIPS 2022, arXiv 2208.07339). So its threshold is set to 0, and each token is scaled alone.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ficpd.backbones.weights import json_file
from ficpd.errors import BackboneError

Quantization = Literal["int8", "bnb_8bit", "bnb_4bit"]
PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "accelerate"), "gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel", "accelerate"),
    "torchao": ("torchao",), "compressed-tensors": ("compressed_tensors",), "hqq": ("hqq",), "quanto": ("optimum",),
    "aqlm": ("aqlm",), "eetq": ("eetq",), "vptq": ("vptq",), "mxfp4": ("kernels",),
}  # fmt: skip
"""The packages that transformers needs, by `quant_method` of a configuration."""
METHODS = {"int8": "torchao", "bnb_8bit": "bitsandbytes", "bnb_4bit": "bitsandbytes"}


def require_packages(folder: Path, name: str, chosen: str | None = None) -> None:
    """Raises `BackboneError` if a package for a folder's quantised weights, or for the `chosen` method, is missing."""
    own = quantized_as(folder)
    if own and chosen:
        raise BackboneError(
            f"backbone.options.quantization = {chosen!r}: the weights of {name!r} are quantised already ({own}). Leave the "
            "option out."
        )
    method = METHODS[chosen] if chosen else own
    if own and not _is_known(own):
        raise BackboneError(
            f"backbone.name = {name!r}: {own} weights are unknown to the installed transformers. Use weights that are not "
            "quantised."
        )
    missing = [package for package in PACKAGES.get(method, ()) if find_spec(package) is None]
    if missing:
        raise BackboneError(
            f"backbone.name = {name!r}: {method} weights need {' and '.join(missing)}, not installed here. Run "
            f"`pip install {' '.join(missing)}`, or use weights that are not quantised."
        )


def _is_known(method: str) -> bool:
    """Tells whether transformers supports a method. It would read the weights of others as plain numbers."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return method in PACKAGES or method in AUTO_QUANTIZATION_CONFIG_MAPPING


def quantized_as(folder: Path) -> str:
    """Returns the quantization method of a folder's weights; "" if they are not quantised."""
    config = json_file(folder / "config.json")
    text = config.get("text_config")
    found = (
        config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None) or {}
    )
    if not isinstance(found, dict):
        raise BackboneError(
            f"{folder / 'config.json'}: quantization_config = {found!r}: expected an object. Mend the file."
        )
    method = str(found.get("quant_method", ""))
    return "bitsandbytes" if method.startswith("bitsandbytes") or found.get("load_in_4bit") else method


def quantization_config(chosen: Quantization, dtype: torch.dtype) -> Any:
    """Returns the `quantization_config` of `from_pretrained`."""
    import transformers

    if chosen == "int8":
        return transformers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    if chosen == "bnb_8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def prepare_quantized(model: nn.Module) -> None:
    """Turns off LLM.int8()'s decisions for a whole batch, and the 4-bit CPU kernel of bitsandbytes.

    The kernel has no gradient. Saved checkpoints may turn on both.
    """
    for part in model.modules():
        if getattr(state := getattr(part, "state", None), "threshold", 0):
            state.threshold = 0.0  # type: ignore[union-attr]
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
