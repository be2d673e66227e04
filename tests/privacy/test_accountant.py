"""What releases cost, against published values and formulas, and what has to hold of any accountant."""

import math
import warnings

import numpy as np
import pytest
from absl import logging
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom, norm

from ficpd.errors import PrivacyError
from ficpd.privacy import accountant
from ficpd.privacy.accountant import (
    COARSE,
    DELTAS,
    EPSILONS,
    FINE,
    LEAST_MULTIPLIER,
    calibrate,
    check_price,
    cost_shares,
    epsilon,
    epsilon_replaced,
    group_costs,
    group_epsilon,
    is_covered_by,
    merge,
)
from ficpd.types import PrivacyCost

DELTA = 1e-5
PLANS = {
    "one step": [PrivacyCost("prompt", 0.1, 1.0)],
    "a short run": [PrivacyCost("prompt", 0.05, 0.8, 60)],
    "much noise": [PrivacyCost("prompt", 0.2, 4.0, 200)],
    "with a total": [PrivacyCost("prompt", 0.1, 1.2, 40), PrivacyCost("weight", 1.0, 15.0)],
}


def epsilon_rdp(costs, delta):
    """Computes the looser upper bound by Rényi differential privacy (Mironov et al., 2019, arXiv 1908.10530)."""
    rdp = RdpAccountant()
    for cost in costs:
        event = GaussianDpEvent(cost.noise_multiplier)
        rdp.compose(event if cost.sampling_rate >= 1 else PoissonSampledDpEvent(cost.sampling_rate, event), cost.count)
    return rdp.get_epsilon(delta)


@pytest.fixture(autouse=True)
def silent():
    """The Rényi accountant logs the orders it cannot evaluate."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    yield
    logging.set_verbosity(before)


def test_the_published_example_of_dpsgd():
    """60,000 records, batches of 256, noise 1.1, 60 epochs: 3.0 by Rényi DP (Mironov's bound), less by what came after."""
    run = [PrivacyCost("prompt", 256 / 60_000, 1.1, 60 * 60_000 // 256)]
    assert 2.3 < epsilon(run, DELTA) < epsilon_rdp(run, DELTA) < 3.01
    assert epsilon_rdp(run, DELTA) > 2.5


def analytic(multiplier: float, delta: float) -> float:
    """ε of one Gaussian release (Balle and Wang, ICML 2018, arXiv 1805.06530, theorem 8)."""

    def excess(e: float) -> float:
        half = 1 / (2 * multiplier)
        return ndtr(half - e * multiplier) - math.exp(e + log_ndtr(-half - e * multiplier)) - delta

    return brentq(excess, 0.0, 1e6, xtol=1e-10)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("multiplier", [0.5, 1.0, 3.0, 20.0])
def test_one_release_costs_what_the_analytic_gaussian_says(multiplier, delta):
    exact = analytic(multiplier, delta)
    assert exact - 1e-6 <= epsilon([PrivacyCost("update", 1.0, multiplier)], delta) <= exact + 1e-3


@pytest.mark.parametrize("count", [4, 25])
def test_releases_on_all_records_add_up_as_gaussians_do(count):
    """k releases of noise z are one of noise z/√k."""
    exact = analytic(3.0 / count**0.5, DELTA)
    assert exact - 1e-6 <= epsilon([PrivacyCost("update", 1.0, 3.0, count)], DELTA) <= exact + 2e-3


@pytest.mark.parametrize("plan", PLANS)
def test_the_loss_distribution_never_costs_more_than_renyi(plan):
    assert 0 < epsilon(PLANS[plan], DELTA) <= epsilon_rdp(PLANS[plan], DELTA)


@pytest.mark.parametrize("plan", PLANS)
def test_a_coarse_grid_never_reads_lower(plan):
    exact, fine, coarse = (epsilon(PLANS[plan], DELTA, grid) for grid in (FINE / 4, FINE, COARSE))
    assert exact <= fine + 1e-9 <= coarse + 2e-9
    assert fine <= exact * 1.01 + 1e-3


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([0.02, 0.1, 0.5, 1.0]), st.floats(0.7, 4.0), st.integers(1, 40), st.sampled_from([1e-3, 1e-5, 1e-7])
)
def test_more_steps_a_larger_sample_less_noise_or_a_smaller_delta_cost_more(rate, multiplier, count, delta):
    def cost(rate=rate, multiplier=multiplier, count=count, delta=delta) -> float:
        return epsilon([PrivacyCost("prompt", rate, multiplier, count)], delta, COARSE)

    assert 0 <= cost() <= cost(count=2 * count)
    assert cost() <= cost(rate=min(1.0, 1.5 * rate)) <= cost(rate=1.0)
    assert cost() <= cost(multiplier=0.8 * multiplier)
    assert cost() <= cost(delta=delta / 10)


def test_names_and_order_cost_nothing():
    lines = [PrivacyCost("a", 0.1, 1.0, 3), PrivacyCost("b", 1.0, 9.0), PrivacyCost("c", 0.1, 1.0, 2)]
    assert epsilon(lines, DELTA) == epsilon(lines[::-1], DELTA)
    assert epsilon(lines, DELTA) == epsilon([PrivacyCost("x", 0.1, 1.0, 5), PrivacyCost("x", 1.0, 9.0)], DELTA)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], DELTA) == epsilon([PrivacyCost("prompt", 0.1, 1.0, 0)], DELTA) == 0.0
    assert epsilon([PrivacyCost("prompt", 0.1, 1.0), PrivacyCost("update", 1.0, 0.0)], DELTA) == math.inf


