"""A client that tunes a prompt with torch. The model lies in the globals of its actor, which live as long as that does."""

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from plain.records import CLASSES, records_of

app = ClientApp()


@cache
def model_of(folder: str, dtype: torch.dtype):
    """In bfloat16 with eager attention, whose backward is much the faster one on a CPU; else as transformers has it."""
    more = {"attn_implementation": "eager"} if dtype == torch.bfloat16 else {}
    return AutoModel.from_pretrained(folder, dtype=dtype, **more).eval().requires_grad_(False)


@app.train()
def train(message: Message, context: Context) -> Message:
    config = context.run_config
    dtype = torch.bfloat16 if config["bfloat16"] else torch.float32
    model = model_of(str(config["folder"]), dtype)
    tokens, targets = records_of(int(context.node_config["partition-id"]))
    prompt = message.content.array_records["arrays"].to_torch_state_dict()["prompt"].requires_grad_(True)
    readout = torch.randn(CLASSES, prompt.shape[1], generator=torch.Generator().manual_seed(0))
    optimiser, rows, loss = torch.optim.Adam([prompt], lr=0.01), int(config["rows"]), torch.zeros(())
    for _ in range(int(config["steps"])):
        drawn = torch.randperm(len(tokens))[:rows].tolist()
        ids = pad_sequence([tokens[i] for i in drawn], batch_first=True)
        mask = pad_sequence([torch.ones_like(tokens[i]) for i in drawn], batch_first=True)
        words = model.get_input_embeddings()(ids)
        front = prompt.to(dtype).expand(rows, -1, -1)
        states = model(
            inputs_embeds=torch.cat([front, words], 1),
            attention_mask=torch.cat([mask.new_ones(front.shape[:2]), mask], 1),
        ).last_hidden_state[:, prompt.shape[0] :]
        pooled = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = F.cross_entropy(20 * F.normalize(pooled, dim=-1) @ F.normalize(readout, dim=-1).T, targets[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    arrays = ArrayRecord({"prompt": prompt.detach()})
    metrics = MetricRecord({"num-examples": len(tokens), "loss": loss.item()})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
