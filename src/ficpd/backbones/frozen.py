"""Runs a frozen transformers model by its own forward, with vectors that enter at any layer.

At layer 0 the vectors are `inputs_embeds`. At layer n the blocks below return their input and block n takes the given
states; the model's own forward does the rest, so no family needs code. Rows are padded on the right.

Guarantees (checked on the loaded model, `tests/backbones/test_frozen.py`):
- embeddings give the states that token ids give;
- a row's states do not depend on longer rows of its batch;
- a row's gradient is zero for all other rows;
- states that are captured at a block and put back give the model's own states (else the middle is closed).
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ficpd.errors import BackboneError
from ficpd.types import HiddenStates

TOLERANCE = {torch.float32: 1e-4}
"""Largest difference, as a share of the largest number. Half precision rounds more."""
HALF_TOLERANCE = 5e-2
LONG, SHORT = 9, 5
"""Tokens of the two rows of the check."""

BODY, HEAD = -1, -2
"""Places of the body and of the output embedding; a block's is its number."""
Action = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Takes a place, and the forward and arguments of its module; gives its output."""


class _ReachedError(Exception):
    """Ends a forward at a block. `states`: the block's input."""

    def __init__(self, states: Tensor):
        self.states = states


class FrozenModel:
    """A frozen text model. `model` has a language head or none; `causal`: no position sees a later one.

    body: the part of the model that gives `last_hidden_state`.
    width: numbers of a token embedding.
    depth: layers that vectors can enter; 1 where only the input is open, and `closed` then says why.
    sample_TD: last states of a short text, for comparisons.
    """

    def __init__(self, model: Any, name: str, causal: bool):
        self.model, self.name, self.causal = model.eval().requires_grad_(False), name, causal
        self.device, self.dtype = model.device, model.dtype
        self.tolerance = TOLERANCE.get(self.dtype, HALF_TOLERANCE)
        self.table = model.get_input_embeddings()
        self.width, self._local = self.table.weight.shape[1], threading.local()
        self._checked: set[int] = set()
        try:
            self._prepare()
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise BackboneError(
                f"backbone.name = {name!r}: a {type(model).__name__} cannot be run on embeddings ({type(error).__name__}: "
                f"{str(error)[:200]}). Use another model."
            ) from error

    # ------------------------------------------------------------ forward passes

    def embed(self, ids: Tensor) -> Tensor:
        """[...] to [..., E]."""
        return self.table(ids.to(self.device))

    @torch.no_grad()
    def encode(self, rows: Sequence[Tensor], layer: int) -> list[Tensor]:
        """The input of a block for embedded rows [T, E], unpadded: [T, D] each."""
        self.check(layer)
        if layer == 0:
            return list(rows)
        text = HiddenStates.of(rows)
        states_STD = self.until(layer, text.states_STD, self._mask(text.mask_ST))
        return [states_TD[: len(row)].clone() for states_TD, row in zip(states_STD, rows, strict=True)]

    def run(self, prompts_SPD: Tensor, hidden: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """The last states [S, P+T, D] of prompts and hidden states, and the mask [S, T] of the latter."""
        self.check(layer)
        text = HiddenStates.of(hidden)
        states, mask = text.joined(prompts_SPD.to(self.device))
        return self.entering(layer, states, self._mask(mask)).last_hidden_state, text.mask_ST

    def until(self, layer: int, states_STE: Tensor, given: dict[str, Any]) -> Tensor:
        """Runs the layers below `layer` on embeddings."""

        def stop(place: int, own: Any, args: Any, kwargs: Any) -> Any:
            if place == layer:
                raise _ReachedError(_states(args, kwargs))
            return own(*args, **kwargs)

        try:
            with self._acting(stop):
                self._body(states_STE, given)
        except _ReachedError as reached:
            return reached.states
        raise BackboneError(f"{self.name} never came to its layer {layer}")

    def entering(self, layer: int, states_STD: Tensor, given: dict[str, Any]) -> Any:
        """Runs the layers from `layer` on; returns the body's own output."""
        if layer == 0:
            return self._body(states_STD, given)
        cache = given.get("past_key_values")

        def enter(place: int, own: Any, args: Any, kwargs: Any) -> Any:
            if place < 0 or place > layer:
                return own(*args, **kwargs)
            if place < layer:
                return self._passed(place, _states(args, kwargs), cache)
            return own(*_replaced(args, states_STD), **_replaced(kwargs, states_STD, not args))

        with self._acting(enter):
            return self._body(states_STD.new_zeros(*states_STD.shape[:2], self.width), given)

    def logits(self, states_ND: Tensor) -> Tensor:
        """[N, V]: the model's own language head, caps, scales and biases included."""
        return self._head(states_ND).logits[:, 0]

    def head_input(self, states_ND: Tensor) -> Tensor:
        """[N, E]: the input of the output embedding, behind the transformations of a masked language model's head."""
        try:
            self._head(states_ND, stops=True)
        except _ReachedError as reached:
            return reached.states[:, 0]
        raise BackboneError(f"{self.name} never came to its output embedding")

    @torch.no_grad()
    def last_norm(self, states_ND: Tensor) -> nn.LayerNorm | None:
        """The layer norm whose output is the input of the output embedding, if one is."""
        outputs, expected = [], self.head_input(states_ND)
        norms = [part for part in self.model.modules() if isinstance(part, nn.LayerNorm)]
        hooks = [norm.register_forward_hook(lambda m, _, output: outputs.append((m, output))) for norm in norms]
        self._head(states_ND)
        for hook in hooks:
            hook.remove()
        return next((norm for norm, output in outputs[::-1] if torch.equal(output[:, 0], expected)), None)

    def _head(self, states_ND: Tensor, stops: bool = False) -> Any:
        """Runs the model with these states in the place of its body's output."""
        head, kind = states_ND[:, None], self._kind

        def answer(place: int, own: Any, args: Any, kwargs: Any) -> Any:
            if place == HEAD and stops:
                raise _ReachedError(args[0])
            return kind(last_hidden_state=head) if place == BODY else own(*args, **kwargs)

        with self._acting(answer):
            return self.model(inputs_embeds=head, **self._options(self.model))

    def check(self, layer: int) -> None:
        """Raises `BackboneError` for a layer that vectors cannot enter; compares a middle layer on its first use."""
        if not 0 <= layer < self.depth:
            raise BackboneError(
                f"a prompt cannot enter {self.name} at layer {layer}: expected 0 to {self.depth - 1}.{self.closed}"
            )
        if layer not in self._checked:
            if layer and (differs := self._differs(layer)):
                raise BackboneError(f"prompt.enters_at = {layer}: {self.name}{differs} Use prompt.enters_at = 0.")
            self._checked.add(layer)

    def _body(self, states_STE: Tensor, given: dict[str, Any]) -> Any:
        return self.body(inputs_embeds=states_STE, **self._options(self.body, given), **given)

    def _mask(self, mask_ST: Tensor) -> dict[str, Any]:
        """A causal model needs no mask: padding on the right is behind every token."""
        return {} if self.causal else {"attention_mask": mask_ST.long()}

    def _options(self, module: Any, given: Any = ()) -> dict[str, Any]:
        return (
            {"use_cache": False}
            if self.causal and "past_key_values" not in given and "use_cache" in parameters(module)
            else {}
        )

    def _passed(self, place: int, states: Tensor, cache: Any) -> Any:
        """The output of a block that is left out. Its cache is as long as the others'."""
        if cache is not None:
            empty = states.new_zeros(len(states), 1, states.shape[1], 1)
            cache.update(empty, empty, place)
        return states if self._arity == 0 else (states, *[None] * (self._arity - 1))

    # ------------------------------------------------------------ wrapped modules

    @contextmanager
    def _acting(self, action: Action) -> Iterator[None]:
        """Meanwhile wrapped modules call `action`, in this thread alone."""
        self._local.action = action
        try:
            yield
        finally:
            self._local.action = None

    def _wrap(self, module: nn.Module, place: int) -> None:
        """Replaces a module's forward. A weak reference, or the weights would stay until garbage is collected."""
        own, local, found = type(module).forward, self._local, weakref.ref(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            action, this = getattr(local, "action", None), found()
            if action is None:
                return own(this, *args, **kwargs)
            return action(place, lambda *a, **k: own(this, *a, **k), args, kwargs)

        module.forward = forward

    # ------------------------------------------------------------ checks

    def _prepare(self) -> None:
        """Finds body and blocks in one forward, and checks the guarantees on two short rows."""
        self.body = self.model
        rows = self.sample_ids()
        with torch.no_grad():
            alone_TD, blocks = self._watch(rows[0])
            other_TD = self.body(input_ids=rows[1][None], **self._options(self.body)).last_hidden_state[0]
        for place, block in enumerate(blocks):
            self._wrap(block, place)
        if self.body is not self.model:
            self._wrap(self.body, BODY)
            if outputs := self.model.get_output_embeddings():
                self._wrap(outputs, HEAD)
        self.sample_TD = alone_TD
        embedded = [self.embed(row).detach() for row in rows]
        self._compare_rows(embedded, [alone_TD, other_TD])
        self.depth, self.closed = max(1, len(blocks)), ""
        if not blocks:
            self.closed = " It has no list of layers that are each called once, in order, on states of one shape."
        for layer in {1, self.depth - 1} & {*range(1, self.depth)}:
            if not self.closed and (differs := self._differs(layer)):
                self.closed = f" It{differs}"
        self.depth = 1 if self.closed else self.depth

    def sample_ids(self) -> list[Tensor]:
        """Two short rows of token ids, always the same."""
        padding = getattr(self.model.config, "pad_token_id", None)
        ids = [i for i in range(5, min(len(self.table.weight), 500)) if i != padding] or [0]
        drawn = torch.randint(len(ids), (2, LONG), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [[ids[i] for i in row] for row in drawn]
        return [torch.tensor(row, device=self.device) for row in (rows[0], rows[1][:SHORT])]

    def _watch(self, ids_T: Tensor) -> tuple[Tensor, list[nn.Module]]:
        """Runs the model on ids: finds the body, its last states [T, D] and its blocks."""
        calls: list[tuple[nn.Module, Any, Any]] = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            states = _states(args, kwargs) if args or "hidden_states" in kwargs else None
            calls.append((module, states.shape if torch.is_tensor(states) else None, output))

        hooks = [m.register_forward_hook(note, with_kwargs=True) for m in self.model.modules()]
        try:
            output = self.model(input_ids=ids_T[None], **self._options(self.model))
        finally:
            for hook in hooks:
                hook.remove()
        self.body, _, last = [c for c in calls if torch.is_tensor(getattr(c[2], "last_hidden_state", None))][-1]
        self._kind, self._own_logits = type(last), getattr(output, "logits", None)
        blocks = self._blocks([(module, shape) for module, shape, _ in calls])
        outputs = [output for module, _, output in calls if blocks and module is blocks[0]]
        self._arity = len(outputs[0]) if outputs and isinstance(outputs[0], tuple) else 0
        return last.last_hidden_state[0], blocks

    def _blocks(self, calls: Sequence[tuple[nn.Module, Any]]) -> list[nn.Module]:
        """The longest list of modules that are each called once, in order, on states [1, T, width]."""
        found: list[nn.Module] = []
        for part in self.body.modules():
            if isinstance(part, nn.ModuleList) and len(part) > len(found):
                within = [(m, shape) for m, shape in calls if any(m is block for block in part)]
                alike = {shape for _, shape in within} == {torch.Size((1, LONG, self.width))}
                if alike and len(within) == len(part) and all(m is b for (m, _), b in zip(within, part, strict=True)):
                    found = [*part]
        return found

    def _compare_rows(self, embedded: Sequence[Tensor], alone: Sequence[Tensor]) -> None:
        """Compares a padded batch of embeddings with each row's ids alone, and its gradients with zero."""
        text = HiddenStates.of(embedded)
        leaf = text.states_STD.requires_grad_(True)
        states_STD = self._body(leaf, self._mask(text.mask_ST)).last_hidden_state
        for row, expected in enumerate(alone):
            what = "a row of embeddings gives other states than its ids" if row == 0 else "a row depends on its batch"
            self._require(difference(states_STD[row, : len(expected)], expected), what)
        weight_D = torch.linspace(-1, 1, states_STD.shape[-1], device=self.device)  # a norm's plain sum is constant
        for row in range(len(alone)):
            value = states_STD[row, len(alone[row]) - 1].float() @ weight_D
            (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
            if not grad[row].any() or not grad.isfinite().all():
                raise BackboneError(f"backbone.name = {self.name!r}: it gives no gradients. Use another model.")
            if (strange := float(grad[1 - row].abs().max())) > 0:
                raise BackboneError(
                    f"backbone.name = {self.name!r}: a row has a gradient of {strange:.2g} for another row's prompt; "
                    "expected 0. A record's privacy needs rows that are independent. Use another model."
                )

    def _require(self, differs: float, what: str) -> None:
        if not differs <= self.tolerance:
            raise BackboneError(
                f"backbone.name = {self.name!r}: {what} (relative difference {differs:.2g}, expected at most "
                f"{self.tolerance:g}). Use another model."
            )

    @torch.no_grad()
    def _differs(self, layer: int) -> str:
        """Why states that are captured at a layer and put back do not give the model's own; "" where they do."""
        embedded = self.embed(self.sample_ids()[0])[None]
        given = self._mask(torch.ones(1, LONG, dtype=torch.bool, device=self.device))
        try:
            states = self.until(layer, embedded, given)
            differs = difference(self.entering(layer, states, given).last_hidden_state[0], self.sample_TD)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            return f" cannot be entered at layer {layer} ({type(error).__name__}: {str(error)[:100]})."
        if differs <= self.tolerance:
            return ""
        return f" gives other states when it is entered at layer {layer} (relative difference {differs:.2g})."


def _states(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _replaced(given: Any, states: Tensor, named: bool = False) -> Any:
    if isinstance(given, tuple):
        return (states, *given[1:]) if given else ()
    return {**given, "hidden_states": states} if named else given


def difference(given: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected number."""
    return float(
        (given.detach().float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12)
    )


def parameters(module: Any) -> Any:
    return inspect.signature(type(module).forward).parameters
