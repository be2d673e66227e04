"""Sentence encoders (BERT family: MiniLM, multilingual E5, ...): features are normalised mean-pooled embeddings.

Answers are scored by cosine similarity to their embedded texts, times `SCALE`, the value that sentence-transformers
trains with (Reimers and Gurevych, EMNLP 2019, arXiv 1908.10084). The prompt is attended to and not pooled.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from ficpd.backbones.bert import Bert, load
from ficpd.errors import BackboneError
from ficpd.registry import FrozenConfig
from ficpd.types import EncodedInput, ModelOutput

SCALE = 20.0


class Config(FrozenConfig):
    """`max_tokens`: longest input, prompt included. `prefix`: what the encoder was trained to see before a text."""

    max_tokens: int = Field(default=256, ge=8)
    prefix: str = ""


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Load an encoder from a `from_pretrained` folder. Raises `BackboneError` if it is not of the BERT family."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    model, tokenizer, _ = load(AutoModel, Path(weights.folder), name, "an encoder", **options)
    return Encoder(config, model.to(device), tokenizer, weights.sha256, name)


class Encoder(Bert):
    """A frozen sentence encoder."""

    kind, about = "sentence_encoder", "a sentence encoder"

    def __init__(self, config: Config, model: Any, tokenizer: Any, sha256: str, name: str):
        super().__init__(config.max_tokens, model, tokenizer, sha256, name)
        self.config = config

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """The instruction is not read with the text: it frames the answers (`readout`)."""
        if writes:
            raise self._cannot_write()
        limit = self.max_tokens - room
        if limit < 8:
            raise BackboneError(
                f"a prompt of {room} virtual tokens leaves {limit} of {self.name}'s {self.max_tokens} positions for the "
                "text; take fewer virtual tokens (prompt.num_tokens) or a larger backbone.max_tokens"
            )
        texts = (self.config.prefix + text,) if pair is None else (self.config.prefix + text, pair)
        ids = self.tokenizer(*texts, truncation=True, max_length=limit)["input_ids"]
        return EncodedInput(torch.tensor(ids), len(ids))

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor:
        """[C, D]: each answer's embedded text, `instruction answer.`, times the scale."""
        for answer in answers:
            if not self._ids(answer):
                raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        items = [self.tokenize(f"{instruction} {answer}".strip() + ".", None, "", None, 0) for answer in answers]
        none = torch.zeros(len(items), 0, self.width, device=self.device)
        with torch.no_grad():
            features = self.forward(none, self.encode_prefix(items, 0), items, 0).features_RD
        return features * SCALE

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Any row length means the same readout: only the direction counts, as with the embedded texts."""
        return F.normalize(rows_RCD.float(), dim=-1) * SCALE

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        states_STD, mask_ST = self._top(prompts_SPD, hidden, layer)
        weight = mask_ST[..., None].float()
        return ModelOutput(F.normalize((states_STD.float() * weight).sum(1) / weight.sum(1), dim=-1))
