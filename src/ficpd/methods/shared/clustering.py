"""Prototypes: cosine K-means of client signatures, which are vectors of the same shape."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng

AUTO_MOST, STABLE = 20, 10
ALIKE = 0.7
"""The minimum silhouette of a clustering: a strong structure (Kaufman and Rousseeuw, Finding Groups in Data, 1990)."""


NO_KEYS: Mapping[str, str] = {}


class Clusters(NamedTuple):
    """Each client's cluster, numbered by size, the largest first; and the number of clusters."""

    member: dict[str, int]
    number: int


def cosine_kmeans(
    signatures: Mapping[str, Tensor], num_prototypes: int | Literal["auto"], seed: int, *, restarts: int = 20
) -> Clusters:
    """Clusters vectors by direction: K-means on the unit sphere (Hornik et al., J. Stat. Software 50(10), 2012).

    There are at most as many clusters as distinct directions. A zero vector joins the largest cluster. "auto"
    maximises the mean silhouette (Rousseeuw, J. Comput. Appl. Math. 20, 1987) times `_stability`, with one cluster if
    no silhouette is above `ALIKE`.
    """
    names = sorted(signatures)
    stacked = torch.stack([signatures[name].flatten().double() for name in names])
    moved = stacked.norm(dim=1) > 1e-12
    if not moved.any():
        return Clusters(dict.fromkeys(names, 0), 1)
    unit = F.normalize(stacked[moved], dim=1)
    different = len(torch.unique(unit.round(decimals=9), dim=0))
    if num_prototypes == "auto":
        labels = _best_of_all(unit, min(AUTO_MOST, different), seed, restarts)
    else:
        labels = _kmeans(unit, min(num_prototypes, different), seed, restarts)
    rank = {label: place for place, label in enumerate(sorted(set(labels), key=lambda i: (-labels.count(i), i)))}
    placed = iter(rank[label] for label in labels)
    return Clusters(
        {name: next(placed) if ok else 0 for name, ok in zip(names, moved.tolist(), strict=True)}, len(rank)
    )


