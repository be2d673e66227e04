"""`execute_assignment`: an update was released and paid for, once; an unpaid one is not computed."""

from collections.abc import Mapping

import pytest
import torch

import small
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.errors import BudgetError, LedgerError, PolicyError, PrivacyError
from ficpd.federation.client import Client, ClientSession
from ficpd.federation.execution import execute_assignment
from ficpd.federation.method import Capabilities
from ficpd.interfaces import ReleaseKind
from ficpd.privacy import client_gaussian, record_gaussian
from ficpd.privacy.clipping import MARGIN
from ficpd.privacy.ledger import Account, Budget, Ledger
from ficpd.privacy.none import NoPrivacy
from ficpd.types import Answer, Assignment, ClientUpdate, ClientWorkload, PrivacyCost, Query

DELTA = 1e-5
RECORDS = 9  # of site-2
PLAN = ClientWorkload(RECORDS, 4 / RECORDS, steps=2, participations=3, num_clients=5, cohort_rate=1.0, num_rounds=3)
STEPS = PrivacyCost("prompt", 4 / RECORDS, 2.0, 2)


def record_level(plan: ClientWorkload = PLAN, **config):
    return record_gaussian.build(record_gaussian.Config(noise_multiplier=2.0, clip_norm=0.5, **config), plan)


def client_level(**config):
    return client_gaussian.build(client_gaussian.Config(noise_multiplier=2.0, clip_norm=0.5, **config), PLAN)


@pytest.fixture
def member(model):
    """A client of nine records with a mechanism, and a ledger of its own."""

    def made(mechanism=None, epsilon: float | None = None) -> Client:
        client = small.clients(model, small.method("fedavg"), 3, mechanism=mechanism or record_level())["site-2"]
        if client.account is not None:
            client.account = Ledger(":memory:", "a run").account("site-2", Budget(epsilon, DELTA))
        return client

    return made


class Counting:
    """The model, and how often it was asked."""

    def __init__(self, model: QueryEngine):
        self.model, self.asked = model, 0

    def answer(self, queries):
        self.asked += 1
        return self.model.answer(queries)


class Written:
    """A method made of one function of the visit, after which it sends what the function returned."""

    name = "written"
    capabilities = Capabilities(private_units=("record", "client"), statistics_once=("weight", "sizes"))

    def __init__(self, work):
        self.work = work

    def local_update(self, client, order: Assignment):
        yield from ()
        arrays = self.work(client)
        client.client_state["trace"] = torch.ones(1)
        return ClientUpdate(client.id, arrays if arrays is not None else {"delta": torch.zeros(2)}, client.weight)


def order_of(client: Client, round: int = 1, method: str = "fedavg") -> Assignment:
    return Assignment(method, round, {"prompt": client.start.vectors_PD}, {"rate": 0.1})


def carried_out(client: Client, model, round: int = 1, method=None) -> ClientUpdate:
    method = method or small.method("fedavg")
    return run_queries(model, execute_assignment(method, client, order_of(client, round, method.name)))


def same(left: ClientUpdate, right: ClientUpdate) -> bool:
    return (left.client, left.weight) == (right.client, right.weight) and small.same(left.arrays, right.arrays)


def averages(values: torch.Tensor, times: int = 1):
    """A method's work: draw one batch of four, and average so many of these rows."""

    def work(client):
        next(iter(client.batches(1, 4)))
        for _ in range(times):
            client.private_mean(values)

    return Written(work)


@pytest.mark.parametrize("mechanism", [record_level, client_level])
def test_the_price_and_the_answer_are_committed_before_the_update_leaves(member, model, mechanism, monkeypatch):
    client = member(mechanism())
    client.client_state = {"old": torch.zeros(1)}
    written = []
    settle = Account.commit

    def watched(account, round, method, spends, body):
        assert client.client_state.keys() == {"old"}
        settle(account, round, method, spends, body)
        written.append((account.spent(), account.stored_update(round, method)))

    monkeypatch.setattr(Account, "commit", watched)
    carried_out(client, model)
    price = [STEPS] if mechanism is record_level else [PrivacyCost("update", 1.0, 2.0)]
    assert written == [(price, client.account.stored_update(1, "fedavg"))]
    assert written[0][1]


