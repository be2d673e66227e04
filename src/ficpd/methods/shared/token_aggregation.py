"""Aggregates the clients' words into one prompt (Wu et al., 2024, arXiv 2411.00985, semantic aggregation).

Clusters come from DBSCAN with an elbow, as in the paper's text; its Algorithm 2 says k-means.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from sklearn.cluster import DBSCAN
from torch import Tensor
from torch.nn import functional as F


def aggregate_tokens(ids_KN: Tensor, vectors_KND: Tensor) -> Tensor:
    """Aggregates K clients' words [K, N], with vectors [K, N, D], to N words by position.

    Each cluster contributes its word of largest weight. Ours (the paper leaves the length open): with more than N clusters,
    those of largest weight. With fewer, empty positions take their word of largest weight, and then other words fill
    the prompt by weight. Ties are broken by position, then by client.
    """
    K, N = ids_KN.shape
    ids_M, weight_M = ids_KN.flatten().tolist(), token_weights(vectors_KND).flatten()
    order = sorted(range(K * N), key=lambda m: (-round(float(weight_M[m]), 6), m % N, m // N))
    cluster_M, kept = clusters(ids_M, vectors_KND.flatten(0, 1)), []
    for wanted in (
        lambda m: cluster_M[m] not in {cluster_M[k] for k in kept},
        lambda m: m % N not in {k % N for k in kept},
        lambda m: (ids_M[m], m % N) not in {(ids_M[k], k % N) for k in kept},
    ):
        for m in order:
            if len(kept) < N and wanted(m):
                kept.append(m)
    return torch.tensor([ids_M[m] for m in sorted(kept, key=lambda m: (m % N, order.index(m)))])


def token_weights(vectors_KND: Tensor) -> Tensor:
    """Returns [K, N]: the log-softmax, over a client's words, of the summed cosines to all other clients' words (Eq. 6).
    In float32 the softmax itself would be 1 for one word and 0 for the others."""
    units_KND = F.normalize(vectors_KND.double(), dim=-1)
    own_KD = units_KND.sum(1)
    others_KD = own_KD.sum(0) - own_KD
    return F.log_softmax(torch.einsum("knd,kd->kn", units_KND, others_KD), dim=1)


def clusters(ids: Sequence[int], vectors_MD: Tensor) -> list[int]:
    """Returns the cluster of each of M words: DBSCAN with all words as cores. The radius is the `elbow_point` of all
    M (M - 1) / 2 distances. Equal words always share a cluster."""
    counts, places = Counter(ids), {word: place for place, word in reversed(list(enumerate(ids)))}
    words = sorted(places, key=places.__getitem__)
    if len(words) < 2:
        return [0] * len(ids)
    distinct_UD = vectors_MD[[places[word] for word in words]].double()
    count_U = torch.tensor([counts[word] for word in words], dtype=torch.double)
    first, second = torch.triu_indices(len(words), len(words), 1)
    equal = (count_U * (count_U - 1) / 2).sum()
    distances = torch.cat([torch.zeros(1).double(), torch.pdist(distinct_UD)])
    radius = elbow_point(distances, torch.cat([equal[None], count_U[first] * count_U[second]]))
    labels = DBSCAN(eps=radius * (1 + 1e-6) + 1e-9, min_samples=1).fit_predict(distinct_UD.numpy())
    of = dict(zip(words, labels.tolist(), strict=True))
    return [of[word] for word in ids]


def elbow_point(values: Tensor, counts: Tensor) -> float:
    """Returns the last value before the elbow of the sorted values, each repeated `counts` times. The elbow is farthest
    above the line from zero to the largest value (Satopää et al., ICDCS Workshops 2011).

    >>> elbow_point(torch.tensor([0.0, 2.0, 9.0, 10.0]), torch.tensor([3, 1, 1, 3]))
    2.0
    """
    order = values.argsort(stable=True)
    rising, before = values[order], counts[order].cumsum(0) - counts[order]
    above = rising / rising[-1].clamp(min=1e-9) - before / counts.sum()
    return float(rising[max(0, int(above.argmax()) - 1)])