def cluster_within_keys(
    signatures: Mapping[str, Tensor], keys: Mapping[str, str], num_prototypes: int | Literal["auto"], seed: int
) -> Clusters:
    """Clusters the clients of each public key separately (`cosine_kmeans`), so that no cluster has two keys.

    A fixed number of prototypes is divided among the keys; each key gets at least one.
    """
    names: dict[str, list[str]] = {}
    for name in sorted(signatures):
        names.setdefault(keys.get(name, ""), []).append(name)
    each = num_prototypes if num_prototypes == "auto" else max(num_prototypes // max(len(names), 1), 1)
    member: dict[str, tuple[str, int]] = {}
    for key, of_key in names.items():
        found = cosine_kmeans({n: signatures[n] for n in of_key}, each, seed)
        member |= {name: (key, place) for name, place in found.member.items()}
    sizes = Counter(member.values())
    rank = {cluster: k for k, cluster in enumerate(sorted(sizes, key=lambda one: (-sizes[one], one)))}
    return Clusters({name: rank[cluster] for name, cluster in member.items()}, len(rank))


def _kmeans(unit_ND: Tensor, number: int, seed: int, restarts: int) -> list[int]:
    kmeans = KMeans(number, n_init=restarts, random_state=seed % 2**32)  # type: ignore[arg-type]
    return kmeans.fit_predict(unit_ND.numpy()).tolist()


def _best_of_all(unit_ND: Tensor, most: int, seed: int, restarts: int) -> list[int]:
    """Chooses the number of clusters by silhouette and stability. Silhouettes alone are unstable."""
    if len(unit_ND) < unit_ND.shape[1]:  # the same distances with fewer values
        left, sizes, _ = torch.linalg.svd(unit_ND, full_matrices=False)
        unit_ND = left * sizes

    def stability(labels: list[int]) -> float:
        return _stability(unit_ND, labels, seed)

    return best_silhouette(
        unit_ND.numpy(), "cosine", most, lambda number: _kmeans(unit_ND, number, seed, restarts), stability
    )


def best_silhouette(
    points: np.ndarray, metric: str, most: int, draw: Callable[[int], list[int]], weight: Callable[[list[int]], float]
) -> list[int]:
    """Returns the labels of 2 to `most` clusters with the highest silhouette times weight.

    Returns one cluster if no silhouette is above `ALIKE`. The smaller number wins a tie.
    """
    best, labels = 0.0, [0] * len(points)
    for number in range(2, min(most, len(points) - 1) + 1):
        tried = draw(number)
        score = float(silhouette_score(points, tried, metric=metric))
        if score > max(best, ALIKE) + 1e-9 and (score := score * weight(tried)) > best:
            best, labels = score, tried
    return labels


def _stability(unit_ND: Tensor, labels: list[int], seed: int) -> float:
    """Returns the mean adjusted Rand index to clusterings of four fifths of the vectors (Ben-Hur et al., PSB 2002)."""
    found, random = 0.0, rng.make_generator(seed, "stability")
    for draw in range(STABLE):
        kept = torch.randperm(len(unit_ND), generator=random)[: max(len(unit_ND) * 4 // 5, len(set(labels)))]
        again = _kmeans(unit_ND[kept], len(set(labels)), rng.derive_seed(seed, "stability", draw), 3)
        found += adjusted_rand_score([labels[i] for i in kept.tolist()], again)
    return found / STABLE


def relabel_clusters(
    before: Mapping[str, int], drawn: Clusters, signatures: Mapping[str, Tensor], stay: float,
    keys: Mapping[str, str] = NO_KEYS,
) -> Clusters:  # fmt: skip
    """Gives new clusters the old numbers, and moves a client only for a clear gain, within its key.

    The matching keeps the numbers of most clients (Kuhn, 1955). A client moves if its signature's cosine
    grows by more than `stay`.
    """
    names = sorted(name for name in drawn.member if name in before)
    if not names:
        return drawn
    size = max(drawn.number, max(before.values()) + 1)
    shared = torch.zeros(size, size)
    for name in names:
        shared[drawn.member[name], before[name]] += 1
    new, old = linear_sum_assignment(-shared.numpy())
    number_of = dict(zip(new.tolist(), old.tolist(), strict=True))
    member = {name: number_of[k] for name, k in drawn.member.items()}
    unit = {name: F.normalize(signatures[name].flatten().double(), dim=0) for name in drawn.member}
    centres = {k: F.normalize(sum(unit[n] for n in member if member[n] == k), dim=0) for k in set(member.values())}  # type: ignore[arg-type]
    key_of = {k: keys.get(name) for name, k in member.items()}
    for name in names:
        old_k, new_k = before[name], member[name]
        if (
            old_k in centres
            and key_of[old_k] == keys.get(name)
            and float(unit[name] @ (centres[new_k] - centres[old_k])) <= stay
        ):
            member[name] = old_k
    used = {k: place for place, k in enumerate(sorted(set(member.values())))}
    return Clusters({name: used[k] for name, k in member.items()}, len(used))


def shrinkage(members: Mapping[int, Sequence[Tensor]], noise: float | None = None) -> dict[int, float]:
    """Returns each cluster's shrinkage of its mean offset towards zero, in 0..1.

    Positive-part empirical Bayes (Efron and Morris, J. Amer. Statist. Assoc. 68, 1973): λ_k = min(1, s² / (n_k
    |mean_k|²)). s² is `noise`, the squared length of the noise on one client's update. None: s² is the pooled scatter
    of members around their cluster's mean, or 0 without a cluster of two.
    """
    means = {k: torch.stack(list(offsets)).double().mean(0) for k, offsets in members.items()}
    if noise is None:
        scatter = sum(float((o.double() - means[k]).square().sum()) for k, offsets in members.items() for o in offsets)
        degrees = sum(len(offsets) - 1 for offsets in members.values())
        noise = scatter / degrees if degrees else 0.0
    lengths = {k: float(mean.square().sum()) for k, mean in means.items()}
    return {k: min(1.0, noise / len(offsets) / lengths[k]) if lengths[k] > 0 else 1.0 for k, offsets in members.items()}


def adjusted_rand(member: Mapping[str, int], truth: Mapping[str, str]) -> float | None:
    """Returns the adjusted Rand index (Hubert and Arabie, J. Classification 2, 1985) of clusters and known groups.

    Uses the clients in both. Returns None if there is one group, or one per client.
    """
    names = sorted(name for name in member if name in truth)
    groups = [truth[name] for name in names]
    if len(set(groups)) < 2 or len(set(groups)) == len(groups):
        return None
    return float(adjusted_rand_score(groups, [member[name] for name in names]))
