"""A library's prompt with nothing but transformers: where it enters, at any layer, in a dozen lines.

python examples/plain_transformers.py runs/demo/library "a text" "and another"
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ficpd.backbones.catalog import NAMED
from ficpd.backbones.weights import resolve

library = Path(sys.argv[1])
texts = sys.argv[2:] or ["a quiet, lovely film", "the battery died within a week"]
card = json.loads((library / "card.json").read_text())
prompt, layer = load_file(library / "prompts.safetensors")["global"], card["backbone"]["enters_at"]
assert layer >= 0, "these are LoRA weights and no prompt: `ficpd export` makes a PEFT folder of them"
name, kind = card["backbone"]["name"], card["backbone"]["kind"]
folder, task = resolve(NAMED[name].weights if name in NAMED else name).folder, next(iter(card["tasks"].values()))
load = AutoModel if kind == "sentence_encoder" else AutoModelForCausalLM
model, tokenizer = load.from_pretrained(folder, dtype="float32").eval(), AutoTokenizer.from_pretrained(folder)
tokens = partial(tokenizer, return_tensors="pt")


@torch.no_grad()
def embed(text: str, prompt: torch.Tensor = prompt[:0]) -> torch.Tensor:
    """A sentence encoder's feature: the prompt is attended to and not pooled."""
    words = model.get_input_embeddings()(tokens(text)["input_ids"])
    states = model.embeddings(inputs_embeds=words if layer else torch.cat([prompt[None], words], dim=1))
    for number, block in enumerate(model.encoder.layer):
        states = block(torch.cat([prompt[None], states], dim=1) if number == layer > 0 else states)
    return torch.nn.functional.normalize(states[0, len(prompt) :].mean(0), dim=0)


@torch.no_grad()
def next_logits(text: str, prompt: torch.Tensor) -> torch.Tensor:
    """A decoder's logits of the next token. Above the entry the text's positions count from behind the prompt."""
    states = model.get_input_embeddings()(tokens(text)["input_ids"])
    for number, block in enumerate(model.model.layers):
        states = torch.cat([prompt[None], states], dim=1) if number == layer else states
        rotations = model.model.rotary_emb(states, torch.arange(states.shape[1])[None])
        states = block(states, position_embeddings=rotations)
    return model.lm_head(model.model.norm(states[0, -1]))


for text in texts:
    if kind == "sentence_encoder":
        answers = {label: embed(f"{task['instruction']} {words}.") for label, words in task["labels"].items()}
        scores = {label: float(embed(text, prompt) @ answer) for label, answer in answers.items()}
    else:  # answers of one token each
        logits = next_logits(f"{text}\n{task['instruction']}", prompt)
        asked = {label: tokens(f" {words}", add_special_tokens=False) for label, words in task["labels"].items()}
        scores = {label: float(logits[answer["input_ids"][0, 0]]) for label, answer in asked.items()}
    print(text, "->", max(scores, key=scores.__getitem__), scores)
