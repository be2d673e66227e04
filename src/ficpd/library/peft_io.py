"""Exports prompts as PEFT prompt-tuning folders, for `PeftModel.from_pretrained`, and imports such folders.

PEFT supports virtual tokens only before the word embeddings, and no tuned readout. Other prompts are distilled first
(`peft_distillation`). PEFT itself writes the folder, on a model without weights. LoRA weights become a LoRA folder;
LoRA folders cannot be imported.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ficpd.backbones import catalog, lora, weights
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone, resolve_backbone
from ficpd.errors import BackboneError, LibraryError, needs
from ficpd.interfaces import Backbone
from ficpd.library.card import ADAPTED, adapted_line, began_line, describe_run, describe_shape, guarantee
from ficpd.library.library import PromptLibrary, prompt_keys, require_new, require_standalone
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import validate
from ficpd.storage import atomic_write, fsync
from ficpd.tasks.build import build_task, start_text
from ficpd.types import LORA, Prompt, Record

IMPORTED = "imported"
LEARNED = "readouts.safetensors"
"""The file of learned readouts: `TASK/rows` [C, D] and `TASK/bias` [C] for each task with a learned readout."""
VECTORS = "prompt_embeddings"
"""The only array of a prompt-tuning folder."""


@dataclass(frozen=True)
class Kind:
    """Describes how PEFT and transformers load a kind of backbone and read its answers."""

    task_type: str | None
    auto: str
    reading: str
    reading_lora: str


KINDS = {
    "causal_lm": Kind(
        "CAUSAL_LM",
        "AutoModelForCausalLM",
        "Feed it {text}, and compare the next token's logits of the answers. Texts of one batch need padding\n"
        'on the right (`padding_side="right"`): PEFT counts positions of padding on the left. Each row is read at its own\n'
        "last token, behind the {tokens} virtual ones.\n\n"
        "Let it write one text at a time, or a batch of texts with as many tokens each. With padding on either side,\n"
        "`generate` writes other words.\n\n"
        "```python\n"
        "def write(tokenizer, texts, **options):\n"
        "    for text in texts:\n"
        '        ids = tokenizer(text, return_tensors="pt"{special}).input_ids.to(model.device)\n'
        "        written = model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), **options)\n"
        "        yield tokenizer.decode(written[0, ids.shape[1]:], skip_special_tokens=True)\n"
        "```",
        "Feed it {text}, and compare the next token's logits of the answers, or let `model.generate` write\n"
        "(texts of one batch with padding on the left).",
    ),
    "seq2seq": Kind(
        "SEQ_2_SEQ_LM",
        "AutoModelForSeq2SeqLM",
        "Feed it {text}, texts of one batch with padding on the right; answers are the decoder's first tokens.",
        "Feed it {text}; answers are the decoder's first tokens.",
    ),
    "sentence_encoder": Kind(
        "FEATURE_EXTRACTION",
        "AutoModel",
        "PEFT does not pool, and `last_hidden_state` begins with the {tokens} virtual tokens: leave them out, take the\n"
        "mean over the text's own positions and scale it to length 1. Answers are embedded without the prompt, as\n"
        '"INSTRUCTION ANSWER.", and compared by cosine.',
        "Take the mean of `last_hidden_state` over a text's positions and scale it to length 1. Answers are embedded\n"
        'without LoRA (`with model.disable_adapter()`), as "INSTRUCTION ANSWER.", and compared by cosine.',
    ),
}
LORA_KINDS = {
    **KINDS,
    "masked_lm": Kind(
        None,
        "AutoModelForMaskedLM",
        "",
        "Feed it `text`, a blank and the instruction with the tokenizer's mask in the place of `[MASK]` (at the end, where\n"
        "the instruction has none), and compare the answers' logits at the mask.",
    ),
}
"""The kinds with a LoRA folder. PEFT adds LoRA to any model, but prompts only to the models of its task types."""


# ---------------------------------------------------------------- export


def export(library: PromptLibrary, name: str, folder: Path, base: str, backbone: Backbone | None = None) -> None:
    """Exports one prompt as a PEFT folder for the model `base` (a folder or a hub id).

    Writes to a staging folder, then renames it.
    backbone: the library's backbone, which maps LoRA weights to modules; None: loads it for LoRA weights.
    Raises `LibraryError` if PEFT cannot express the prompt, `base` is another model, or the folder exists.
    """
    folder, prompt = Path(folder), checked_for_peft(library, name)
    kind, config = checked_target(library, folder, base, prompt.enters_at)
    adapters = lora.lora_of(backbone or _load(library)) if prompt.enters_at == LORA else None
    staging = folder.with_name(folder.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _write(prompt, kind, config, base, staging, adapters)
    if learned := _learned(library, name):
        save_file(learned, staging / LEARNED)
    for file in staging.iterdir():
        fsync(file)
    atomic_write(staging / "README.md", page(library, name, kind, base))
    staging.rename(folder)
    fsync(folder.parent)


def _learned(library: PromptLibrary, name: str) -> dict[str, torch.Tensor]:
    """Returns the arrays of `LEARNED`; empty for an adapted prompt or LoRA weights."""
    if name == ADAPTED or library.prompts[name].enters_at == LORA:
        return {}
    read = {task: {"rows": found.rows_CD, "bias": found.bias_C} for task, found in library.learned.items()}
    return {f"{task}/{part}": t.float().contiguous() for task, parts in read.items() for part, t in parts.items()}


def checked_for_peft(library: PromptLibrary, name: str) -> Prompt:
    """Returns the named prompt. Raises `LibraryError` if PEFT cannot express it."""
    if name not in library.prompts:
        raise LibraryError(f"no prompt {name!r} in this library; it has {', '.join(library.prompts) or 'none'}")
    require_standalone(library, name)
    prompt, reasons = library.prompts[name], []
    if prompt.enters_at not in (0, LORA):
        reasons.append(f"it enters at layer {prompt.enters_at}, and PEFT only has virtual tokens at the input")
    if prompt.head_rows or name in library.readouts:
        reasons.append("it has a tuned readout, which PEFT does not support")
    if reasons:
        raise LibraryError(
            f"PEFT cannot express the prompt {name!r}: {'; '.join(reasons)}. Distill it to an input prompt (--reenter), "
            "tune one with prompt.enters_at=0 and no tuned head, or use examples/plain_transformers.py"
        )
    return prompt


def own_base(library: PromptLibrary) -> str:
    """Returns the folder of the card's backbone. Raises `LibraryError` if it is not a transformers model."""
    kind, found = resolve_backbone(backbone_config(library))
    if found is None:
        raise LibraryError(f"the library's backbone is {kind}: expected a transformers model, which PEFT can load")
    return str(Path(found.folder).resolve())


