"""The server's own step on the global prompt: the mean update is its gradient (Reddi et al., "Adaptive Federated
Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2). It sees released updates only, so it costs no privacy."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

FIRST, SECOND = "server/first", "server/second"


class ServerStep(BaseModel):
    """`rate` 1 and "plain" is FedAvg. "momentum": Δ + momentum · what came before (FedAvgM, Hsu et al., 2019, arXiv
    1909.06335). "adam": FedAdam with β₂ = 0.99 and `adaptivity` τ; its `rate` is a step in the prompt's own unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["plain", "momentum", "adam"] = "plain"
    rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    adaptivity: float = Field(default=1e-3, gt=0)

    def moved(self, delta_PD: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the global prompt goes, and the moments to keep beside it (found again in `arrays`)."""
        zero = torch.zeros_like(delta_PD)
        if self.kind == "plain":
            return self.rate * delta_PD, {}
        if self.kind == "momentum":
            first = self.momentum * arrays.get(FIRST, zero) + delta_PD
            return self.rate * first, {FIRST: first}
        first = self.momentum * arrays.get(FIRST, zero) + (1 - self.momentum) * delta_PD
        second = 0.99 * arrays.get(SECOND, zero) + 0.01 * delta_PD**2
        return self.rate * first / (second.sqrt() + self.adaptivity), {FIRST: first, SECOND: second}
