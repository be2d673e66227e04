"""The round loop: bad updates are dropped, counted and named, and the run goes on."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

import small
from ficpd.federation import codec, simulation
from ficpd.federation.rounds import RoundSchedule, run_rounds, sample_cohort
from ficpd.types import ArraySpec, ClientUpdate, Reply

NAMES = [f"site-{i}" for i in range(5)]


class Tampering:
    """An engine whose replies are changed on their way: by client, what becomes of its reply (or of none)."""

    def __init__(self, engine, changes: Mapping[str, Callable[[Reply], list[Reply]]]):
        self.engine, self.changes = engine, changes
        self.sent: list[dict[str, bytes]] = []
        self.came: list[list[Reply]] = []

    def clients(self):
        return self.engine.clients()

    def exchange(self, orders: Mapping[str, bytes]) -> Iterator[Reply]:
        self.sent.append(dict(orders))
        self.came.append([])
        for reply in self.engine.exchange(orders):
            for changed in self.changes.get(reply.client, lambda reply: [reply])(reply):
                self.came[-1].append(changed)
                yield changed


def rewritten(change: Callable[[ClientUpdate], ClientUpdate], round: int | None = None):
    """Decode a reply's update, change it, encode it again."""

    def apply(reply: Reply) -> list[Reply]:
        number = int.from_bytes(reply.body[3:7], "little")  # after the magic and the version
        expected = codec.ExpectedUpdate(reply.client, number, "tiny:16x2", {"delta": ArraySpec((3, 16))})
        update = change(codec.decode_update(reply.body, expected))
        return [Reply(reply.client, codec.encode_update(update, round or number, "tiny:16x2"))]

    return apply


def filled(value: float):
    return rewritten(lambda u: ClientUpdate(u.client, {n: torch.full_like(a, value) for n, a in u.arrays.items()}))


BAD = {
    "not finite": (filled(float("nan")), "not finite"),
    "infinite": (filled(float("inf")), "not finite"),
    "too long": (filled(1e7), "norm"),
    "another name": (rewritten(lambda u: ClientUpdate("site-0", u.arrays, u.weight)), "client"),
    "another round": (rewritten(lambda u: u, 99), "round"),
    "another shape": (rewritten(lambda u: ClientUpdate(u.client, {"delta": torch.ones(2, 2)})), "expected"),
    "nothing in it": (rewritten(lambda u: ClientUpdate(u.client, {})), "for client 'site-3' and delta"),
    "truncated": (lambda reply: [Reply(reply.client, reply.body[:-7])], "bytes, expected"),
    "empty": (lambda reply: [Reply(reply.client, b"")], "bytes, expected"),
    "an error": (lambda reply: [Reply(reply.client, None, "OSError: disk full")], "OSError: disk full"),
    "no body": (lambda reply: [Reply(reply.client, None)], "no update"),
    "no reply": (lambda reply: [], "no reply"),
}


def run(model, changes, schedule: RoundSchedule | None = None, name: str = "fedavg"):
    method = small.method(name)
    members = small.clients(model, method)
    engine = Tampering(small.engine(method, members, model), changes)
    schedule = schedule or RoundSchedule(2, 5, 0)
    state = small.first_state(method, members, schedule.num_rounds)
    compression = next(iter(members.values())).compression
    return method, state, engine, list(run_rounds(method, engine, model, state, schedule, compression))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_dropped_counted_and_named(model, kind):
    change, words = BAD[kind]
    method, first, engine, done = run(model, {"site-3": change})
    state = first
    for number, (after, report) in enumerate(done, 1):
        assert (report.round, report.clients, report.updates) == (number, 5, 4)
        assert list(report.dropped) == ["site-3"]
        assert words in report.dropped["site-3"]
        layout = small.wire(method.update_spec(state))
        good = [
            codec.decode_update(r.body, codec.ExpectedUpdate(r.client, number, model.backbone.fingerprint, layout))
            for r in engine.came[number - 1]
            if r.client != "site-3"
        ]
        state = method.aggregate(state, good, number, model)
        assert small.same(after.arrays, state.arrays)
    assert len(done) == 2
    assert torch.isfinite(method.global_prompt(done[-1][0])).all()


