"""A library's prompt in plain transformers: it joins a sentence encoder's states before any layer.

python examples/plain_transformers.py runs/demo/library "a text" "and another"
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

from ficpd.library.library import PromptLibrary
from ficpd.library.peft_io import own_base

library = PromptLibrary.load(sys.argv[1])
texts = sys.argv[2:] or ["a quiet, lovely film", "the battery died within a week"]
prompt, layer = library.prompts["global"].vectors_PD, library.start.enters_at
assert layer >= 0, "these are LoRA weights and no prompt: `ficpd export` makes a PEFT folder of them"
folder, task = own_base(library), next(iter(library.card["tasks"].values()))
model, tokenizer = AutoModel.from_pretrained(folder, dtype="float32").eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(text: str, prompt: torch.Tensor = prompt[:0]) -> torch.Tensor:
    """The feature of a text: the prompt is attended to, and left out of the mean."""
    words = model.get_input_embeddings()(tokenizer(text, return_tensors="pt")["input_ids"])
    states = model.embeddings(inputs_embeds=words if layer else torch.cat([prompt[None], words], dim=1))
    for number, block in enumerate(model.encoder.layer):
        states = block(torch.cat([prompt[None], states], dim=1) if number == layer > 0 else states)
    return torch.nn.functional.normalize(states[0, len(prompt) :].mean(0), dim=0)


answers = {label: embed(f"{task['instruction']} {words}.") for label, words in task["labels"].items()}
for text in texts:
    scores = {label: float(embed(text, prompt) @ answer) for label, answer in answers.items()}
    print(text, "->", max(scores, key=scores.__getitem__), scores)