def profile(rate: float, multiplier: float, size: int, e: float) -> float:
    """δ of one step at ε, by integration: the larger of both directions of a binomial mixture of Gaussians and one."""
    x = np.linspace(-12 * multiplier, size + 12 * multiplier, 400_001)
    without = norm.pdf(x, 0, multiplier)
    weights = binom.pmf(range(size + 1), size, rate)
    with_ = sum(weight * norm.pdf(x, place, multiplier) for place, weight in enumerate(weights))
    pairs = ((with_, without), (without, with_))
    return max(float(np.trapezoid(np.maximum(p - math.exp(e) * q, 0.0), x)) for p, q in pairs)


@pytest.mark.parametrize("size", [1, 2, 5, 10])
@pytest.mark.parametrize(("rate", "multiplier"), [(0.03, 0.8), (0.2, 2.0), (0.5, 4.0)])
def test_several_records_of_one_person_cost_what_the_integral_says(size, rate, multiplier):
    e = group_epsilon([PrivacyCost("prompt", rate, multiplier)], DELTA, size)
    assert profile(rate, multiplier, size, e) <= DELTA * 1.0001
    assert profile(rate, multiplier, size, 0.99 * e - 0.01) > DELTA


@pytest.mark.parametrize("size", [2, 5, 10])
def test_several_records_in_a_sum_over_all_are_one_of_so_many_times_the_sensitivity(size):
    found = group_epsilon([PrivacyCost("weight", 1.0, 9.0)], DELTA, size)
    assert analytic(9.0 / size, DELTA) - 1e-6 <= found <= 1.01 * analytic(9.0 / size, DELTA) + 0.01


def test_several_records_cost_more_than_so_many_times_one():
    """500 records, batches of 16, 100 steps: figures of an independent review."""
    run = [PrivacyCost("prompt", 16 / 500, calibrate(2.0, DELTA, lambda z: [PrivacyCost("p", 16 / 500, z, 100)]), 100)]
    found = group_costs(run, DELTA)
    assert found == {2: pytest.approx(4.3, abs=0.05), 5: pytest.approx(12.4, abs=0.1), 10: pytest.approx(28.8, abs=0.2)}
    assert all(cost > size * epsilon(run, DELTA) for size, cost in found.items())
    assert group_epsilon(run, DELTA, 1) == pytest.approx(epsilon(run, DELTA), rel=0.01)


def test_a_replaced_unit_costs_more_than_one_added_or_removed():
    assert epsilon_replaced([PrivacyCost("update", 1.0, 3.0)], DELTA) == pytest.approx(analytic(1.5, DELTA), abs=2e-3)
    for plan in PLANS.values():
        assert epsilon(plan, DELTA) < epsilon_replaced(plan, DELTA) < 2.5 * epsilon(plan, DELTA)


