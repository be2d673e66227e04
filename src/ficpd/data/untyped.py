"""Targets of files without types (CSV): text as it stands there, which a task of numbers reads numbers off."""

import math
import re
from collections.abc import Iterable
from typing import Any


def parse_cell(cell: Any) -> Any:
    """A CSV cell as the number it spells, else as it is.

    >>> number_of("-3"), number_of("2.50"), number_of("1_0"), number_of("nan")
    (-3, 2.5, '1_0', 'nan')
    """
    if not isinstance(cell, str) or not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", cell, re.ASCII):
        return cell
    return int(cell) if cell.strip().lstrip("+-").isdigit() else float(cell)


class UntypedStr(str):
    """A target of a file without types (CSV): text as it stands there, which may spell a number."""


def parse_number(target: Any) -> Any:
    """The finite number that a target of a file without types spells, else the target as it is. Where a file has types,
    text is text.

    >>> spelled(Spelled("007")), spelled(Spelled("V45")), spelled("007")
    (7, 'V45', '007')
    """
    number = parse_cell(target) if isinstance(target, UntypedStr) else target
    return target if number in (math.inf, -math.inf) else number


def is_regression_target(targets: Iterable[Any]) -> bool:
    """Whether these are real numbers and no labels: one is, and none is a text.

    >>> are_real([Spelled("1"), Spelled("2.5")]), are_real([Spelled("V45"), Spelled("2.5")]), are_real([1, 2])
    (True, False, False)
    """
    found = [parse_number(target) for target in targets]
    return any(isinstance(number, float) for number in found) and not any(isinstance(number, str) for number in found)
