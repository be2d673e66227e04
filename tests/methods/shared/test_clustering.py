"""Prototypes: planted clusters of directions are found, and no odd input breaks it."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import small
from ficpd.methods.shared import clustering
from ficpd.methods.shared.clustering import Clusters, adjusted_rand, cosine_kmeans, relabel_clusters, shrinkage


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


@pytest.mark.parametrize("clusters", [2, 4, 6])
def test_the_number_is_found_by_the_silhouette(clusters):
    vectors, truth = planted(clusters, each=5, noise=0.2)
    found = cosine_kmeans(vectors, "auto", 0)
    assert found.number == clusters
    assert adjusted_rand(found.member, {name: str(k) for name, k in truth.items()}) == 1.0


def test_clusters_that_are_there_are_found_again_among_four_fifths_and_others_are_not():
    vectors, _ = planted(4, 6, noise=0.3)
    unit = torch.stack([torch.nn.functional.normalize(vectors[n].flatten().double(), dim=0) for n in sorted(vectors)])
    assert clustering._stability(unit, clustering._kmeans(unit, 4, 0, 20), 0) == 1.0
    assert clustering._stability(unit, clustering._kmeans(unit, 8, 0, 20), 0) < 0.9
    assert clustering._stability(unit, clustering._kmeans(unit, 4, 0, 20), 1) == clustering._stability(
        unit, clustering._kmeans(unit, 4, 0, 20), 1
    )


def test_a_number_is_found_for_as_many_clients_as_there_are_numbers_or_fewer():
    vectors, truth = planted(3, 4)
    for names in (sorted(vectors)[:2], sorted(vectors)[:3], sorted(vectors)):
        found = cosine_kmeans({name: vectors[name] for name in names}, "auto", 0)
        assert found.number <= 3
    assert found.number == len(set(truth.values()))


def test_noise_alone_is_one_prototype():
    random = torch.Generator().manual_seed(0)
    noise = {f"site-{i:02}": torch.randn(200, generator=random) for i in range(20)}
    assert cosine_kmeans(noise, "auto", 0).number == 1
    assert cosine_kmeans({"a": torch.ones(3), "b": torch.ones(3)}, "auto", 0).number == 1


@pytest.mark.parametrize("seed", range(12))
def test_no_cluster_is_left_empty(seed):
    """One start only, and most clients in one place: K-means' own centres fall empty here, and are filled again."""
    vectors, _ = planted(1, 30)
    vectors |= {f"other-{i}": torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    found = cosine_kmeans(vectors, 12, seed, restarts=1)
    assert found.number == 12
    assert set(found.member.values()) == set(range(12))


def test_a_client_far_away_owns_a_prototype():
    vectors, _ = planted(1, 9)
    vectors["far"] = -next(iter(vectors.values()))
    assert partition(cosine_kmeans(vectors, 2, 0).member) == {frozenset({"far"}), frozenset(vectors) - {"far"}}


def test_clusters_drawn_again_keep_their_numbers():
    vectors, _ = planted(3, 4)
    first = cosine_kmeans(vectors, 3, 0)
    swapped = Clusters({name: (k + 1) % 3 for name, k in first.member.items()}, 3)
    assert relabel_clusters(first.member, swapped, vectors, 0.0) == first


def test_nobody_moves_for_a_trifle_and_who_has_moved_does():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    vectors = {f"e{i}": east for i in range(3)} | {f"n{i}": north for i in range(3)}
    before = {name: int(name[0] == "n") for name in vectors} | {"x": 0}
    between = vectors | {"x": torch.tensor([1.0, 1.05])}
    assert cosine_kmeans(between, 2, 0).member["x"] == cosine_kmeans(between, 2, 0).member["n0"]
    drawn = cosine_kmeans(between, 2, 0)
    assert relabel_clusters(before, drawn, between, 0.2).member["x"] == 0
    assert relabel_clusters(before, drawn, vectors | {"x": north}, 0.2).member["x"] == 1


def test_newcomers_and_a_cluster_that_vanished():
    vectors, _ = planted(2, 3)
    first = cosine_kmeans(vectors, 2, 0)
    more = vectors | {"new": vectors["site-00"]}
    found = relabel_clusters(first.member, cosine_kmeans(more, 2, 0), more, 0.05)
    assert found.member["new"] == first.member["site-00"]
    one = relabel_clusters(first.member, Clusters(dict.fromkeys(vectors, 0), 1), vectors, 2.0)
    assert sorted(set(one.member.values())) == list(range(one.number))


def test_shrinkage_is_the_share_of_noise_in_a_mean():
    """Means of true squared length 4 and noise of variance 1 in 100 numbers: λ = (100 / n) / (4 + 100 / n)."""
    random = torch.Generator().manual_seed(0)
    members = {}
    for k in range(60):
        centre = torch.zeros(100)
        centre[k] = 2.0
        members[k] = [centre + torch.randn(100, generator=random) for _ in range(2 + k % 2 * 8)]
    found = shrinkage(members)
    for size in (2, 10):
        mean = sum(found[k] for k in members if len(members[k]) == size) / 30
        assert mean == pytest.approx((100 / size) / (4 + 100 / size), abs=0.06)


def test_where_the_noise_is_known_scatter_does_not_count():
    alone = {0: [torch.tensor([3.0, 4.0])], 1: [torch.tensor([0.3, 0.4])]}
    assert shrinkage(alone) == {0: 0.0, 1: 0.0}
    assert shrinkage(alone, 5.0) == {0: pytest.approx(0.2), 1: 1.0}
    apart = {0: [torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])]}
    assert shrinkage(apart) == {0: 1.0}
    assert shrinkage(apart, 0.0) == {0: 0.0}
    assert shrinkage(apart, 1.0) == {0: pytest.approx(0.5)}
    assert shrinkage({0: [torch.zeros(2), torch.zeros(2)]}) == {0: 1.0}


def test_agreement_says_nothing_where_there_is_nothing_to_say():
    member = {"a": 0, "b": 0, "c": 1}
    assert adjusted_rand(member, {"a": "x", "b": "x", "c": "y"}) == 1.0
    assert adjusted_rand(member, {"a": "x", "b": "y", "c": "y"}) < 0.5
    assert adjusted_rand(member, dict.fromkeys("abc", "x")) is None
    assert adjusted_rand(member, {"a": "x", "b": "y", "c": "z"}) is None
    assert adjusted_rand(member, {}) is None


def test_a_client_never_stays_in_a_cluster_of_another_key():
    """The old number of b's cluster goes to one of key a; b's client moves, however small its gain."""
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    vectors = {"a1": east, "a2": north, "b1": east}
    keys = {"a1": "a", "a2": "a", "b1": "b"}
    before = {"a1": 0, "a2": 1, "b1": 1}
    drawn = Clusters({"a1": 0, "a2": 1, "b1": 2}, 3)
    assert relabel_clusters(before, drawn, vectors, 2.0).member["b1"] == 1
    found = relabel_clusters(before, drawn, vectors, 2.0, keys).member
    assert found["b1"] not in (found["a1"], found["a2"])
