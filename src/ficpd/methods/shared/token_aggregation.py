"""One prompt of words from many: what the clients' words mean in common (Wu et al., 2024, arXiv 2411.00985, section on
semantic aggregation; Algorithm 2 as printed says k-means, the text DBSCAN with an elbow, which is what is done here)."""

from collections import Counter
from collections.abc import Sequence

import torch
from sklearn.cluster import DBSCAN
from torch import Tensor
from torch.nn import functional as F


def aggregate_tokens(ids_KN: Tensor, vectors_KND: Tensor) -> Tensor:
    """[N] of the words [K, N] of K clients, whose vectors are [K, N, D].

    Words that lie together are one cluster; from each the word of largest weight is kept, and they stand in the order of
    their places. The paper does not say how a prompt keeps its length; ours is always N: of more clusters those of largest
    weight; of fewer all, then for each place that has none the word of largest weight there, then any others by weight.
    Equal weights go by place, then by client.
    """
    K, N = ids_KN.shape
    ids_M, weight_M = ids_KN.flatten().tolist(), token_weights(vectors_KND).flatten()
    assignment = sorted(range(K * N), key=lambda m: (-round(float(weight_M[m]), 6), m % N, m // N))
    cluster_M, kept = clusters(ids_M, vectors_KND.flatten(0, 1)), []
    for wanted in (
        lambda m: cluster_M[m] not in {cluster_M[k] for k in kept},
        lambda m: m % N not in {k % N for k in kept},
        lambda m: (ids_M[m], m % N) not in {(ids_M[k], k % N) for k in kept},
    ):
        for m in assignment:
            if len(kept) < N and wanted(m):
                kept.append(m)
    return torch.tensor([ids_M[m] for m in sorted(kept, key=lambda m: (m % N, assignment.index(m)))])


def token_weights(vectors_KND: Tensor) -> Tensor:
    """[K, N]: w of each word, the sum of its cosines to all words of the other clients (Eq. 6), and of that the logarithm of
    the softmax over the client's own. As a logarithm, because sums of (K - 1) N cosines make one word's softmax 1 in float32
    and all others' 0."""
    units_KND = F.normalize(vectors_KND.double(), dim=-1)
    own_KD = units_KND.sum(1)
    others_KD = own_KD.sum(0) - own_KD
    return F.log_softmax(torch.einsum("knd,kd->kn", units_KND, others_KD), dim=1)


def clusters(ids: Sequence[int], vectors_MD: Tensor) -> list[int]:
    """Which cluster each of M words is in: DBSCAN where every word counts as a core, with the `elbow` of all M (M - 1) / 2
    distances for its radius. Equal words, whose distance is 0, are always together; where none is much nearer than all
    others, only they are."""
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
    """Of values, each there so many times, sorted: the last before the curve bends, where it is farthest above the line from
    nothing to the largest (Satopää et al., ICDCS Workshops 2011). Distances before the bend are those between words that are
    alike; from the bend on, those between any two words.

    >>> elbow_point(torch.tensor([0.0, 2.0, 9.0, 10.0]), torch.tensor([3, 1, 1, 3]))
    2.0
    """
    assignment = values.argsort(stable=True)
    rising, before = values[assignment], counts[assignment].cumsum(0) - counts[assignment]
    above = rising / rising[-1].clamp(min=1e-9) - before / counts.sum()
    return float(rising[max(0, int(above.argmax()) - 1)])
