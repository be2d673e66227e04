"""Validates assignments before any record is read.

A site trusts no server. A valid assignment cannot fail because of its content, so no failure depends on the sampled records.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.types import MAX_PROMPT_NORM_RATIO, Assignment, Prompt

RATE: Mapping[str, tuple[type, ...]] = {"rate": (float, int)}
MAX_PROTOTYPES = 1000


def validate_facts(assignment: Assignment, kinds: Mapping[str, Sequence[type]]) -> None:
    """Raises `CodecError` unless the assignment has exactly these facts, each of one of its types, 0 or more."""
    if assignment.facts.keys() != kinds.keys():
        raise CodecError(
            f"the assignment's facts are {sorted(assignment.facts)}, expected {sorted(kinds) or 'none'} "
            f"({assignment.method})"
        )
    for name, value in assignment.facts.items():
        if type(value) not in kinds[name] or not 0 <= value < math.inf:
            raise CodecError(f"the assignment's {name!r} is {value!r}, which {assignment.method} never sends")


def validate_arrays(
    assignment: Assignment, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> None:
    """Raises `CodecError` unless the assignment has exactly these arrays, in this dtype."""
    given = {name: (tuple(array.shape), array.dtype) for name, array in assignment.arrays.items()}
    if given != {name: (tuple(shape), dtype) for name, shape in shapes.items()}:
        raise CodecError(f"the assignment's arrays are {given}, expected {dtype} {dict(shapes) or 'nothing'}")


def validate_prompts(assignment: Assignment, start: Prompt, names: Sequence[str], more: Sequence[str] = ()) -> None:
    """Raises `CodecError` unless the arrays are prompts of the run's shape and within its norm.

    `names`: single prompts, of which the first is required. `more`: stacks of prompts.
    """
    shape = start.vectors_PD.shape
    for name, array in assignment.arrays.items():
        rows = array.shape[1:] if name in more else array.shape
        if name not in (*names, *more) or rows != shape or array.dtype != torch.float32:
            raise CodecError(
                f"the assignment's array {name!r} is {array.dtype} {tuple(array.shape)}, expected {tuple(shape)}"
            )
        if name in more and len(array) > MAX_PROTOTYPES:
            raise CodecError(f"the assignment has {len(array)} of {name!r}, expected at most {MAX_PROTOTYPES}")
        validate_norm(array, start, name)
    if names[0] not in assignment.arrays:
        raise CodecError(f"the assignment has no {names[0]}")


def validate_norm(prompts: Tensor, start: Prompt, name: str) -> None:
    """Raises `CodecError` for prompts longer than any run's."""
    if not start.within_max_norm(prompts):
        raise CodecError(
            f"the assignment's {name!r} is more than {MAX_PROMPT_NORM_RATIO:g} times as long as the initial prompt"
        )
