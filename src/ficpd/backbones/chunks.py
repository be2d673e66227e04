"""Divides rows into chunks of one shape, and keeps hidden states of the layers below a prompt."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from ficpd.interfaces import Backbone
from ficpd.types import EncodedInput, padded_length

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
UNBATCHED = 1
"""A chunk size with one row in each forward pass, so that its result is independent of all other records."""


class Shape(NamedTuple):
    """The shape of the rows in a forward pass: padded length, whether no row is padded, sequences per row."""

    padded: int
    full: bool
    sequences: int

    def positions(self, overhead: int = 0) -> int:
        """Returns the positions of one row. overhead: virtual and written tokens of a sequence."""
        return self.sequences * (self.padded + overhead)


def shape_of(items: Sequence[EncodedInput]) -> Shape:
    """Returns the shape of one row's sequences. It does not depend on other rows."""
    lengths = [item.length for item in items]
    padded = padded_length(max(lengths))
    return Shape(padded, min(lengths) == padded, len(lengths))


def bucket_by_shape(
    items: Sequence[Item], shape: Callable[[Item], Shape], tokens: int, overhead: int = 0
) -> Iterator[list[Item]]:
    """Splits items into chunks of one shape, with at most `tokens` positions or one item.

    Chunks of a shape differ by one item at most, so none is a small rest.
    """
    for of, group in groupby(sorted(items, key=shape), key=shape):
        alike = list(group)
        number = -(-len(alike) // max(tokens // of.positions(overhead), 1))
        ends = [-(-len(alike) * n // number) for n in range(number + 1)]
        yield from (alike[first:last] for first, last in pairwise(ends))


def fill_chunk(chunk: list[Item], of: Shape, least: int, overhead: int = 0) -> list[Item]:
    """Repeats the last item until a chunk has `least` positions. The results of the repetitions are not used.

    Small matrix products have other kernels than large ones. With enough positions, a row's bits do not depend on the
    number of rows.
    """
    return chunk + chunk[-1:] * (-(-least // of.positions(overhead)) - len(chunk))


class BoundedCache(Generic[Key, Value]):
    """Keeps the most recently used values, up to a number of bytes. Threads may share it."""

    def __init__(self, limit_bytes: int):
        self.limit, self.size, self.lock = limit_bytes, 0, threading.Lock()
        self.values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def find(self, keys: Iterable[Key]) -> dict[Key, Value]:
        """Returns the values that are kept, by key."""
        found = {}
        with self.lock:
            for key in keys:
                if key in self.values:
                    self.values.move_to_end(key)
                    found[key] = self.values[key][0]
        return found

    def clear(self) -> None:
        with self.lock:
            self.values.clear()
            self.size = 0

    def keep(self, key: Key, value: Value, nbytes: int) -> None:
        with self.lock:
            if key in self.values:
                return
            self.values[key] = value, nbytes
            self.size += nbytes
            while self.size > self.limit and self.values:
                self.size -= self.values.popitem(last=False)[1][1]


class HiddenStateCache(BoundedCache[tuple[EncodedInput, int], Tensor]):
    """Keeps hidden states below a prompt's layer, by item and layer."""

    def __init__(self, limit_bytes: int, chunk_tokens: int, least_tokens: int = 0):
        super().__init__(limit_bytes)
        self.chunk_tokens, self.least_tokens = chunk_tokens, least_tokens

    def fetch(self, items: Sequence[EncodedInput], layer: int, backbone: Backbone) -> list[Tensor]:
        """Returns the states [T, D] of each item, and computes missing ones. Embeddings of texts are not kept."""
        if layer == 0 and backbone.modality == "text":
            return list(backbone.encode_prefix(items, 0))
        found = {item: state for (item, _), state in self.find((item, layer) for item in items).items()}
        missing = [item for item in dict.fromkeys(items) if item not in found]
        for part in bucket_by_shape(missing, lambda item: shape_of([item]), self.chunk_tokens):
            whole = fill_chunk(part, shape_of(part[:1]), self.least_tokens)
            for item, state in zip(part, backbone.encode_prefix(whole, layer), strict=False):
                found[item] = state
                self.keep((item, layer), state, state.nbytes)
        return [found[item] for item in items]
