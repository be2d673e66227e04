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
    """The texts of a table. The first cell of a row is its heading.

    marked: the rows that the page is about.
    note: a sentence below the table.
    folded: hidden until the reader unfolds it.
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
        """Returns, for each column, whether it has only numbers or dashes. Such columns are aligned right.

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
        """Describes the plot for a screen reader: the first rows of its numbers."""
        lines = "; ".join(" ".join(line) for line in self.numbers.cells[:8])
        return f"{self.numbers.caption}. {', '.join(self.numbers.heads[1:])}: {lines}."


@dataclass(frozen=True)
class Text:
    """A paragraph. `alarm`: must not be overlooked. `strong`: the main sentence, bold on a terminal."""

    words: str
    alarm: bool = False
    strong: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class KeyValues:
    """Names and values, one pair a line. `large`: the figures to show first."""

    pairs: Sequence[tuple[str, str]]
    large: bool = False
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Code:
    """Text to copy. `folded`: hidden until the reader unfolds it."""

    title: str
    words: str
    folded: bool = True
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Downloads:
    """Files that the page contains, by name."""

    files: dict[str, str]
    kind: Literal["files"] = "files"


@dataclass(frozen=True)
class Examples:
    """Texts under one heading, each with a short remark."""

    title: str
    texts: Sequence[tuple[str, str]]
    kind: Literal["quotes"] = "quotes"


Block = Table | Figure | Text | KeyValues | Code | Downloads | Examples


@dataclass(frozen=True)
class Section:
    """Blocks under one title. `folded`: why the section is hidden until the reader unfolds it; "": it is shown."""

    id: str
    title: str
    blocks: Sequence[Block]
    folded: str = ""


@dataclass(frozen=True)
class Page:
    """A report. `headline`: the result in one sentence. `lead`: the other blocks of the first screen."""

    title: str
    headline: str
    lead: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def figures(self) -> list[Figure]:
        blocks = [*self.lead, *(block for section in self.sections for block in section.blocks)]
        return [block for block in blocks if isinstance(block, Figure)]
