"""Sentence encoders (MiniLM, E5, BGE, MPNet, Qwen3-Embedding, ...): features are normalised pooled embeddings.

The files of a sentence-transformers folder define the pooling; the default is the mean. Answers are scored by cosine
similarity to their embedded texts, times `SCALE`, the value that sentence-transformers trains with (Reimers and Gurevych,
EMNLP 2019, arXiv 1908.10084). The prompt is attended to, but not pooled.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from ficpd.backbones.pretrained import Loader, LoadingConfig, TextModel, require_weights
from ficpd.backbones.sentence_files import SentenceFiles, pool, read_sentence_files
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput, ModelOutput

SCALE = 20.0


class Config(LoadingConfig):
    """Sets the input length and the text before each input.

    max_tokens: the longest input in tokens, prompt included.
    prefix: the text before each input in the encoder's training; None: the folder's default prompt, if any."""

    max_tokens: int = Field(default=256, ge=8)
    prefix: str | None = None


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Loads an encoder from a `from_pretrained` folder.

    Raises `BackboneError` if it cannot be run on embeddings, or its files have an unsupported setting."""
    loader = Loader(Path(weights.folder), name, "an encoder", config, device, dtype, attention)
    files = read_sentence_files(loader.folder, name, config.prefix, device)
    model, tokenizer, missing = loader.model_and_tokenizer(AutoModel)
    require_weights({key for key in missing if "pooler" not in key}, name, "an encoder")  # the pooler is not used
    return Encoder(config, model, tokenizer, config.identity(weights), name, files)


class Encoder(TextModel):
    """A frozen sentence encoder."""

    kind, about = "sentence_encoder", "a sentence encoder"

    def __init__(
        self, config: Config, model: Any, tokenizer: Any, identity: str, name: str, files: SentenceFiles | None = None
    ):
        super().__init__(config.max_tokens, model, tokenizer, identity, name)
        self.files = files or SentenceFiles(prompt=config.prefix or "")
        if self.files.pooling != "mean" or self.files.dense:  # the features do not depend on the weights alone
            self.fingerprint += f":{self.files.pooling}:{len(self.files.dense)}"
        out = len(self.files.dense[-1].weight_OD) if self.files.dense else self.frozen.sample_TD.shape[1]
        if out > self.width:
            raise BackboneError(
                f"backbone.name = {name!r}: its token embeddings have {self.width} numbers and its features {out}; expected "
                'no more than the embeddings. Use another model, or backbone.kind = "masked_lm".'
            )

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """Encodes text and pair. The instruction is not read here, but with the answers (`readout`)."""
        if writes:
            raise self._cannot_write()
        limit = self.max_tokens - room
        if limit < 8:
            raise BackboneError(
                f"a prompt of {room} virtual tokens leaves {limit} of {self.name}'s {self.max_tokens} positions for the "
                "text; take fewer virtual tokens (prompt.num_tokens) or a larger backbone.max_tokens"
            )
        texts = [self.files.prompt + text, *([] if pair is None else [pair])]
        texts = [text.lower() for text in texts] if self.files.lower_case else texts
        limit = min(limit, self.files.max_tokens or limit)
        ids = self.tokenizer(*texts, truncation=True, max_length=limit)["input_ids"]
        return EncodedInput(torch.tensor(ids), len(ids))

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor:
        """Returns the embeddings of the texts `instruction answer.`, times the scale, [C, D]."""
        for answer in answers:
            if not self._ids(answer):
                raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        items = [self.tokenize(f"{instruction} {answer}".strip() + ".", None, "", None, 0) for answer in answers]
        none = torch.zeros(len(items), 0, self.width, device=self.device)
        with torch.no_grad():
            features = self.forward(none, self.encode_prefix(items, 0), items, 0).features_RD
        return features * SCALE

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Scales rows to the length of embedded texts. Only their directions matter."""
        return F.normalize(rows_RCD.float(), dim=-1) * SCALE

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        states_STD, mask_ST = self.frozen.run(prompts_SPD, hidden, layer)
        lengths = [item.length for item in items]
        pooled_SD = pool(states_STD[:, prompts_SPD.shape[1] :], mask_ST, lengths, self.files.pooling)
        for dense in self.files.dense:
            pooled_SD = dense(pooled_SD)
        return ModelOutput(F.pad(F.normalize(pooled_SD, dim=-1), (0, self.width - pooled_SD.shape[1])))
