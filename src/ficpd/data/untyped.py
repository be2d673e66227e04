"""Parses targets: numbers in files without types (CSV), and labels that are not text."""

import math
import re
from collections.abc import Iterable
from typing import Any


def parse_cell(cell: Any) -> Any:
    """Returns the number that a CSV cell spells, else the cell.

    >>> parse_cell("-3"), parse_cell("2.50"), parse_cell("1_0"), parse_cell("nan")
    (-3, 2.5, '1_0', 'nan')
    """
    if not isinstance(cell, str) or not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", cell, re.ASCII):
        return cell
    return int(cell) if re.fullmatch(r"\s*[+-]?\d{1,300}\s*", cell) else float(cell)


class UntypedStr(str):
    """A target of a file without types (CSV): the unchanged text, which may spell a number."""


def parse_number(target: Any) -> Any:
    """Returns the finite number that an `UntypedStr` spells, else the target. Text of a file with types stays text.

    >>> parse_number(UntypedStr("007")), parse_number(UntypedStr("V45")), parse_number("007")
    (7, 'V45', '007')
    """
    number = parse_cell(target) if isinstance(target, UntypedStr) else target
    return target if number in (math.inf, -math.inf) else number


def label_spellings(target: Any) -> list[str]:
    """Returns the labels that a target may mean, the most literal first.

    They are the text, the text without outer blanks, both spellings of a truth value, and 1 for 1.0.

    >>> label_spellings(" pos"), label_spellings(True), label_spellings(1.0)
    ([' pos', 'pos'], ['True', 'true'], ['1.0', '1'])
    """
    literal = str(target)
    bare = literal.strip()
    found = [literal, bare]
    if bare.lower() in ("true", "false"):
        found += [bare.title(), bare.lower()]
    if re.fullmatch(r"-?\d+\.0+", bare):
        found.append(bare.partition(".")[0])
    return list(dict.fromkeys(found))


def is_regression_target(targets: Iterable[Any]) -> bool:
    """Tells whether targets are real numbers, not labels: at least one is real, and none is text.

    >>> number, code = UntypedStr("2.5"), UntypedStr("V45")
    >>> is_regression_target([number]), is_regression_target([code, number]), is_regression_target([1, 2])
    (True, False, False)
    """
    found = [parse_number(target) for target in targets]
    return any(isinstance(number, float) for number in found) and not any(isinstance(number, str) for number in found)