def backbone_config(library: PromptLibrary) -> BackboneConfig:
    """Returns the configuration of the backbone in the library's card."""
    named = {key: value for key, value in library.card["backbone"].items() if key in ("name", "kind", "options")}
    return validate(BackboneConfig, named, "card.json: backbone")


def checked_target(library: PromptLibrary, folder: Path, base: str, enters_at: int = 0) -> tuple[Kind, Any]:
    """Returns the `Kind` of the library's backbone, and its transformers configuration.

    Raises `LibraryError` if `folder` exists, PEFT does not support the kind, or `base` is no model or another one.
    Raises `BackboneError` if the folder `base` has no configuration.
    """
    from transformers import AutoConfig

    require_new(folder)
    own, named = own_base(library), resolve_backbone(backbone_config(library))[0]
    kinds, what = (LORA_KINDS, "LoRA folder") if enters_at == LORA else (KINDS, "prompt tuning")
    kind = kinds.get(named)
    if kind is None:
        raise LibraryError(f"a {named} backbone has no {what} in PEFT; expected one of {', '.join(kinds)}")
    config = AutoConfig.from_pretrained(own, local_files_only=True)
    if Path(base).is_dir():
        try:
            other = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BackboneError(f"{base}/config.json: expected a transformers configuration: {error}") from error
        for key in ("model_type", "hidden_size", "num_hidden_layers"):
            given, expected = (getattr(one, key, None) for one in (other, config))
            if given != expected:
                raise LibraryError(
                    f"base {base}: {key} = {given!r}: expected {expected!r} as in {named} ({own}), "
                    "which the prompt was tuned on; name that model, or leave --base out"
                )
    elif not weights.HUB_ID.fullmatch(base):
        raise LibraryError(f"base {base!r}: expected a folder or a hub id (owner/name)")
    return kind, config


def _load(library: PromptLibrary) -> Backbone:
    config = backbone_config(library).model_copy(update={"dtype": "float32", "attention": "eager"})
    return load_backbone(config, EngineConfig())[0]


