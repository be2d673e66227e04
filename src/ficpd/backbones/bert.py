"""Runs models of the BERT family (BERT, RoBERTa, XLM-RoBERTa) block by block, for the kinds that use one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ficpd.backbones import Tokenised
from ficpd.backbones.lora import Adapters
from ficpd.backbones.vocabulary import TokenizerVocabulary
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput, HiddenStates


def load(
    auto: Any, folder: Path, name: str, what: str, level: int = ERROR, **options: Any
) -> tuple[Any, Any, set[str]]:
    """Loads model and tokeniser of a `from_pretrained` folder; returns also the weights that it lacks."""
    try:
        with (
            _quietly(level),
            torch.random.fork_rng(devices=[]),
        ):  # a part that a checkpoint lacks is drawn, and never used
            model, told = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"backbone {name!r}: {folder} cannot be read as {what}: {error}") from error
    return model, tokenizer, set(told["missing_keys"])


@contextmanager
def _quietly(level: int = ERROR) -> Iterator[None]:
    """Hides transformers' progress bars and its notes below a level, such as those on the unused pooling head."""
    shown, before = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(level)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if shown:
            transformers_logging.enable_progress_bar()


class Bert(Tokenised):
    """The frozen blocks. At layer 0 the prompt joins the word embeddings (ordinary prompt tuning, as in PEFT); at layer n
    it joins the input of the n-th block. A subclass defines the reading and the name of its `kind`."""

    supports_gradients = True
    kind: str

    def __init__(self, max_tokens: int, model: Any, tokenizer: Any, sha256: str, name: str):
        if not hasattr(getattr(model.base_model, "encoder", None), "layer"):
            raise BackboneError(
                f"backbone {name!r} is a {type(model).__name__}; the {self.kind} kind needs a BERT-like model (with "
                "`encoder.layer`). Use a BERT, RoBERTa, XLM-RoBERTa or E5 model, or another kind."
            )
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False).base_model, tokenizer, name
        self.fingerprint = f"{self.kind}:{sha256[:16]}"
        self.width, self.depth = model.config.hidden_size, model.config.num_hidden_layers
        self.max_tokens = min(max_tokens, model.config.max_position_embeddings - _positions_start(model.config))
        self.device, self.dtype = model.device, model.dtype
        self.adapters = Adapters(self.model, self.width)
        self.vocabulary = self.words = TokenizerVocabulary(tokenizer, self._embedded, model.config.vocab_size)

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        if text is None:
            ids = self._vocabulary(seed)[: min(num_tokens, self.max_tokens)]
        else:
            ids = self._start_ids(text)[: self.max_tokens]
        item = EncodedInput(torch.tensor(ids), len(ids))
        states_TD = self.encode_prefix([item], enters_at)[0].float().cpu()
        return states_TD[torch.arange(num_tokens) % len(states_TD)].clone()

    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        with torch.no_grad():
            embedded = [self._word_vectors(item) for item in items]
            if layer == 0:
                return embedded
            hidden = HiddenStates.of(embedded, most=self.max_tokens)
            states = self._run(self._embed(hidden.states_STD), hidden.mask_ST, 0, layer)
            return [states[i, : item.length].clone() for i, item in enumerate(items)]

    def _word_vectors(self, item: EncodedInput) -> Tensor:
        """[T, D]: what a prompt at layer 0 stands beside."""
        return self._embedded(item.content[: item.length])

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.to(self.device))

    def _top(self, prompts_SPD: Tensor, hidden: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """[S, T, D] behind the prompt after the last block, and which of them are tokens [S, T]."""
        text = HiddenStates.of(hidden, most=self.max_tokens - prompts_SPD.shape[1])
        states, mask = text.joined(prompts_SPD)
        states = self._run(self._embed(states) if layer == 0 else states, mask, layer, self.depth)
        return states[:, prompts_SPD.shape[1] :], text.mask_ST

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


def _positions_start(config: Any) -> int:
    """RoBERTa counts positions from its padding index + 1, BERT from 0."""
    return config.pad_token_id + 1 if "roberta" in config.model_type else 0
