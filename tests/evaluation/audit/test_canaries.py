"""Canaries: no sound mechanism is ever above its epsilon, broken ones are, and the play is that of the planned run."""

import pytest
import torch

import broken
from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.canaries import (
    AFFORDED,
    HUGE,
    client_scores,
    lower_bound,
    num_trials,
    record_scores,
    release_kind,
)
from ficpd.interfaces import ReleaseKind
from ficpd.privacy import accountant, client_gaussian, none, record_gaussian
from ficpd.privacy.noise import SeededNoise
from ficpd.types import ClientWorkload

DELTA = 1e-3
PLAN = ClientWorkload(
    num_records=60, sampling_rate=0.2, steps=2, participations=3, num_clients=6, cohort_rate=0.5, num_rounds=4
)
SOUND = {
    "record": (record_gaussian, {}),
    "local": (client_gaussian, {"placement": "local"}),
    "central": (client_gaussian, {"placement": "central"}),
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


def streams(trial: int) -> SeededNoise:
    return SeededNoise("a test", trial)


# ---------------------------------------------------------------- sound and broken


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("seed", range(3))
def test_no_sound_mechanism_is_above_its_epsilon(kind, seed):
    mechanism = built(kind, 2.0)
    spent = accountant.epsilon(mechanism.planned_costs(), DELTA)
    assert lower_bound(mechanism, PLAN, DELTA, trials=300, seed=seed) <= spent <= 2.0


@pytest.mark.parametrize("kind", SOUND)
def test_a_large_epsilon_shows(kind):
    assert 0.3 < lower_bound(built(kind, 8.0), PLAN, DELTA, trials=400) <= 8.0


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("seed", range(3))
def test_a_broken_mechanism_is_above_its_epsilon(how, seed):
    mechanism = unsound(how, 2.0)
    assert accountant.epsilon(mechanism.planned_costs(), DELTA) <= 2.0
    assert lower_bound(mechanism, PLAN, DELTA, trials=300, seed=seed) > 2.0


@pytest.mark.parametrize("kind", ["local", "central"])
def test_a_client_mechanism_that_does_not_clip_is_above_its_epsilon(kind, monkeypatch):
    whole = lambda rows_BN, clip_norm: rows_BN.double().sum(0)  # noqa: E731
    monkeypatch.setattr("ficpd.privacy.client_gaussian.clipped_sum", whole)
    monkeypatch.setattr("ficpd.privacy.central_gaussian.clipped_sum", whole)
    assert lower_bound(built(kind, 1.0), PLAN, DELTA, trials=400) > 1.0


def test_too_little_noise_shows():
    weak = built("local", 1.0)
    weak.noise_multiplier /= 4
    assert lower_bound(weak, PLAN, DELTA, trials=500) > 1.0


# ---------------------------------------------------------------- what is played


class Watched:
    """A mechanism that notes what it was given."""

    def __init__(self, inner):
        self.inner, self.given, self.batches = inner, [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def sample(self, num_records, expected_batch, steps, noise):
        self.given.append((num_records, expected_batch, steps))
        return self.inner.sample(num_records, expected_batch, steps, noise)

    def noisy_mean(self, values_KB, expected_batch, noise):
        self.batches.append(values_KB)
        return self.inner.noisy_mean(values_KB, expected_batch, noise)


def test_the_whole_planned_run_is_played_with_the_mechanisms_own_sampling():
    mechanism = Watched(built("record", 2.0))
    record_scores(mechanism, PLAN, 100, streams)
    assert mechanism.given == [(60, 12, 2)] * 3 * 100
    with_canary = [batch for batch in mechanism.batches if _largest(batch) == HUGE]
    assert len(mechanism.batches) - len(with_canary) == 6 * 100
    assert len(with_canary) / (6 * 100) == pytest.approx(PLAN.sampling_rate, abs=0.05)
    assert max(abs(float(batch[batch < HUGE].sum())) for batch in mechanism.batches) < 1e-3


def _largest(batch: torch.Tensor) -> float:
    return float(batch.max()) if batch.numel() else 0.0


def test_equal_streams_give_equal_scores_and_each_world_its_own():
    for kind, play in (("record", record_scores), ("local", client_scores), ("central", client_scores)):
        mechanism = built(kind, 8.0)
        without, with_ = play(mechanism, PLAN, 50, streams)
        assert (without, with_) == play(mechanism, PLAN, 50, streams)
        assert len(set(without)) == len(without) == len(with_) == 50
        assert sum(with_) > sum(without)


def test_a_plan_without_releases_says_nothing():
    for kind in SOUND:
        quiet = ClientWorkload(60, 0.2, 2, 0, 6, 0.5, 0)
        assert lower_bound(built(kind, 2.0), quiet, DELTA, trials=50) == 0.0


class Silent(SeededNoise):
    """No noise at all."""

    def add_gaussian(self, values, deviation):
        return values


def test_the_score_is_the_log_likelihood_ratio():
    """One release x of rate 1: log N(x; 1, z²) - log N(x; 0, z²) = (2x - 1) / 2z², x in clip norms."""
    for kind, plan in (
        ("record", ClientWorkload(60, 1.0, 1, 1, 6, 1.0, 1)),
        ("central", ClientWorkload(60, 1.0, 1, 1, 6, 1.0, 1)),
    ):
        mechanism = built(kind, 8.0, plan)
        play = record_scores if kind == "record" else client_scores
        without, with_ = play(mechanism, plan, 1, lambda trial: Silent("a test"))
        half = 1 / (2 * mechanism.noise_multiplier**2)
        assert (*without, *with_) == pytest.approx((-half, half), rel=1e-3)


# ---------------------------------------------------------------- doors, and what it costs


def test_the_door_is_the_units():
    assert {kind: release_kind(built(kind, 2.0)) for kind in SOUND} == {
        "record": ReleaseKind.STEP,
        "local": ReleaseKind.UPDATE,
        "central": ReleaseKind.SUM,
    }
    with pytest.raises(PrivacyError, match="unit = 'none'"):
        lower_bound(none.NoPrivacy(), PLAN, DELTA)


def test_long_runs_are_played_fewer_times_but_not_too_few(monkeypatch):
    monkeypatch.setitem(AFFORDED, ReleaseKind.STEP, 3000)
    assert [num_trials(built("record", 2.0), PLAN, asked) for asked in (100, 400, 2000)] == [100, 400, 500]
    long = ClientWorkload(60, 0.2, 100, 10, 6, 0.5, 4)
    assert num_trials(built("record", 2.0), long, 2000) == 200