def _write(
    prompt: Prompt, kind: Kind, config: Any, base: str, folder: Path, adapters: lora.Adapters | None = None
) -> None:
    """Saves the prompt or LoRA weights with PEFT, on a model without weights."""
    with needs("a PEFT folder", "peft"):
        import peft
    import transformers

    common = {"task_type": kind.task_type, "inference_mode": True}
    vectors_PD = prompt.vectors_PD
    with warnings.catch_warnings():  # PEFT uses names that transformers deprecates
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            empty = getattr(transformers, kind.auto).from_config(config)
        if adapters is not None:
            model = _with_lora(empty, vectors_PD, adapters, common)
        else:
            tuning = peft.PromptTuningConfig(
                num_virtual_tokens=len(vectors_PD), token_dim=vectors_PD.shape[1], num_transformer_submodules=1,
                num_attention_heads=getattr(config, "num_attention_heads", 1),
                num_layers=getattr(config, "num_hidden_layers", 1), **common,
            )  # fmt: skip
            model: Any = peft.get_peft_model(empty, tuning)
            model.prompt_encoder["default"].embedding.weight = torch.nn.Parameter(vectors_PD.clone())
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder, save_embedding_layers=False)


def _with_lora(empty: Any, rows_PD: torch.Tensor, adapters: lora.Adapters, common: Mapping[str, Any]) -> Any:
    import peft

    rank, parts = adapters.rank(rows_PD), adapters.split(rows_PD)
    names = lora.short_names(empty, parts)
    tuning = peft.LoraConfig(r=rank, lora_alpha=round(lora.SCALE * rank), target_modules=names, **common)
    model: Any = peft.get_peft_model(empty, tuning)
    for name, (down_RN, up_RN) in parts.items():
        changed = model.base_model.model.get_submodule(name)
        changed.lora_A["default"].weight = torch.nn.Parameter(down_RN.contiguous())
        changed.lora_B["default"].weight = torch.nn.Parameter(up_RN.mT.contiguous())
    return model


def page(library: PromptLibrary, name: str, kind: Kind, base: str) -> str:
    """Returns the folder's README: content, privacy cost, and how to load and read it."""
    card, prompt = library.card, library.prompts[name]
    tokens, width = prompt.vectors_PD.shape
    changes = prompt.enters_at == LORA
    what, tag = ("LoRA weights", "lora") if changes else ("Soft prompt", "prompt-tuning")
    size = describe_shape(prompt) if changes else f"{tokens} virtual tokens of width {width} in front of the input"
    head = ["library_name: peft", *([] if Path(base).is_dir() else [f"base_model: {base}"]), f"tags: [{tag}]"]
    tasks = "; ".join(f"{task}: {json.dumps(about, ensure_ascii=False)}" for task, about in card["tasks"].items())
    lines = [
        f"- {size}, for `{base}`",
        f"- tuned on the frozen backbone {card['backbone'].get('name', '?')} (`{prompt.backbone}`)",
        f"- task: {tasks}",
        f"- made by: {describe_run(card)}",
        f"- privacy: {guarantee(card.get('privacy', {}))}",
        *began_line(card).splitlines(),
    ]
    if name == ADAPTED:
        lines.append(adapted_line(card, library.readouts).strip())
    if _learned(library, name):
        lines.append(
            f"- read by a learned readout: `{LEARNED}` has `TASK/rows` [C, D] and `TASK/bias` [C], the labels in the task's "
            "order. Scores are features @ rows.T + bias; they replace the cosines with the answers below"
        )
    if "reentered" in card:
        lines += [f"- {line}" for line in reentry_lines(card)]
        lines.append("- the privacy above covers the federation's records, not the texts of the distillation")
    return (
        "---\n" + "\n".join(head) + f"\n---\n# {what} `{name}`, for PEFT\n\n" + "\n".join(lines) + "\n\n"
        "```python\n"
        f"from peft import PeftModel\nfrom transformers import {kind.auto}\n"
        f'model = PeftModel.from_pretrained({kind.auto}.from_pretrained("{base}", dtype="float32"), "THIS_FOLDER")\n'
        "```\n\n" + (kind.reading_lora if changes else kind.reading).format(tokens=tokens, **_text(card)) + "\n"
    )  # fmt: skip


def _text(card: Mapping[str, Any]) -> dict[str, str]:
    """Describes the input text: plain, or in its chat template. `special`: an argument of the tokenizer."""
    options, lines = card["backbone"].get("options", {}), "`text`, a line break and the instruction"
    if not options.get("chat_template"):
        return {"text": lines, "special": ""}
    turns = (
        "" if options.get("system") is None else f'{{"role": "system", "content": {json.dumps(options["system"])}}}, '
    )
    call = f'tokenizer.apply_chat_template([{turns}{{"role": "user", "content": lines}}], tokenize=False'
    return {
        "text": f"`{call}, add_generation_prompt=True, enable_thinking=False)`\n"
        f"with {lines} as `lines` (special tokens are in it already: `add_special_tokens=False`)",
        "special": ", add_special_tokens=False",
    }


