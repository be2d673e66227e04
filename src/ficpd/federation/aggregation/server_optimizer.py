"""The server's own step: the mean update is its gradient (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv
2003.00295, algorithm 2). It sees released updates only, so it costs no privacy."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig

FIRST, SECOND = "server/first", "server/second"


class ServerOptimizer(BaseModel):
    """Of the global prompt. `rate` 1 and "plain" is FedAvg. "momentum": Δ + momentum · what came before (FedAvgM, Hsu et
    al., 2019, arXiv 1909.06335). "adam": FedAdam with β₂ = 0.99 and `adaptivity` τ; its `rate` is a step in the prompt's
    own unit.

    "extrapolated", of prototypes too: the mean, as many times as clients disagree (`extrapolation`). It needs the length of
    each update: not with a noised sum of all, nor with a rule that leaves out parts of updates; and at the record level,
    where the size of the noise would tell record counts, it is "plain".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["plain", "momentum", "adam", "extrapolated"] = "plain"
    rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    adaptivity: float = Field(default=1e-3, gt=0)

    @property
    def sums(self) -> bool:
        """Whether the weighted sum of the updates is all that it needs."""
        return self.kind != "extrapolated"

    def check(self, robust: RobustConfig) -> None:
        """Raises `ValueError` if lengths are asked for that `robust` may not trust."""
        if not self.sums and robust.rule not in ("mean", "norm_bound"):
            raise ValueError(
                f'server.kind = "extrapolated" goes by the length of every update, and robust.rule = "{robust.rule}" leaves '
                'out what it distrusts: take the rule "norm_bound" or "mean", or another server.kind'
            )

    def per_client_extrapolation(
        self, means: RobustAggregator, member: Mapping[str, int], noise: float | None
    ) -> dict[str, Tensor]:
        """By client, how much farther than their mean update the clients of its cluster go; nothing if not extrapolated."""
        deltas, more = {} if self.sums else {u.client: u.arrays["delta"] for u in means.updates}, {}
        for k in {member.get(name) for name in deltas}:
            there = {name: delta for name, delta in deltas.items() if member.get(name) == k}
            mean = means.mean_of(f"prototype-{k}", there, means.weights)
            more |= dict.fromkeys(there, (fedexp_factor(mean, there, means.weights, noise) - 1) * mean)
        return more

    def step(self, delta_PD: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the global prompt goes, and the moments to keep beside it (found again in `arrays`)."""
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
    """How many times their mean a step of these clients may be: η = max(1, Σ w |δ|² / 2 |Σ w δ|²), w summing to one (FedExP:
    Jhunjhunwala, Wang and Joshi, ICLR 2023, arXiv 2301.09604, equation 9).

    Updates that pull different ways cancel, and their mean is shorter than each of them. In place of the paper's ε, η is at
    most what it is for updates at right angles, 1 / 2 Σ w² (half their number, if all count alike; of one or two 1): a mean
    of nearly nothing is no direction to go far in. `noise` is the expected squared length of what a mechanism put on each
    update: it cancels too and is no disagreement, so it is taken off the numerator (and left in the denominator, which errs
    towards 1). None, not known: 1.
    """
    length, total = float(mean_PD.double().square().sum()), sum(weights[name] for name in deltas)
    if noise is None or not length:
        return 1.0
    shares = {name: weights[name] / total for name in sorted(deltas)}
    squares = sum(share * float(deltas[name].double().square().sum()) for name, share in shares.items())
    at_right_angles = 1 / sum(share**2 for share in shares.values()) / 2
    return max(1.0, min((squares - noise) / (2 * length), at_right_angles))
