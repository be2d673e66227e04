"""Every method: what leaves is what was released, the order of updates does not matter, a seed fixes all."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

import small
from ficpd import storage
from ficpd.backbones.query_engine import QueryEngine, run_queries, run_queries_lockstep
from ficpd.errors import ConfigError, LibraryError
from ficpd.evaluation.evaluate import evaluate
from ficpd.federation import codec
from ficpd.federation.client import Client
from ficpd.federation.execution import execute_assignment, personal_prompt
from ficpd.federation.method import Method
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.shared.readouts import BIAS, CENTRE, ROWS, SCORING, SCORING_BIAS, SHARES
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import names
from ficpd.types import TOKEN_DTYPE, ArraySpec, Assignment, ClientUpdate, Query, State

METHODS = names("methods")
UNSENT = ("centralized", "icl", "linear_probe", "zero_shot")
MARK, MARKED_WEIGHT = 0.125, 42.0


class Marking(NoPrivacy):
    """Lets nothing through but a mark, and counts how often it was asked."""

    def __init__(self):
        self.released: list[str] = []

    def privatize_update(self, update, noise):
        self.released.append(update.client)
        arrays = {name: torch.full(a.shape, MARK).to(a.dtype) for name, a in update.arrays.items()}
        return ClientUpdate(update.client, arrays, MARKED_WEIGHT)


@pytest.fixture(params=METHODS)
def method(request) -> Method:
    return small.method(request.param)


def orders_of(method: Method, members: Mapping[str, Client], state: State, round: int = 1) -> dict[str, Assignment]:
    return {name: method.make_assignment(state, client.card, round) for name, client in members.items()}


def updates_of(method: Method, members: Mapping[str, Client], model: QueryEngine, state: State, round: int = 1):
    orders = orders_of(method, members, state, round)
    return [run_queries(model, execute_assignment(method, client, orders[name])) for name, client in members.items()]


def outcome(method: Method, members: Mapping[str, Client], state: State) -> dict[str, torch.Tensor]:
    """All prompts that a run leaves: those of the library, and what each client would use."""
    orders = orders_of(method, members, state, 9)
    own = {f"own/{name}": personal_prompt(method, client, orders[name]) for name, client in members.items()}
    return {**method.library_prompts(state), **own}


def test_two_rounds_run_and_no_update_is_dropped(method, model):
    members = small.clients(model, method)
    state, reports = small.rounds(method, members, model)
    assert [report.round for report in reports] == [1, 2]
    assert [(report.updates, report.dropped) for report in reports] == [(len(members), {})] * 2
    shape = next(iter(members.values())).start.vectors_PD.shape
    assert all(vectors.shape == shape for vectors in method.library_prompts(state).values())
    shared = method.global_prompt(state)
    assert shared is None or shared.shape[1:] == shape[1:]
    evaluation = evaluate(method, state, members, model, 3)
    assert evaluation.own.keys() == members.keys()
    assert (evaluation.everyone is None) == (shared is None)


def test_training_moves_the_prompts_and_lowers_the_training_loss(method, model):
    if not method.capabilities.trains or method.capabilities.rounds == 1:
        pytest.skip("no prompt is trained")
    members = small.clients(model, method)
    before = outcome(method, members, small.first_state(method, members))
    state, _ = small.rounds(method, members, model, RoundSchedule(10, len(members), 0))
    after, losses = outcome(method, members, state), []
    for name, client in members.items():
        first, last = before[f"own/{name}"], after[f"own/{name}"]
        assert not small.close(first, last, 1e-3)
        losses.append(model.answer([Query(torch.stack([first, last]), client.encoded())])[0].loss_KB)
    first, last = torch.cat(losses, 1).mean(1)
    random = method.capabilities.prompt_type == "tokens"  # no words help a random backbone: methods/test_feddtpt.py
    assert last < first or random


def test_two_of_five_clients_a_round(method, model):
    members = small.clients(model, method)
    schedule = RoundSchedule(3, 2, 4)
    state, reports = small.rounds(method, members, model, schedule)
    assert [(report.clients, report.dropped) for report in reports] == [(min(2, len(members)), {})] * 3
    evaluation = evaluate(method, state, members, model, 4)
    assert evaluation.own.keys() == members.keys()


def test_a_task_with_a_tuned_head(method, model):
    if method.capabilities.prompt_type == "tokens":
        with pytest.raises(ConfigError, match="tuned_head"):
            small.clients(model, method, task=small.classes(tuned_head=True))
        return
    members = small.clients(model, method, task=small.classes(tuned_head=True))
    state, reports = small.rounds(method, members, model)
    assert not any(report.dropped for report in reports)
    begin = next(iter(members.values())).start
    for name, prompt in outcome(method, members, state).items():
        assert len(prompt) in (len(begin.vectors_PD), begin.head_rows), name
    if type(method).demonstrate is not Method.demonstrate:
        with pytest.raises(LibraryError, match="without a tuned head"):
            evaluate(method, state, members, model, 3)
        return
    assert evaluate(method, state, members, model, 3).own.keys() == members.keys()


def test_the_order_of_updates_does_not_change_the_aggregate(method, model):
    members = small.clients(model, method)
    state = small.first_state(method, members)
    for round in (1, 2):
        updates = updates_of(method, members, model, state, round)
        after = [method.aggregate(state, small.shuffled(updates, seed), round, model) for seed in range(4)]
        assert all(small.same(after[0].arrays, other.arrays) for other in after[1:])
        assert all(after[0].facts == other.facts for other in after[1:])
        state = after[0]


def test_aggregating_leaves_its_arguments_as_they_were(method, model):
    members = small.clients(model, method)
    state = small.first_state(method, members)
    before = {name: array.clone() for name, array in state.arrays.items()}
    facts = storage.encode_state(State({}, state.facts), {})
    updates = updates_of(method, members, model, state)
    copies = [{name: array.clone() for name, array in update.arrays.items()} for update in updates]
    method.aggregate(state, updates, 1, model)
    assert small.same(before, state.arrays)
    assert storage.encode_state(State({}, state.facts), {}) == facts
    assert all(small.same(update.arrays, copy) for update, copy in zip(updates, copies, strict=True))


def test_every_state_can_be_written_read_and_gone_on_from(method, model):
    whole, stopped = small.clients(model, method), small.clients(model, method)
    ours = theirs = small.first_state(method, whole)
    for round in (1, 2, 3):
        ours = method.aggregate(ours, updates_of(method, whole, model, ours, round), round, model)
        again = small.method(method.name)  # another object, as after a restart
        theirs = again.aggregate(theirs, updates_of(again, stopped, model, theirs, round), round, model)
        theirs, _ = storage.decode_state(storage.encode_state(theirs, {}))
    assert ours.facts == theirs.facts
    assert small.same(ours.arrays, theirs.arrays)
    assert small.same(outcome(method, whole, ours), outcome(method, stopped, theirs))


def test_a_first_state_can_be_written_before_any_update_came(method, model):
    state = small.first_state(method, small.clients(model, method))
    read, _ = storage.decode_state(storage.encode_state(state, {}))
    assert small.same(read.arrays, state.arrays)
    assert read.facts == state.facts


def test_the_layout_is_that_of_every_update(method, model):
    members = small.clients(model, method)
    state = small.first_state(method, members)
    for round in (1, 2):
        updates = updates_of(method, members, model, state, round)
        for update in updates:
            kinds = {name: ArraySpec(tuple(array.shape), array.dtype) for name, array in update.arrays.items()}
            assert kinds == small.wire(method.update_spec(state))
            assert {kind.dtype for kind in kinds.values()} <= {torch.float32, TOKEN_DTYPE}
        state = method.aggregate(state, updates, round, model)


def test_what_leaves_is_exactly_what_was_released(method, model):
    mechanism = Marking()
    members = small.clients(model, method, mechanism=mechanism)
    state, fingerprint = small.first_state(method, members), model.backbone.fingerprint
    orders = orders_of(method, members, state)
    bodies = {name: codec.encode_assignment(order, fingerprint) for name, order in orders.items()}
    replies = list(small.engine(method, members, model).exchange(bodies))
    assert sorted(mechanism.released) == sorted(reply.client for reply in replies) == sorted(members)
    for reply in replies:
        layout = small.wire(method.update_spec(state))
        marks = {name: torch.full(kind.shape, MARK).to(kind.dtype) for name, kind in layout.items()}
        assert reply.body == codec.encode_update(ClientUpdate(reply.client, marks, MARKED_WEIGHT), 1, fingerprint)


def test_a_client_without_record_counts_to_tell_weighs_one(method, model):
    class Private(NoPrivacy):
        unit = "record"

    members = small.clients(model, method, mechanism=Private())
    updates = updates_of(method, members, model, small.first_state(method, members))
    assert {update.weight for update in updates} == {1.0}


def test_nothing_is_kept_of_an_order_that_was_not_carried_out(method, model):
    class Broken(NoPrivacy):
        def privatize_update(self, update, noise):
            raise RuntimeError("no way out")

    members = small.clients(model, method, mechanism=Broken())
    orders = orders_of(method, members, small.first_state(method, members))
    for name, client in members.items():
        with pytest.raises(RuntimeError, match="no way out"):
            run_queries(model, execute_assignment(method, client, orders[name]))
        assert client.client_state == {}


def test_a_site_takes_the_servers_own_orders_and_no_others(method, model):
    if method.name in UNSENT:
        pytest.skip("no site takes its orders")
    members = small.clients(model, method)
    state, _ = small.rounds(method, members, model)
    start, good = members["site-0"].start, method.make_assignment(state, members["site-0"].card, 3)
    arrays, facts, learned = good.arrays, good.facts, (CENTRE, ROWS, BIAS, SHARES, SCORING, SCORING_BIAS)
    bad = [{"method": "another"}, {"round": 7}, {"round": True}, {"facts": {**facts, "rates": 0.1}}]
    bad += [{"facts": {**facts, name: value}} for name in facts for value in (float("nan"), float("inf"), -0.1, "x")]
    bad += [{"facts": {n: value for n, value in facts.items() if n != name}} for name in facts]
    bad += [{"arrays": {**arrays, "more": start.vectors_PD}}]
    bad += [{"arrays": {n: array for n, array in arrays.items() if n != name}} for name in arrays]
    for name, array in arrays.items():
        others = (array.double(), array[..., 1:], torch.zeros(()), array[None])
        bad += [{"arrays": {**arrays, name: other}} for other in others]
        if array.is_floating_point() and name not in learned:
            bad += [{"arrays": {**arrays, name: torch.full_like(array, 1e30)}}]
    small.refuses_all(method, start, good, *(replace(good, **change) for change in bad))


def test_local_lets_nothing_out_but_that_it_is_done(model):
    method = small.method("local")
    members = small.clients(model, method)
    state, fingerprint = small.first_state(method, members), model.backbone.fingerprint
    for round in (1, 2):
        orders = orders_of(method, members, state, round)
        bodies = {name: codec.encode_assignment(order, fingerprint) for name, order in orders.items()}
        replies = list(small.engine(method, members, model).exchange(bodies))
        expected = [codec.ExpectedUpdate(reply.client, round, fingerprint, {}) for reply in replies]
        updates = [codec.decode_update(reply.body, one) for reply, one in zip(replies, expected, strict=True)]
        assert [update.arrays for update in updates] == [{}] * len(members)
        state = method.aggregate(state, updates, round, model)
    assert method.library_prompts(state) == {}
    assert all("prompt" in client.client_state for client in members.values())


def test_local_sends_the_same_whatever_the_records(model):
    """ "Nothing that depends on a record ever leaves": not their number either."""
    method = small.method("local")
    sent = []
    for count in (6, 9):
        members = small.clients(model, method, 1)
        members["site-0"].train = small.records(count, seed=count)
        (update,) = updates_of(method, members, model, small.first_state(method, members))
        sent.append(codec.encode_update(update, 1, model.backbone.fingerprint))
    assert sent[0] == sent[1]


def test_a_seed_fixes_all_and_another_seed_does_not(method, model):
    left = []
    for seed in (1, 1, 2):
        members = small.clients(model, method, seed=seed)
        state, _ = small.rounds(method, members, model, RoundSchedule(2, len(members), seed))
        left.append(outcome(method, members, state))
    assert small.same(left[0], left[1])
    if method.capabilities.trains and method.capabilities.rounds != 1:
        assert not small.same(left[0], left[2])


def test_singly_and_in_lock_step_agree(method, model):
    single, together = small.clients(model, method), small.clients(model, method)
    state = small.first_state(method, single)
    for round in (1, 2):
        orders = orders_of(method, single, state, round)
        works = {name: execute_assignment(method, client, orders[name]) for name, client in single.items()}
        ours = {name: run_queries(model, work) for name, work in works.items()}
        works = {name: execute_assignment(method, client, orders[name]) for name, client in together.items()}
        theirs = dict(run_queries_lockstep(QueryEngine(model.backbone), works))
        assert ours.keys() == theirs.keys()
        for name, update in ours.items():
            assert update.weight == theirs[name].weight
            assert update.arrays.keys() == theirs[name].arrays.keys()
            assert all(small.close(array, theirs[name].arrays[key]) for key, array in update.arrays.items())
            kept = together[name].client_state
            own = {key: array.float() for key, array in single[name].client_state.items()}
            assert all(small.close(array, kept[key].float()) for key, array in own.items())
        state = method.aggregate(state, list(ours.values()), round, model)


def test_a_client_that_was_not_asked_keeps_nothing_new(method, model):
    members = small.clients(model, method)
    asked = sorted(members)[:1]
    orders = orders_of(method, members, small.first_state(method, members))
    for name in asked:
        run_queries(model, execute_assignment(method, members[name], orders[name]))
    assert all(client.client_state == {} for name, client in members.items() if name not in asked)
