"""Prototypes: planted clusters of directions are found, and no odd input breaks it."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import small
from ficpd.server.prototypes import cosine_kmeans


def planted(clusters: int = 3, each: int = 5, noise: float = 0.1, seed: int = 0) -> tuple[dict, dict]:
    """Vectors of very different lengths around a few directions, and which direction each is of."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, 4, 8, generator=random)
    vectors, truth = {}, {}
    for i in range(clusters * each):
        name, length = f"site-{i:02}", 10 ** (3 * float(torch.rand((), generator=random)) - 2)
        vectors[name] = length * (centres[i % clusters] + noise * torch.randn(4, 8, generator=random))
        truth[name] = i % clusters
    return vectors, truth


def partition(member: dict[str, int]) -> set[frozenset[str]]:
    return {frozenset(n for n, k in member.items() if k == cluster) for cluster in set(member.values())}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_planted_directions_are_found(clusters, seed):
    vectors, truth = planted(clusters, seed=seed)
    found = cosine_kmeans(vectors, clusters, seed)
    names = sorted(vectors)
    assert found.number == clusters
    assert adjusted_rand_score([truth[n] for n in names], [found.member[n] for n in names]) == 1.0


def test_opposite_directions_are_different_and_lengths_do_not_count():
    base = torch.ones(2, 2)
    found = cosine_kmeans({"a": base, "b": 100 * base, "c": -base, "d": -0.01 * base}, 2, 0)
    assert partition(found.member) == {frozenset("ab"), frozenset("cd")}


def test_clusters_are_numbered_by_size():
    vectors, _ = planted(1, 6)
    other = {f"other-{i}": -vector for i, vector in enumerate(list(vectors.values())[:2])}
    found = cosine_kmeans({**other, **vectors}, 2, 0)
    assert {found.member[name] for name in vectors} == {0}
    assert {found.member[name] for name in other} == {1}


@pytest.mark.parametrize("wanted", [6, 7, 50])
def test_more_prototypes_than_clients_give_each_its_own(wanted):
    vectors, _ = planted(3, 2, noise=0.5)
    found = cosine_kmeans(vectors, wanted, 0)
    assert (found.number, sorted(found.member.values())) == (6, [0, 1, 2, 3, 4, 5])


def test_all_alike_are_one_cluster():
    same = {f"site-{i}": torch.full((2, 3), 0.7) for i in range(5)}
    assert cosine_kmeans(same, 3, 0) == (dict.fromkeys(same, 0), 1)
    assert cosine_kmeans({"only": torch.randn(2, 3)}, 4, 0) == ({"only": 0}, 1)


def test_those_who_learned_nothing_join_the_largest():
    vectors, truth = planted(2, 4)
    del vectors["site-01"]
    found = cosine_kmeans({**vectors, "idle": torch.zeros(4, 8), "asleep": torch.zeros(4, 8)}, 2, 0)
    assert found.number == 2
    assert found.member["idle"] == found.member["asleep"] == 0 == found.member["site-00"]
    names = sorted(vectors)
    assert adjusted_rand_score([truth[n] for n in names], [found.member[n] for n in names]) == 1.0
    assert cosine_kmeans({"a": torch.zeros(2), "b": torch.zeros(2)}, 3, 0) == ({"a": 0, "b": 0}, 1)


def test_the_order_of_clients_does_not_matter():
    vectors, _ = planted(4, 4, noise=0.8)
    first = cosine_kmeans(vectors, 4, 7)
    for seed in range(4):
        assert cosine_kmeans(dict(small.shuffled(vectors.items(), seed)), 4, 7) == first


@pytest.mark.parametrize("seed", [0, 2**31, 2**62 + 1])
def test_any_derived_seed_is_a_seed_and_fixes_the_outcome(seed):
    vectors, _ = planted(5, 3, noise=2.0)
    assert cosine_kmeans(vectors, 5, seed) == cosine_kmeans(vectors, 5, seed)
