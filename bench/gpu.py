"""A GPU at work, against the plan: a random decoder of about a billion weights, 64 clients x 16 rows; and plans for 7 B.

    python bench/gpu.py [--width 2048 --layers 20]      needs CUDA; `--device cpu` only tries it out

Engine efficiency, lock-step gain and the peak of memory are measured. A model of the size of Llama 2 7B is planned from its
shape alone, in bfloat16 and with 4-bit blocks.
"""

import argparse
import json
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ficpd.backbones.causal_lm import CausalLM, Config
from ficpd.backbones.memory import USABLE, Footprint, footprint, measure
from ficpd.backbones.query_engine import QueryEngine
from ficpd.types import Batch, EncodedInput, ModelOutput, Objective, Query
from measure import medians, paired, quietness, ratio, save

TOKENS, LENGTH = 20, 64
SEVEN: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32}  # fmt: skip
FOUR_BITS = 4.127 / 8
"""Bytes of a weight in 4 bits with double quantisation: Dettmers et al., NeurIPS 2023, arXiv 2305.14314, section 3."""
CARDS = 16, 24, 40, 80
"""GB of memory of usual GPUs."""


class Plain:
    """The tokeniser's part that `CausalLM` needs when items are made of numbers and not of texts."""

    bos_token_id = eos_token_id = chat_template = None
    all_special_ids: tuple = ()


class Sum(Objective):
    """A task whose loss is the features' sum: nothing but the backbone is timed."""

    def loss(self, outputs: ModelOutput, batch: Batch) -> torch.Tensor:
        return outputs.features_RD.sum(-1)


class Numbered(CausalLM):
    """A decoder without words; its synthetic records are token ids."""

    def synthetic_inputs(self, number: int, seed: int) -> list[Any]:
        return [torch.arange(LENGTH)] * number

    def tokenize(self, text: Any, *more: Any, **options: Any) -> EncodedInput:
        return EncodedInput(text, len(text))


def seven_billion() -> dict[str, Any]:
    """The plan of a 7 B: weights, bytes of a position, and the positions that usual GPUs hold."""
    with FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SEVEN), dtype=torch.bfloat16).requires_grad_(False)

        def run(virtual: int) -> torch.Tensor:
            states = torch.empty(1, virtual + LENGTH, SEVEN["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
            return model.model(inputs_embeds=states, use_cache=False).last_hidden_state

        found = measure(run, model, LENGTH, SEVEN["num_hidden_layers"], SEVEN["hidden_size"])
        blocks = sum(part.nbytes for part in model.model.layers.parameters() if part.dim() == 2)
    four = found.weights - blocks + int(blocks / 2 * FOUR_BITS)
    plans = {"bfloat16": found, "4 bits": found._replace(weights=four)}
    return {name: {"weights_gb": round(plan.weights / 1e9, 2), **_cards(plan)} for name, plan in plans.items()}


def _cards(plan: Footprint) -> dict[str, Any]:
    def holds(card: int, again: bool) -> int:
        return max(int(plan.positions(USABLE * (card * 1e9 - plan.weights), 256, again)), 0)

    found = {f"{card} GB": {"kept": holds(card, False), "computed again": holds(card, True)} for card in CARDS}
    return {"kb_of_a_position": round(plan.position / 1e3), "positions": found}


def memory(engine: QueryEngine, asked: list[Query], layer: int) -> dict[str, Any]:
    """The peak of one step on CUDA over the plan's; None on a CPU."""
    rows = min(sum(len(query.batch) for query in asked), max(engine.chunk_tokens // (LENGTH + TOKENS), 1))
    found = footprint(engine.backbone)
    planned = found.forward_bytes(rows, LENGTH + TOKENS, layer, checkpointed=bool(engine.checkpoint))
    peak = None
    if engine.backbone.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.answer(asked)
        peak = round((torch.cuda.max_memory_allocated() - before) / planned, 3)
    return {
        "chunk_tokens": engine.chunk_tokens, "computed again": bool(engine.checkpoint),
        "planned_gb": round(planned / 1e9, 3), "peak over plan": peak,
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--layers", type=int, default=20)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here; only the plan of a 7 B was made.")
        save("gpu_plan", {"7 B, planned": seven_billion()})
        sys.exit()
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=given.width, intermediate_size=4 * given.width, num_hidden_layers=given.layers,
        num_attention_heads=given.width // 64,
    )  # fmt: skip
    shape._attn_implementation = "sdpa"
    with torch.device(given.device):
        model: Any = LlamaForCausalLM(shape)
    model.to(torch.bfloat16)
    backbone = Numbered(Config(), model, Plain(), "random" * 3, "random decoder")
    random = torch.Generator().manual_seed(0)
    weights = sum(p.numel() for p in model.parameters())
    result: dict[str, Any] = {"quiet": quietness(), "weights": weights, "dtype": "bfloat16", "attention": "sdpa"}
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
            "memory": memory(engine, asked, layer),
            "seconds": medians(seconds),
        }
    result["7 B, planned"] = seven_billion()
    print(json.dumps(result, indent=2))
    save("gpu", result, device=given.device)


if __name__ == "__main__":
    main()
