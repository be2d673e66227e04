"""Models of the BERT family (BERT, RoBERTa, XLM-RoBERTa), block by block: what the kinds that run one have in common."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ficpd import rng
from ficpd.backbones import Reads, Silent, unknown_share
from ficpd.backbones.lora import Adapters
from ficpd.backbones.vocabulary import Vocabulary
from ficpd.errors import BackboneError
from ficpd.types import Hidden, Item

NONSENSE = 8  # words of a nonsense text


def load(auto: Any, folder: Path, name: str, what: str, **options: Any) -> tuple[Any, Any, set[str]]:
    """Model and tokeniser of a `from_pretrained` folder, and the weights that it lacks. `BackboneError` if it has none."""
    try:
        with _quietly(), torch.random.fork_rng(devices=[]):  # a part that a checkpoint lacks is drawn, and never used
            model, told = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"backbone {name!r}: {folder} cannot be read as {what}: {error}") from error
    return model, tokenizer, set(told["missing_keys"])


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


class Bert(Silent, Reads):
    """The frozen blocks. At layer 0 the prompt joins the word embeddings (ordinary prompt tuning, as in PEFT); at layer n
    it joins the input of the n-th block. A subclass says what is read (`kind`, `about`) and where."""

    gives_gradients = True
    kind: str
    about: str

    def __init__(self, max_tokens: int, model: Any, tokenizer: Any, sha256: str, name: str):
        if not hasattr(getattr(model.base_model, "encoder", None), "layer"):
            raise BackboneError(
                f"backbone {name!r} is a {type(model).__name__}; the {self.kind} kind needs a BERT-like model (with "
                "`encoder.layer`). Use a BERT, RoBERTa, XLM-RoBERTa or E5 model, or another kind."
            )
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False).base_model, tokenizer, name
        self.fingerprint = f"{self.kind}:{sha256[:16]}"
        self.width, self.depth = model.config.hidden_size, model.config.num_hidden_layers
        self.max_tokens = min(max_tokens, _positions(model.config))
        self.device, self.dtype = model.device, model.dtype
        self.adapters = Adapters(self.model, self.width)
        self.words = Vocabulary(tokenizer, self._embedded, model.config.vocab_size)

    def start(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        ids = self._words(min(num_tokens, self.max_tokens), seed) if text is None else self._start_ids(text)
        item = Item(torch.tensor(ids), len(ids))
        states_TD = self.below([item], enters_at)[0].float().cpu()
        return states_TD[torch.arange(num_tokens) % len(states_TD)].clone()

    def nonsense(self, number: int, seed: int) -> list[str]:
        ids = self._words(NONSENSE * number, seed)
        return [
            self.tokenizer.decode([ids[(NONSENSE * i + j) % len(ids)] for j in range(NONSENSE)]) for i in range(number)
        ]

    def unknown_share(self, texts: Sequence[str]) -> float:
        return unknown_share(self.tokenizer, texts)

    def below(self, items: Sequence[Item], layer: int) -> list[Tensor]:
        with torch.no_grad():
            embedded = [self._word_vectors(item) for item in items]
            if layer == 0:
                return embedded
            hidden = Hidden.of(embedded)
            states = self._run(self._embed(hidden.states_STD), hidden.mask_ST, 0, layer)
            return [states[i, : item.length].clone() for i, item in enumerate(items)]

    def _word_vectors(self, item: Item) -> Tensor:
        """[T, D]: what a prompt at layer 0 stands beside."""
        return self._embedded(item.content[: item.length])

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.to(self.device))

    def _top(self, prompts_SPD: Tensor, hidden: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """[S, T, D] behind the prompt after the last block, and which of them are tokens [S, T]."""
        text = Hidden.of(hidden)
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

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _start_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        if not ids:
            raise BackboneError(f"the start text {text!r} has no tokens for {self.name}; write it in words")
        return ids[: self.max_tokens]

    def _words(self, count: int, seed: int) -> list[int]:
        special = set(self.tokenizer.all_special_ids)
        drawn = torch.randperm(len(self.tokenizer), generator=rng.generator(seed, "vocabulary")).tolist()
        return [i for i in drawn if i not in special][:count]


def _positions_start(config: Any) -> int:
    """RoBERTa counts positions from its padding index + 1, BERT from 0."""
    return config.pad_token_id + 1 if "roberta" in config.model_type else 0


def _positions(config: Any) -> int:
    return config.max_position_embeddings - _positions_start(config)
