"""Enters a frozen model's own forward at any block: stops it there, or gives the block other states.

The blocks below return their input. The model's code does the rest, so no family needs special code. The action of a guard
applies to one thread.
"""

import functools
import hashlib
import inspect
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ficpd import storage
from ficpd.errors import BackboneError
from ficpd.types import JSON

TOLERANCES = {torch.float32: 1e-4}
"""The largest difference by dtype, relative to the largest number. Half precision rounds more."""
HALF_TOLERANCE = 5e-2
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)
"""Errors of a model that is run in an unsupported manner."""

SLOW = 1.0
"""The processor seconds above which the result of a check is cached."""
BODY, HEAD = -1, -2
"""The places of the body and of the output embedding. A block's place is its number."""
Action = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Maps a place, and the forward and arguments of its module, to the output."""


class ReachedError(Exception):
    """Ends a forward at a module. `states`: its input."""

    def __init__(self, states: Tensor):
        self.states = states


class _Shared:
    """The values that all guards of a model read. It references no module, so an unused model is freed at once."""

    def __init__(self):
        self.local, self.checkpointed = threading.local(), False


class _Guard:
    """A module's place, the shared values, and the instance's `forward`, if set. A copy of a model has no guards."""

    def __init__(self, place: int, shared: _Shared, outer: Callable[..., Any] | None):
        self.place, self.shared, self.outer = place, shared, outer

    def __deepcopy__(self, memo: Any) -> None:
        return None


class Guarded(ABC):
    """A frozen body with blocks.

    body: the module that returns `last_hidden_state`.
    depth: the number of layers that vectors can enter; 1: only the input, for the reason `closed`.
    """

    body: Any

    def __init__(self, model: Any, name: str):
        self.model, self.name = model.eval().requires_grad_(False), name
        self.device, self.dtype = model.device, model.dtype
        self.tolerance = TOLERANCES.get(self.dtype, HALF_TOLERANCE)
        self._shared, self._checked = _Shared(), {0}
        self.depth, self.closed, self._arity, self.num_blocks = 1, "", 0, 0

    # ------------------------------------------------------------ forward passes

    def until(self, layer: int, call: Callable[[], Any]) -> Tensor:
        """Returns the input of a block in a forward, and ends the forward there."""

        def stop(place: int, own: Any, args: Any, kwargs: Any) -> Any:
            if place == layer:
                raise ReachedError(_states(args, kwargs))
            return own(*args, **kwargs)

        try:
            with self.acting(stop):
                call()
        except ReachedError as reached:
            return reached.states.to(self.device)  # the model may be on several devices
        raise BackboneError(f"{self.name} never came to its layer {layer}")

    def entering(self, layer: int, states_STD: Tensor, call: Callable[[], Any], cache: Any = None) -> Any:
        """Returns the body's output in a forward whose block `layer` gets these states as input."""

        def enter(place: int, own: Any, args: Any, kwargs: Any) -> Any:
            if place < 0 or place > layer:
                return own(*args, **kwargs)
            if place < layer:
                return self._passed(place, _states(args, kwargs), cache)
            return own(states_STD, *args[1:], **kwargs) if args else own(**{**kwargs, "hidden_states": states_STD})

        with self.acting(enter):
            return call()

    def _passed(self, place: int, states: Tensor, cache: Any) -> Any:
        """Returns the output of a skipped block. Its cache becomes as long as the others'."""
        if cache is not None:
            empty = states.new_zeros(len(states), 1, states.shape[1], 1)
            cache.update(empty, empty, place)
        return states if self._arity == 0 else (states, *[None] * (self._arity - 1))

    @contextmanager
    def acting(self, action: Action) -> Iterator[None]:
        """Makes guarded modules call `action` inside the context, only in this thread."""
        self._shared.local.action = action
        try:
            yield
        finally:
            self._shared.local.action = None

    def guard(self, module: nn.Module, place: int) -> None:
        """Makes a module call the action of its thread. Keeps a `forward` that accelerate set on the instance."""
        outer = module.__dict__.pop("forward", None)
        module.__class__ = _guarded(type(module))
        module._guard = _Guard(place, self._shared, outer)  # type: ignore[assignment]

    def set_attention(self, attention: str) -> bool:
        """Changes the attention of all blocks in place. Returns whether the model supports it."""
        with suppress(ValueError, ImportError):  # it has none of this name
            self.model.set_attn_implementation(attention)
        return self.model.config._attn_implementation == attention

    def checkpoint_blocks(self, on: bool) -> None:
        """Computes each block again in the backward from its input, if `on` (Chen et al., 2016, arXiv 1604.06174)."""
        self._shared.checkpointed = on

    # ------------------------------------------------------------ checks

    def check(self, layer: int) -> None:
        """Raises `BackboneError` for a layer that vectors cannot enter. Checks a middle layer on its first use."""
        if not 0 <= layer < self.depth:
            raise BackboneError(
                f"a prompt cannot enter {self.name} at layer {layer}: expected 0 to {self.depth - 1}.{self.closed}"
            )
        if layer not in self._checked:
            if differs := self.differs(layer):
                raise BackboneError(f"prompt.enters_at = {layer}: {self.name}{differs} Use prompt.enters_at = 0.")
            self._checked.add(layer)

    @abstractmethod
    def differs(self, layer: int) -> str:
        """Returns why states that are taken at a layer and put back change the output; "" if they do not."""

    def guard_blocks(self, blocks: Sequence[nn.Module], first: Any) -> None:
        """Guards the blocks. first: the output of the first block in a forward."""
        self._arity = len(first) if isinstance(first, tuple) else 0
        for place, block in enumerate(blocks):
            self.guard(block, place)
        self.depth, self.num_blocks = max(1, len(blocks)), len(blocks)

    def why_closed(self) -> str:
        """Returns why prompts cannot enter the lowest or the highest middle layer; "" if they can."""
        if self.depth == 1:
            return " It has no list of layers that are each called once, in order, on states of one shape."
        reasons = [self.differs(layer) for layer in sorted({1, self.depth - 1})]
        return next((f" It{reason}" for reason in reasons if reason), "")

    def remembered(self, what: str, identity: str | None, find: Callable[[], JSON]) -> Any:
        """Returns the result of a check, from the cache folder if it took more than `SLOW` seconds.

        identity: names the weights; None: no cache.
        """
        config = self.model.config.to_json_string(use_diff=False)
        versions = [metadata.version("transformers"), torch.__version__]
        key = [identity, what, config, str(self.dtype), str(self.device), *versions]
        name = hashlib.sha256(json.dumps([*key, self.model.config._attn_implementation]).encode()).hexdigest()
        with suppress(OSError, ValueError):
            if identity is not None:
                return json.loads((storage.cache_dir() / "checked" / f"{name}.json").read_text(encoding="utf-8"))
        began = time.process_time()
        found = find()
        if identity is not None and time.process_time() - began > SLOW:
            with suppress(OSError):  # without the cache, this only takes longer
                storage.atomic_write(storage.cache_dir() / "checked" / f"{name}.json", json.dumps(found))
        return found

    def why_not(self, layer: int, compare: Callable[[], float]) -> str:
        """Runs a comparison. Returns the reason if it fails or differs too much, else ""."""
        try:
            differs = compare()
        except FAILURES as error:
            return f" cannot be entered at layer {layer} ({type(error).__name__}: {str(error)[:100]})."
        if differs <= self.tolerance:
            return ""
        return f" gives other states when it is entered at layer {layer} (relative difference {differs:.2g})."

    def require(self, differs: float, what: str) -> None:
        if not differs <= self.tolerance:
            raise BackboneError(
                f"backbone.name = {self.name!r}: {what} (relative difference {differs:.2g}, expected at most "
                f"{self.tolerance:g}). Use another model."
            )

    def require_own_gradient(self, value: Tensor, leaf: Tensor, row: int) -> None:
        """Raises `BackboneError` if a row's value has no gradient for its own leaf, or one for another row's."""
        (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
        if not grad[row].any() or not grad.isfinite().all():
            raise BackboneError(f"backbone.name = {self.name!r}: it gives no gradients. Use another model.")
        if (strange := float(grad[1 - row].abs().max())) > 0:
            raise BackboneError(
                f"backbone.name = {self.name!r}: a row has a gradient of {strange:.2g} for another row's prompt; "
                "expected 0. A record's privacy needs rows that are independent. Use another model."
            )


def watch(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, list[tuple[nn.Module, Any, Any]]]:
    """Runs a forward. Returns its output and each module call: module, shape of its states, output."""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = _states(args, kwargs) if args or "hidden_states" in kwargs else None
        calls.append((module, states.shape if torch.is_tensor(states) else None, output))

    hooks = [part.register_forward_hook(note, with_kwargs=True) for part in model.modules()]
    try:
        with torch.no_grad():
            return call(), calls
    finally:
        for hook in hooks:
            hook.remove()


def find_blocks(
    body: nn.Module, calls: Sequence[tuple[nn.Module, Any, Any]], width: int
) -> tuple[list[nn.Module], Any]:
    """Returns the longest list of modules called once each, in order, on states [S, T, width].

    Also returns the output of the first one."""
    found: list[nn.Module] = []
    for part in body.modules():
        if isinstance(part, nn.ModuleList) and len(part) > len(found):
            within = [(module, shape) for module, shape, _ in calls if any(module is block for block in part)]
            shapes = {shape for _, shape in within}
            alike = len(shapes) == 1 and None not in shapes and [*min(shapes)][2:] == [width]
            in_order = len(within) == len(part) and all(m is b for (m, _), b in zip(within, part, strict=True))
            found = [*part] if alike and in_order else found
    return found, next((output for module, _, output in calls if found and module is found[0]), None)


def difference(given: Tensor, expected: Tensor) -> float:
    """Returns the largest difference relative to the largest expected number."""
    return float(
        (given.detach().float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12)
    )


@functools.cache
def parameters(kind: type) -> frozenset[str]:
    """Returns the names of the parameters of a module type's forward."""
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


@functools.cache
def _guarded(kind: Any) -> type:
    """Returns a subclass whose forward calls the action. A copied module has no guard, and runs normally."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard = self.__dict__.get("_guard")
        own = (guard and guard.outer) or functools.partial(kind.forward, self)
        if guard is None:
            return own(*args, **kwargs)
        if guard.place >= 0 and guard.shared.checkpointed and torch.is_grad_enabled():
            own = functools.partial(checkpoint, own, use_reentrant=False, preserve_rng_state=False)
        action = getattr(guard.shared.local, "action", None)
        return action(guard.place, own, args, kwargs) if action else own(*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _states(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]
