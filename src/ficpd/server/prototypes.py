"""Prototypes: cosine K-means of what the clients' prompts learned."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F


class Clusters(NamedTuple):
    """`member[name]` is the cluster of each client, numbered by size, the largest first; there are `number`."""

    member: dict[str, int]
    number: int


def cosine_kmeans(vectors: Mapping[str, Tensor], num_prototypes: int, seed: int, restarts: int = 10) -> Clusters:
    """Cluster vectors by their direction: K-means on the unit sphere (Hornik et al., J. Stat. Software 50(10), 2012).

    At most as many clusters as there are different directions; a zero vector (nothing learned) has none and joins the
    largest cluster.
    """
    names = sorted(vectors)
    stacked = torch.stack([vectors[name].flatten().double() for name in names])
    moved = stacked.norm(dim=1) > 1e-12
    if not moved.any():
        return Clusters(dict.fromkeys(names, 0), 1)
    unit = F.normalize(stacked[moved], dim=1)
    count = min(num_prototypes, len(torch.unique(unit.round(decimals=9), dim=0)))
    kmeans = KMeans(count, n_init=restarts, random_state=seed % 2**32)  # type: ignore[arg-type]
    labels: list[int] = kmeans.fit_predict(unit.numpy()).tolist()
    rank = {label: place for place, label in enumerate(sorted(set(labels), key=lambda i: (-labels.count(i), i)))}
    placed = iter(rank[label] for label in labels)
    return Clusters(
        {name: next(placed) if ok else 0 for name, ok in zip(names, moved.tolist(), strict=True)}, len(rank)
    )
