"""One prompt of words from many: weights (Eq. 6), the elbow, clusters, and who is kept."""

import pytest
import torch

from ficpd.methods.shared.token_aggregation import aggregate_tokens, clusters, elbow_point, token_weights


def vectors(number: int, width: int = 24) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(1))


def test_a_words_weight_is_the_sum_of_its_cosines_to_other_clients_words_as_a_softmax_over_its_own():
    given = vectors(6).view(3, 2, 24)
    units = given / given.norm(dim=-1, keepdim=True)
    for k in range(3):
        sums = [sum(float(units[k, n] @ units[j, m]) for j in range(3) if j != k for m in range(2)) for n in range(2)]
        expected = torch.tensor(sums).log_softmax(0)
        assert torch.allclose(token_weights(given)[k].float(), expected, atol=1e-5)


def test_weights_of_many_clients_keep_their_order():
    """Sums of 100 clients' cosines: a softmax in float32 would be 1 and 0."""
    table, ids = torch.eye(4), torch.tensor([[0, 1, 2]] * 60 + [[0, 1, 3]] * 40)
    found = token_weights(table[ids])
    assert found.isfinite().all()
    assert float(found[0, 2]) > float(found[99, 2])


@pytest.mark.parametrize("many", [2, 5])
def test_what_all_send_alike_comes_back(many):
    table = vectors(8)
    ids = torch.tensor([[4, 1, 4, 7, 0]] * many)
    assert aggregate_tokens(ids, table[ids]).tolist() == [4, 1, 4, 7, 0]


def test_one_clients_words_come_back():
    table, ids = vectors(8), torch.tensor([[3, 1, 3, 2]])
    assert aggregate_tokens(ids, table[ids]).tolist() == [3, 1, 3, 2]


def test_a_word_that_most_agree_on_takes_its_place_and_one_that_nobody_else_has_does_not():
    table = torch.eye(12)
    ids = torch.tensor([[0, 1, 2]] * 2 + [[0, 5, 2]] * 3 + [[0, 5, 9]])
    assert aggregate_tokens(ids, table[ids]).tolist() == [0, 5, 2]


def test_of_words_that_mean_the_same_one_is_kept_and_room_goes_to_others():
    """Words 5 and 6 lie together, and all others far apart: one of the two stays, and word 3, one client's, gets in."""
    table = torch.eye(8)
    table[6] = table[5] + 0.01
    ids = torch.tensor([[0, 1, 5, 6]] * 3 + [[0, 3, 5, 6]])
    found = aggregate_tokens(ids, table[ids]).tolist()
    assert found in ([0, 1, 3, 5], [0, 1, 3, 6])


def test_the_order_of_clients_changes_nothing_but_ties():
    table, random = vectors(20), torch.Generator().manual_seed(0)
    ids = torch.randint(20, (6, 5), generator=random)
    found = aggregate_tokens(ids, table[ids]).tolist()
    assert len(found) == 5
    back = ids.flip(0)
    assert sorted(aggregate_tokens(back, table[back]).tolist()) == sorted(found)


def test_equal_words_are_one_cluster_and_near_ones_too():
    table = torch.eye(6)
    table[5] = table[4] + 1e-3
    found = clusters([0, 1, 0, 4, 5, 2], table[[0, 1, 0, 4, 5, 2]])
    assert found[0] == found[2]
    assert found[3] == found[4]
    assert len(set(found)) == 4


def test_a_vocabulary_of_one_word_is_one_cluster():
    assert clusters([3, 3, 3], vectors(4)[[3, 3, 3]]) == [0, 0, 0]


def test_the_elbow_is_the_last_value_before_the_curve_bends():
    curve = torch.cat([torch.linspace(0, 1, 10), torch.linspace(9, 10, 90)])
    assert elbow_point(curve, torch.ones(100)) == 1.0
    assert elbow_point(curve.flip(0), torch.ones(100)) == 1.0
    assert elbow_point(torch.tensor([0.0, 5.0, 5.0]), torch.ones(3)) == 0.0
    assert elbow_point(torch.zeros(3), torch.ones(3)) == 0.0
