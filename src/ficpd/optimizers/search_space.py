"""The search space of black-box optimizers: coordinates y around a prompt, and public draws that all clients share."""

from functools import lru_cache

import torch
from torch import Tensor

from ficpd import rng
from ficpd.interfaces import Subspace
from ficpd.privacy.clipping import clip_scale


class SearchSpace:
    """prompt = origin + lift(y), with y [size].

    - With the client's subspace, y is in clip units: a derivative along y has the scale of a clipped gradient, so that
      one clip norm serves both.
    - With `dimension` below the prompt's size, y is in a public Gaussian subspace (BBT, ICML 2022, arXiv 2201.03514).
    - Otherwise y is the whole prompt.

    `unit`: the length of each number of y that moves the prompt's numbers by 1 in root mean square.
    """

    def __init__(
        self, shape: tuple[int, ...], coordinates: Subspace | None, dimension: int | None = None, seed: int = 0
    ):
        self.shape, self.coordinates, numbers = shape, coordinates, shape[0] * shape[1]
        self.rows: Tensor | None = None
        if coordinates is not None:
            self.units = clip_scale(coordinates.grad_scale)
            self.size, self.unit = coordinates.size, (numbers / float(self.units.square().sum())) ** 0.5
        elif dimension is not None and dimension < numbers:
            self.rows = _gaussian_rows(dimension, numbers, seed)
            self.size, self.unit = dimension, (numbers / dimension) ** 0.5
        else:
            self.size, self.unit = numbers, 1.0

    def lift(self, values: Tensor) -> Tensor:
        """Maps [..., size] to [..., P, D]."""
        if self.coordinates is not None:
            return self.coordinates.lift(values * self.units)
        if self.rows is not None:
            values = values @ self.rows
        return values.unflatten(-1, self.shape)

    def signs(self, number: int, *names: object) -> Tensor:
        """Draws [number, size] of ±1 (Rademacher), equal on every machine for equal names."""
        return 1.0 - 2.0 * torch.randint(2, (number, self.size), generator=rng.make_generator("signs", *names))


@lru_cache(maxsize=4)
def _gaussian_rows(size: int, numbers: int, seed: int) -> Tensor:
    """Draws [size, numbers], each row of length 1 in expectation."""
    return torch.randn(size, numbers, generator=rng.make_generator("rows", size, numbers, seed)) / numbers**0.5


def regularizer(prompts_KPD: Tensor, start_PD: Tensor, l2_weight: float, proximal_weight: float) -> Tensor:
    """Returns the penalty [K] that gradient optimizers apply: l2/2 |p|² + proximal/2 |p - start|²."""
    to_zero, to_start = prompts_KPD.flatten(1), (prompts_KPD - start_PD).flatten(1)
    return (l2_weight * to_zero.square().sum(1) + proximal_weight * to_start.square().sum(1)) / 2
