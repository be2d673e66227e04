"""Shares the code of backbones with a tokeniser: vocabulary, and rate of unknown tokens."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ficpd import rng
from ficpd.errors import BackboneError, BackboneWarning
from ficpd.interfaces import Backbone
from ficpd.types import Record

MOST_UNKNOWN = 0.05
"""The share of unknown tokens in a client's texts above which a warning is given."""
LOOKED_AT = 50
"""The maximum number of records of each client that are checked, evenly spread."""
NONSENSE = 8
"""The number of tokens in a synthetic text."""


class Tokenised(Backbone):
    """The common part of backbones with a tokeniser."""

    tokenizer: Any

    def synthetic_inputs(self, number: int, seed: int) -> list[str]:
        ids, texts = self._vocabulary(seed), range(number)
        rows = [[ids[(NONSENSE * i + j) % len(ids)] for j in range(NONSENSE)] for i in texts]
        return [self.tokenizer.decode(row) for row in rows]

    def unk_rate(self, texts: Sequence[str]) -> float:
        return unknown_share(self.tokenizer, texts)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _start_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        if not ids:
            raise BackboneError(f"the start text {text!r} has no tokens for {self.name}; write it in words")
        return ids

    def _vocabulary(self, seed: int) -> list[int]:
        """Returns the ids of all ordinary words, in an order drawn from the seed."""
        special = self._special()
        drawn = torch.randperm(len(self.tokenizer), generator=rng.make_generator(seed, "vocabulary")).tolist()
        return [i for i in drawn if i not in special]

    def _special(self) -> set[int]:
        """Returns the ids of special tokens."""
        return {*self.tokenizer.all_special_ids}


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Returns the share of unknown tokens in these texts, from 0 to 1. A byte-level tokeniser has none."""
    if tokenizer.unk_token_id is None or not texts:
        return 0.0
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(row.count(tokenizer.unk_token_id) for row in rows) / max(1, sum(len(row) for row in rows))


def warn_unk_rate(backbone: Backbone, records_of: Mapping[str, Sequence[Record]]) -> None:
    """Warns about the worst client, if more than `MOST_UNKNOWN` of its tokens are unknown."""
    shares = {who: backbone.unk_rate(_texts(records)) for who, records in records_of.items()}
    worst = max(shares, key=lambda who: shares[who], default=None)
    if worst is None or shares[worst] <= MOST_UNKNOWN:
        return
    many = sum(share > MOST_UNKNOWN for share in shares.values())
    warnings.warn(
        f"{shares[worst]:.0%} of the tokens of {worst} are unknown to {backbone.name}; at {many} of {len(shares)} clients "
        f"more than {MOST_UNKNOWN:.0%} are. What is unknown is not read: take a backbone made for these languages, such as "
        "intfloat/multilingual-e5-small (backbone.name)",
        BackboneWarning,
        stacklevel=3,
    )


def _texts(records: Sequence[Record]) -> list[str]:
    some = records[:: -(-len(records) // LOOKED_AT) or 1]
    texts = [record.fields.get(role) for record in some for role in ("text", "text_pair")]
    return [text for text in texts if isinstance(text, str)]
