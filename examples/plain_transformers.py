"""A library's prompt in plain transformers, at any layer: a sentence encoder or a decoder.

python examples/plain_transformers.py runs/demo/library "a text" "and another"
"""

import sys

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ficpd.library.library import PromptLibrary
from ficpd.library.peft_io import own_base

library = PromptLibrary.load(sys.argv[1])
texts = sys.argv[2:] or ["a quiet, lovely film", "the battery died within a week"]
prompt, layer = library.prompts["global"].vectors_PD, library.start.enters_at
task = next(iter(library.card["tasks"].values()))
assert layer >= 0, "these are LoRA weights and no prompt: `ficpd export` makes a PEFT folder of them"
folder, decoder = own_base(library), library.card["backbone"]["kind"] == "causal_lm"
model = (AutoModelForCausalLM if decoder else AutoModel).from_pretrained(folder, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)


def last_states(text, prompt):
    """The prompt joins the states before a block; a decoder's positions count from the first of them."""
    states = model.get_input_embeddings()(tokenizer(text, return_tensors="pt")["input_ids"])
    states = states if layer else torch.cat([prompt[None], states], dim=1)
    states = states if decoder else model.embeddings(inputs_embeds=states)
    for number, block in enumerate(model.model.layers if decoder else model.encoder.layer):
        states = torch.cat([prompt[None], states], dim=1) if number == layer > 0 else states
        place = torch.arange(states.shape[1])[None]
        states = block(states, position_embeddings=model.model.rotary_emb(states, place)) if decoder else block(states)
    return states[0]


@torch.no_grad()
def score(text, words):
    """The logit of an answer's one token, or the cosine of the text and the answer."""
    if decoder:
        answer = tokenizer(f" {words}", add_special_tokens=False)["input_ids"][0]
        return float(model.lm_head(model.model.norm(last_states(f"{text}\n{task['instruction']}", prompt)[-1]))[answer])
    answer = last_states(f"{task['instruction']} {words}.", prompt[:0]).mean(0)
    return float(torch.cosine_similarity(last_states(text, prompt)[len(prompt) :].mean(0), answer, dim=0))


for text in texts:
    scores = {label: score(text, words) for label, words in task["labels"].items()}
    print(text, "->", max(scores, key=scores.__getitem__), scores)
