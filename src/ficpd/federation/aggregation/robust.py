"""Robust means, which a few malicious updates cannot move far. They read released updates only, so they cost no privacy.

Central DP hides individual updates in one sum and allows no robust mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ficpd.federation.aggregation.mean import weighted_mean_of
from ficpd.registry import FrozenConfig
from ficpd.types import ClientUpdate

REPORTED_SHARE = 0.1
"""A client is reported if at most this part of its fair share of numbers was kept by the trimming."""


class RobustConfig(FrozenConfig):
    """The rule that combines updates. "mean" is weighted; other rules ignore the weights that clients claim.

    rule: "trimmed_mean" drops the `num_byzantine` largest and smallest values of each number (Yin et al., ICML 2018, arXiv
        1803.01498, definition 2). "multi_krum" drops the `num_byzantine` updates farthest from their nearest others
        (Blanchard et al., NeurIPS 2017, arXiv 1703.02757). "norm_bound" clips updates to `max_norm`, or to `medians` times
        the round's median norm (Sun et al., 2019, arXiv 1911.07963).
    num_byzantine: f, updates per mean that may be malicious. n updates resist f for n >= 2f + 1 (Multi-Krum: 2f + 3).
    max_norm: bound of "norm_bound"; None: by the median.
    medians: times the round's median norm.

    A smaller mean trims at most (n - 1) // 2 at each end and is reported; one or two updates are unprotected.
    """

    rule: Literal["mean", "trimmed_mean", "norm_bound", "multi_krum"] = "mean"
    num_byzantine: int = Field(default=1, ge=1)
    max_norm: float | None = Field(default=None, gt=0)
    medians: float = Field(default=2.0, gt=0)

    @property
    def sums(self) -> bool:
        """Tells whether the rule needs only the weighted sum of the updates."""
        return self.rule == "mean"


MEAN = RobustConfig()


class RobustAggregator:
    """The means of one round over `updates`, which the rule may clip.

    `facts`: reports for the state, `excluded_updates` by client and `underfilled_means` by mean; empty for "mean".
    """

    def __init__(self, robust: RobustConfig, updates: Sequence[ClientUpdate]):
        self.robust, self.updates = robust, list(updates)
        self.facts: dict[str, dict[str, str]] = {} if robust.sums else {"excluded_updates": {}, "underfilled_means": {}}
        if robust.rule == "norm_bound" and updates:
            self._clip()

    @property
    def weights(self) -> dict[str, float]:
        """Returns each client's weight in a mean."""
        return {u.client: u.weight if self.robust.rule == "mean" else 1.0 for u in self.updates}

    def mean_all(self) -> Tensor:
        """Returns the mean `delta` of all updates."""
        return self.mean_of("global", {update.client: update.arrays["delta"] for update in self.updates}, self.weights)

    def mean_of(self, where: str, arrays: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """Returns the mean of clients' arrays of one shape; `where` names it in the report."""
        rule, number = self.robust.rule, len(arrays)
        if rule in ("mean", "norm_bound"):
            return weighted_mean_of(arrays, weights if rule == "mean" else dict.fromkeys(arrays, 1.0))
        enough = 2 * self.robust.num_byzantine + (3 if rule == "multi_krum" else 1)
        trimmed = min(self.robust.num_byzantine, (number - 1) // 2)
        if number < enough:
            self.facts["underfilled_means"][where] = (
                f"{number} came, {rule} needs {enough}: {trimmed} trimmed at each end"
            )
        names = sorted(arrays)
        stacked = torch.stack([arrays[name].double() for name in names])
        if rule == "multi_krum" and number >= enough:
            return self._krum(where, names, stacked)
        return self._trimmed(where, names, stacked, trimmed)

    def _trimmed(self, where: str, names: list[str], stacked: Tensor, trimmed: int) -> Tensor:
        left = stacked.sort(dim=0).values[trimmed : len(names) - trimmed]
        inside = ((stacked >= left[0]) & (stacked <= left[-1])).flatten(1).double().mean(1)
        for name, share in zip(names, inside.tolist(), strict=True):
            if share <= REPORTED_SHARE * len(left) / len(names):
                self._note(name, f"{1 - share:.0%} trimmed from {where}")
        return left.mean(0).float()

    def _krum(self, where: str, names: list[str], stacked: Tensor) -> Tensor:
        """Scores by the sum of squared distances to the `n-f-2` nearest others (section 4 of the paper)."""
        rows, kept = stacked.flatten(1), len(names) - self.robust.num_byzantine
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        score = apart.sort(dim=1).values[:, 1 : kept - 1].sum(1)  # skips the distance to itself
        ranked = score.sort(stable=True).indices.tolist()
        for place in ranked[kept:]:
            self._note(names[place], f"left out of {where}")
        return stacked[sorted(ranked[:kept])].mean(0).float()

    def _clip(self) -> None:
        """Clips long updates. An even number of norms has the lower median, so of two the shorter bounds the other."""
        norms = [_norm(update) for update in self.updates]
        bound = self.robust.max_norm or self.robust.medians * float(torch.tensor(norms).double().median())
        for place, norm in enumerate(norms):
            if norm > bound:
                update = self.updates[place]
                arrays = {name: (array.double() * (bound / norm)).float() for name, array in update.arrays.items()}
                self.updates[place] = replace(update, arrays=arrays)
                self._note(update.client, f"cut from a norm of {norm:.3g} to {bound:.3g}")

    def _note(self, client: str, what: str) -> None:
        before = self.facts["excluded_updates"].get(client)
        self.facts["excluded_updates"][client] = what if before is None else f"{before}, {what}"


def _norm(update: ClientUpdate) -> float:
    return float(torch.cat([array.flatten().double() for array in update.arrays.values()]).norm())
