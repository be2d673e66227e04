"""Noise on the sum at the server: how far one client moves it, what it costs, and that a paid round is paid once."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binom

import small
from ficpd.errors import BudgetError
from ficpd.federation.rounds import RoundSchedule, run_rounds
from ficpd.interfaces import ReleaseKind
from ficpd.privacy import accountant, client_gaussian
from ficpd.privacy.central_gaussian import CentralGaussian
from ficpd.privacy.clipping import MARGIN
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.privacy.noise import SecureNoise, SeededNoise
from ficpd.types import ClientUpdate, ClientWorkload, PrivacyCost

DELTA = 1e-5
CLIP, MULTIPLIER, EXPECTED = 0.5, 2.0, 4.0
LAYOUT = {"b": (2, 3), "a": (2,)}
NAMES = [f"site-{i}" for i in range(8)]


class Silent:
    """A stream that adds nothing, and says what it would have added."""

    kind = "simulated"

    def __init__(self):
        self.deviations: list[float] = []

    def poisson_sample(self, number: int, rate: float) -> torch.Tensor:
        return torch.arange(number)

    def add_gaussian(self, values: torch.Tensor, deviation: float) -> torch.Tensor:
        self.deviations.append(deviation)
        return values


def noised(stream=None, rate: float = 0.5, epsilon: float | None = None, ledger: Ledger | None = None):
    account = (ledger or Ledger(":memory:", "a run")).account("server", Budget(epsilon, DELTA))
    price = PrivacyCost("sum", rate, MULTIPLIER)
    return CentralGaussian(price, CLIP, EXPECTED, stream or (lambda round: SeededNoise("central", round)), account)


def update(name: str, value: float, seed: int = 0) -> ClientUpdate:
    """A direction of its own, so many times as long as 1."""
    random = torch.Generator().manual_seed(seed)
    arrays = {name: torch.randn(shape, generator=random) for name, shape in LAYOUT.items()}
    length = float(torch.cat([array.flatten() for array in arrays.values()]).norm())
    return ClientUpdate(name, {n: value * array / length for n, array in arrays.items()}, weight=100.0)


def flat(mean: ClientUpdate) -> torch.Tensor:
    return torch.cat([mean.arrays[name].flatten() for name in sorted(LAYOUT)]).double()


def unnoised(updates: list[ClientUpdate]) -> torch.Tensor:
    silent = Silent()
    central = noised(lambda round: silent)
    central.sample_cohort(NAMES, 1)
    mean = central.noisy_mean(updates, LAYOUT, 1, "fedavg")
    assert silent.deviations == [MULTIPLIER * CLIP]
    return flat(mean)


OTHERS = [update(f"site-{i}", length, i) for i, length in enumerate([0.1, 0.4, 3.0, 1e6])]
EXTREME = [0.0, 0.3, 1.0, 1e30, float("nan"), float("inf")]


@pytest.mark.parametrize("length", EXTREME)
@pytest.mark.parametrize("others", [[], OTHERS])
def test_one_client_more_moves_the_mean_by_at_most_its_share_of_the_norm(length, others):
    more = unnoised([*others, update("site-7", length, 7)]) - unnoised(others)
    assert float(more.norm()) <= CLIP / EXPECTED
    if length == 1.0:
        assert float(more.norm()) == pytest.approx(CLIP / EXPECTED, rel=1e-4)


def test_the_norm_is_one_over_all_arrays_of_an_update():
    both = unnoised([ClientUpdate("site-0", {"a": torch.full((2,), 9.0), "b": torch.full((2, 3), 9.0)})])
    assert float(both.norm()) == pytest.approx(MARGIN * CLIP / EXPECTED, rel=1e-5)


def test_a_clients_own_weight_counts_for_nothing():
    heavy = ClientUpdate("site-0", OTHERS[0].arrays, weight=1e9)
    assert torch.equal(unnoised([heavy]), unnoised([OTHERS[0]]))


def test_the_divisor_is_the_expected_cohort_whoever_came():
    one = unnoised(OTHERS[:1])
    assert torch.allclose(one, flat(OTHERS[0]) / EXPECTED, rtol=1e-5)
    assert torch.allclose(unnoised(OTHERS[:1] * 7), 7 * one, rtol=1e-5)
    assert not unnoised([]).any()


def test_nobody_came_and_there_is_noise_of_the_same_deviation():
    layout = {"a": (100, 100)}
    central = noised(lambda round: SecureNoise())
    central.sample_cohort(NAMES, 1)
    mean = central.noisy_mean([], layout, 1, "fedavg")
    assert (mean.client, mean.weight, mean.arrays["a"].shape) == ("everybody", 1.0, (100, 100))
    assert float(mean.arrays["a"].std()) == pytest.approx(MULTIPLIER * CLIP / EXPECTED, rel=0.06)


def test_arrays_come_back_under_their_own_names():
    mean = unnoised(OTHERS[:1])
    assert torch.allclose(mean[:2] * EXPECTED, OTHERS[0].arrays["a"].double(), rtol=1e-5)


@pytest.mark.parametrize("stream", [lambda round: SeededNoise("cohort", round), lambda round: SecureNoise()])
def test_each_client_joins_a_round_independently(stream):
    central = noised(stream, rate=0.3)
    drawn = [central.sample_cohort(NAMES, round) for round in range(400)]
    low, high = binom.ppf([1e-9, 1 - 1e-9], 400, 0.3)
    assert all(low <= sum(name in cohort for cohort in drawn) <= high for name in NAMES)
    assert len({len(cohort) for cohort in drawn}) >= 4
    both = sum({"site-0", "site-1"} <= set(cohort) for cohort in drawn)
    assert binom.ppf(1e-9, 400, 0.09) <= both <= binom.ppf(1 - 1e-9, 400, 0.09)


def test_the_cohort_has_the_rate_that_is_paid_for():
    assert noised(rate=1.0).sample_cohort(NAMES, 1) == NAMES
    assert noised(rate=1e-12).sample_cohort(NAMES, 1) == []


def test_a_mean_is_in_the_ledger_before_anybody_sees_it(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite", "a run")
    central = noised(ledger=ledger)
    central.sample_cohort(NAMES, 1)
    assert central.stored_mean(1, "fedavg") is None
    first = central.noisy_mean(OTHERS, LAYOUT, 1, "fedavg")
    again = noised(ledger=Ledger(tmp_path / "ledger.sqlite", "a run"))
    assert again.account.spent() == [PrivacyCost("sum", 0.5, MULTIPLIER)]
    stored = again.stored_mean(1, "fedavg")
    assert (stored.client, stored.weight) == (first.client, first.weight)
    assert small.same(stored.arrays, first.arrays)
    assert again.stored_mean(2, "fedavg") is again.stored_mean(1, "fedprox") is None


def test_a_mean_that_cannot_be_paid_for_is_not_seen(monkeypatch):
    central = noised()
    central.sample_cohort(NAMES, 1)

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(central.account, "commit", refuse)
    with pytest.raises(OSError, match="full"):
        central.noisy_mean(OTHERS, LAYOUT, 1, "fedavg")


def test_a_round_that_the_budget_does_not_allow_draws_no_cohort():
    allowed = 1.001 * accountant.epsilon([PrivacyCost("sum", 0.5, MULTIPLIER)], DELTA)
    central = noised(epsilon=allowed)
    central.sample_cohort(NAMES, 1)
    central.noisy_mean([], LAYOUT, 1, "fedavg")
    with pytest.raises(BudgetError, match="server has spent"):
        central.sample_cohort(NAMES, 2)
    assert central.account.spent() == [central.cost]


class Watching:
    """An engine, and whom it was told to ask."""

    def __init__(self, engine):
        self.engine, self.asked = engine, []

    def clients(self):
        return self.engine.clients()

    def exchange(self, orders):
        self.asked.append(sorted(orders))
        return self.engine.exchange(orders)


def federation(model, rate: float = 0.6, epsilon: float | None = None, ledger: Ledger | None = None, name="fedavg"):
    method, ledger = small.method(name), ledger or Ledger(":memory:", "a run")
    plan = ClientWorkload(9, 0.5, 2, 2, 5, rate, 2)
    config = client_gaussian.Config(placement="central", noise_multiplier=MULTIPLIER, clip_norm=CLIP)
    mechanism = client_gaussian.build(config, plan)
    members = small.clients(model, method, mechanism=mechanism, ledger=ledger)
    account = ledger.account("server", Budget(epsilon, DELTA))
    streams = (lambda round: SeededNoise("server", round), account)
    central = CentralGaussian(mechanism.cost(ReleaseKind.SUM), CLIP, 5 * rate, *streams)
    return method, members, Watching(small.engine(method, members, model)), central


def rounds(model, method, members, engine, central, count: int = 2):
    state = small.first_state(method, members, count)
    schedule, compression = RoundSchedule(count, 5, 0), next(iter(members.values())).compression
    return state, list(run_rounds(method, engine, model, state, schedule, compression, central=central))


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_method_that_sums_runs_and_only_the_server_pays(model, name):
    method, members, engine, central = federation(model, name=name)
    first, done = rounds(model, method, members, engine, central)
    assert central.account.spent() == [PrivacyCost("sum", 0.6, MULTIPLIER, 2)]
    assert all(client.account.spent() == [] for client in members.values())
    for (after, report), asked in zip(done, engine.asked, strict=True):
        assert (report.clients, report.updates, report.dropped) == (len(asked), len(asked), {})
        moved = after.arrays["prompt"] - first.arrays["prompt"]
        assert float(moved.abs().min()) > 0  # noise on every number
        first = after
    assert engine.asked[0] != engine.asked[1]


def test_what_the_state_moved_by_is_the_noised_mean(model):
    method, members, engine, central = federation(model)
    first, ((after, _), *_) = rounds(model, method, members, engine, central, 1)
    mean = central.stored_mean(1, "fedavg").arrays["delta"]
    assert torch.allclose(after.arrays["prompt"], first.arrays["prompt"] + mean, atol=1e-6)


def test_a_round_to_which_nobody_came_is_aggregated_all_the_same(model):
    method, members, engine, central = federation(model, rate=1e-9)
    central.expected_cohort = 1.0
    first, done = rounds(model, method, members, engine, central)
    assert [(report.clients, report.updates) for _, report in done] == [(0, 0), (0, 0)]
    assert not small.close(done[0][0].arrays["prompt"], first.arrays["prompt"])
    assert central.account.spent() == [PrivacyCost("sum", 1e-9, MULTIPLIER, 2)]


def test_a_round_that_was_paid_for_is_used_again_and_nobody_is_asked(model):
    """Killed after the sum was settled and before the checkpoint."""
    ledger = Ledger(":memory:", "a run")
    _, ((once, _),) = rounds(model, *federation(model, ledger=ledger), count=1)
    method, members, engine, central = federation(model, ledger=ledger)
    central.stream = lambda round: SecureNoise()
    _, ((again, report),) = rounds(model, method, members, engine, central, count=1)
    assert (engine.asked, report.clients, report.updates) == ([[]], 0, 0)
    assert small.same(once.arrays, again.arrays)
    assert central.account.spent() == [PrivacyCost("sum", 0.6, MULTIPLIER)]


def test_the_budget_ends_the_run_before_anybody_is_asked(model):
    allowed = 1.001 * accountant.epsilon([PrivacyCost("sum", 0.6, MULTIPLIER)], DELTA)
    method, members, engine, central = federation(model, epsilon=allowed)
    state = small.first_state(method, members)
    compression = next(iter(members.values())).compression
    going = run_rounds(method, engine, model, state, RoundSchedule(2, 5, 0), compression, central=central)
    next(going)
    with pytest.raises(BudgetError):
        next(going)
    assert len(engine.asked) == 1
    assert central.account.spent() == [PrivacyCost("sum", 0.6, MULTIPLIER)]


def test_a_client_that_sends_nothing_good_still_leaves_a_noised_round(model):
    method, members, engine, central = federation(model, rate=1.0)
    for client in members.values():
        client.task = SimpleNamespace(num_labels=2)  # it cannot encode
        client.encodings.clear()
    first, done = rounds(model, method, members, engine, central, 1)
    assert (done[0][1].updates, len(done[0][1].dropped)) == (0, 5)
    assert not small.close(done[0][0].arrays["prompt"], first.arrays["prompt"])
