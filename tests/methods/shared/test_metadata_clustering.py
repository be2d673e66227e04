"""Clusters of clients from their public cards."""

import numpy as np
import pytest

from ficpd.errors import ConfigError
from ficpd.methods.shared.metadata_clustering import cluster_by_metadata, gower_distance, nearest_client

CARDS = {
    "paris": {"country": "fr", "specialty": "heart", "beds": 900},
    "lyon": {"country": "fr", "specialty": "heart", "beds": 800},
    "bonn": {"country": "de", "specialty": "skin", "beds": 100},
    "kiel": {"country": "de", "specialty": "skin", "beds": 120},
    "wien": {"country": "at", "specialty": "skin", "beds": 150},
}


@pytest.mark.parametrize("number", [2, "auto"])
def test_those_with_like_cards_are_together(number):
    found = cluster_by_metadata(CARDS, (), number)
    assert found.member["paris"] == found.member["lyon"] != found.member["bonn"] == found.member["kiel"]
    assert sorted(set(found.member.values())) == list(range(found.number))
    sizes = [list(found.member.values()).count(k) for k in range(found.number)]
    assert sizes == sorted(sizes, reverse=True)


def test_given_clusters_are_one_for_each_different_card():
    found = cluster_by_metadata(CARDS, ("country",), len(CARDS))
    assert found.number == 3
    assert found.member["wien"] not in (found.member["paris"], found.member["bonn"])


@pytest.mark.parametrize("cards", [{"a": {}, "b": {}}, {"a": {"x": 1}, "b": {"x": 1}}, {"only": {"x": "y"}}])
def test_cards_that_are_alike_or_empty_are_one_cluster(cards):
    for number in (3, "auto"):
        assert cluster_by_metadata(cards, (), number) == (dict.fromkeys(cards, 0), 1)


def test_a_client_without_a_card_is_placed_and_moves_nobody():
    found = cluster_by_metadata({**CARDS, "silent": {}}, (), 3)
    assert found.member["paris"] == found.member["lyon"]
    assert [name for name, k in found.member.items() if k == found.member["silent"]] == ["silent"]


def test_a_fact_that_one_card_lacks_is_left_out_of_its_distances():
    distance = gower_distance([{"a": "x", "n": 0}, {"a": "x"}, {"a": "y", "n": 10}, {"n": 5}], ["a", "n"])
    assert np.allclose(distance, [[0, 0, 1, 0.5], [0, 0, 1, 1], [1, 1, 0, 0.5], [0.5, 1, 0.5, 0]])


def test_a_field_that_nobody_states_is_named():
    with pytest.raises(ConfigError, match=r"field 'contry'.*country"):
        cluster_by_metadata(CARDS, ("contry",), 2)


def test_somebody_new_is_placed_by_the_nearest_card():
    assert nearest_client(CARDS, {"country": "fr", "beds": 10}, ()) == "lyon"
    assert nearest_client(CARDS, {"specialty": "skin", "beds": 155, "country": "ch"}, ()) == "wien"
