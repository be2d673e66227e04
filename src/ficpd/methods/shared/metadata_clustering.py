"""Clusters clients by their public cards, before training."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from sklearn.cluster import AgglomerativeClustering

from ficpd.errors import ConfigError, did_you_mean
from ficpd.methods.shared.clustering import AUTO_MOST, Clusters, best_silhouette

Card = Mapping[str, str | float]


def cluster_by_metadata(cards: Mapping[str, Card], by: Sequence[str], number: int | Literal["auto"]) -> Clusters:
    """Clusters clients by the fields `by` of their cards (default: all): average linkage on Gower's distance.

    The clusters are numbered by size, the largest first.

    number: at most the number of distinct cards; "auto": the highest silhouette (Rousseeuw, 1987), or one cluster.

    Raises `ConfigError` for a field that no card has.
    """
    names, fields = sorted(cards), metadata_fields(cards, by)
    distance_CC = gower_distance([cards[name] for name in names], fields)
    different = len(np.unique(distance_CC.round(9), axis=0))
    if not fields or different == 1:
        return Clusters(dict.fromkeys(names, 0), 1)

    def drawn(count: int) -> list[int]:
        model = AgglomerativeClustering(count, metric="precomputed", linkage="average")
        return model.fit_predict(distance_CC).tolist()

    if number == "auto":
        labels = best_silhouette(distance_CC, "precomputed", min(AUTO_MOST, different), drawn, lambda _: 1.0)
    else:
        labels = drawn(min(number, different))
    order = sorted(set(labels), key=lambda k: (-labels.count(k), labels.index(k)))
    return Clusters({name: order.index(k) for name, k in zip(names, labels, strict=True)}, len(order))


def gower_distance(cards: Sequence[Card], fields: Sequence[str]) -> np.ndarray:
    """Returns Gower's distance in 0..1, [C, C] (Gower, Biometrics 27, 1971).

    The distance is the mean over the fields of both cards: 0 or 1 for categories, the difference over the range for
    numbers. Two cards without a common field have distance 1, two empty cards 0.

    >>> cards = [{"country": "fr", "beds": 100}, {"country": "fr", "beds": 300}, {"country": "de"}]
    >>> gower_distance(cards, ["country", "beds"])
    array([[0. , 0.5, 1. ],
           [0.5, 0. , 1. ],
           [1. , 1. , 0. ]])
    """
    apart, both = np.zeros((len(cards), len(cards))), np.zeros((len(cards), len(cards)))
    for field in fields:
        values = [card.get(field) for card in cards]
        stated = np.array([value is not None for value in values])
        if _numeric(values):
            numbers = np.array([float(v) if v is not None else 0.0 for v in values])
            span = np.ptp(numbers[stated])
            difference = np.abs(numbers[:, None] - numbers) / (span if span > 0 else 1.0)
        else:
            words = np.array([str(value) for value in values])
            difference = (words[:, None] != words).astype(float)
        shared = stated[:, None] & stated
        apart += np.where(shared, difference, 0.0)
        both += shared
    silent = np.array([all(card.get(field) is None for field in fields) for card in cards])
    apart = np.where(both > 0, apart / np.maximum(both, 1), 1.0)
    return np.where(np.eye(len(cards), dtype=bool) | (silent[:, None] & silent), 0.0, apart)


def nearest_client(cards: Mapping[str, Card], of: Card, by: Sequence[str]) -> str:
    """Returns the client with the nearest card. The first by name wins a tie."""
    names = sorted(cards)
    distance_CC = gower_distance([*(cards[name] for name in names), of], metadata_fields(cards, by))
    return names[int(distance_CC[-1, :-1].argmin())]


def metadata_fields(cards: Mapping[str, Card], by: Sequence[str]) -> list[str]:
    """Returns the named fields, else all fields of any card."""
    known = sorted({field for card in cards.values() for field in card})
    for field in by:
        if known and field not in known:
            raise ConfigError(
                f"{did_you_mean('field', field, known)} (no public card has it; see partition.cards, partition.publish)"
            )
    return [field for field in by if field in known] if by else known


def _numeric(values: Sequence) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values if value is not None)
