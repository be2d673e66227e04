"""Defines the parts of a page: sections of blocks. All text is plain; the template escapes it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import plotly.graph_objects as go

NUMBER = re.compile(r"^none$|^[-–+<]?\s?([\d.,]+)?\s?(%|\[.*\]|[kMG]?B)?\s?[▲▼]?$")


@dataclass(frozen=True)
class Table:
    """Holds the words of a table; the first cell of a line is its heading.

    `marked`: the lines that the page is about. `note`: a sentence below the table. `folded`: to unfold.
    """

    caption: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    note: str = ""
    folded: bool = False
    kind: Literal["table"] = "table"

    @property
    def numeric(self) -> list[bool]:
        """Returns the columns of numbers or dashes, which are aligned right.

        >>> Table("", ["name", "share"], [["a", "81.2 [80, 83] ▲"], ["b", "–"]]).numeric
        [False, True]
        """
        return [
            place > 0 and all(NUMBER.match(line[place].strip()) for line in self.cells)
            for place in range(len(self.heads))
        ]


@dataclass(frozen=True)
class Figure:
    """A plot with its data as a table (`numbers`)."""

    id: str
    title: str
    said: str
    plot: "go.Figure"
    numbers: Table
    kind: Literal["figure"] = "figure"

    @property
    def alt(self) -> str:
        """Describes the plot to a screen reader: the first lines of its numbers."""
        lines = "; ".join(" ".join(line) for line in self.numbers.cells[:8])
        return f"{self.numbers.caption}. {', '.join(self.numbers.heads[1:])}: {lines}."


@dataclass(frozen=True)
class Text:
    """A paragraph; `alarm`: one that must not be overlooked; `strong`: the sentence that counts, on a terminal."""

    words: str
    alarm: bool = False
    strong: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class KeyValues:
    """Names and values, a line each. `large`: figures to show first."""

    pairs: Sequence[tuple[str, str]]
    large: bool = False
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Code:
    """Text to copy. `folded`: a file to unfold."""

    title: str
    words: str
    folded: bool = True
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Downloads:
    """Files that the page has in it, by name."""

    files: dict[str, str]
    kind: Literal["files"] = "files"


@dataclass(frozen=True)
class Examples:
    """Texts to read under one heading, each with a few words about it."""

    title: str
    texts: Sequence[tuple[str, str]]
    kind: Literal["quotes"] = "quotes"


Block = Table | Figure | Text | KeyValues | Code | Downloads | Examples


@dataclass(frozen=True)
class Section:
    """`folded`: why it says little of this run; it is there to unfold."""

    id: str
    title: str
    blocks: Sequence[Block]
    folded: str = ""


@dataclass(frozen=True)
class Page:
    """`headline`: the result in one sentence; `lead`: the other blocks of the first screen."""

    title: str
    headline: str
    lead: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def figures(self) -> list[Figure]:
        blocks = [*self.lead, *(block for section in self.sections for block in section.blocks)]
        return [block for block in blocks if isinstance(block, Figure)]
