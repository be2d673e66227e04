"""Divides rows into chunks of one shape, and keeps hidden states of the layers below a prompt."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

from torch import Tensor

from ficpd.interfaces import Backbone
from ficpd.types import EncodedInput, padded_length

Item = TypeVar("Item")
UNBATCHED = 1
"""A chunk size that gives every row its own forward pass: its result is then independent of all other records."""


class Shape(NamedTuple):
    """The shape that rows of one forward pass share: padded length, whether none is padded, sequences per row."""

    padded: int
    full: bool
    sequences: int


def shape_of(items: Sequence[EncodedInput]) -> Shape:
    """Returns the shape of one row's sequences, which depends on no other row."""
    lengths = [item.length for item in items]
    padded = padded_length(max(lengths))
    return Shape(padded, min(lengths) == padded, len(lengths))


def bucket_by_shape(
    items: Sequence[Item], shape: Callable[[Item], Shape], tokens: int, overhead: int = 0
) -> Iterator[list[Item]]:
    """Splits items into chunks of one shape and at most `tokens` positions (one item at least)."""
    for of, group in groupby(sorted(items, key=shape), key=shape):
        alike = list(group)
        most = max(tokens // (of.sequences * (of.padded + overhead)), 1)
        yield from (alike[first : first + most] for first in range(0, len(alike), most))


class HiddenStateCache:
    """An LRU cache of hidden states below a prompt's layer, by item, bounded in bytes."""

    def __init__(self, limit_bytes: int, chunk_tokens: int):
        self.limit, self.chunk_tokens, self.size = limit_bytes, chunk_tokens, 0
        self.states: OrderedDict[tuple[EncodedInput, int], Tensor] = OrderedDict()
        self.lock = threading.Lock()

    def fetch(self, items: Sequence[EncodedInput], layer: int, backbone: Backbone) -> list[Tensor]:
        """Returns [T, D] of each item; computes the missing ones. Embeddings of texts are never kept."""
        if layer == 0 and backbone.modality == "text":
            return list(backbone.encode_prefix(items, 0))
        found: dict[EncodedInput, Tensor] = {}
        with self.lock:
            for item in items:
                if (item, layer) in self.states:
                    self.states.move_to_end((item, layer))
                    found[item] = self.states[item, layer]
        missing = [item for item in dict.fromkeys(items) if item not in found]
        for part in bucket_by_shape(missing, lambda item: shape_of([item]), self.chunk_tokens):
            for item, state in zip(part, backbone.encode_prefix(part, layer), strict=True):
                found[item] = state
                with self.lock:
                    self._keep(item, layer, state)
        return [found[item] for item in items]

    def _keep(self, item: EncodedInput, layer: int, state: Tensor) -> None:
        if (item, layer) in self.states:
            return
        self.states[item, layer] = state
        self.size += state.nbytes
        while self.size > self.limit and self.states:
            self.size -= self.states.popitem(last=False)[1].nbytes
