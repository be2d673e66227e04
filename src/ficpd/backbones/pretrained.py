"""Reads frozen text models from folders, and shares the code of all kinds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ficpd.backbones.devices import copy_to
from ficpd.backbones.frozen import FrozenModel
from ficpd.backbones.guards import parameters
from ficpd.backbones.lora import Adapters
from ficpd.backbones.projections import find_projections
from ficpd.backbones.quantization import (
    Quantization,
    prepare_quantized,
    quantization_config,
    quantized_as,
    require_packages,
)
from ficpd.backbones.tokenised import Tokenised
from ficpd.backbones.vocabulary import TokenizerVocabulary
from ficpd.backbones.weights import Weights
from ficpd.errors import BackboneError
from ficpd.registry import FrozenConfig
from ficpd.types import EncodedInput

UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError)
"""Errors of transformers for folders that are broken, or need their code or a package for quantised weights."""


TOKENIZERS = ("tokenizer.json", "tekken.json", "vocab*", "*.model", "*.tiktoken")
"""Files with a vocabulary."""


class LoadingConfig(FrozenConfig):
    """Options of all kinds that load weights.

    revision: a branch, tag or commit of a hub id.
    device_map: "auto" spreads the layers over all GPUs. It needs engine.device = "cuda".
    quantization: quantises the linear layers: int8 (torchao), bnb_8bit or bnb_4bit (bitsandbytes).
    """

    revision: str | None = None
    device_map: Literal["auto"] | None = None
    quantization: Quantization | None = None

    def identity(self, weights: Weights) -> str:
        """Returns the identity of weights and quantization, for the fingerprint."""
        return weights.identity + (f":{self.quantization}" if self.quantization else "")


class Loader(NamedTuple):
    """Loads a folder's model and tokenizer. `what`: the kind of model, for errors. `level`: transformers' log level."""

    folder: Path
    name: str
    what: str
    config: LoadingConfig
    device: torch.device
    dtype: torch.dtype
    attention: str
    level: int = ERROR

    def model(self, auto: Any) -> tuple[Any, set[str]]:
        """Returns the model on its device, and the names of missing weights.

        Never runs code in the folder. Raises `BackboneError` for an unreadable folder, or one with a LoRA adapter.
        """
        chosen, options = self.config.quantization, {}
        require_packages(self.folder, self.name, chosen)
        if chosen:
            options["quantization_config"] = quantization_config(chosen, self.dtype)
        if self.config.device_map and self.device.type != "cuda":
            raise BackboneError(
                f"backbone.options.device_map = {self.config.device_map!r}: engine.device is {self.device}; expected cuda. "
                "Leave the option out, or set engine.device."
            )
        placed = bool(self.config.device_map or chosen or quantized_as(self.folder))
        if placed:  # by transformers: a quantised or spread model cannot be moved
            options["device_map"] = self.config.device_map or {"": self.device}
        options |= {"dtype": self.dtype, "attn_implementation": self.attention, "output_loading_info": True}
        model, told = self.read(auto, **options)
        if any(weight.is_meta for weight in model.parameters()):
            raise BackboneError(
                f"backbone.name = {self.name!r}: its weights do not fit on the GPUs. Use a smaller model, or "
                'backbone.options.quantization = "bnb_4bit".'
            )
        prepare_quantized(model)
        return (model if placed else model.to(self.device)), set(told["missing_keys"])

    def model_and_tokenizer(self, auto: Any) -> tuple[Any, Any, set[str]]:
        """Returns the model, its tokenizer and the names of missing weights."""
        tokenizer = self.tokenizer()
        model, missing = self.model(auto)
        rows = len(model.get_input_embeddings().weight)
        if any(i not in tokenizer.added_tokens_decoder for i in range(rows, len(tokenizer))):
            raise BackboneError(
                f"backbone.name = {self.name!r}: its tokenizer has {len(tokenizer)} tokens and its embedding {rows} rows; "
                "expected as many or more rows. Save model and tokenizer together, after `model.resize_token_embeddings`."
            )
        return model, tokenizer, missing

    def tokenizer(self) -> Any:
        """Returns the tokenizer. Raises `BackboneError` without its files: transformers would return an empty one."""
        tokenizer = self.read(AutoTokenizer, "its tokenizer")
        names = {*tokenizer.vocab_files_names.values()}  # empty for byte tokenizers
        if names and not any(any(self.folder.glob(name)) for name in {*names, *TOKENIZERS}):
            raise BackboneError(
                f"backbone.name = {self.name!r}: {self.folder} lacks its tokenizer; expected {' or '.join(sorted(names))}. "
                "Save model and tokenizer together."
            )
        return tokenizer

    def read(self, auto: Any, part: str = "", **options: Any) -> Any:
        """Calls an auto class's `from_pretrained` on the folder, without messages and changes of the random state."""
        what = f"{self.what} ({part})" if part else self.what
        if (self.folder / "adapter_config.json").exists():
            raise BackboneError(
                f"backbone.name = {self.name!r}: {self.folder} holds an adapter (adapter_config.json); expected a model "
                "alone. Merge it with PEFT's `merge_and_unload` and save the model, or remove the adapter's files."
            )
        try:
            with quietly(self.level), torch.random.fork_rng(devices=[]):  # missing weights are drawn, but not used
                return auto.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False, **options)
        except UNREADABLE as error:
            raise BackboneError(
                f"backbone.name = {self.name!r}: {self.folder} cannot be read as {what}: {error}. Use a folder that "
                "transformers reads without code of its own; a package that the message names has to be installed."
            ) from error


