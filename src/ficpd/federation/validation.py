"""Checks an assignment against its run, before a record is touched."""

from ficpd.errors import CodecError
from ficpd.method import Method
from ficpd.types import Assignment, Prompt


def validate_assignment(assignment: Assignment, method: Method, start: Prompt, last: int) -> None:
    """Raises `CodecError` for an assignment of another method, round or shape than the run's (`start`, `last` round)."""
    if assignment.method != method.name:
        raise CodecError(f"the order is of {assignment.method!r}, and the run of {method.name!r}")
    if type(assignment.round) is not int or not 1 <= assignment.round <= last + 1:
        raise CodecError(f"the order's round is {assignment.round!r}, expected 1 to {last}")
    method.validate_assignment(assignment, start)
