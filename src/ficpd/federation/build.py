"""Builds a method from a recipe's section, and checks the results of a method outside the package.

Guarantees: a state that a checkpoint would change is an error, so a resumed run gives the same state as an unbroken one; a
run says so if real sites would refuse its assignments (`tests/federation/test_build.py`).
"""

import json
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ficpd.errors import CodecError, ConfigError, RunError
from ficpd.federation.method import Method, validate_assignment
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import map_queries
from ficpd.registry import build_config
from ficpd.types import JSON, Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Query, State


def make_method(part: Mapping[str, Any], training: Any) -> Method:
    """Builds the method that a recipe's section names. Raises `ConfigError` if its module makes no `Method`.

    training: an `optimizers.LocalTrainingConfig`.
    """
    module, config = build_config("methods", part)
    method = module.build(config, training)
    if not isinstance(method, Method):
        raise ConfigError(f"method {part['name']!r}: build returned a {type(method).__name__}; expected a "
                          "ficpd.federation.method.Method")  # fmt: skip
    if not isinstance(getattr(method, "name", None), str):
        raise ConfigError(
            f'method {part["name"]!r}: it has no `name`; expected a text: write name = "own" in the class'
        )
    return check_results(method) if "." in part["name"] else method


def check_results(method: Method) -> Method:
    """Lets `init`, `make_assignment`, `local_update` and `aggregate` of a method check their own results."""
    init, assign, update, aggregate = method.init, method.make_assignment, method.local_update, method.aggregate
    name = method.name

    def first(setup: FederationInfo) -> State:
        state = init(setup)
        _check_state(f"{name}: init returned", state)
        _warn_of_refusal(method, state, setup)
        return state

    def assigned(state: State, client: ClientCard, round: int) -> Assignment:
        found, place = assign(state, client, round), f"{name}, round {round}: make_assignment returned"
        _require(place, found, Assignment)
        _check_values(place, found.arrays, found.facts)
        return found

    def updated(client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        found = yield from map_queries(update(client, assignment), _checked_query)
        if not isinstance(found, ClientUpdate):  # the text stays at a private client; its log has the traceback
            raise TypeError(f"local_update returned a {type(found).__name__}; expected a ficpd.types.ClientUpdate")
        return found

    def combined(state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        found, place = aggregate(state, updates, round, model), f"{name}, round {round}: aggregate returned"
        _check_state(place, found)
        _check_prompt(place, state.arrays.get(method.array), found.arrays.get(method.array), method.array)
        return found

    method.init, method.make_assignment, method.local_update, method.aggregate = first, assigned, updated, combined
    return method


def _checked_query(query: Any) -> Query:
    """Returns the query. Raises `TypeError` for another value, and for prompts that are not [K, P, D]."""
    if not isinstance(query, Query):
        raise TypeError(f"local_update yielded a {type(query).__name__}; expected a ficpd.types.Query")
    if query.prompts_KPD.dim() != 3:
        given = list(query.prompts_KPD.shape)
        raise TypeError(f"local_update yielded a Query with prompts {given}; expected [K, P, D], such as prompt[None]")
    return query


def _require(place: str, found: Any, kind: type) -> None:
    if not isinstance(found, kind):
        raise RunError(f"{place} a {type(found).__name__}; expected a ficpd.types.{kind.__name__}")


def _check_state(place: str, found: Any) -> None:
    """Raises `RunError` for a state that a checkpoint cannot keep."""
    _require(place, found, State)
    _check_values(place, found.arrays, found.facts)


def _check_values(place: str, arrays: Mapping[str, Any], facts: Mapping[str, JSON]) -> None:
    """Raises `RunError` for an array that is no tensor, and for a fact that JSON changes or refuses."""
    if others := sorted(name for name, array in arrays.items() if not isinstance(array, Tensor)):
        raise RunError(f"{place} arrays[{others[0]!r}] = {arrays[others[0]]!r:.60}; expected a tensor")
    for name, value in facts.items():
        try:
            kept = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            kept = ...
        if kept != value:
            raise RunError(
                f"{place} facts[{name!r}] = {value!r:.60}; expected JSON: texts, finite numbers, true, false, None, "
                "lists of them, and dicts with text keys. Put tensors into arrays"
            )


def _check_prompt(place: str, before: Tensor | None, after: Tensor | None, array: str) -> None:
    if before is not None and (after is None or after.shape != before.shape):
        given = "no such array" if after is None else f"the shape {tuple(after.shape)}"
        raise RunError(f"{place} arrays[{array!r}] = {given}; expected the shape {tuple(before.shape)}")
    if after is not None and not torch.isfinite(after).all():
        raise RunError(f"{place} arrays[{array!r}] with numbers that are not finite; expected none")


def _warn_of_refusal(method: Method, state: State, setup: FederationInfo) -> None:
    """Warns if a real site would refuse the first assignment. A simulation's clients accept all."""
    declared = method.capabilities
    if declared.centralized or not declared.trains or not setup.clients:  # for simulations only
        return
    assignment = method.make_assignment(state, setup.clients[0], 1)
    try:
        validate_assignment(assignment, method, setup.start, setup.num_rounds)
    except CodecError as error:
        warnings.warn(
            f"{method.name}: real sites would refuse its assignments: {error}. Override validate_assignment, which "
            "accepts what make_assignment adds",
            stacklevel=2,
        )
