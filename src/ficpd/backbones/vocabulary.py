"""Maps token ids to and from texts and vectors, and proposes other words for a place.

Prompts of words (`methods/feddtpt`) consist of token ids.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng
from ficpd.errors import BackboneError
from ficpd.interfaces import Vocabulary

Likely = Callable[[Sequence[int], int], Tensor]
"""Maps token ids and a place among them to the logits [V] of the tokens at that place."""


class TokenizerVocabulary:
    """The words of a tokeniser from `transformers`.

    table: maps ids [...] to word vectors [..., D].
    likely: a masked language model's logits for a place; None: proposes all words with equal probability."""

    def __init__(self, tokenizer: Any, table: Callable[[Tensor], Tensor], size: int, likely: Likely | None = None):
        self.tokenizer, self.table, self.size, self.likely = tokenizer, table, size, likely

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids)).strip()

    def vectors(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.table(validate_ids(ids, self.size)).float()

    def embed_for_prompt(self, ids_RP: Tensor) -> Tensor:
        return self.vectors(ids_RP)

    def proposals(self, ids: Sequence[int], place: int, number: int, seed: int) -> list[int]:
        """Draws words without replacement, by Gumbel noise on the logits (Kool et al., ICML 2019, arXiv 1903.06059)."""
        random = rng.make_generator(seed, "proposals")
        drawn = torch.rand(len(self.whole_words), generator=random).clamp(min=1e-30, max=1 - 1e-7)
        scores = -(-drawn.log()).log()
        if self.likely is not None:
            scores = scores + F.log_softmax(self.likely(ids, place).float().cpu()[self.whole_words], 0)
        scores = scores.masked_fill(self.whole_words == ids[place], -torch.inf)
        wanted = min(number, int(scores.isfinite().sum()))
        return self.whole_words[scores.topk(wanted).indices].tolist()

    @cached_property
    def whole_words(self) -> Tensor:
        """Returns the ids of whole words: letters only, and tokenised to the same id. Without any, all ordinary ids."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        plain = [i for i in range(min(len(self.tokenizer), self.size)) if i not in special]
        texts = self.tokenizer.batch_decode([[i] for i in plain])
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        whole = [i for i, text, row in zip(plain, texts, rows, strict=True) if row == [i] and text.strip().isalpha()]
        return torch.tensor(whole or plain)


def validate_ids(ids: Tensor, size: int) -> Tensor:
    """Returns untrusted ids as int64. Raises `BackboneError` for an id outside this vocabulary."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise BackboneError(
            f"a prompt has the token ids {int(ids.min())} to {int(ids.max())}, and this backbone's vocabulary 0 to "
            f"{size - 1}; use the backbone that it was made for"
        )
    return ids.long()


def token_prompt(words: Vocabulary | None, name: str, text: str | None, num_tokens: int, seed: int) -> Tensor:
    """Makes a prompt of token ids, [num_tokens, 1] int64, from a text.

    A short text is repeated. Without a text, words are drawn from the seed. Raises `BackboneError` for a text without
    tokens, or if the backbone `name` has no words.
    """
    if words is None:
        raise BackboneError(f"{name} has no vocabulary for a prompt of words; use a backbone that reads texts")
    ids = words.proposals([-1], 0, num_tokens, seed) if text is None else words.ids(text)
    if not ids:
        raise BackboneError(f"the start text {text!r} has no tokens for {name}; write it in words")
    return torch.tensor((ids * -(-num_tokens // len(ids)))[:num_tokens])[:, None]
