"""A library in plain transformers, adapted or not, at any layer: a sentence encoder or a decoder.

python examples/plain_transformers.py runs/demo/library "a text" "and another"
"""

import sys

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ficpd.backbones.sentence_encoder import SCALE
from ficpd.library.library import PromptLibrary
from ficpd.library.peft_io import own_base

library = PromptLibrary.load(sys.argv[1])
texts = sys.argv[2:] or ["a quiet, lovely film", "the battery died within a week"]
name = "adapted" if "adapted" in library.prompts else "global"
adapted, layer = library.card.get("adapted", {}), library.start.enters_at
task_name = adapted.get("task") or next(iter(library.card["tasks"]))
task, mixture = library.card["tasks"][task_name], library.mixture if name == "adapted" else None
head = library.readouts.get(name) or library.learned.get(task_name)
assert layer >= 0, "these are LoRA weights and no prompt: `ficpd export` makes a PEFT folder of them"
assert not adapted.get("demonstrations"), "the adapted prompt needs demonstrations: answer by `ficpd predict`"
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


def feature(text, prompt):
    """A decoder's last state, or an encoder's mean state at the text, of length 1."""
    if decoder:
        return model.model.norm(last_states(f"{text}\n{task['instruction']}", prompt)[-1])
    return torch.nn.functional.normalize(last_states(text, prompt)[len(prompt) :].mean(0), dim=0)


@torch.no_grad()
def probabilities(text):
    """By the mixture, else by the learned head, else by the texts of the labels; a decoder reads their first tokens."""
    prompt, words = library.prompts[name].vectors_PD, task["labels"].values()
    if mixture:
        features_MD = torch.stack([feature(text, vectors) for vectors in mixture.prompts_KPD])[mixture.prompt_M]
        logits_MC = torch.einsum("md,mcd->mc", features_MD, mixture.rows_MCD) + mixture.bias_MC
        return mixture.weight_M @ logits_MC.softmax(-1)
    if head:
        return (head.rows_CD @ feature(text, prompt) + head.bias_C).softmax(-1)
    if decoder:
        rows = [model.lm_head.weight[tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0]] for w in words]
    else:
        rows = [SCALE * feature(f"{task['instruction']} {w}.", prompt[:0]) for w in words]
    return (torch.stack(rows) @ feature(text, prompt)).softmax(-1)


for text in texts:
    shares = dict(zip(task["labels"], probabilities(text).tolist(), strict=True))
    print(text, "->", max(shares, key=shares.__getitem__), shares)
