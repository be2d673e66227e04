"""Sentence encoders (BERT family: MiniLM, multilingual E5, ...): features are normalised mean-pooled embeddings.

Answers are scored by cosine similarity to their embedded texts, times `SCALE`, the value that sentence-transformers
trains with (Reimers and Gurevych, EMNLP 2019, arXiv 1908.10084). The prompt is attended to and not pooled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ficpd import seeds
from ficpd.errors import BackboneError
from ficpd.types import Hidden, Item, Outputs, Prompt

SCALE = 20.0
NONSENSE = 8  # words of a nonsense text


class Config(BaseModel):
    """`max_tokens`: longest input, prompt included. `prefix`: what the encoder was trained to see before a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_tokens: int = Field(default=256, ge=8)
    prefix: str = ""


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Load an encoder from a `from_pretrained` folder. Raises `BackboneError` if it is not of the BERT family."""
    folder = Path(weights.folder)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "local_files_only": True}
    try:
        with _quietly(), torch.random.fork_rng(devices=[]):  # a part that a checkpoint lacks is drawn, and never used
            model = AutoModel.from_pretrained(folder, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"backbone {name!r}: {folder} cannot be read as an encoder: {error}") from error
    return Encoder(config, model.to(device), tokenizer, weights.sha256, name)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars and notes on the pooling head, which is not used."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


class Encoder:
    """A frozen BERT-like encoder. At layer 0 the prompt joins the word embeddings (ordinary prompt tuning, as in PEFT);
    at layer n it joins the input of the n-th block."""

    gives_gradients, writes = True, False

    def __init__(self, config: Config, model: Any, tokenizer: Any, sha256: str, name: str):
        if not hasattr(getattr(model, "encoder", None), "layer"):
            raise BackboneError(
                f"backbone {name!r} is a {type(model).__name__}; the encoder kind needs a BERT-like model (with "
                "`encoder.layer`). Use a BERT, RoBERTa, XLM-RoBERTa or E5 model, or another kind."
            )
        self.config, self.model, self.tokenizer, self.name = config, model.eval().requires_grad_(False), tokenizer, name
        self.fingerprint = f"encoder:{sha256[:16]}"
        self.width, self.depth = model.config.hidden_size, model.config.num_hidden_layers
        self.max_tokens = min(config.max_tokens, _positions(model.config))
        self.device, self.dtype = model.device, model.dtype

    def read(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> Item:
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
        return Item(torch.tensor(ids), len(ids))

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor:
        """[C, D]: each answer's embedded text, `instruction answer.`, times the scale."""
        for answer in answers:
            if not self.tokenizer(answer, add_special_tokens=False)["input_ids"]:
                raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        items = [self.read(f"{instruction} {answer}".strip() + ".", None, "", None, 0) for answer in answers]
        with torch.no_grad():
            features = self.above(self._no_prompt(len(items)), self.below(items, 0), items, 0).features_RD
        return features * SCALE

    def as_readout(self, rows_RCD: Tensor) -> Tensor:
        """Any row length means the same readout: only the direction counts, as with the embedded texts."""
        return F.normalize(rows_RCD.float(), dim=-1) * SCALE

    def start(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        ids = self._words(min(num_tokens, self.max_tokens), seed) if text is None else self._ids(text)
        item = Item(torch.tensor(ids), len(ids))
        states_TD = self.below([item], enters_at)[0].float().cpu()
        return states_TD[torch.arange(num_tokens) % len(states_TD)].clone()

    def nonsense(self, number: int, seed: int) -> list[str]:
        ids = self._words(NONSENSE * number, seed)
        return [
            self.tokenizer.decode([ids[(NONSENSE * i + j) % len(ids)] for j in range(NONSENSE)]) for i in range(number)
        ]

    def below(self, items: Sequence[Item], layer: int) -> list[Tensor]:
        with torch.no_grad():
            embedded = [self.model.get_input_embeddings()(item.content.to(self.device)) for item in items]
            if layer == 0:
                return embedded
            hidden = Hidden.of(embedded)
            states = self._run(self._embed(hidden.states_STD), hidden.mask_ST, 0, layer)
            return [states[i, : item.length].clone() for i, item in enumerate(items)]

    def above(self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[Item], layer: int) -> Outputs:
        text = Hidden.of(hidden)
        states, mask = text.joined(prompts_SPD)
        states = self._run(self._embed(states) if layer == 0 else states, mask, layer, self.depth)
        pooled_STD, weight = states[:, prompts_SPD.shape[1] :].float(), text.mask_ST[..., None].float()
        return Outputs(F.normalize((pooled_STD * weight).sum(1) / weight.sum(1), dim=-1))

    def write(self, prompts_SPD: Tensor, items: Sequence[Item], layer: int, max_tokens: int) -> list[str]:
        raise self._cannot_write()

    def generate(
        self, prompt: Prompt, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        raise self._cannot_write()

    def _cannot_write(self) -> BackboneError:
        return BackboneError(f"{self.name} is a sentence encoder and cannot write; use a causal_lm backbone for text")

    def _embed(self, states_STD: Tensor) -> Tensor:
        first = _positions_start(self.model.config)
        places = torch.arange(first, first + states_STD.shape[1], device=self.device).expand(1, -1)
        kinds = torch.zeros(states_STD.shape[:2], dtype=torch.long, device=self.device)
        return self.model.embeddings(inputs_embeds=states_STD, position_ids=places, token_type_ids=kinds)

    def _run(self, states: Tensor, mask_ST: Tensor, first: int, last: int) -> Tensor:
        bias = torch.zeros(mask_ST.shape, dtype=self.dtype, device=self.device)
        bias = bias.masked_fill(~mask_ST, torch.finfo(self.dtype).min)[:, None, None, :]
        for block in self.model.encoder.layer[first:last]:
            states = block(states, bias)
        return states

    def _no_prompt(self, rows: int) -> Tensor:
        return torch.zeros(rows, 0, self.width, device=self.device)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise BackboneError(f"the start text {text!r} has no tokens for {self.name}; write it in words")
        return ids[: self.max_tokens]

    def _words(self, count: int, seed: int) -> list[int]:
        special = set(self.tokenizer.all_special_ids)
        drawn = torch.randperm(len(self.tokenizer), generator=seeds.generator(seed, "vocabulary")).tolist()
        return [i for i in drawn if i not in special][:count]


def _positions_start(config: Any) -> int:
    """RoBERTa counts positions from its padding index + 1, BERT from 0."""
    return config.pad_token_id + 1 if "roberta" in config.model_type else 0


def _positions(config: Any) -> int:
    return config.max_position_embeddings - _positions_start(config)
