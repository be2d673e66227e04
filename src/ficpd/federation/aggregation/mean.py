"""Weighted means of released updates. They cost no privacy."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ficpd.types import ClientUpdate


def weighted_mean(updates: Sequence[ClientUpdate], name: str) -> Tensor:
    """Returns Σ w_c x_c / Σ w_c (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1).

    Sums in the order of the clients' names, so that the order of arrival does not change the rounding.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    weights = torch.tensor([update.weight for update in ordered], dtype=torch.float64)
    stacked = torch.stack([update.arrays[name].double() for update in ordered])
    return (torch.tensordot(weights, stacked, dims=1) / weights.sum()).float()


def weighted_mean_of(arrays: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Returns the weighted mean of arrays by client."""
    return weighted_mean([ClientUpdate(name, {"x": array}, weights[name]) for name, array in arrays.items()], "x")
