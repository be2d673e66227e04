"""Canaries: no sound mechanism is ever above its epsilon, broken ones are, and the play is that of the planned run."""

from dataclasses import replace

import pytest

import broken
import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.canaries import AFFORDED, HUGE, lower_bound, num_trials, play, release_kind
from ficpd.federation.client import Client
from ficpd.interfaces import ReleaseKind
from ficpd.privacy import accountant, client_gaussian, none, record_gaussian, shared_gaussian
from ficpd.privacy.noise import SeededNoise
from ficpd.privacy.shared_gaussian import GRID
from ficpd.types import ClientWorkload

DELTA = 1e-3
PLAN = ClientWorkload(60, sampling_rate=0.2, steps=2, participations=3, num_clients=6, cohort_rate=0.5, num_rounds=4)
SOUND = {
    "record": (record_gaussian, {}),
    "local": (client_gaussian, {"placement": "local"}),
    "central": (client_gaussian, {"placement": "central"}),
    "shared": (shared_gaussian, {"least_records": 40, "max_lost": 0, "max_colluding": 1}),
}
BROKEN = list(broken.MECHANISMS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As many releases as a test has time for."""
    monkeypatch.setitem(AFFORDED, ReleaseKind.SUM, 1000)


def built(kind: str, epsilon: float, plan: ClientWorkload = PLAN):
    module, options = SOUND[kind]
    return module.build(module.Config(epsilon=epsilon, delta=DELTA, clip_norm=0.1, **options), plan)


def unsound(how: str, epsilon: float, plan: ClientWorkload = PLAN):
    return broken.build(broken.Config(epsilon=epsilon, delta=DELTA, clip_norm=0.1, how=how), plan)


def client(mechanism) -> Client:
    return small.clients(QueryEngine(small.backbone()), small.method("fedavg"), 1, mechanism=mechanism)["site-0"]


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("seed", range(2))
def test_no_sound_mechanism_is_above_its_epsilon(kind, seed):
    mechanism = built(kind, 2.0)
    spent = accountant.epsilon(mechanism.planned_costs(), DELTA)
    bound = lower_bound(client(mechanism), PLAN, trials=200, seed=seed)
    assert bound.epsilon <= bound.stated == spent <= 2.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOUND)
def test_a_large_epsilon_shows(kind):
    assert 0.3 < lower_bound(client(built(kind, 8.0)), PLAN, trials=400).epsilon <= 8.0


SUMS_ALONE = replace(PLAN, steps=0, participations=1, num_rounds=1, once={"classes": 0.9})
SUMS_TOO = replace(PLAN, once={"classes": 0.3}, totals={"weight": 0.3})


def quiet(self, name, chunks, noise, subject_B=None):
    """A quarter of the noise that the ledger states."""
    summed = self._clipped_statistic(name, chunks, noise, subject_B)
    return noise.add_gaussian(summed, self.cost(ReleaseKind.STATISTIC, name).noise_multiplier / 4)


def unclipped(self, name, chunks, noise, subject_B=None):
    return noise.add_gaussian(sum(chunk.double().sum(0) for chunk in chunks), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "fault"),
    [(SUMS_ALONE, None), (SUMS_ALONE, quiet), (SUMS_ALONE, unclipped), (SUMS_TOO, None), (SUMS_TOO, unclipped)],
)
def test_a_sum_over_all_records_is_attacked(plan, fault, monkeypatch):
    if fault:
        monkeypatch.setattr(record_gaussian.RecordGaussian, "noisy_sum", fault)
    bound = lower_bound(client(built("record", 2.0, plan)), plan, trials=400)
    assert bound.contradicts == (fault is not None)


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("seed", range(2))
def test_a_broken_mechanism_is_above_its_epsilon(how, seed):
    mechanism = unsound(how, 2.0)
    assert accountant.epsilon(mechanism.planned_costs(), DELTA) <= 2.0
    assert lower_bound(client(mechanism), PLAN, trials=200, seed=seed).contradicts


@pytest.mark.parametrize("kind", ["local", "central"])
def test_a_client_mechanism_that_does_not_clip_is_above_its_epsilon(kind, monkeypatch):
    whole = lambda rows_BN, clip_norm: rows_BN.double().sum(0)  # noqa: E731
    monkeypatch.setattr("ficpd.privacy.client_gaussian.clipped_sum", whole)
    monkeypatch.setattr("ficpd.privacy.central_gaussian.clipped_sum", whole)
    assert lower_bound(client(built(kind, 1.0)), PLAN, trials=400).contradicts


def test_too_little_noise_shows():
    weak = built("local", 1.0)
    weak.noise_multiplier /= 4
    assert lower_bound(client(weak), PLAN, trials=500).contradicts


FEW_HONEST = ClientWorkload(60, 1.0, 1, 1, 40, 1.0, 1)
"""Of forty sites, 38 help the server."""


def test_a_secure_sum_of_many_sites_with_few_honest_is_attacked():
    config = shared_gaussian.Config(epsilon=2.0, delta=DELTA, clip_norm=0.1, max_lost=0, max_colluding=38)
    bound = lower_bound(client(shared_gaussian.build(config, FEW_HONEST)), FEW_HONEST, trials=200)
    assert not bound.contradicts


def test_noise_that_is_shared_by_more_sites_than_add_it_shows():
    """The noise of two is not enough where each added a fortieth."""
    plan = FEW_HONEST
    config = shared_gaussian.Config(epsilon=1.0, delta=DELTA, clip_norm=0.1, max_lost=0, max_colluding=38)
    weak = shared_gaussian.build(config, plan)
    assert not lower_bound(client(weak), plan, trials=200).contradicts
    weak._deviation = lambda multiplier, size: multiplier * (GRID + size**0.5) / 40**0.5
    assert lower_bound(client(weak), plan, trials=200).contradicts


def test_the_worst_site_of_a_secure_sum_has_the_least_records():
    mechanism, given = built("shared", 2.0), []
    sample = mechanism.sample
    mechanism.sample = lambda *asked: given.append(asked[:3]) or sample(*asked)
    play(client(mechanism), PLAN, 2, 0)
    assert given == [(40, 12, 2)] * 3 * 4


class Watched:
    """A mechanism that notes what it was given."""

    def __init__(self, inner):
        self.inner, self.given, self.batches = inner, [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def sample(self, num_records, expected_batch, steps, noise):
        self.given.append((num_records, expected_batch, steps))
        return self.inner.sample(num_records, expected_batch, steps, noise)

    def noisy_mean(self, values_KB, *rest):
        self.batches.append(values_KB)
        return self.inner.noisy_mean(values_KB, *rest)


def test_the_whole_planned_run_is_played_with_the_mechanisms_own_sampling():
    mechanism = Watched(built("record", 2.0))
    play(client(mechanism), PLAN, 100, 0)
    assert mechanism.given == [(60, 12, 2)] * 3 * 200
    with_canary = [batch for batch in mechanism.batches if batch.numel() and float(batch.abs().max()) == HUGE]
    assert len(mechanism.batches) == 6 * 200
    assert len(with_canary) / (6 * 100) == pytest.approx(PLAN.sampling_rate, abs=0.05)
    assert max(abs(float(batch[batch.abs() < HUGE].sum())) for batch in mechanism.batches) < 1e-3


def test_equal_seeds_give_equal_scores_and_each_world_its_own():
    for kind in SOUND:
        attacked = client(built(kind, 8.0))
        without, with_, stated = play(attacked, PLAN, 20, 0)
        assert (without, with_, stated) == play(attacked, PLAN, 20, 0)
        assert (without, with_) != play(attacked, PLAN, 20, 1)[:2]
        assert len(set(without)) == len(without) == len(with_) == 20
        assert sum(with_) > sum(without)


def test_a_plan_without_releases_says_nothing():
    for kind in SOUND:
        quiet = ClientWorkload(60, 0.2, 2, 0, 6, 0.5, 0)
        bound = lower_bound(client(built(kind, 2.0)), quiet, trials=50)
        assert (bound.epsilon, bound.stated) == (0.0, 0.0)


def test_a_run_is_played_until_its_budget_ends():
    config = record_gaussian.Config(epsilon=2.5, noise_multiplier=2.0, delta=DELTA, clip_norm=0.1)
    long = replace(PLAN, sampling_rate=1.0, participations=9)
    bound = lower_bound(client(record_gaussian.build(config, long)), long, trials=50)
    costs = record_gaussian.build(config, replace(long, participations=1)).planned_costs()
    assert bound.stated == accountant.epsilon(costs, DELTA)


class Silent(SeededNoise):
    """No noise at all."""

    def add_gaussian(self, values, deviation):
        return values


def test_the_score_is_the_log_likelihood_ratio(monkeypatch):
    """One release x of rate 1: log N(x; 1, z²) - log N(x; 0, z²) = (2x - 1) / 2z², x in clip norms."""
    plan = ClientWorkload(60, 1.0, 1, 1, 6, 1.0, 1)
    for kind in ("record", "central"):
        mechanism = built(kind, 8.0, plan)
        monkeypatch.setattr("ficpd.federation.client.SeededNoise", Silent)
        monkeypatch.setattr("ficpd.evaluation.audit.canaries.SeededNoise", Silent)
        without, with_, _ = play(client(mechanism), plan, 1, 0)
        half = 1 / (2 * mechanism.noise_multiplier**2)
        assert (*without, *with_) == pytest.approx((-half, half), rel=1e-3)


def test_the_door_is_the_units():
    assert {kind: release_kind(built(kind, 2.0)) for kind in SOUND} == {
        "record": ReleaseKind.STEP, "local": ReleaseKind.UPDATE, "central": ReleaseKind.SUM,
        "shared": ReleaseKind.STEP,
    }  # fmt: skip
    with pytest.raises(PrivacyError, match="unit = 'none'"):
        lower_bound(client(none.NoPrivacy()), PLAN)


def test_long_runs_are_played_fewer_times_but_not_too_few(monkeypatch):
    monkeypatch.setitem(AFFORDED, ReleaseKind.STEP, 3000)
    assert [num_trials(built("record", 2.0), PLAN, asked) for asked in (100, 400, 2000)] == [100, 400, 500]
    long = ClientWorkload(60, 0.2, 100, 10, 6, 0.5, 4)
    assert num_trials(built("record", 2.0), long, 2000) == 200
