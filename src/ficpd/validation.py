"""Checks of assignments, for sites that trust no server. An assignment that passes causes no later failure, so no failure
reveals anything of the records that were drawn for it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.types import MAX_PROMPT_NORM_RATIO, Assignment, Prompt

RATE: Mapping[str, tuple[type, ...]] = {"rate": (float, int)}
MOST_PROTOTYPES = 1000


def validate_facts(assignment: Assignment, kinds: Mapping[str, Sequence[type]]) -> None:
    """Raises `CodecError` unless the order has these facts and no others, each of one of its kinds, 0 or more."""
    if assignment.facts.keys() != kinds.keys():
        raise CodecError(
            f"the order's facts are {sorted(assignment.facts)}, and an order of {assignment.method} has {sorted(kinds) or 'none'}"
        )
    for name, value in assignment.facts.items():
        if type(value) not in kinds[name] or not 0 <= value < math.inf:
            raise CodecError(f"the order's {name!r} is {value!r}, which no order of {assignment.method} has")


def validate_arrays(assignment: Assignment, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `CodecError` unless the order has these arrays and no others, in float32."""
    given = {name: tuple(array.shape) for name, array in assignment.arrays.items()}
    if given != dict(shapes) or any(array.dtype != torch.float32 for array in assignment.arrays.values()):
        raise CodecError(f"the order has {_told(assignment.arrays)}, expected float32 {dict(shapes) or 'nothing'}")


def validate_prompts(assignment: Assignment, start: Prompt, names: Sequence[str], more: Sequence[str] = ()) -> None:
    """Raises `CodecError` unless the order has `names[0]` and else arrays of `names` (prompts) and `more` (several prompts)
    alone, all of the run's shape and within its reach."""
    shape = start.vectors_PD.shape
    for name, array in assignment.arrays.items():
        rows = array.shape[1:] if name in more else array.shape
        if name not in (*names, *more) or rows != shape or array.dtype != torch.float32:
            raise CodecError(
                f"the order's array {name!r} is {array.dtype} {tuple(array.shape)}, expected {tuple(shape)}"
            )
        if name in more and len(array) > MOST_PROTOTYPES:
            raise CodecError(f"the order has {len(array)} of {name!r}, at most {MOST_PROTOTYPES} are looked at")
        validate_norm(array, start, name)
    if names[0] not in assignment.arrays:
        raise CodecError(f"the order has no {names[0]}")


def validate_norm(prompts: Tensor, start: Prompt, name: str) -> None:
    """Raises `CodecError` for prompts that are farther away than any run gets."""
    if not start.within_max_norm(prompts):
        raise CodecError(
            f"the order's {name!r} is more than {MAX_PROMPT_NORM_RATIO:g} times as long as the start of the run"
        )


def _told(arrays: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name!r} {array.dtype} {tuple(array.shape)}" for name, array in arrays.items()) or "no arrays"
