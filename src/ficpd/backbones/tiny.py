"""A small random transformer with a hash tokeniser, for quick tests and for the engine's overhead.

It has bidirectional pre-norm blocks and mean pooling. Its weights are drawn from a fixed seed, so it is the same everywhere.
"""

import hashlib
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ficpd import rng
from ficpd.backbones.lora import Adapters
from ficpd.backbones.projections import find_projections
from ficpd.backbones.vocabulary import validate_ids
from ficpd.errors import BackboneError
from ficpd.interfaces import Backbone
from ficpd.registry import FrozenConfig
from ficpd.types import EncodedInput, HiddenStates, ModelOutput

SCALE = 20.0
VOCABULARY = 4096


class Config(FrozenConfig):
    width: int = Field(default=32, ge=4, multiple_of=4)
    depth: int = Field(default=2, ge=1)
    max_tokens: int = Field(default=64, ge=8)


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Builds the backbone. Ignores `weights`: there are none to load."""
    return Tiny(config, dtype, device, name)


class HashTokenizer:
    """Maps each word to its hash, without a vocabulary file. An id's text is its number."""

    size = VOCABULARY

    def __init__(self, table: Tensor):
        self.table = table

    def ids(self, text: str) -> list[int]:
        words = text.lower().split() or ["[empty]"]
        return [int.from_bytes(hashlib.md5(w.encode()).digest()[:4], "big") % VOCABULARY for w in words]

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(f"#{i}" for i in ids)

    def vectors(self, ids: Tensor) -> Tensor:
        return self.table[validate_ids(ids, VOCABULARY).to(self.table.device)].float()

    def embed_for_prompt(self, ids_RP: Tensor) -> Tensor:
        return self.vectors(ids_RP)

    def proposals(self, ids: Sequence[int], place: int, number: int, seed: int) -> list[int]:
        drawn = torch.randperm(VOCABULARY, generator=rng.make_generator(seed, "proposals")).tolist()
        return [i for i in drawn[: number + 1] if i != ids[place]][:number]


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states_STD: Tensor, mask_ST: Tensor) -> Tensor:
        S, T, D = states_STD.shape
        q, k, v = self.qkv(self.norm1(states_STD)).view(S, T, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_ST[:, None, None, :])
        states_STD = states_STD + self.out(mixed.transpose(1, 2).reshape(S, T, D))
        return states_STD + self.narrow(F.gelu(self.wide(self.norm2(states_STD))))


class Tiny(Backbone):
    supports_gradients = True

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, name: str):
        self.name, self.width, self.depth, self.max_tokens = name, config.width, config.depth, config.max_tokens
        self.device, self.dtype, self.num_blocks, self.checkpointed = device, dtype, config.depth, False
        random = rng.make_generator("tiny", config.width, config.depth)
        self.table = torch.randn(VOCABULARY, config.width, generator=random).to(device, dtype)
        self.vocabulary = self.words = HashTokenizer(self.table)
        with torch.random.fork_rng(devices=[]):  # torch draws weights from its global state; they are replaced below
            self.blocks = nn.ModuleList([Block(config.width) for _ in range(config.depth)])
        for weight in self.blocks.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=random)
            elif weight.dim() == 1:
                nn.init.zeros_(weight)
        for block in self.blocks:
            nn.init.ones_(block.norm1.weight), nn.init.ones_(block.norm2.weight)  # type: ignore[union-attr]
        self.blocks.to(device, dtype).eval().requires_grad_(False)
        self.model = self.blocks
        self.fingerprint = f"tiny:{config.width}x{config.depth}"
        sample_STD = self.table[:18].view(2, 9, -1)
        self.adapters = Adapters(partial(_projections, self.blocks, sample_STD), self.width)

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        if writes:
            raise self._cannot_write()
        limit = self.max_tokens - room
        if limit < 1:
            raise BackboneError(
                f"a prompt of {room} virtual tokens leaves {limit} of {self.name}'s {self.max_tokens} positions for "
                "the text; take fewer virtual tokens (prompt.num_tokens)"
            )
        ids = self.words.ids(text if pair is None else f"{text} | {pair}")[:limit]
        return EncodedInput(torch.tensor(ids), len(ids))

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor:
        for answer in answers:
            if not answer.split():
                raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        items = [self.tokenize(f"{instruction} {answer}", None, "", None, 0) for answer in answers]
        none = torch.zeros(len(items), 0, self.width, device=self.device)
        with torch.no_grad():
            return self.forward(none, self.encode_prefix(items, 0), items, 0).features_RD * SCALE

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        return F.normalize(rows_RCD.float(), dim=-1) * SCALE

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        drawn = torch.randint(VOCABULARY, (num_tokens,), generator=rng.make_generator(seed, "vocabulary")).tolist()
        ids = drawn if text is None else self.words.ids(text)
        states_TD = self.encode_prefix([EncodedInput(torch.tensor(ids), len(ids))], enters_at)[0].float().cpu()
        return states_TD[torch.arange(num_tokens) % len(states_TD)].clone()

    def synthetic_inputs(self, number: int, seed: int) -> list[str]:
        drawn = torch.randint(10**6, (number, 8), generator=rng.make_generator(seed, "nonsense")).tolist()
        return [" ".join(f"w{word}" for word in words) for words in drawn]

    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        with torch.no_grad():
            hidden = HiddenStates.of([self.table[item.content.to(self.device)] for item in items])
            states = self._run(hidden.states_STD, hidden.mask_ST, 0, layer)
            return [states[i, : item.length].clone() for i, item in enumerate(items)]

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        text = HiddenStates.of(hidden)
        states, mask = text.joined(prompts_SPD)
        states = self._run(states, mask, layer, self.depth)[:, prompts_SPD.shape[1] :].float()
        weight = text.mask_ST[..., None].float()
        return ModelOutput(F.normalize((states * weight).sum(1) / weight.sum(1), dim=-1))

    def _run(self, states: Tensor, mask_ST: Tensor, first: int, last: int) -> Tensor:
        again = self.checkpointed and states.requires_grad
        for layer in self.blocks[first:last]:
            block = partial(checkpoint, layer, use_reentrant=False) if again else layer
            states = block(states, mask_ST)
        return states

    def checkpoint_blocks(self, on: bool) -> None:
        self.checkpointed = on


def _projections(blocks: nn.ModuleList, states_STD: Tensor) -> dict[str, nn.Module]:
    mask_ST = torch.ones(states_STD.shape[:2], dtype=torch.bool, device=states_STD.device)
    return find_projections(blocks, lambda: reduce(lambda states, block: block(states, mask_ST), blocks, states_STD))