@pytest.mark.parametrize("target", [0.01, 0.1])
@pytest.mark.parametrize(("rate", "count"), [(0.03, 100), (0.03, 5000), (1.0, 1)])
def test_what_others_than_the_unit_cost_is_exact_for_a_small_budget_too(target, rate, count):
    """Much noise: the sum of many releases is nearly one Gaussian, for which two or ten units are as many sensitivities.

    A unit that is replaced counts as two, up to the variance between their samples.
    """
    multiplier = calibrate(target, DELTA, lambda z: [PrivacyCost("prompt", rate, z, count)])
    run = [PrivacyCost("prompt", rate, multiplier, count)]
    gaussian = brentq(lambda z: analytic(z, DELTA) - epsilon(run, DELTA), 1.0, 2e4)
    for size in (2, 10):
        assert group_epsilon(run, DELTA, size) == pytest.approx(analytic(gaussian / size, DELTA), rel=0.05)
    assert epsilon_replaced(run, DELTA) == pytest.approx(analytic(gaussian / 2, DELTA), rel=0.05)


def test_nothing_costs_nothing_for_several_records_too():
    assert group_epsilon([], DELTA, 5) == epsilon_replaced([], DELTA) == 0.0
    assert group_epsilon([PrivacyCost("update", 1.0, 0.0)], DELTA, 5) == math.inf


@pytest.mark.parametrize(("target", "rate", "count"), [(2.0, 0.1, 60), (1.0, 1.0, 1), (8.0, 0.05, 200)])
def test_the_noise_that_a_budget_pays_for_is_the_least(target, rate, count):
    def priced(multiplier: float) -> list[PrivacyCost]:
        return [PrivacyCost("prompt", rate, multiplier, count), PrivacyCost("weight", 1.0, 20 * multiplier)]

    multiplier = calibrate(target, DELTA, priced)
    assert epsilon(priced(multiplier), DELTA) <= target
    assert epsilon(priced(0.99 * multiplier), DELTA) > 0.995 * target


def test_the_noise_of_a_long_plan_is_nearly_the_least():
    def priced(multiplier: float) -> list[PrivacyCost]:
        return [PrivacyCost("prompt", 0.01, multiplier, 10_000)]

    multiplier = calibrate(2.0, DELTA, priced)
    assert 0.98 * 2.0 < epsilon(priced(multiplier), DELTA) <= 2.0


@pytest.mark.parametrize("target", [0.05, 0.19, 0.2, 0.3, 0.49])
@pytest.mark.parametrize(("rate", "count"), [(0.01, 10_000), (0.5, 3000), (1.0, 100)])
def test_a_small_budget_of_a_long_plan_is_kept_by_the_cost_that_the_ledger_sums(target, rate, count):
    multiplier = calibrate(target, DELTA, lambda z: [PrivacyCost("prompt", rate, z, count)])
    assert 0.98 * target <= epsilon([PrivacyCost("prompt", rate, multiplier, count)], DELTA) <= target


def test_equal_plans_are_calibrated_once(monkeypatch):
    first = calibrate(3.0, DELTA, lambda z: [PrivacyCost("prompt", 0.3, z, 7)])
    monkeypatch.setattr(accountant, "epsilon", None)
    assert calibrate(3.0, DELTA, lambda z: [PrivacyCost("prompt", 0.3, z, 7)]) == first


def test_a_plan_that_no_noise_makes_cheap_enough_says_so():
    with pytest.raises(PrivacyError, match=r"no noise multiplier up to a million gives epsilon = 1.0.*fewer rounds"):
        calibrate(1.0, DELTA, lambda z: [PrivacyCost("update", 1.0, min(z, 2.0))])


@pytest.mark.parametrize("names", [[], ["prompt"]])
def test_a_plan_without_a_release_is_refused(names):
    with pytest.raises(PrivacyError, match="releases nothing"):
        calibrate(1.0, DELTA, lambda z: [PrivacyCost(name, 0.5, z, 0) for name in names])


def test_shares_name_each_line_and_sum_to_one():
    found = cost_shares([*PLANS["with a total"], PrivacyCost("prompt", 0.1, 1.2, 2)], DELTA)
    assert [(s["name"], s["releases"]) for s in found] == [("prompt", 42), ("weight", 1)]
    assert [(s["sampling_rate"], s["noise_multiplier"]) for s in found] == [(0.1, 1.2), (1.0, 15.0)]
    assert sum(s["share"] for s in found) == pytest.approx(1.0)
    assert found[1]["epsilon_alone"] == epsilon([PrivacyCost("weight", 1.0, 15.0)], DELTA)
    assert found[0]["share"] > found[1]["share"] > 0


def test_shares_of_releases_that_cost_nothing_at_this_delta():
    (only,) = cost_shares([PrivacyCost("prompt", 0.01, 1e5)], 1e-3)
    assert (only["name"], only["epsilon_alone"]) == ("prompt", 0.0)


