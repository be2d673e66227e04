"""Reads frozen text models from folders, and what all kinds of them share."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ficpd.backbones import Tokenised
from ficpd.backbones.devices import copy_to
from ficpd.backbones.frozen import FrozenModel
from ficpd.backbones.lora import Adapters
from ficpd.backbones.vocabulary import TokenizerVocabulary
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput

UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError)
"""Errors of transformers on folders that are broken, need code of their own, or need a package for quantised weights."""


def load(
    auto: Any, folder: Path, name: str, what: str, level: int = ERROR, **options: Any
) -> tuple[Any, Any, set[str]]:
    """Loads model and tokenizer of a `from_pretrained` folder; returns also the weights that it lacks.

    Code in the folder is never run. Raises `BackboneError` for a folder that cannot be read or holds a LoRA adapter.
    """
    model, told = read(auto, folder, name, what, level, output_loading_info=True, **options)
    tokenizer = read(AutoTokenizer, folder, name, f"{what} (its tokenizer)", level)
    rows = len(model.get_input_embeddings().weight)
    if any(i not in tokenizer.added_tokens_decoder for i in range(rows, len(tokenizer))):
        raise BackboneError(
            f"backbone.name = {name!r}: its tokenizer has {len(tokenizer)} tokens and its embedding {rows} rows; expected "
            "as many or more rows. Save model and tokenizer together, after `model.resize_token_embeddings`."
        )
    return model, tokenizer, set(told["missing_keys"])


def require_weights(missing: set[str], name: str, what: str) -> None:
    """Raises `BackboneError` for a folder that lacks weights, which would be random numbers."""
    if missing:
        raise BackboneError(
            f"backbone.name = {name!r}: it lacks {len(missing)} weights of {what}, among them {min(missing)}; use weights "
            'that were saved with all parts, such as the language head, or backbone.kind = "sentence_encoder"'
        )


def read(auto: Any, folder: Path, name: str, what: str, level: int = ERROR, **options: Any) -> Any:
    """Calls `from_pretrained` of an auto class on a local folder, silently and without changing the random state."""
    if (Path(folder) / "adapter_config.json").exists():
        raise BackboneError(
            f"backbone.name = {name!r}: {folder} holds an adapter (adapter_config.json); expected a model alone. Merge it "
            "with PEFT's `merge_and_unload` and save the model, or remove the adapter's files."
        )
    try:
        with quietly(level), torch.random.fork_rng(devices=[]):  # parts that a checkpoint lacks are drawn, never used
            return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except UNREADABLE as error:
        raise BackboneError(
            f"backbone.name = {name!r}: {folder} cannot be read as {what}: {error}. Use a folder that transformers reads "
            "without code of its own; a package that the message names has to be installed."
        ) from error


@contextmanager
def quietly(level: int = ERROR) -> Iterator[None]:
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


class TextModel(Tokenised):
    """A frozen model with a tokenizer. At layer 0 the prompt joins the token embeddings (ordinary prompt tuning, as in
    PEFT); at layer n it joins the input of the n-th block. A subclass defines the reading and the name of its `kind`."""

    supports_gradients = True
    kind: str
    causal = False

    def __init__(self, max_tokens: int, model: Any, tokenizer: Any, sha256: str, name: str):
        self.fingerprint = f"{self.kind}:{sha256[:16]}"
        self.frozen = FrozenModel(self.layered(model), name, self.causal, self.fingerprint)
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.width, self.depth, self.num_blocks = self.frozen.width, self.frozen.depth, self.frozen.num_blocks
        self.context = context(model)
        self.frozen.most = self.context
        self.max_tokens = min(max_tokens, self.context)
        self.device, self.dtype = self.frozen.device, self.frozen.dtype
        self.adapters = Adapters(model, self.width)
        self.vocabulary = self.words = TokenizerVocabulary(tokenizer, self.frozen.embed, len(self.frozen.table.weight))

    def layered(self, model: Any) -> Any:
        """The part of the model that has the layers which a prompt can enter."""
        return model

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        if text is None:
            ids = self._vocabulary(seed)[: min(num_tokens, self.max_tokens)]
        else:
            ids = self._start_ids(text)[: self.max_tokens]
        item = EncodedInput(torch.tensor(ids), len(ids))
        states_TD = self.encode_prefix([item], enters_at)[0].float().cpu()
        return states_TD[torch.arange(num_tokens) % len(states_TD)].clone()

    @torch.no_grad()
    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        return self.frozen.encode(self._word_vectors(items), layer)

    def _word_vectors(self, items: Sequence[EncodedInput]) -> Sequence[Tensor]:
        """[T, D] each: the embeddings that a prompt at layer 0 stands before, gathered in one call."""
        ids = torch.cat([item.content[: item.length] for item in items])
        return self.frozen.embed(ids).split([item.length for item in items])

    def set_attention(self, attention: str) -> bool:
        return self.frozen.set_attention(attention)

    def checkpoint_blocks(self, on: bool) -> None:
        self.frozen.checkpoint_blocks(on)

    def _index(self, ids: Sequence[int]) -> Tensor:
        return copy_to(torch.tensor(ids, dtype=torch.long), self.device)


def context(model: Any) -> int:
    """The longest row that a model reads. Positions that depend on the longest row of a batch bound it too.

    The rotary scalings `longrope` and `dynamic` change all rows once one is longer than the length of the pretraining.
    """
    config, limits = model.config, [1 << 40]
    places = getattr(config, "max_position_embeddings", None)
    if isinstance(places, int) and places > 0:
        limits.append(places)
        for part in model.modules():  # RoBERTa's family counts positions from its padding index + 1
            if isinstance(part, nn.Embedding) and part.num_embeddings == places and part.padding_idx is not None:
                limits += [places - part.padding_idx - 1] if part is not model.get_input_embeddings() else []
    for scaling in _scalings(config):
        if scaling.get("rope_type", scaling.get("type")) in ("longrope", "dynamic"):
            before = scaling.get("original_max_position_embeddings")
            limits.append(before or getattr(config, "original_max_position_embeddings", None) or places or limits[0])
    return min(limits)


def _scalings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration, one for all layers or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found, *(part for part in found.values() if isinstance(part, dict))]


def json_file(path: Path, expected: type = dict) -> Any:
    """The content of a JSON file; an empty value where there is none. Raises `BackboneError` for other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else expected()
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: expected JSON ({error}). Mend the file.") from error
    if not isinstance(content, expected):
        raise BackboneError(f"{path}: expected a JSON {expected.__name__}. Mend the file.")
    return content
