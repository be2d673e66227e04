"""What black-box optimizers move in: a few numbers y around a prompt, and the public draws that all clients share."""

from functools import lru_cache

import torch
from torch import Tensor

from ficpd import rng
from ficpd.interfaces import Subspace
from ficpd.privacy.clipping import clip_scale


class SearchSpace:
    """prompt = origin + up(y), y [size].

    In the client's coordinates, if it has any, where y is in their clip units: a slope along y is then what a gradient is
    there before it is clipped, so that one clip norm serves both. Else, with `dimension`, in a random subspace of so many
    numbers (A Gaussian, from a public seed: Sun et al., "Black-Box Tuning for Language-Model-as-a-Service", ICML 2022, arXiv
    2201.03514), or, where the prompt has no more than these or none are given, in all its numbers.

    `unit`: how long each number of y has to be so that the prompt's numbers move by 1 in root mean square.
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
        """[..., size] to [..., P, D]."""
        if self.coordinates is not None:
            return self.coordinates.lift(values * self.units)
        if self.rows is not None:
            values = values @ self.rows
        return values.unflatten(-1, self.shape)

    def signs(self, number: int, *names: object) -> Tensor:
        """[number, size] of ±1, equal for equal names everywhere (Rademacher: Spall, IEEE Trans. Automatic Control 1992)."""
        return 1.0 - 2.0 * torch.randint(2, (number, self.size), generator=rng.make_generator("signs", *names))


@lru_cache(maxsize=4)
def _gaussian_rows(size: int, numbers: int, seed: int) -> Tensor:
    """[size, numbers], each row of length 1 in expectation."""
    return torch.randn(size, numbers, generator=rng.make_generator("rows", size, numbers, seed)) / numbers**0.5


def regularizer(prompts_KPD: Tensor, start_PD: Tensor, l2_weight: float, proximal_weight: float) -> Tensor:
    """[K]: what a optimizer with gradients would add to the loss, in its own terms: l2/2 |p|² + proximal/2 |p - start|²."""
    to_zero, to_start = prompts_KPD.flatten(1), (prompts_KPD - start_PD).flatten(1)
    return (l2_weight * to_zero.square().sum(1) + proximal_weight * to_start.square().sum(1)) / 2