def test_equal_lines_are_merged_and_unequal_ones_are_not():
    lines = [
        PrivacyCost("b", 0.1, 1.0), PrivacyCost("a", 0.1, 1.0, 2), PrivacyCost("b", 0.1, 1.0, 4),
        PrivacyCost("b", 0.2, 1.0),
    ]  # fmt: skip
    assert merge(lines) == [PrivacyCost("a", 0.1, 1.0, 2), PrivacyCost("b", 0.1, 1.0, 5), PrivacyCost("b", 0.2, 1.0)]


def test_a_certified_plan_covers_its_parts_and_no_more():
    plan = [PrivacyCost("prompt", 0.1, 1.0, 5), PrivacyCost("weight", 1.0, 9.0)]
    assert is_covered_by(plan, plan)
    assert is_covered_by(plan, [])
    assert is_covered_by(plan, [PrivacyCost("prompt", 0.1, 1.0, 2), PrivacyCost("prompt", 0.1, 1.0, 3)])
    assert not is_covered_by([], plan)
    for extra in [
        plan[1], PrivacyCost("prompt", 0.1, 1.0), PrivacyCost("prompt", 0.1, 1.1), PrivacyCost("prompt", 0.09, 1.0),
    ]:  # fmt: skip
        assert not is_covered_by(plan, [*plan, extra])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["a short run", "much noise", "the published example", "one full release"])
def test_opacus_agrees(plan):
    others = {
        "the published example": [PrivacyCost("prompt", 256 / 60_000, 1.1, 14_062)],
        "one full release": [PrivacyCost("update", 0.999999, 2.0, 4)],
    }
    (line,) = (PLANS | others)[plan]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import create_accountant

        oracle = create_accountant("prv")
        oracle.history = [(line.noise_multiplier, line.sampling_rate, line.count)]
        theirs = oracle.get_epsilon(DELTA, eps_error=0.005)
    assert epsilon([line], DELTA) == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize(("name", "epsilon", "delta"), [
    *(("epsilon", epsilon, 1e-5) for epsilon in (1e-9, 1000, 1e9)),
    *(("delta", 2, delta) for delta in (1e-13, 0.5, 0.9)),
])  # fmt: skip
def test_a_budget_beyond_what_can_be_computed_is_refused_with_the_range(name, epsilon, delta):
    least, most = EPSILONS if name == "epsilon" else DELTAS
    with pytest.raises(PrivacyError, match=rf"privacy.{name} = .*{least:g} to {most:g}"):
        calibrate(epsilon, delta, lambda z: [PrivacyCost("prompt", 0.1, z, 100)])


@pytest.mark.slow
@pytest.mark.parametrize("epsilon_", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(("rate", "count"), [(1.0, 1), (0.5, 100), (0.01, 10), (0.5, 10_000)])
def test_every_budget_within_the_range_has_an_answer_that_keeps_it(epsilon_, delta, rate, count):
    """At such a delta little noise is enough, or none at all would be: then it is the least that is accounted."""
    found = calibrate(epsilon_, delta, lambda z: [PrivacyCost("prompt", rate, z, count)])
    cost = epsilon([PrivacyCost("prompt", rate, found, count)], delta)
    assert found >= LEAST_MULTIPLIER
    assert cost <= epsilon_
    assert cost >= 0.9 * epsilon_ or found < 1.5 * LEAST_MULTIPLIER


def test_noise_too_small_to_be_accounted_is_refused_and_many_releases_are_not():
    with pytest.raises(PrivacyError, match="noise_multiplier = 1e-06"):
        epsilon([PrivacyCost("prompt", 0.1, 1e-6, 1)], DELTA)
    count = 100_000
    exact = analytic(count**-0.5, DELTA)
    assert exact <= epsilon([PrivacyCost("prompt", 1.0, 1.0, count)], DELTA) <= 1.01 * exact


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_a_sampling_rate_that_none_is_has_no_price(rate):
    with pytest.raises(PrivacyError, match="sampling_rate"):
        epsilon([PrivacyCost("sum", rate, 1.0, 10)], DELTA)


def test_releases_that_would_cost_nothing_are_an_error():
    with pytest.raises(PrivacyError, match="costs nothing"):
        check_price([PrivacyCost("sum", 1e-6, LEAST_MULTIPLIER, 3)], DELTA)
    check_price([PrivacyCost("sum", 1.0, 1.0, 0)], DELTA)
    check_price([PrivacyCost("sum", 0.1, 1.0, 3)], DELTA)
