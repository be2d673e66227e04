"""Bounds: below the Gaussian mechanism's exact epsilon as often as promised, not far below, and above it when the noise
is a tenth of what is stated."""

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from scipy.stats import binom, binomtest

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.epsilon_bounds import one_run_bound, two_world_bound


def worlds(noise: float, seed: int, runs: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """What the canary's direction shows in runs without and with it, at sensitivity 1."""
    random = np.random.default_rng(seed)
    return noise * random.standard_normal(runs), 1 + noise * random.standard_normal(runs)


def canaries(noise: float, seed: int, m: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """One run: every canary has a direction to itself."""
    random = np.random.default_rng(seed)
    included = random.random(m) < 0.5
    return included + noise * random.standard_normal(m), included


@pytest.mark.parametrize(("noise", "delta"), [(1.0, 0.01), (2.0, 0.01)])
def test_two_worlds_are_below_epsilon(noise, delta):
    stated = get_epsilon_gaussian(noise, delta)
    bounds = [two_world_bound(*worlds(noise, seed), delta) for seed in range(40)]
    assert sum(bound > stated for bound in bounds) <= 2
    assert np.median(bounds) > 0


def test_two_worlds_are_not_far_below_epsilon():
    stated = get_epsilon_gaussian(1.0, 0.01)
    bounds = [two_world_bound(*worlds(1.0, seed), 0.01) for seed in range(20)]
    assert np.median(bounds) >= stated / 2
    assert min(bounds) >= stated / 3


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_two_worlds_hold_where_they_are_tight(epsilon):
    """Randomised response, for which the best attack's odds are exactly epsilon: nothing hides a broken promise."""
    random, truth = np.random.default_rng(0), 1 / (1 + np.exp(-epsilon))
    bounds = [two_world_bound(random.random(1000) > truth, random.random(1000) < truth, 0.0) for _ in range(400)]
    assert sum(bound > epsilon for bound in bounds) <= binom.ppf(0.999, 400, 0.05)
    assert np.median(bounds) > 0.6 * epsilon
    loose = [two_world_bound(random.random(1000) > truth, random.random(1000) < truth, 0.0, 0.2) for _ in range(400)]
    assert 40 < sum(bound > epsilon for bound in loose) <= binom.ppf(0.999, 400, 0.8)


def test_two_worlds_are_what_clopper_and_pearson_say():
    """40 runs of 100 pass the only threshold that tells, 5 without the canary; half the error goes to each rate."""
    without, with_ = np.zeros(200), np.zeros(200)
    without[[*range(5), *range(100, 105)]] = with_[[*range(40), *range(100, 140)]] = 1.0
    fpr = binomtest(5, 100).proportion_ci(0.95, "exact").high
    fnr = binomtest(60, 100).proportion_ci(0.95, "exact").high
    expected = np.log((1 - 0.01 - fnr) / fpr)
    assert two_world_bound(without, with_, delta=0.01) == pytest.approx(expected)


def test_both_kinds_of_error_are_used():
    """A tenth of the runs give the canary's presence away, or its absence: either tells as much."""
    without, with_ = np.zeros(1000), np.arange(1000) % 10 == 0
    assert two_world_bound(without, with_, 0.01) > 2
    assert two_world_bound(~with_, 1 - without, 0.01) == pytest.approx(two_world_bound(without, with_, 0.01))


def test_the_threshold_is_chosen_on_other_runs():
    """The first half shows a perfect attack, the second none: what counts is the second."""
    random = np.random.default_rng(0)
    without, with_ = np.r_[np.zeros(100), random.random(100)], np.r_[np.ones(100), random.random(100)]
    assert two_world_bound(without, with_, 0.0) < 0.2
    assert two_world_bound(np.zeros(200), np.ones(200), 0.0) > 3


@pytest.mark.parametrize(("noise", "delta"), [(1.0, 1e-5), (2.0, 1e-5), (0.5, 1e-3)])
def test_one_run_is_below_epsilon_and_above_zero(noise, delta):
    stated = get_epsilon_gaussian(noise, delta)
    bounds = [one_run_bound(*canaries(noise, seed), delta) for seed in range(20)]
    assert max(bounds) < stated
    assert min(bounds) > 0


@pytest.mark.parametrize("guesses", [100, 300])
def test_one_run_holds_where_it_is_tight(guesses):
    """Randomised response on each canary: the number of right guesses is binomial, as the theorem's worst case is."""
    random, epsilon = np.random.default_rng(0), 1.0
    truth, bounds, loose = 1 / (1 + np.exp(-epsilon)), [], []
    for _ in range(400):
        included = random.random(1000) < 0.5
        answer = np.where(random.random(1000) < truth, included, ~included)
        bounds.append(one_run_bound(answer, included, 0.0, guesses=guesses))
        loose.append(one_run_bound(answer, included, 0.0, confidence=0.2, guesses=guesses))
    assert 0 < sum(bound > epsilon for bound in bounds) <= binom.ppf(0.999, 400, 0.05)
    assert binom.ppf(0.001, 400, 0.7) < sum(bound > epsilon for bound in loose) <= binom.ppf(0.999, 400, 0.8)


@pytest.mark.parametrize(
    ("m", "r", "correct", "delta", "published"), [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)]
)
def test_one_run_gives_the_papers_numbers(m, r, correct, delta, published):
    """Section 7 and appendix D of arXiv 2305.08846."""
    included = np.ones(m, bool)
    included[: r // 2] = False
    included[m - (r - correct) :] = False
    assert one_run_bound(np.arange(m), included, delta, guesses=r) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("stated_noise", [1.0, 2.0])
def test_a_tenth_of_the_noise_is_found_out(stated_noise):
    stated = get_epsilon_gaussian(stated_noise, 1e-5)
    for seed in range(5):
        assert two_world_bound(*worlds(stated_noise / 10, seed), 1e-5) > stated
        assert one_run_bound(*canaries(stated_noise / 10, seed), 1e-5) > stated


def test_nothing_is_said_where_nothing_shows():
    random, zero = np.random.default_rng(0), []
    for _ in range(40):
        included = random.random(600) < 0.5
        zero += [two_world_bound(random.random(200), random.random(200), 0.0) == 0.0]
        zero += [one_run_bound(random.random(600), included, 0.0) == 0.0]
    assert sum(zero) >= 72


def test_equal_scores_say_nothing_in_whatever_order_the_canaries_come():
    included = np.arange(1000) < 500
    for order in (included, ~included):
        assert one_run_bound(np.zeros(1000), order, 0.0) < 0.3
    assert two_world_bound(np.zeros(100), np.zeros(100), 0.0) == 0.0


def test_more_confidence_and_more_delta_say_less():
    given, run = [runs > 1.5 for runs in worlds(1.0, 0)], canaries(1.0, 0)
    assert two_world_bound(*given, 0.01, confidence=0.99) < two_world_bound(*given, 0.01) < two_world_bound(*given, 0.0)
    assert one_run_bound(*run, 1e-4, confidence=0.99) < one_run_bound(*run, 1e-4) < one_run_bound(*run, 0.0)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: two_world_bound([1.0], [1.0, 2.0], 0.0), "1 runs without and 2 with"),
    (lambda: two_world_bound([1.0, np.inf], [1.0, 2.0], 0.0), "scores_without has shape"),
    (lambda: two_world_bound([1.0, 2.0], [1.0, 2.0], 1.0), r"delta = 1.0.* expected \[0, 1\)"),
    (lambda: one_run_bound([1.0, 2.0], [True, False], 0.0, confidence=95), "confidence = 95"),
    (lambda: one_run_bound([1.0, 2.0], [True, False], 0.0), "guesses = 0"),
    (lambda: one_run_bound([1.0, 2.0], [True, False], 0.0, guesses=3), "guesses = 3"),
    (lambda: one_run_bound([1.0, 2.0], [True], 0.0), "included is bool of shape"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(PrivacyError, match=says):
        call()
