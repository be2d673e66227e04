"""Targets of files without types (CSV): text as it stands there, which a task of numbers reads numbers off."""

import math
import re
from collections.abc import Iterable
from typing import Any


def parse_cell(cell: Any) -> Any:
    """A CSV cell as the number it spells, else as it is.

    >>> parse_cell("-3"), parse_cell("2.50"), parse_cell("1_0"), parse_cell("nan")
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

    >>> parse_number(UntypedStr("007")), parse_number(UntypedStr("V45")), parse_number("007")
    (7, 'V45', '007')
    """
    number = parse_cell(target) if isinstance(target, UntypedStr) else target
    return target if number in (math.inf, -math.inf) else number


def is_regression_target(targets: Iterable[Any]) -> bool:
    """Whether these are real numbers and no labels: one is, and none is a text.

    >>> number, code = UntypedStr("2.5"), UntypedStr("V45")
    >>> is_regression_target([number]), is_regression_target([code, number]), is_regression_target([1, 2])
    (True, False, False)
    """
    found = [parse_number(target) for target in targets]
    return any(isinstance(number, float) for number in found) and not any(isinstance(number, str) for number in found)