@pytest.mark.parametrize("name", ["fedavg", "ficpd", "centralized"])
@pytest.mark.parametrize("kind", ["not finite", "no reply"])
def test_a_round_without_a_good_update_leaves_the_state_as_it_was(model, kind, name):
    bad = dict.fromkeys([*NAMES, "everyone"], BAD[kind][0])
    _, first, _, done = run(model, bad, name=name)
    assert [(report.updates, len(report.dropped)) for _, report in done] == [(0, report.clients) for _, report in done]
    assert all(small.same(after.arrays, first.arrays) and after.facts == first.facts for after, _ in done)


def test_bytes_are_the_lengths_of_what_travelled_dropped_updates_too(model):
    spoiled = {"site-1": BAD["truncated"][0], "site-2": BAD["no reply"][0]}
    _, _, engine, done = run(model, spoiled, RoundSchedule(3, 4, 1))
    for number, (_, report) in enumerate(done):
        assert report.bytes_down == sum(map(len, engine.sent[number].values())) > 0
        assert report.bytes_up == sum(len(reply.body) for reply in engine.came[number]) > 0
        assert report.seconds_train >= 0 <= report.seconds_aggregate


def test_the_bound_on_norms_is_the_schedules(model):
    _, first, _, done = run(model, {}, RoundSchedule(2, 5, 0, max_norm=1e-9))
    assert all(report.updates == 0 and "norm" in report.dropped["site-0"] for _, report in done)
    assert small.same(done[-1][0].arrays, first.arrays)


def test_a_client_that_answers_twice_counts_once(model):
    """The first answer counts; a second is dropped and named, or the client has twice its weight."""
    _, _, _, calm = run(model, {})
    _, _, _, done = run(model, {"site-3": lambda reply: [reply, reply]})
    assert [report.updates for _, report in done] == [5, 5]
    assert small.same(done[-1][0].arrays, calm[-1][0].arrays)


def test_an_update_of_a_client_that_was_not_asked_is_dropped(model):
    def stranger(reply: Reply) -> list[Reply]:
        (other,) = rewritten(lambda u: ClientUpdate("site-99", u.arrays, 1e6))(reply)
        return [reply, Reply("site-99", other.body)]

    _, _, _, calm = run(model, {})
    _, _, _, done = run(model, {"site-3": stranger})
    assert all((report.updates, list(report.dropped)) == (5, ["site-99"]) for _, report in done)
    assert small.same(done[-1][0].arrays, calm[-1][0].arrays)


def test_rounds_go_on_where_they_stopped(model):
    method = small.method("fedavg")
    members = small.clients(model, method)
    engine, schedule = small.engine(method, members, model), RoundSchedule(4, 3, 0)
    compression = next(iter(members.values())).compression
    whole = list(run_rounds(method, engine, model, small.first_state(method, members, 4), schedule, compression))
    rest = list(run_rounds(method, engine, model, whole[1][0], schedule, compression, 3))
    assert [report.round for _, report in rest] == [3, 4]
    assert small.same(rest[-1][0].arrays, whole[-1][0].arrays)
    assert list(run_rounds(method, engine, model, whole[-1][0], schedule, compression, 5)) == []


@pytest.mark.parametrize("cohort", [1, 2, 5, 9])
def test_a_cohort_has_its_size_and_nobody_twice(cohort):
    for round in range(1, 6):
        drawn = sample_cohort(RoundSchedule(5, cohort, 0), NAMES, round)
        assert len(drawn) == len(set(drawn)) == min(cohort, 5)
        assert set(drawn) <= set(NAMES)