@pytest.mark.parametrize("error", [OSError("disk full"), BudgetError("spent"), KeyboardInterrupt()])
def test_without_the_commit_nothing_leaves_and_nothing_is_kept(member, model, error, monkeypatch):
    client = member()
    client.client_state = {"old": torch.zeros(1)}

    def refuse(*_):
        raise error

    monkeypatch.setattr(client.account, "commit", refuse)
    with pytest.raises(type(error)):
        carried_out(client, model, method=averages(torch.ones(1, 0, 2), 0))
    assert client.client_state.keys() == {"old"}
    assert client.account.spent() == []


@pytest.mark.parametrize("mechanism", [record_level, client_level])
def test_what_a_round_costs_is_what_its_releases_cost(member, model, mechanism):
    client = member(mechanism())
    for round in (1, 2, 3):
        carried_out(client, model, round)
    assert client.account.spent() == list(mechanism().planned_costs())


def test_an_order_that_fails_on_the_way_is_paid_and_not_tried_again(member, model):
    """Whether it fails may depend on which records were drawn; tried again and again for nothing, it would tell."""

    def work(client):
        list(client.batches(2, 4))
        raise RuntimeError("out of memory")

    client = member()
    with pytest.raises(RuntimeError):
        carried_out(client, model, method=Written(work))
    assert [(spend.name, spend.count) for spend in client.account.spent()] == [("prompt", 2)]
    assert client.client_state == {}
    with pytest.raises(PolicyError, match="is not tried again"):
        carried_out(client, model, method=Written(work))
    assert [(spend.name, spend.count) for spend in client.account.spent()] == [("prompt", 2)]


class Failing:
    """A model that answers so many questions and then fails, as one does that has no memory for a long record."""

    def __init__(self, model: QueryEngine, answers: int):
        self.model, self.answers = model, answers

    def answer(self, queries):
        self.answers -= 1
        if self.answers < 0:
            raise RuntimeError("out of memory")
        return self.model.answer(queries)


@pytest.mark.parametrize("answers", [0, 1])
def test_an_order_that_fails_in_the_model_is_paid_and_not_tried_again(member, model, answers):
    client = member()
    with pytest.raises(RuntimeError):
        carried_out(client, Failing(model, answers))
    assert [(spend.name, spend.count) for spend in client.account.spent()] == [("prompt", 2)]
    with pytest.raises(PolicyError, match="is not tried again"):
        carried_out(client, model)
    assert [(spend.name, spend.count) for spend in client.account.spent()] == [("prompt", 2)]


def test_a_total_that_was_paid_for_is_kept_also_if_the_order_fails(member, model):
    client = member(record_level(statistics={"weight": 0.1}))

    class Weighs(Written):
        def local_update(self, session, order):
            session.client_state["other"] = torch.ones(1)
            assert session.weight > 0
            raise RuntimeError("out of memory")
            yield

    with pytest.raises(RuntimeError):
        carried_out(client, model, method=Weighs(None))
    assert client.client_state.keys() == {"statistic/weight"}
    carried_out(client, model, 2)
    assert {spend.name: spend.count for spend in client.account.spent()} == {"weight": 1, "prompt": 2}
    client.client_state = {}
    with pytest.raises(PolicyError):
        carried_out(client, model, 1, method=Weighs(None))


def test_records_that_cannot_be_encoded_are_paid_for(member, model, monkeypatch):
    client = member()
    client.encodings.clear()

    def encode(*_):
        raise RuntimeError("too long")

    monkeypatch.setattr(type(client.task), "encode", encode)
    with pytest.raises(RuntimeError):
        carried_out(client, model)
    assert [(spend.name, spend.count) for spend in client.account.spent()] == [("prompt", 2)]


@pytest.mark.parametrize(("mechanism", "held"), [(record_level, True), (NoPrivacy, False)])
def test_nobody_is_asked_about_prompts_where_records_depend_on_one_another(member, model, mechanism, held):
    """Also if the order is a good one, and its rate takes the next step far away."""
    client, lengths = member(mechanism()), []

    class Watched(Counting):
        def answer(self, queries):
            lengths.extend(float(query.prompts_KPD.norm(dim=-1).max()) for query in queries)
            return super().answer(queries)

    prompt = client.start.vectors_PD
    far = Assignment("fedavg", 1, {"prompt": prompt}, {"rate": 1e6})
    run_queries(Watched(model), execute_assignment(small.method("fedavg"), client, far))
    assert len(lengths) == 2
    assert (max(lengths) <= client.start.max_norm * (1 + 1e-6)) == held
    assert lengths[0] == pytest.approx(float(prompt.norm(dim=-1).max()))


