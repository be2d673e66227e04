"""Backbones: frozen models, and what they read of a text. Those with a tokeniser share how it fails: `unknown_share`."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ficpd.errors import BackboneError, BackboneWarning
from ficpd.interfaces import Backbone
from ficpd.types import Item, Prompt, Record

MOST_UNKNOWN = 0.05
"""Above this share of unknown tokens somebody's texts are not read as they were written."""
LOOKED_AT = 50
"""Records of each client that are looked at, evenly spread: some thousand tokens."""


class Reads:
    """What all backbones of texts have in common: they see no images."""

    sees, knows_words, gives_features = False, True, True
    name: str

    def look(self, image: Any, room: int) -> Item:
        raise BackboneError(f"{self.name} reads texts and sees no images; for those use a vision backbone")


class Silent:
    """What all backbones that cannot write have in common; `about` says what such a one is, if there is more to say."""

    writes, about = False, ""
    name: str

    def write(self, prompts_SPD: Tensor, items: Sequence[Item], layer: int, max_tokens: int) -> list[str]:
        raise self._cannot_write()

    def generate(
        self, prompt: Prompt, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        raise self._cannot_write()

    def _cannot_write(self) -> BackboneError:
        said = f" is {self.about} and" if self.about else ""
        return BackboneError(f"{self.name}{said} cannot write; use a causal_lm backbone for text")


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Which share of all tokens of these texts is the tokeniser's unknown token, 0 to 1. A byte-level one has none."""
    if tokenizer.unk_token_id is None or not texts:
        return 0.0
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(row.count(tokenizer.unk_token_id) for row in rows) / max(1, sum(len(row) for row in rows))


def warn_of_unknown(backbone: Backbone, records_of: Mapping[str, Sequence[Record]]) -> None:
    """One `BackboneWarning`, about whose texts are worst, where more than `MOST_UNKNOWN` of the tokens are unknown."""
    shares = {who: backbone.unknown_share(_texts(records)) for who, records in records_of.items()}
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
