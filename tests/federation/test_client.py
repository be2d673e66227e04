"""A client: what it draws, what it keeps, and that its records are read once."""

from dataclasses import replace

import pytest
import torch

import small
from ficpd.federation.client import ClientSession
from ficpd.privacy.none import NoPrivacy


@pytest.fixture
def client(model):
    return small.clients(model, small.method("fedavg"), 3)["site-2"]  # of nine records


def drawn(client, round: int, steps: int = 3, size: int = 4) -> list[list[int]]:
    """Which records each batch holds."""
    places = {items: place for place, items in enumerate(client.encoded().items)}
    return [[places[items] for items in batch.items] for batch in ClientSession(client, round).batches(steps, size)]


def test_a_round_has_batches_of_its_own_and_always_the_same(client):
    first = drawn(client, 1)
    assert [len(batch) for batch in first] == [4, 4, 4]
    assert drawn(client, 1) == first
    assert drawn(client, 2) != first


def test_every_record_comes_once_an_epoch(client):
    places = [place for batch in drawn(client, 1, 6, 3) for place in batch]
    assert sorted(places[:9]) == sorted(places[9:]) == list(range(9))
    assert places[:9] != places[9:]


def test_a_batch_is_never_larger_than_the_records(client):
    session = ClientSession(client, 1)
    batches = list(session.batches(2, 64))
    assert [len(batch) for batch in batches] == [9, 9]
    assert session.expected_batch == 9


def test_a_mean_divides_by_the_expected_batch_not_by_what_came(client):
    class Poisson(NoPrivacy):
        def sample(self, num_records, expected_batch, steps, noise):
            return [torch.arange(3), torch.arange(0)]

    client.mechanism = Poisson()
    session = ClientSession(client, 1)
    batches, values = session.batches(2, 4), torch.ones(2, 3, 5, 6)
    assert len(next(batches)) == 3
    assert torch.equal(session.private_mean(values), torch.full((2, 5, 6), 0.75))
    assert len(next(batches)) == 0
    assert torch.equal(session.private_mean(values[:, :0]), torch.zeros(2, 5, 6))


def test_another_private_seed_draws_otherwise(client, model):
    other = small.clients(model, small.method("fedavg"), 3, seed=1)["site-2"]
    assert drawn(other, 1) != drawn(client, 1)


def test_records_are_encoded_once(client):
    assert client.encoded() is client.encoded()
    assert client.encoded("test") is client.encoded("test")
    assert (len(client.encoded()), len(client.encoded("test"))) == (9, 4)


def test_what_a_visit_keeps_is_not_the_clients_until_it_is_done(client):
    client.client_state["prompt"] = torch.zeros(2)
    session = ClientSession(client, 1)
    session.client_state["prompt"] = torch.ones(2)
    session.client_state["more"] = torch.ones(1)
    assert client.client_state.keys() == {"prompt"}
    assert torch.equal(client.client_state["prompt"], torch.zeros(2))


def test_members_under_two_methods_share_what_they_encoded_but_not_others_records(client, model):
    again = replace(client, client_state={})
    assert again.encoded() is client.encoded()
    other = replace(client, train=list(client.train[:3]))
    assert len(other.encoded()) == 3
    longer = replace(client, start=small.start(model, small.classes(), 5), encodings=dict(client.encodings))
    assert longer.encoded() is not client.encoded()
