"""What an order may be, before a record is touched."""

import math

import torch

from ficpd.errors import CodecError
from ficpd.seams import Method
from ficpd.traits import ChecksOrders
from ficpd.types import FARTHEST, Assignment, Prompt

MOST_PROTOTYPES = 1000
FACTS = {"rate": (float, int), "contrast": (float, int), "choosing": (bool,)}


def check_order(order: Assignment, method: Method, start: Prompt, last: int) -> None:
    """Raises `CodecError` for an order of another shape than the run's (`start`, `last` round). What passes cannot fail by
    its own doing, so that no failure tells of the records that were drawn for it."""
    if order.method != method.name:
        raise CodecError(f"the order is of {order.method!r}, and the run of {method.name!r}")
    if type(order.round) is not int or not 1 <= order.round <= last + 1:
        raise CodecError(f"the order's round is {order.round!r}, expected 1 to {last}")
    if isinstance(method, ChecksOrders):
        method.check_order(order, start)
        return
    shape = start.vectors_PD.shape
    for name, array in order.arrays.items():
        rows = array.shape[1:] if name == "others_KPD" else array.shape
        if name not in ("prompt", "start", "global", "others_KPD") or rows != shape or array.dtype != torch.float32:
            raise CodecError(
                f"the order's array {name!r} is {array.dtype} {tuple(array.shape)}, expected {tuple(shape)}"
            )
        if name == "others_KPD" and len(array) > MOST_PROTOTYPES:
            raise CodecError(f"the order has {len(array)} other prototypes, at most {MOST_PROTOTYPES} are looked at")
        if not start.reaches(array):
            raise CodecError(
                f"the order's array {name!r} is more than {FARTHEST:g} times as long as the start of the run"
            )
    if "prompt" not in order.arrays:
        raise CodecError("the order has no prompt")
    wanted = {"rate"} | ({"contrast", "choosing"} if method.name == "fpl" else set())
    for name in wanted | order.facts.keys():
        value = order.facts.get(name, math.nan)
        if name not in FACTS or not isinstance(value, FACTS[name]) or not 0 <= value < math.inf:
            raise CodecError(f"the order's {name!r} is {value!r}, which no order of {method.name} has")