def reentry_lines(card: Mapping[str, Any]) -> list[str]:
    """Describes a distilled prompt and its agreement with the original."""
    facts = card["reentered"]
    before, after = facts["before"], facts["after"]
    measure = "minus log-likelihood of its words" if facts["writes"] else "mean squared difference of the logits"
    weak = ": quality on real texts may be low" if facts["weak"] else ""
    vain = "" if facts["helped"] else "; tuning did not help, so it is the untuned start: give more texts"
    return [
        f"imitates a prompt that enters at layer {facts['from_layer']}; {facts['steps']} steps on {facts['tuned_on']} "
        f"texts ({facts['texts']}{weak}){vain}",
        f"agreement on {facts['held_back']} texts held back: {after['same']:.1%} answered alike ({before['same']:.1%} "
        f"before tuning), {measure} {after['loss']:.3g} ({before['loss']:.3g} before)",
    ]


# ---------------------------------------------------------------- import


def read_folder(folder: Path) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """Returns the vectors [P, D] and the configuration of a PEFT prompt-tuning folder.

    Raises `LibraryError` if it is not one.
    """
    folder = Path(folder)
    try:
        config = dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LibraryError(f"{folder}: expected a PEFT folder; adapter_config.json cannot be read ({error})") from error
    if config.get("peft_type") != "PROMPT_TUNING":
        raise LibraryError(f"{folder} holds {config.get('peft_type')!r}; expected 'PROMPT_TUNING'")
    file = folder / "adapter_model.safetensors"
    try:
        vectors_PD = load_file(file)[VECTORS].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise LibraryError(
            f"{file}: expected an array {VECTORS!r} ({error}). adapter_model.bin is a pickle and not read: load it in "
            "PEFT and save it again"
        ) from error
    expected = (config.get("num_virtual_tokens"), config.get("token_dim"))
    if config.get("num_transformer_submodules") not in (None, 1) or tuple(vectors_PD.shape) != expected:
        raise LibraryError(
            f"{folder}: the array is {list(vectors_PD.shape)}, adapter_config.json says {list(expected)} for "
            f"{config.get('num_transformer_submodules')} submodules; expected one model's [tokens, width]"
        )
    if not torch.isfinite(vectors_PD).all():
        raise LibraryError(f"{file}: expected finite numbers")
    return vectors_PD, config


def imported(
    folder: Path, backbone: BackboneConfig, task: Mapping[str, Any], device: str = "cpu"
) -> tuple[PromptLibrary, str]:
    """Returns a library with the folder's prompt as `imported`, and the base model that the folder names.

    Its `start` is made of the task's text, because the folder has no start. Raises `LibraryError` if the folder is no
    prompt-tuning folder, or its width is not the backbone's.
    """
    vectors_PD, adapter = read_folder(folder)
    engine = validate(EngineConfig, {"device": device}, "--device")
    loaded, config = load_backbone(backbone, engine)
    if vectors_PD.shape[1] != loaded.width:
        raise LibraryError(
            f"{folder}: virtual tokens of width {vectors_PD.shape[1]}, and {loaded.name} has width {loaded.width}; give "
            f"--backbone {adapter.get('base_model_name_or_path')!r}, which the folder names"
        )
    built = build_task(task)
    prompt = Prompt(vectors_PD, loaded.fingerprint)
    built.encode([Record("a text", {"text": "a text"})], loaded, prompt)  # raises for too many virtual tokens
    start = prompt.with_vectors(loaded.init_prompt(start_text([built]), len(vectors_PD), 0, 0))
    rate = catalog.defaults(config.name, config.kind, loaded.depth).learning_rate
    rms = float(start.vectors_PD.square().mean().sqrt())
    card = {
        "method": "imported from PEFT",
        "privacy": {},
        "tasks": {task["name"]: dict(built.to_config())},
        "backbone": {
            "enters_at": 0, "name": config.name, "kind": config.kind, "options": config.options,
            "fingerprint": loaded.fingerprint,
        },
        "imported": {"base": adapter.get("base_model_name_or_path"), "peft_version": adapter.get("peft_version")},
        "training": LocalTrainingConfig(learning_rate=rate * rms).model_dump(),
    }  # fmt: skip
    keys = prompt_keys([IMPORTED], {task["name"]: built}, {}, loaded)
    return PromptLibrary(start, {IMPORTED: prompt}, card, keys), str(adapter.get("base_model_name_or_path"))
