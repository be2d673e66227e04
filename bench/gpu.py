"""Efficiency and lock-step gain on a GPU: a decoder of about a billion random weights, 64 clients x 16 rows.

python bench/gpu.py [--width 2048 --layers 20]      needs CUDA; `--device cpu` only tries it out
"""

import argparse
import json
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ficpd.backbones.causal_lm import CausalLM, Config
from ficpd.backbones.query_engine import QueryEngine
from ficpd.types import Batch, EncodedInput, ModelOutput, Objective, Query
from measure import medians, paired, ratio, save

TOKENS, LENGTH = 20, 64


class Plain:
    """The tokeniser's part that `CausalLM` needs when items are made of numbers and not of texts."""

    bos_token_id = eos_token_id = None
    all_special_ids: tuple = ()


class Sum(Objective):
    """A task whose loss is the features' sum: nothing but the backbone is timed."""

    def loss(self, outputs: ModelOutput, batch: Batch) -> torch.Tensor:
        return outputs.features_RD.sum(-1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--layers", type=int, default=20)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/gpu.py: no CUDA device here; nothing measured")
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=given.width, intermediate_size=4 * given.width, num_hidden_layers=given.layers,
        num_attention_heads=given.width // 64,
    )  # fmt: skip
    shape._attn_implementation = "sdpa"
    with torch.device(given.device):
        model: Any = LlamaForCausalLM(shape)
    model.to(torch.bfloat16)
    backbone = CausalLM(Config(), model, Plain(), "random" * 3, "random decoder")
    random = torch.Generator().manual_seed(0)
    result = {"weights": sum(p.numel() for p in model.parameters()), "dtype": "bfloat16", "attention": "sdpa"}
    for layer in (0, given.layers // 2):
        asked = []
        for _ in range(given.clients):
            drawn = [torch.randint(32000, (LENGTH,), generator=random) for _ in range(given.rows)]
            items = tuple((EncodedInput(ids, LENGTH),) for ids in drawn)
            prompt = torch.randn(1, TOKENS, given.width, generator=random)
            asked.append(Query(prompt, Batch(Sum(), items, torch.zeros(given.rows), None, layer), grad=True))
        engine = QueryEngine(backbone, keep_bytes=64 << 30)
        items = [item for query in asked for (item,) in query.batch.items]
        hidden = backbone.encode_prefix(items, layer)
        rows = torch.cat([q.prompts_KPD.expand(given.rows, -1, -1) for q in asked]).to(given.device)
        per = engine.chunk_tokens // (LENGTH + TOKENS)

        def bare(rows=rows, hidden=hidden, items=items, layer=layer, per=per) -> None:
            for first in range(0, len(items), per):
                part = slice(first, first + per)
                own = rows[part].clone().requires_grad_(True)
                backbone.forward(own, hidden[part], items[part], layer).features_RD.sum().backward()

        works = {
            "bare": bare,
            "lock step": lambda asked=asked, engine=engine: engine.answer(asked),
            "one after another": lambda asked=asked, engine=engine: [engine.answer([query]) for query in asked],
        }
        seconds = paired(works, repeats=5, device=given.device)
        result[f"enters_at={layer}"] = {
            "efficiency": ratio(seconds, "bare", "lock step"),
            "lock-step gain": ratio(seconds, "one after another", "lock step"),
            "seconds": medians(seconds),
        }
    print(json.dumps(result, indent=2))
    save("gpu", result, device=given.device)


if __name__ == "__main__":
    main()
