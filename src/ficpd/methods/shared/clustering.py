"""Prototypes: cosine K-means of what the clients' prompts learned.

Signatures are what clients are told apart by: vectors of any one shape, compared by direction alone.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng

AUTO_MOST, STABLE = 20, 10
ALIKE = 0.1
"""A best silhouette below this is no structure at all: one prototype (Kaufman and Rousseeuw, 1990, call 0.25 none)."""


class Clusters(NamedTuple):
    """`member[name]` is the cluster of each client, numbered by size, the largest first; there are `number`."""

    member: dict[str, int]
    number: int


def cosine_kmeans(
    signatures: Mapping[str, Tensor], num_prototypes: int | Literal["auto"], seed: int, *, restarts: int = 20,
    least_members: int = 1,
) -> Clusters:  # fmt: skip
    """Cluster vectors by their direction: K-means on the unit sphere (Hornik et al., J. Stat. Software 50(10), 2012).

    At most as many clusters as there are different directions; a zero vector (nothing learned) has none and joins the
    largest cluster. "auto": the number of best mean silhouette (Rousseeuw, J. Comput. Appl. Math. 20, 1987) times
    `_stability`, one if no silhouette is better than `ALIKE`. scikit-learn's K-means fills a cluster that falls empty with
    the farthest vector. Clusters of fewer than `least_members` are given up, the smallest first, their members going to
    the nearest of the others.
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
    labels = _dissolved(unit, labels, least_members)
    rank = {label: place for place, label in enumerate(sorted(set(labels), key=lambda i: (-labels.count(i), i)))}
    placed = iter(rank[label] for label in labels)
    return Clusters(
        {name: next(placed) if ok else 0 for name, ok in zip(names, moved.tolist(), strict=True)}, len(rank)
    )


def _kmeans(unit_ND: Tensor, number: int, seed: int, restarts: int) -> list[int]:
    kmeans = KMeans(number, n_init=restarts, random_state=seed % 2**32)  # type: ignore[arg-type]
    return kmeans.fit_predict(unit_ND.numpy()).tolist()


def _best_of_all(unit_ND: Tensor, most: int, seed: int, restarts: int) -> list[int]:
    """Silhouettes alone are not enough: with nearly the best one, four clusters of thirty clients once had a Rand index of
    0.63 to their five tasks, in a draw that the next seed did not repeat."""
    if len(unit_ND) < unit_ND.shape[1]:  # the same distances in fewer numbers
        left, sizes, _ = torch.linalg.svd(unit_ND, full_matrices=False)
        unit_ND = left * sizes
    best, labels = 0.0, [0] * len(unit_ND)
    for number in range(2, min(most, len(unit_ND) - 1) + 1):
        tried = _kmeans(unit_ND, number, seed, restarts)
        score = float(silhouette_score(unit_ND.numpy(), tried, metric="cosine"))
        if score > max(best, ALIKE) and (score := score * _stability(unit_ND, tried, seed)) > best:
            best, labels = score, tried
    return labels


def _stability(unit_ND: Tensor, labels: list[int], seed: int) -> float:
    """The mean adjusted Rand index of these clusters and those of four fifths of the vectors, over `STABLE` draws (Ben-Hur,
    Elisseeff and Guyon, Pacific Symposium on Biocomputing 2002)."""
    found, random = 0.0, rng.make_generator(seed, "stability")
    for draw in range(STABLE):
        kept = torch.randperm(len(unit_ND), generator=random)[: max(len(unit_ND) * 4 // 5, len(set(labels)))]
        again = _kmeans(unit_ND[kept], len(set(labels)), rng.derive_seed(seed, "stability", draw), 3)
        found += adjusted_rand_score([labels[i] for i in kept.tolist()], again)
    return found / STABLE


def _dissolved(unit_ND: Tensor, labels: list[int], least: int) -> list[int]:
    """One cluster after another, as long as there is more than one and the smallest is too small."""
    labels = list(labels)
    while len(set(labels)) > 1:
        smallest = min(sorted(set(labels)), key=labels.count)
        if labels.count(smallest) >= least:
            break
        others = sorted(set(labels) - {smallest})
        centres = torch.stack([_centre(unit_ND, labels, k) for k in others])
        for place, label in enumerate(labels):
            if label == smallest:
                labels[place] = others[int((centres @ unit_ND[place]).argmax())]
    return labels


def _centre(unit_ND: Tensor, labels: Sequence[int], cluster: int) -> Tensor:
    return F.normalize(unit_ND[[label == cluster for label in labels]].mean(0), dim=0)


def relabel_clusters(
    before: Mapping[str, int], drawn: Clusters, signatures: Mapping[str, Tensor], stay: float
) -> Clusters:
    """Newly drawn clusters with the old ones' numbers, and nobody moved for a trifle.

    Clusters are matched so that most clients keep their number (Kuhn, 1955). A client moves only if the direction of its
    signature is nearer to the new cluster's centre than to its old one's by more than `stay` in cosine.
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
    for name in names:
        old_k, new_k = before[name], member[name]
        if old_k in centres and float(unit[name] @ (centres[new_k] - centres[old_k])) <= stay:
            member[name] = old_k
    used = {k: place for place, k in enumerate(sorted(set(member.values())))}
    return Clusters({name: used[k] for name, k in member.items()}, len(used))


def shrinkage(members: Mapping[int, Sequence[Tensor]], noise: float | None = None) -> dict[int, float]:
    """How far each cluster's mean offset from the global prompt is to be drawn back to zero, in 0..1.

    Positive-part empirical Bayes (Efron and Morris, J. Amer. Statist. Assoc. 68, 1973): λ_k = min(1, s² / (n_k |mean_k|²)).
    s² is `noise`, the squared length of the noise that a mechanism put on one client's update. None: it is not known, and
    all of the scatter of members around their cluster's mean (pooled over clusters) is taken for noise; without any cluster
    of two nothing can be estimated then, and nothing is drawn back.
    """
    means = {k: torch.stack(list(offsets)).double().mean(0) for k, offsets in members.items()}
    if noise is None:
        scatter = sum(float((o.double() - means[k]).square().sum()) for k, offsets in members.items() for o in offsets)
        degrees = sum(len(offsets) - 1 for offsets in members.values())
        noise = scatter / degrees if degrees else 0.0
    lengths = {k: float(mean.square().sum()) for k, mean in means.items()}
    return {k: min(1.0, noise / len(offsets) / lengths[k]) if lengths[k] > 0 else 1.0 for k, offsets in members.items()}


def adjusted_rand(member: Mapping[str, int], truth: Mapping[str, str]) -> float | None:
    """The adjusted Rand index (Hubert and Arabie, J. Classification 2, 1985) of clusters and known groups, over the
    clients in both. None where it says nothing: everybody is of one group, or each of its own."""
    names = sorted(name for name in member if name in truth)
    groups = [truth[name] for name in names]
    if len(set(groups)) < 2 or len(set(groups)) == len(groups):
        return None
    return float(adjusted_rand_score(groups, [member[name] for name in names]))
