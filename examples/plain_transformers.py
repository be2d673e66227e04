"""A library's prompt with nothing but transformers: where it enters, in a dozen lines. Needs MiniLM's weights.

python examples/plain_transformers.py runs/demo/library
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from ficpd.backbones.catalog import NAMED
from ficpd.backbones.weights import resolve

library = Path(sys.argv[1])  # of a prompt that enters at layer 1 or later, as MiniLM's does
card = json.loads((library / "card.json").read_text())
prompt, layer = load_file(library / "prompts.safetensors")["global"], card["backbone"]["enters_at"]
folder = resolve(NAMED[card["backbone"]["name"]].weights).folder
model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(text: str, prompt: torch.Tensor | None = None) -> torch.Tensor:
    states = model.embeddings(tokenizer(text, return_tensors="pt")["input_ids"])
    for number, block in enumerate(model.encoder.layer):
        if number == layer and prompt is not None:
            states = torch.cat([prompt[None], states], dim=1)
        states = block(states)
    text_states = states[0] if prompt is None else states[0, len(prompt) :]
    return torch.nn.functional.normalize(text_states.mean(0), dim=0)


labels = {name: embed(f"{card['task']['instruction']} {text}.") for name, text in card["task"]["labels"].items()}
for text in ("a quiet, lovely film", "the battery died within a week"):
    scores = {name: float(embed(text, prompt) @ label) for name, label in labels.items()}
    print(text, "->", max(scores, key=scores.__getitem__), scores)
