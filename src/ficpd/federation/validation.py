"""What an order may be, before a record is touched: a site trusts no server. What passes cannot fail by its own doing, so
that no failure tells of the records that were drawn for it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.interfaces import Method
from ficpd.traits import ChecksOrders
from ficpd.types import FARTHEST, Assignment, Prompt

RATE: Mapping[str, tuple[type, ...]] = {"rate": (float, int)}
MOST_PROTOTYPES = 1000


def check_order(order: Assignment, method: Method, start: Prompt, last: int) -> None:
    """Raises `CodecError` for an order of another shape than the run's (`start`, `last` round). Of a method that does not
    say what its orders are (`ChecksOrders`), one prompt and a rate."""
    if order.method != method.name:
        raise CodecError(f"the order is of {order.method!r}, and the run of {method.name!r}")
    if type(order.round) is not int or not 1 <= order.round <= last + 1:
        raise CodecError(f"the order's round is {order.round!r}, expected 1 to {last}")
    if isinstance(method, ChecksOrders):
        method.check_order(order, start)
        return
    check_facts(order, RATE)
    check_prompts(order, start, ("prompt",))


def check_facts(order: Assignment, kinds: Mapping[str, Sequence[type]]) -> None:
    """Raises `CodecError` unless the order has these facts and no others, each of one of its kinds, 0 or more."""
    if order.facts.keys() != kinds.keys():
        raise CodecError(
            f"the order's facts are {sorted(order.facts)}, and an order of {order.method} has {sorted(kinds) or 'none'}"
        )
    for name, value in order.facts.items():
        if type(value) not in kinds[name] or not 0 <= value < math.inf:
            raise CodecError(f"the order's {name!r} is {value!r}, which no order of {order.method} has")


def check_arrays(order: Assignment, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `CodecError` unless the order has these arrays and no others, in float32."""
    given = {name: tuple(array.shape) for name, array in order.arrays.items()}
    if given != dict(shapes) or any(array.dtype != torch.float32 for array in order.arrays.values()):
        raise CodecError(f"the order has {_told(order.arrays)}, expected float32 {dict(shapes) or 'nothing'}")


def check_prompts(order: Assignment, start: Prompt, names: Sequence[str], more: Sequence[str] = ()) -> None:
    """Raises `CodecError` unless the order has `names[0]` and else arrays of `names` (prompts) and `more` (several prompts)
    alone, all of the run's shape and within its reach."""
    shape = start.vectors_PD.shape
    for name, array in order.arrays.items():
        rows = array.shape[1:] if name in more else array.shape
        if name not in (*names, *more) or rows != shape or array.dtype != torch.float32:
            raise CodecError(
                f"the order's array {name!r} is {array.dtype} {tuple(array.shape)}, expected {tuple(shape)}"
            )
        if name in more and len(array) > MOST_PROTOTYPES:
            raise CodecError(f"the order has {len(array)} of {name!r}, at most {MOST_PROTOTYPES} are looked at")
        check_reach(array, start, name)
    if names[0] not in order.arrays:
        raise CodecError(f"the order has no {names[0]}")


def check_reach(prompts: Tensor, start: Prompt, name: str) -> None:
    """Raises `CodecError` for prompts that are farther away than any run gets."""
    if not start.reaches(prompts):
        raise CodecError(f"the order's {name!r} is more than {FARTHEST:g} times as long as the start of the run")


def _told(arrays: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name!r} {array.dtype} {tuple(array.shape)}" for name, array in arrays.items()) or "no arrays"