def test_cohorts_are_fixed_by_seed_and_round_alone():
    def draws(seed: int) -> list[list[str]]:
        return [sample_cohort(RoundSchedule(20, 2, seed), NAMES, round) for round in range(1, 21)]

    assert draws(0) == draws(0) != draws(1)
    assert len({tuple(drawn) for drawn in draws(0)}) > 3
    counts = [sum(name in drawn for drawn in draws(0)) for name in NAMES]
    assert min(counts) >= 3
    assert sample_cohort(RoundSchedule(20, 2, 0), NAMES, 7) == draws(0)[6]


def test_only_the_cohort_is_asked(model):
    schedule = RoundSchedule(3, 2, 5)
    _, _, engine, done = run(model, {}, schedule)
    assert [sorted(orders) for orders in engine.sent] == [sample_cohort(schedule, NAMES, round) for round in (1, 2, 3)]
    assert [report.clients for _, report in done] == [2, 2, 2]


def test_everybody_is_asked_in_the_first_round_if_the_schedule_says_so():
    schedule = RoundSchedule(3, 2, 0, everyone_first=True)
    assert sample_cohort(schedule, NAMES, 1) == NAMES
    assert all(len(sample_cohort(schedule, NAMES, round)) == 2 for round in (2, 3))


def unreliable(model, **options):
    method = small.method("fedavg")
    members = small.clients(model, method)
    engine = simulation.build(simulation.Config(**options), method, members, model)
    return method, members, engine


def test_the_share_that_is_lost_never_arrives(model):
    method, members, engine = unreliable(model, lost=0.5, seed=3)
    schedule = RoundSchedule(6, 5, 0)
    _, reports = small.rounds(method, members, model, schedule, engine)
    gone = sum(len(report.dropped) for report in reports)
    assert 5 < gone < 25
    assert {why for report in reports for why in report.dropped.values()} == {"no reply"}
    assert sum(report.updates for report in reports) == 30 - gone


def test_a_late_update_is_dropped_unless_late_ones_are_accepted(model):
    method, members, engine = unreliable(model, late=0.5, seed=3)
    _, strict = small.rounds(method, members, model, RoundSchedule(4, 5, 0), engine)
    assert any("round" in why for report in strict for why in report.dropped.values())
    method, members, engine = unreliable(model, late=0.5, seed=3)
    _, patient = small.rounds(method, members, model, RoundSchedule(4, 5, 0, accept_late=1), engine)
    assert sum(r.updates for r in patient) > sum(r.updates for r in strict)
    assert not any("round" in why for report in patient for why in report.dropped.values())


class Watched:
    """A method whose aggregate is looked at: the weights that came, by round and client."""

    def __init__(self, method):
        self.method, self.weights = method, {}

    def __getattr__(self, name):
        return getattr(self.method, name)

    def aggregate(self, state, updates, round, model):
        self.weights |= {(round, update.client): update.weight for update in updates}
        return self.method.aggregate(state, updates, round, model)


def test_a_late_update_weighs_less_and_counts_once(model):
    method, members, engine = unreliable(model)
    held: list[Reply] = []

    class Slow(Tampering):
        def exchange(self, orders):
            late, held[:] = list(held), []
            for reply in super().exchange(orders):
                if reply.client == "site-2" and len(self.sent) == 1:
                    held.append(reply)
                else:
                    yield reply
            yield from [*late, *late]

    watched = Watched(method)
    schedule = RoundSchedule(2, 5, 0, accept_late=1)
    state, asked = small.first_state(method, members), []
    orders = iter([NAMES, [n for n in NAMES if n != "site-2"]])
    cohort_for = lambda schedule, names, round: next(orders)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ficpd.federation.rounds.sample_cohort", cohort_for)
        compression = small.whole(small.start(model, small.classes()))
        for _, report in run_rounds(watched, Slow(engine, {}), model, state, schedule, compression):
            asked.append(report)
    assert asked[0].dropped == {"site-2": "no reply"}
    assert (asked[1].updates, asked[1].dropped) == (5, {})
    assert watched.weights[2, "site-2"] == pytest.approx(len(members["site-2"].train) / 2**0.5)
    assert watched.weights[2, "site-1"] == len(members["site-1"].train)
