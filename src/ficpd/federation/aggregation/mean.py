"""Averages on the server: sums of what clients released, so they cost no privacy."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ficpd.types import ClientUpdate


def weighted_mean(updates: Sequence[ClientUpdate], name: str) -> Tensor:
    """Σ w_c x_c / Σ w_c over the updates that came (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1).

    Summed in the order of the clients' names, so that the order of arrival changes nothing, not even a rounding.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    weights = torch.tensor([update.weight for update in ordered], dtype=torch.float64)
    stacked = torch.stack([update.arrays[name].double() for update in ordered])
    return (torch.tensordot(weights, stacked, dims=1) / weights.sum()).float()


def weighted_mean_of(arrays: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The same over named arrays."""
    return weighted_mean([ClientUpdate(name, {"x": array}, weights[name]) for name, array in arrays.items()], "x")
