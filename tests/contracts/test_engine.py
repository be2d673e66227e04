"""Every engine: one reply an order, a client's error is its reply, and the bytes are the codec's."""

import pytest

import small
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.federation import codec, simulation
from ficpd.federation.execution import execute_assignment
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load, names

BUILDERS = {
    "in_process": lambda method, members, model, **options: simulation.build(
        simulation.Config(**options), method, members, model
    )
}


ELSEWHERE = {"flower", "ray"}
"""Clients that are sites on sockets: the same is asked in `tests/site/test_site.py` and `test_faults.py`. Ray's actors need
half a minute to start: `tests/federation/test_ray_engine.py`."""


@pytest.fixture(params=[name for name in names("engines") if name not in ELSEWHERE])
def build(request):
    if request.param not in BUILDERS:
        pytest.fail(f"engine {request.param!r} has no entry in BUILDERS of tests/contracts/test_engine.py: add one")
    return BUILDERS[request.param]


class Stumbling:
    """A method whose named clients raise: before their first question, after its answer, or at the end."""

    def __init__(self, method, where: dict[str, str]):
        self.method, self.where = method, where

    def __getattr__(self, name):
        return getattr(self.method, name)

    def local_update(self, client, order):
        where, work = self.where.get(client.id), self.method.local_update(client, order)
        if where == "first":
            raise ValueError("no records today")
        answer = yield next(work)
        if where == "second":
            raise KeyError("disk")
        try:
            while True:
                answer = yield work.send(answer)
        except StopIteration as end:
            if where == "last":
                raise ZeroDivisionError("of all things") from None
            return end.value


def orders_for(method, members, model, round: int = 1) -> dict[str, bytes]:
    state = small.first_state(method, members)
    orders = {name: method.make_assignment(state, client.card, round) for name, client in members.items()}
    return {name: codec.encode_assignment(order, model.backbone.fingerprint) for name, order in orders.items()}


def updates(method, members, model, replies, round: int = 1) -> dict:
    layout, fingerprint = small.wire(method.update_spec(small.first_state(method, members))), model.backbone.fingerprint
    expected = {name: codec.ExpectedUpdate(name, round, fingerprint, layout) for name in members}
    return {reply.client: codec.decode_update(reply.body, expected[reply.client]) for reply in replies}


def test_it_tells_who_is_there_and_nothing_of_their_records(build, model):
    method = small.method("fedavg")
    members = small.clients(model, method)
    assert list(build(method, members, model).clients()) == [client.card for client in members.values()]


def test_one_reply_an_order_whatever_the_order(build, model):
    method = small.method("fedavg")
    members = small.clients(model, method)
    orders = orders_for(method, members, model)
    for asked in (sorted(orders), small.shuffled(orders), sorted(orders)[1:3], []):
        replies = list(build(method, members, model).exchange({name: orders[name] for name in asked}))
        assert sorted(reply.client for reply in replies) == sorted(asked)
        assert all(reply.error is None and reply.body for reply in replies)


def test_the_bytes_are_the_codecs(build, model):
    method = small.method("fedavg")
    members, alone = small.clients(model, method), small.clients(model, method)
    orders, fingerprint = orders_for(method, members, model, 3), model.backbone.fingerprint
    found = updates(method, members, model, build(method, members, model).exchange(orders), 3)
    for name, body in orders.items():
        update = run_queries(model, execute_assignment(method, alone[name], codec.decode_assignment(body, fingerprint)))
        assert (found[name].client, found[name].weight) == (update.client, update.weight)
        assert small.close(found[name].arrays["delta"], update.arrays["delta"])
    (reply,) = build(method, small.clients(model, method, 1), model).exchange({"site-0": orders["site-0"]})
    assert reply.body == codec.encode_update(found["site-0"], 3, fingerprint) or small.close(
        updates(method, members, model, [reply], 3)["site-0"].arrays["delta"], found["site-0"].arrays["delta"]
    )


@pytest.mark.parametrize("lock_step", [1, 2, 64])
@pytest.mark.parametrize("where", ["first", "second", "last"])
def test_a_client_that_raises_is_an_error_and_the_others_go_on(model, where, lock_step):
    method = small.method("fedavg")
    members, calm = small.clients(model, method), small.clients(model, method)
    orders = orders_for(method, members, model)
    stumbling = Stumbling(method, {"site-1": where, "site-4": where})
    replies = {reply.client: reply for reply in small.engine(stumbling, members, model, lock_step).exchange(orders)}
    assert replies.keys() == members.keys()
    for name in ("site-1", "site-4"):
        assert replies[name].body is None
        words = {"first": "ValueError: no records today", "second": "KeyError: 'disk'"}
        assert replies[name].error == words.get(where, "ZeroDivisionError: of all things")
        assert members[name].client_state == {}
    good = [reply for name, reply in replies.items() if name not in ("site-1", "site-4")]
    theirs = updates(method, calm, model, small.engine(method, calm, model, lock_step).exchange(orders))
    for name, update in updates(method, members, model, good).items():
        assert small.close(update.arrays["delta"], theirs[name].arrays["delta"])


@pytest.mark.parametrize("name", names("methods"))
def test_few_and_many_in_lock_step_agree(model, name):
    method = small.method(name)
    found = []
    for lock_step in (1, 2, 64):
        members = small.clients(model, method)
        engine = small.engine(method, members, QueryEngine(model.backbone), lock_step)
        found.append(updates(method, members, model, engine.exchange(orders_for(method, members, model))))
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for client, update in found[0].items():
            assert update.arrays.keys() == other[client].arrays.keys()
            assert all(small.close(array, other[client].arrays[key]) for key, array in update.arrays.items())


def test_clients_in_lock_step_share_forwards(monkeypatch):
    method, backbone = small.method("fedavg"), small.backbone()
    forwards = []
    above = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda *given: forwards.append(len(given[2])) or above(*given))
    counts = {}
    for lock_step in (1, 64):
        model = QueryEngine(backbone)
        members = small.clients(model, method)
        orders = orders_for(method, members, model)
        forwards.clear()
        assert len(list(small.engine(method, members, model, lock_step).exchange(orders))) == 5
        counts[lock_step] = len([rows for rows in forwards if rows > len(small.LABELS)])
    assert counts == {1: 5 * small.TRAINING.local_steps, 64: small.TRAINING.local_steps}


def test_an_order_for_another_backbone_is_refused(model):
    method = small.method("fedavg")
    members = small.clients(model, method)
    state = small.first_state(method, members)
    order = codec.encode_assignment(method.make_assignment(state, members["site-0"].card, 1), "tiny:other")
    with pytest.raises(codec.CodecError, match="load the same backbone"):
        list(small.engine(method, members, model).exchange({"site-0": order}))


def test_a_known_engine_has_settings():
    assert all(load("engines", name).Config() for name in names("engines"))


def test_with_privacy_an_error_does_not_quote_a_record(model):
    """The server hears what kind it was, and the budget's and the mechanism's own words, which quote none."""
    from ficpd.errors import BudgetError, DataError

    method = small.method("fedavg")
    open_one = small.clients(model, method)["site-0"]
    record_level = type("Record", (NoPrivacy,), {"unit": "record"})()
    private = small.clients(model, method, mechanism=record_level)["site-0"]
    error = DataError("row 7: the patient's name is Ada")
    assert "Ada" in simulation.public_error(open_one, error)
    assert simulation.public_error(private, error) == "DataError (its text stays at the client)"
    assert simulation.public_error(private, BudgetError("spent")) == "BudgetError: spent"
