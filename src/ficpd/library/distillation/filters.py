"""Examples that are nobody's: their file, what they are as records, and which of them are kept."""

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
"""Two texts are near duplicates where their runs of three words overlap this much (Jaccard)."""
ALONE = 3
"""A record of fewer words than this is memorised only by a text that is nothing else."""


@dataclass(frozen=True)
class SyntheticExample:
    """A text that is nobody's. `label`: as the data spells it, or None before a vote; `prototype`: who wrote it;
    `agreement`: the share of votes for the label."""

    text: str
    label: str | None
    prototype: str
    agreement: float = 1.0


class FilterResult(NamedTuple):
    """Examples, and how many were dropped for which reason. Both may be empty."""

    examples: list[SyntheticExample]
    dropped: Counter[str]

    def then(self, step: "Callable[[list[SyntheticExample]], FilterResult]") -> "FilterResult":
        """One step more, with the reasons of both."""
        after = step(self.examples)
        return FilterResult(after.examples, self.dropped + after.dropped)

    def summary(self) -> str:
        """One line for a report.

        >>> FilterResult([], Counter({"near duplicate": 12, "votes disagree": 3})).summary()
        '0 examples; dropped: 12 near duplicate, 3 votes disagree'
        """
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{len(self.examples)} examples" + (f"; dropped: {reasons}" if reasons else "")


# ---------------------------------------------------------------- which are kept


def distinct(examples: Sequence[SyntheticExample]) -> FilterResult:
    """Without those that are nearly one that was kept before."""
    kept: list[tuple[SyntheticExample, set]] = []
    for example in examples:
        grams = grams_of(example.text)
        if all(len(grams & other) < ALIKE * len(grams | other) for _, other in kept):
            kept.append((example, grams))
    return FilterResult([example for example, _ in kept], _counted("near duplicate", len(examples) - len(kept)))


def balanced(examples: Sequence[SyntheticExample], ratio: float = 2.0) -> FilterResult:
    """No label has more than `ratio` times the rarest of those that have any; those with most agreement stay."""
    counts = Counter(example.label for example in examples)
    most = int(ratio * min(counts.values(), default=0))
    kept: list[SyntheticExample] = []
    taken: Counter[str | None] = Counter()
    for example in sorted(examples, key=lambda e: -e.agreement):
        if taken[example.label] < most:
            taken[example.label] += 1
            kept.append(example)
    return FilterResult(kept, _counted("more than its label's share", len(examples) - len(kept)))


def memorised(
    examples: Sequence[SyntheticExample], private: Sequence[Record], words: int = 8
) -> list[SyntheticExample]:
    """The examples that share a run of `words` words with a record; case and punctuation do not count.

    A shorter record counts if an example holds all of it; one of one or two words only if the example is nothing else.
    This looks at records: it is for a simulation, where they are at hand, and its outcome is not to be published.
    """
    texts = [words_of(text) for record in private for text in _texts(record)]
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
    """The examples without the memorised ones."""
    found = set(memorised(examples, private, words))
    return FilterResult([example for example in examples if example not in found], _counted("memorised", len(found)))


# ---------------------------------------------------------------- as records, as a file


def records(examples: Sequence[SyntheticExample], labelled: bool = True) -> list[Record]:
    """As a task reads them."""
    return [
        Record(f"synthetic example {i}", {"text": e.text} | ({"target": e.label} if labelled else {}))
        for i, e in enumerate(examples, 1)
    ]


def save(examples: Sequence[SyntheticExample], path: Path) -> None:
    """JSON Lines, one example a line, sorted by label and text."""
    ordered = sorted(examples, key=lambda e: (e.label or "", e.text, e.prototype))
    atomic_write(Path(path), "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in ordered))


def load(path: Path) -> list[SyntheticExample]:
    """What `save` wrote. Raises `DataError` with the line that is no example."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a file of synthetic examples") from error
    return [_parsed(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(line: str, place: str) -> SyntheticExample:
    try:
        return SyntheticExample(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{place} is no synthetic example ({error}); expected an object with text, label, prototype and agreement"
        ) from error


# ---------------------------------------------------------------- words


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    """All runs of this many words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def grams_of(text: str) -> set[tuple[str, ...]]:
    """All runs of three words; of a shorter text the whole."""
    words = words_of(text)
    return _runs(words, min(GRAM, len(words)))


def _texts(record: Record) -> list[str]:
    """What its owner wrote: the texts, not the label."""
    return [record.fields[role] for role in ("text", "text_pair") if record.fields.get(role)]


def _counted(reason: str, number: int) -> Counter[str]:
    return Counter({reason: number} if number else {})
