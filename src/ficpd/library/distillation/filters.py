"""Synthetic examples: their file, their records, and the filters on them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ficpd.errors import DataError
from ficpd.storage import atomic_write
from ficpd.types import Record

GRAM, ALIKE = 3, 0.7
"""Two texts are near duplicates if the Jaccard index of their word trigrams is at least `ALIKE`."""
ALONE = 3
"""A record with fewer words counts as memorised only if it is the whole text."""


@dataclass(frozen=True)
class SyntheticExample:
    """A synthetic text.

    label: as the data spells it; None for a text without an intended label, before the vote.
    prototype: the prompt that generated it, or another source (`generation.WRITER`, `PUBLIC`, `NONSENSE`).
    agreement: the share of votes for the label.
    """

    text: str
    label: str | None
    prototype: str
    agreement: float = 1.0


class FilterResult(NamedTuple):
    """Examples, and the number of dropped ones by reason."""

    examples: list[SyntheticExample]
    dropped: Counter[str]

    def then(self, step: "Callable[[list[SyntheticExample]], FilterResult]") -> "FilterResult":
        """Applies another filter and adds its reasons."""
        after = step(self.examples)
        return FilterResult(after.examples, self.dropped + after.dropped)

    def summary(self) -> str:
        """Returns one line for a report.

        >>> FilterResult([], Counter({"near duplicate": 12, "votes disagree": 3})).summary()
        '0 examples; dropped: 12 near duplicate, 3 votes disagree'
        """
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{len(self.examples)} examples" + (f"; dropped: {reasons}" if reasons else "")


# ---------------------------------------------------------------- filters


def distinct(examples: Sequence[SyntheticExample]) -> FilterResult:
    """Drops near duplicates of an earlier example."""
    kept: list[tuple[SyntheticExample, set]] = []
    for example in examples:
        grams = grams_of(example.text)
        if all(len(grams & other) < ALIKE * len(grams | other) for _, other in kept):
            kept.append((example, grams))
    return FilterResult([example for example, _ in kept], +Counter({"near duplicate": len(examples) - len(kept)}))


def balanced(examples: Sequence[SyntheticExample], ratio: float = 2.0) -> FilterResult:
    """Limits each label to `ratio` times the rarest label; keeps the examples with the highest agreement."""
    counts = Counter(example.label for example in examples)
    most = int(ratio * min(counts.values(), default=0))
    kept: list[SyntheticExample] = []
    taken: Counter[str | None] = Counter()
    for example in sorted(examples, key=lambda e: -e.agreement):
        if taken[example.label] < most:
            taken[example.label] += 1
            kept.append(example)
    return FilterResult(kept, +Counter({"more than its label's share": len(examples) - len(kept)}))


def memorised(
    examples: Sequence[SyntheticExample], private: Sequence[Record], words: int = 8
) -> list[SyntheticExample]:
    """Returns the examples that share a run of `words` words with a record, without case and punctuation.

    A shorter record counts if an example contains all of it. A record of one or two words must be the whole example.
    The function reads records: use it only in simulations, and do not publish its result.
    """
    roles = ("text", "text_pair")
    texts = [words_of(r.fields[role]) for r in private for role in roles if r.fields.get(role)]
    runs = {run for text in texts for run in _runs(text, words)}
    short = {tuple(text) for text in texts if ALONE <= len(text) < words}
    whole = {tuple(text) for text in texts if 0 < len(text) < ALONE}

    def holds(example: SyntheticExample) -> bool:
        text = words_of(example.text)
        if not runs.isdisjoint(_runs(text, words)) or tuple(text) in whole:
            return True
        return any(not short.isdisjoint(_runs(text, length)) for length in {len(run) for run in short})

    return [example for example in examples if holds(example)]


def drop_memorised(examples: Sequence[SyntheticExample], private: Sequence[Record], words: int = 8) -> FilterResult:
    """Drops the memorised examples."""
    found = set(memorised(examples, private, words))
    return FilterResult([example for example in examples if example not in found], +Counter({"memorised": len(found)}))


# ---------------------------------------------------------------- records and files


def records(examples: Sequence[SyntheticExample], labelled: bool = True) -> list[Record]:
    """Returns the examples as records of a task."""
    return [
        Record(f"synthetic example {i}", {"text": e.text} | ({"target": e.label} if labelled else {}))
        for i, e in enumerate(examples, 1)
    ]


def save(examples: Sequence[SyntheticExample], path: Path) -> None:
    """Writes JSON Lines, sorted by label and text."""
    ordered = sorted(examples, key=lambda e: (e.label or "", e.text, e.prototype))
    atomic_write(Path(path), "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in ordered))


def load(path: Path) -> list[SyntheticExample]:
    """Reads the file of `save`. Raises `DataError` for a line that is not an example."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a file of synthetic examples") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [SyntheticExample(**json.loads(line))] if line.strip() else []
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path} line {number}: expected an object with text, label, prototype and agreement ({error})"
            ) from error
    return found


# ---------------------------------------------------------------- words


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    """Returns all runs of this many words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def grams_of(text: str) -> set[tuple[str, ...]]:
    """Returns all word trigrams, or the whole of a shorter text."""
    words = words_of(text)
    return _runs(words, min(GRAM, len(words)))
