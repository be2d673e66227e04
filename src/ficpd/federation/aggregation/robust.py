"""Means that a few poisoned updates cannot move far, for federations that do not trust every member. They are made of
released updates only, so they cost no privacy; one noised sum of all (client level, at the server) hides who sent what, and
leaves them nothing to compare."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.federation.aggregation.mean import weighted_mean_of
from ficpd.types import ClientUpdate

SELDOM = 0.1
"""A client is named if so small a part of its fair share of numbers survived the trimming, or less."""


class RobustConfig(BaseModel):
    """How several updates become one. "mean": the weighted one. A weight is its sender's own claim (and less for an update
    that comes late), so by every other rule each client counts once.

    "trimmed_mean": of each number, the `num_byzantine` largest and smallest are left out (Yin et al., ICML 2018, arXiv
    1803.01498, definition 2). "multi_krum": the `num_byzantine` updates that are farthest from their nearest others are left
    out, guilty or not (Blanchard et al., NeurIPS 2017, arXiv 1703.02757). "norm_bound": an update longer than `max_norm`
    is cut to it; without one, to `medians` times the median length in its round (Sun et al., 2019, arXiv 1911.07963).

    `num_byzantine` is how many of the updates in one mean may be: n of them stand it from 2 · num_byzantine + 1 on, for "multi_krum"
    from 2 · num_byzantine + 3. Of fewer, these are trimmed, as many as can be: at most (n - 1) // 2, which is the median, so of
    one or two none, and nothing protects that mean. Each such mean is reported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: Literal["mean", "trimmed_mean", "norm_bound", "multi_krum"] = "mean"
    num_byzantine: int = Field(default=1, ge=1)
    max_norm: float | None = Field(default=None, gt=0)
    medians: float = Field(default=2.0, gt=0)

    @property
    def sums(self) -> bool:
        """Whether the weighted sum of the updates is all that it needs."""
        return self.rule == "mean"


MEAN = RobustConfig()


class RobustAggregator:
    """The means of one round. `updates`: those that came, cut if the rule cuts; a method goes on with these.

    `facts` says what became of whom, for the state, from where `federate` reports it: `excluded_updates` by client, `underfilled_means` by
    mean; none by the rule "mean".
    """

    def __init__(self, robust: RobustConfig, updates: Sequence[ClientUpdate]):
        self.robust, self.updates = robust, list(updates)
        self.facts: dict[str, dict[str, str]] = {} if robust.sums else {"excluded_updates": {}, "underfilled_means": {}}
        if robust.rule == "norm_bound" and updates:
            self._cut()

    @property
    def weights(self) -> dict[str, float]:
        """By client, what it counts for in a mean of these updates."""
        return {u.client: u.weight if self.robust.rule == "mean" else 1.0 for u in self.updates}

    def mean_all(self) -> Tensor:
        """The mean `delta` of all that came."""
        return self.mean_of("global", {update.client: update.arrays["delta"] for update in self.updates}, self.weights)

    def mean_of(self, where: str, arrays: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """The mean of these clients' arrays, all of one shape, whatever their order; `where` names it in the report."""
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
            if share <= SELDOM * len(left) / len(names):
                self._note(name, f"{1 - share:.0%} trimmed from {where}")
        return left.mean(0).float()

    def _krum(self, where: str, names: list[str], stacked: Tensor) -> Tensor:
        """A score is the sum of squared distances to the n - num_byzantine - 2 nearest others (section 4 of the paper)."""
        rows, kept = stacked.flatten(1), len(names) - self.robust.num_byzantine
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        score = apart.sort(dim=1).values[:, 1 : kept - 1].sum(1)  # the nearest of all is oneself
        assignment = score.sort(stable=True).indices.tolist()
        for name in [names[int(place)] for place in assignment[kept:]]:
            self._note(name, f"left out of {where}")
        return stacked[sorted(assignment[:kept])].mean(0).float()

    def _cut(self) -> None:
        """Of an even number the lower median: of two, the shorter says how long the other may be."""
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