def test_what_is_owed_is_paid_with_the_first_order_alone(member, model):
    client, whole = member(client_level(placement="central")), client_level(placement="central").planned_costs()
    client.pending_costs = whole
    carried_out(client, model)
    assert client.account.spent() == list(whole)
    carried_out(client, model, 2)
    assert client.account.spent() == list(whole)


KINDS: Mapping[str, object] = {
    "record, simulated": lambda: record_level(),
    "record, cryptographic": lambda: record_level(noise="cryptographic"),
    "client, cryptographic": lambda: client_level(noise="cryptographic"),
    "record with a total": lambda: record_level(noise="cryptographic", statistics={"weight": 0.1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_carried_out_before_is_answered_as_it_was_and_costs_nothing(member, model, kind):
    client, counting = member(KINDS[kind]()), Counting(model)
    first = carried_out(client, counting)
    asked, spent, kept = counting.asked, client.account.spent(), dict(client.client_state)
    assert asked == 2
    for _ in range(2):
        client.client_state = {}  # as after a kill between the commit and the answer
        assert same(carried_out(client, counting), first)
        assert small.same(client.client_state, kept)
    assert (counting.asked, client.account.spent()) == (asked, spent)
    later = carried_out(client, counting, 2)
    assert not torch.equal(later.arrays["delta"], first.arrays["delta"])
    assert counting.asked == 2 * asked


def test_an_order_carried_out_before_is_answered_when_the_budget_is_spent(member, model):
    client = member()
    first = carried_out(client, model)
    client.account.budget = Budget(1e-6, DELTA)
    assert same(carried_out(client, model), first)
    with pytest.raises(BudgetError):
        carried_out(client, model, 2)


def test_another_order_in_the_same_round_changes_no_answer(member, model):
    """Whatever the server sends the second time, the round is answered as it was."""
    client = member()
    first = carried_out(client, model)
    other = Assignment("fedavg", 1, {"prompt": client.start.vectors_PD + 1}, {"rate": 5.0})
    assert same(run_queries(model, execute_assignment(small.method("fedavg"), client, other)), first)


def test_what_the_client_kept_then_it_keeps_again(member, model):
    client = member()
    carried_out(client, model, method=averages(torch.ones(1, 0, 2), 0))
    client.client_state = {"other": torch.zeros(3)}
    carried_out(client, model, method=averages(torch.ones(1, 0, 2), 0))
    assert small.same(client.client_state, {"trace": torch.ones(1)})


def test_a_stored_update_that_cannot_be_read_is_an_error_not_a_second_release(member, model):
    client, counting = member(), Counting(model)
    client.account.commit(1, "fedavg", [STEPS], b"torn")
    with pytest.raises(LedgerError, match="stored update of site-2"):
        carried_out(client, counting)
    assert counting.asked == 0


def test_a_budget_that_does_not_pay_for_the_steps_refuses_before_a_query_is_asked(member, model):
    client, counting = member(epsilon=0.01), Counting(model)
    with pytest.raises(BudgetError, match=r"site-2 has spent epsilon = 0 of 0.01"):
        carried_out(client, counting)
    assert counting.asked == 0
    assert client.account.spent() == []
    assert client.account.stored_update(1, "fedavg") is None


def test_one_order_counts_all_that_it_has_spent_so_far(member):
    """Each draw alone would be within the budget, both together are not."""
    client = member()
    client.account.commit(1, "fedavg", [STEPS], b"")
    client.account = Ledger(":memory:", "a run").account("site-2", Budget(1.01 * client.account.epsilon(), DELTA))
    session = ClientSession(client, 2)
    list(session.batches(2, 4))
    with pytest.raises(BudgetError):
        next(session.batches(2, 4))
    assert session.costs == [STEPS]


@pytest.mark.parametrize(
    ("drawn", "work", "words"),
    [
        (False, lambda client, rows: client.private_mean(torch.ones(1, 4, 2)), "no batch is open"),
        (True, lambda client, rows: [client.private_mean(rows), client.private_mean(rows)], "no batch is open"),
        (True, lambda client, rows: client.private_mean(rows[:, :-1]), "other records than the last batch has"),
        (
            True,
            lambda client, rows: client.private_mean(torch.cat([rows, rows[:, :1]], 1)),
            "other records than the last batch has",
        ),
    ],
    ids=["without a batch", "twice", "too few", "too many"],
)
def test_a_batch_is_averaged_once_and_whole(member, drawn, work, words):
    session = ClientSession(member(record_level(noise="simulated")), 3)
    rows = torch.ones(1, 1, 2)
    if drawn:
        batch = next(batch for batch in session.batches(20, 4) if len(batch))
        rows = torch.ones(1, len(batch), 2)
    with pytest.raises(PrivacyError, match=words):
        work(session, rows)


def test_a_mean_of_an_earlier_batch_is_refused(member):
    """Only the last batch that was drawn may be averaged, and drawing another forgoes it."""
    session = ClientSession(member(), 1)
    lengths = [len(batch) for batch in session.batches(20, 4)]
    other = next(length for length in lengths if length != lengths[-1])
    with pytest.raises(PrivacyError):
        session.private_mean(torch.ones(1, other, 2))
    assert session.private_mean(torch.ones(1, lengths[-1], 2)).shape == (1, 2)


def test_a_method_that_breaks_the_rule_sends_nothing(member, model):
    client = member(NoPrivacy())
    for times in (0, 1):
        assert carried_out(client, model, method=averages(torch.ones(1, 4, 2), times)).arrays
    client.client_state = {}
    with pytest.raises(PrivacyError):
        carried_out(client, model, method=averages(torch.ones(1, 4, 2), 2))
    assert client.client_state == {}


def test_an_empty_sample_is_an_ordinary_one(member):
    client = member(record_level(ClientWorkload(RECORDS, 1e-9, 3, 3, 5, 1.0, 3)))
    client.mechanism.sample = lambda *_: [torch.zeros(0, dtype=torch.long)] * 3
    session = ClientSession(client, 1)
    means = [session.private_mean(torch.ones(2, len(batch), 3)) for batch in session.batches(3, 4)]
    assert [mean.shape for mean in means] == [(2, 3)] * 3
    assert all(bool(mean.all()) for mean in means)  # nothing but noise


def test_a_larger_batch_than_was_planned_is_refused(member):
    session = ClientSession(member(), 1)
    with pytest.raises(PrivacyError, match="a batch of 5 of 9 records"):
        next(session.batches(1, 5))


@pytest.mark.parametrize("mechanism", [record_level, client_level])
def test_a_client_with_a_guarantee_and_no_book_is_refused(member, mechanism):
    client = member(NoPrivacy())
    assert client.account is None
    settings = {name: value for name, value in vars(client).items() if not name.startswith("_")}
    with pytest.raises(PrivacyError, match=r"site-2 has a .*-level mechanism and no ledger"):
        Client(**settings | {"mechanism": mechanism()})


def test_the_weight_is_the_record_count_only_where_no_privacy_is_asked(member, model):
    assert carried_out(member(NoPrivacy()), model).weight == RECORDS
    assert carried_out(member(record_level()), model).weight == 1.0
    assert carried_out(member(client_level()), model).weight == 1.0


@pytest.mark.parametrize("stated", [9.0, 4.0])
def test_a_weight_that_the_method_made_up_does_not_leave(member, model, stated):
    """It may count what came, such as the records of a batch: what leaves is 1, or the noised total."""

    class Counts(Written):
        def local_update(self, client, order):
            update = yield from super().local_update(client, order)
            return ClientUpdate(update.client, update.arrays, stated)

    for mechanism in (record_level(), client_level()):
        assert carried_out(member(mechanism), model, method=Counts(lambda client: None)).weight == 1.0


@pytest.mark.parametrize("name", ["weight", "statistic/weight"])
def test_a_method_cannot_state_a_statistic_by_its_state(member, model, name):
    def writes(session):
        session.client_state[name] = torch.tensor(12345.0)
        session.local_context().client_state[name] = torch.tensor(12345.0)

    client = member(record_level(statistics={"weight": 0.1}))
    for round in (1, 2):
        assert carried_out(client, model, round, Written(writes)).weight != 12345.0
    assert {spend.name: spend.count for spend in client.account.spent()} == {"weight": 1}


def test_a_noised_weight_is_released_once_and_kept(member, model):
    mechanism = record_level(noise="cryptographic", statistics={"weight": 0.1})
    client = member(mechanism)
    weights = [carried_out(client, model, round).weight for round in (1, 2, 3)]
    assert len(set(weights)) == 1
    assert weights[0] >= 1.0
    assert weights[0] != RECORDS
    lines = [line for line in client.account.spent() if line.name == "weight"]
    assert lines == [mechanism.cost(ReleaseKind.STATISTIC, "weight")]
    assert client.account.spent() == sorted(mechanism.planned_costs())
    other = member(mechanism)
    carried_out(other, model)
    assert other.client_state["statistic/weight"] != client.client_state["statistic/weight"]


def test_the_noise_of_a_total_has_the_deviation_that_is_paid_for(member):
    mechanism = record_level(statistics={"weight": 0.1})
    session = ClientSession(member(mechanism), 1)
    seen = []
    session.noise.add_gaussian = lambda values, deviation: seen.append(deviation) or values
    assert session.weight == pytest.approx(MARGIN * RECORDS, rel=1e-5)
    price = mechanism.cost(ReleaseKind.STATISTIC, "weight")
    assert seen == [session.costs[0].noise_multiplier] == [price.noise_multiplier]
    assert session.costs[0].sampling_rate == 1.0


def test_each_record_counts_at_most_one_in_a_total(member):
    session = ClientSession(member(record_level(statistics={"sizes": 0.1})), 1, declared=("sizes",))
    session.noise.add_gaussian = lambda values, deviation: values
    rows = torch.zeros(RECORDS, 2)
    rows[0, 0], rows[1, 1] = 1e6, float("nan")
    assert torch.allclose(session.private_sum("sizes", rows).double(), torch.tensor([MARGIN, 0.0]).double(), atol=1e-5)


@pytest.mark.parametrize("count", [0, 8, 10])
def test_a_total_of_another_number_of_rows_is_refused_and_free(member, count):
    session = ClientSession(member(record_level(statistics={"weight": 0.1})), 1)
    with pytest.raises(PrivacyError, match=f"was given {count} rows"):
        session.private_sum("weight", torch.ones(count, 1))
    assert session.costs == []


@pytest.mark.parametrize("mechanism", [record_level, client_level])
@pytest.mark.parametrize("name", ["sizes", "step", "release", "sum", "prompt"])
def test_a_total_without_a_share_of_the_budget_is_refused(member, name, mechanism):
    """Also one with the name of another kind of release: a full sum at a step's price would cost far more than it states."""
    session = ClientSession(member(mechanism()), 1, declared=(name,))
    with pytest.raises(PrivacyError, match=name):
        session.private_sum(name, torch.ones(RECORDS, 1))


@pytest.mark.parametrize("name", ["step", "release", "sum"])
def test_a_total_that_is_named_like_a_kind_of_release_is_a_statistic(name):
    """ "sum" would make the run a central one, whose clients pay nothing; "step" would be underpaid."""
    mechanism = record_level(statistics={name: 0.1})
    assert mechanism.cost(ReleaseKind.UPDATE) is mechanism.cost(ReleaseKind.SUM) is None
    assert mechanism.cost(ReleaseKind.STEP)[0] == "prompt"
    assert mechanism.cost(ReleaseKind.STATISTIC, name)[:2] == (name, 1.0)


def test_a_client_that_is_never_asked_has_a_mechanism_too():
    """Small cohorts and few rounds leave some out."""
    never = ClientWorkload(RECORDS, 4 / RECORDS, 2, 0, 5, 0.2, 1)
    for config in ({}, {"statistics": {"weight": 0.1}}):
        assert record_level(never, **config).cost(ReleaseKind.STEP) is not None


def test_what_a_method_returns_is_noised_at_client_level(member, model):
    secret = torch.full((40,), 7.0)
    sent = carried_out(member(client_level(noise="cryptographic")), model, method=Written(lambda c: {"delta": secret}))
    assert not torch.isclose(sent.arrays["delta"], secret).any()
    clean = member(client_level(placement="central"))
    left = carried_out(clean, model, method=Written(lambda c: {"a": secret, "b": secret})).arrays
    assert float(torch.cat(list(left.values())).double().norm()) <= 0.5


def test_queries_never_see_a_batch_that_was_not_paid_for(member, model):
    """The first query of an order comes after its charge."""
    client = member()
    work = execute_assignment(small.method("fedavg"), client, order_of(client))
    charged = []
    client.account.check_budget = lambda spends: charged.append(list(spends))
    query = next(work)
    assert isinstance(query, Query)
    assert charged == [[STEPS]]
    assert isinstance(model.answer([query])[0], Answer)
    work.close()
    assert client.account.spent() == []


def test_two_methods_of_one_round_do_not_share_their_noise(model):
    client = small.clients(model, small.method("fedavg"), 1)["site-0"]
    zeros = torch.zeros(6)
    sources = (client.noise_source(name, 1) for name in ("fedavg", "fedavg", "ficpd"))
    first, again, other = (source.add_gaussian(zeros, 1.0) for source in sources)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
