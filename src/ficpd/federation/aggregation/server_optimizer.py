"""Server optimizers, with the mean update as gradient. They read released updates only, so they cost no privacy.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig
from ficpd.registry import FrozenConfig

FIRST, SECOND = "server/first", "server/second"


class ServerOptimizer(FrozenConfig):
    """The optimizer of the global prompt.

    kind: "plain" with `rate` 1: FedAvg. "momentum": FedAvgM (Hsu et al., 2019, arXiv 1909.06335). "adam": FedAdam with
        β₂ = 0.99 and `adaptivity` τ; `rate` is in the prompt's unit. "extrapolated": the mean times `fedexp_factor`, for
        prototypes too. It needs every update's norm, so it excludes central DP and rules that drop parts of updates. At
        the record level it acts as "plain", because the noise norm would reveal record counts.
    rate: the step size; 1 applies the mean itself.
    momentum: β₁ of "momentum" and "adam".
    adaptivity: τ of "adam".
    """

    kind: Literal["plain", "momentum", "adam", "extrapolated"] = "plain"
    rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    adaptivity: float = Field(default=1e-3, gt=0)

    @property
    def sums(self) -> bool:
        """Tells whether the optimizer needs only the weighted sum of the updates."""
        return self.kind != "extrapolated"

    def check(self, robust: RobustConfig) -> None:
        """Raises `ValueError` if the optimizer needs norms that `robust` drops."""
        if not self.sums and robust.rule not in ("mean", "norm_bound"):
            raise ValueError(
                f'server.kind = "extrapolated" needs the norm of every update, and robust.rule = "{robust.rule}" drops '
                'updates: set the rule to "norm_bound" or "mean", or choose another server.kind'
            )

    def per_client_extrapolation(
        self, means: RobustAggregator, member: Mapping[str, int], noise: float | None
    ) -> dict[str, Tensor]:
        """Returns each client's step beyond the mean update of its cluster; empty if not extrapolated."""
        deltas, more = {} if self.sums else {u.client: u.arrays["delta"] for u in means.updates}, {}
        for k in {member.get(name) for name in deltas}:
            there = {name: delta for name, delta in deltas.items() if member.get(name) == k}
            mean = means.mean_of(f"prototype-{k}", there, means.weights)
            more |= dict.fromkeys(there, (fedexp_factor(mean, there, means.weights, noise) - 1) * mean)
        return more

    def step(self, delta_PD: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the step of the global prompt, and the moments to store (the next call reads them from `arrays`)."""
        zero = torch.zeros_like(delta_PD)
        if self.kind in ("plain", "extrapolated"):
            return self.rate * delta_PD, {}
        if self.kind == "momentum":
            first = self.momentum * arrays.get(FIRST, zero) + delta_PD
            return self.rate * first, {FIRST: first}
        first = self.momentum * arrays.get(FIRST, zero) + (1 - self.momentum) * delta_PD
        second = 0.99 * arrays.get(SECOND, zero) + 0.01 * delta_PD**2
        return self.rate * first / (second.sqrt() + self.adaptivity), {FIRST: first, SECOND: second}


def fedexp_factor(
    mean_PD: Tensor, deltas: Mapping[str, Tensor], weights: Mapping[str, float], noise: float | None
) -> float:
    """Returns the step length in units of the mean update.

    η = max(1, Σ w |δ|² / 2 |Σ w δ|²), with w summing to one.
    FedExP: Jhunjhunwala, Wang and Joshi, ICLR 2023, arXiv 2301.09604, equation 9. In place of the paper's ε, η is at most
    its value for orthogonal updates, 1 / 2 Σ w²: a mean near zero is no reliable direction.

    `noise`: expected squared norm of the DP noise on each update. It is subtracted from the numerator only, which errs
    towards 1. None (unknown) gives 1.
    """
    length, total = float(mean_PD.double().square().sum()), sum(weights[name] for name in deltas)
    if noise is None or not length:
        return 1.0
    shares = {name: weights[name] / total for name in sorted(deltas)}
    squares = sum(share * float(deltas[name].double().square().sum()) for name, share in shares.items())
    orthogonal = 1 / sum(share**2 for share in shares.values()) / 2
    return max(1.0, min((squares - noise) / (2 * length), orthogonal))