def require_weights(missing: set[str], name: str, what: str) -> None:
    """Raises `BackboneError` if weights are missing: they would be random numbers."""
    if missing:
        raise BackboneError(
            f"backbone.name = {name!r}: it lacks {len(missing)} weights of {what}, among them {min(missing)}; use weights "
            'that were saved with all parts, such as the language head, or backbone.kind = "sentence_encoder"'
        )


@contextmanager
def quietly(level: int = ERROR) -> Iterator[None]:
    """Hides transformers' progress bars, and its messages below a level, such as those on an unused pooling head."""
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
    """A frozen model with a tokenizer. A subclass defines its `kind`, the encoding of records and the forward.

    At layer 0 the prompt joins the token embeddings (prompt tuning, as in PEFT); at layer n, the input of block n."""

    supports_gradients = True
    kind: str
    causal = False

    def __init__(self, max_tokens: int, model: Any, tokenizer: Any, identity: str, name: str):
        """Checks and wraps the model. identity: names weights and other files (`LoadingConfig.identity`)."""
        self.fingerprint = f"{self.kind}:{identity}"
        self.frozen = FrozenModel(self.layered(model), name, self.causal, self.fingerprint)
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.width, self.depth, self.num_blocks = self.frozen.width, self.frozen.depth, self.frozen.num_blocks
        self.context = context(model)
        self.frozen.most = self.context
        self.max_tokens = min(max_tokens, self.context)
        self.device, self.dtype = self.frozen.device, self.frozen.dtype
        self.adapters = Adapters(partial(_projections, model, self.frozen.sample_ids()[0]), self.width)
        self.vocabulary = self.words = TokenizerVocabulary(tokenizer, self.frozen.embed, len(self.frozen.table.weight))

    def layered(self, model: Any) -> Any:
        """Returns the part of the model with the layers that a prompt can enter."""
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
        """Returns the embeddings [T, D] of each item, computed in one call."""
        ids = torch.cat([item.content[: item.length] for item in items])
        return self.frozen.embed(ids).split([item.length for item in items])

    def set_attention(self, attention: str) -> bool:
        return self.frozen.set_attention(attention)

    def checkpoint_blocks(self, on: bool) -> None:
        self.frozen.checkpoint_blocks(on)

    def _index(self, ids: Sequence[int]) -> Tensor:
        return copy_to(torch.tensor(ids, dtype=torch.long), self.device)


def _projections(model: Any, ids_T: Tensor) -> dict[str, nn.Module]:
    ids_ST = torch.stack([ids_T, ids_T.flip(0)])
    known = {"input_ids": ids_ST, "decoder_input_ids": ids_ST, "use_cache": False}
    given = {name: value for name, value in known.items() if name in parameters(type(model))}
    return find_projections(model, lambda: model(**given))


def context(model: Any) -> int:
    """Returns the longest row, in positions, that a model reads.

    The rotary scalings `longrope` and `dynamic` change all rows if one is longer than the pretraining length, so that
    length is a limit too.
    """
    config, limits = model.config, [1 << 40]
    places = getattr(config, "max_position_embeddings", None)
    if isinstance(places, int) and places > 0:
        limits.append(places)
        for part in model.modules():  # RoBERTa's family counts positions from its padding index + 1 on
            if isinstance(part, nn.Embedding) and part.num_embeddings == places and part.padding_idx is not None:
                limits += [places - part.padding_idx - 1] if part is not model.get_input_embeddings() else []
    for scaling in _scalings(config):
        if scaling.get("rope_type", scaling.get("type")) in ("longrope", "dynamic"):
            before = scaling.get("original_max_position_embeddings")
            limits.append(before or getattr(config, "original_max_position_embeddings", None) or places or limits[0])
    return min(limits)


def _scalings(config: Any) -> list[dict[str, Any]]:
    """Returns the rotary settings of a configuration: for all layers, and for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found, *(part for part in found.values() if isinstance(part, dict))]
