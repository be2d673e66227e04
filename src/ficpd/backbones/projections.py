"""Finds query and value projections by their effect, so that no list of model families is needed.

A module mixes positions if its output at the last position depends on a linear layer's output at other positions. In the
innermost such modules, the output of each layer in turn is set to zero. Without values, an attention has no gradient for
queries and keys; without keys, it has none for queries. Keys affect other positions, queries do not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a forward."""


def linear_sizes(module: Any) -> tuple[int, ...]:
    """Returns the input and output width of a linear module (torch's or GPT-2's); () for another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    from transformers.pytorch_utils import Conv1D  # not at the top: only LoRA needs transformers

    return (module.nx, module.nf) if isinstance(module, Conv1D) else ()


def find_projections(model: nn.Module, forward: Callable[[], Any]) -> dict[str, nn.Module]:
    """Returns a model's query and value projections, or the layers that combine both, in the model's order.

    forward: runs the model on two rows of equal length, without a cache. Leaves out layers whose input is not one state per
    token: DeBERTa's queries also read relative positions.
    """
    calls, mixing, found = _first_calls(model, forward), list[str](), set[str]()
    parts = dict(model.named_modules())
    for name in reversed(parts):  # a module's parts come before it
        above = name and f"{name}."
        if name in calls and not any(other.startswith(above) for other in mixing):
            linear = {above + n: part for n, part in parts[name].named_modules() if n and linear_sizes(part)}
            chosen = _projections(parts[name], calls[name], linear)
            mixing += [name] if chosen is not None else []
            found |= chosen or set()
    return {name: part for name, part in parts.items() if name in found}


def _first_calls(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Call]:
    """Runs the model. Returns the first arguments of each module."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Any:
        return lambda module, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    hooks = [part.register_forward_pre_hook(note(name), with_kwargs=True) for name, part in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _projections(module: nn.Module, call: Call, linear: Mapping[str, nn.Module]) -> set[str] | None:
    """Returns the query and value projections of a module; None if it does not mix positions."""
    whole = _gradients(module, call, linear)
    far = {name for name, gradient_STN in whole.items() if gradient_STN[:, :-1].any()}
    if not far:
        return None
    without = {name: _gradients(module, call, linear, zero=name) for name in far}
    values = {name for name in far if not any(without[name][other].any() for other in far - {name})}
    near = {n for n in whole.keys() - far if whole[n].any() and any(not without[value][n].any() for value in values)}
    queries = {n for n in near if any(not without[key][n].any() for key in far - values)}
    return values | (queries or near)


@torch.enable_grad()
def _gradients(module: nn.Module, call: Call, linear: Mapping[str, nn.Module], zero: str = "") -> dict[str, Tensor]:
    """Returns the gradients [S, T, N] of the last position's output with respect to each linear layer's output.

    Leaves out layers that run more than once. zero: the layer whose output is set to zero.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in linear}

    def keep(name: str) -> Any:
        def hook(part: nn.Module, inputs: Any, output: Any) -> Tensor | None:
            if not torch.is_tensor(output):  # a router's choice
                return None
            kept[name].append(torch.zeros_like(output).requires_grad_())
            largest = output.detach().abs().max().clamp_min(1e-6)  # large numbers have no gradient in a softmax
            return kept[name][-1] + (0 if name == zero else output / largest)

        return hook

    hooks = [part.register_forward_hook(keep(name)) for name, part in linear.items()]
    try:
        output = module(*call[0], **call[1])
    finally:
        for hook in hooks:
            hook.remove()
    states = output[0] if isinstance(output, tuple) else output
    once = {name: leaves[0] for name, leaves in kept.items() if len(leaves) == 1}
    leaves = {name: leaf for name, leaf in once.items() if leaf.dim() == 3 and len(leaf) == len(states)}
    if not leaves or not torch.is_tensor(states) or states.dim() != 3:
        return {}
    weight_D = torch.linspace(-1, 1, states.shape[-1], device=states.device)  # a norm's plain sum is constant
    value = (states[:, -1].float() @ weight_D).sum()
    found = torch.autograd.grad(value, [*leaves.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
