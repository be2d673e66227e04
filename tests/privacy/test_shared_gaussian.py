"""Noise that sites share: a record's part in a term is bounded, and the honest sites' noise is that of the whole sum."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import kstest

from contracts.test_mechanism import Silent
from ficpd.errors import PrivacyError, PrivacyWarning
from ficpd.interfaces import ReleaseKind
from ficpd.privacy import accountant, record_gaussian, shared_gaussian
from ficpd.privacy.noise import SecureNoise, SeededNoise, discrete_gaussian_measurement
from ficpd.privacy.shared_gaussian import GRADIENT, GRID, LARGEST_GAP, Config, sum_gap, tolerance
from ficpd.types import ClientWorkload

PLAN = ClientWorkload(
    num_records=100, sampling_rate=0.1, steps=2, participations=5, num_clients=10, cohort_rate=1.0, num_rounds=5,
    once={"classes": 0.15}, most_participations=5,
)  # fmt: skip
CLIP = 0.5


def built(plan: ClientWorkload = PLAN, **more):
    return shared_gaussian.build(Config(**{"epsilon": 2.0, "delta": 1e-3, "clip_norm": CLIP, **more}), plan)


def test_one_record_moves_a_term_by_the_grid_and_the_rounding_at_most():
    mechanism, random = built(), torch.Generator().manual_seed(0)
    for _ in range(50):
        values = torch.randn(1, 6, 40, generator=random) * 10 ** float(torch.randn(1, generator=random))
        whole = mechanism.noisy_mean(values, 10, Silent())  # type: ignore[arg-type]
        less = mechanism.noisy_mean(values[:, 1:], 10, Silent())  # type: ignore[arg-type]
        assert whole.dtype == torch.int64
        assert float((whole - less).double().norm()) <= GRID + math.sqrt(40)


def test_one_subject_moves_a_term_by_the_grid_and_the_rounding_at_most():
    mechanism, random = built(replace(PLAN, num_subjects=20)), torch.Generator().manual_seed(0)
    assert mechanism.guarantee()["unit"] == "subject"
    subject_B = torch.tensor([0, 1, 2, 2, 2, 2, 2])
    for _ in range(50):
        values = torch.randn(1, 7, 40, generator=random) * 10 ** float(torch.randn(1, generator=random))
        values[0, 2:] = values[0, 2]  # all records of the subject say the same
        rows = values[0]
        for whole, less in (
            (mechanism.noisy_mean(values, 2, Silent(), subject_B=subject_B),  # type: ignore[arg-type]
             mechanism.noisy_mean(values[:, :2], 2, Silent(), subject_B=subject_B[:2])),  # type: ignore[arg-type]
            (mechanism.noisy_sum("classes", [rows], Silent(), subject_B),  # type: ignore[arg-type]
             mechanism.noisy_sum("classes", [rows[:2]], Silent(), subject_B[:2])),  # type: ignore[arg-type]
        ):  # fmt: skip
            assert 0 < float((whole - less).double().norm()) <= GRID + math.sqrt(40)


def test_rounding_may_move_a_term_by_more_than_the_grid():
    """So the sensitivity needs its second part: half a step below and above, in every number."""
    rows = torch.full((2, 10_000), 0.5 / GRID)
    apart = (rows.sum(0) * GRID + 1e-9).round() - (rows[0] * GRID - 1e-9).round()
    assert float(apart.norm()) > float((rows[1] * GRID).norm()) * 1.5


def test_noise_of_the_honest_sites_is_that_of_the_whole_sum():
    silent, mechanism = Silent(), built(max_lost=1, max_colluding=2)
    mechanism.noisy_mean(torch.ones(1, 3, 64), 10, silent)  # type: ignore[arg-type]
    stated = mechanism.cost(ReleaseKind.STEP)
    assert stated is not None
    assert mechanism.tolerance.honest == 7
    assert silent.deviations[0] * math.sqrt(7) >= stated.noise_multiplier * (GRID + 8)
    mechanism.noisy_sum("classes", [torch.ones(3, 64)], silent)  # type: ignore[arg-type]
    stated = mechanism.cost(ReleaseKind.STATISTIC, "classes")
    assert stated is not None
    assert silent.deviations[1] * math.sqrt(7) >= stated.noise_multiplier * (GRID + 8)


def test_the_noise_is_the_one_of_the_accountant():
    for source in (SeededNoise("a test"), SecureNoise()):
        noise = source.add_discrete_gaussian(torch.zeros(4000, dtype=torch.int64), 1000.0).double() / 1000
        assert kstest(noise.numpy(), "norm").pvalue > 1e-4
    assert discrete_gaussian_measurement(5, 7.0).map(3.0) <= (3 / 7.0) ** 2 / 2 * (1 + 1e-9)


def test_a_part_without_records_has_the_noise_of_all_steps():
    mechanism, silent = built(), Silent()
    mechanism.noise_share(GRADIENT, 64, silent)  # type: ignore[arg-type]
    one = built(replace(PLAN, steps=1), noise_multiplier=mechanism.noise_multiplier)
    assert silent.deviations[0] == pytest.approx(one.deviation_of(GRADIENT, 64) * 2**0.5)


def test_a_site_adds_less_noise_than_alone_and_the_sum_costs_no_more():
    shared = built(max_lost=0, max_colluding=0)
    alone = record_gaussian.build(record_gaussian.Config(epsilon=2.0, delta=1e-3, clip_norm=CLIP), PLAN)
    assert shared.noise_multiplier == pytest.approx(alone.noise_multiplier)
    assert shared.deviation_of(GRADIENT, 64) / GRID == pytest.approx(alone.noise_multiplier * (2 / 10) ** 0.5, rel=1e-4)
    assert accountant.epsilon(shared.planned_costs(), 1e-3) <= 2.0


def test_the_noise_tells_no_sites_number_of_records():
    """Sites of any size plan the same noise, and the same batch, from `least_records`."""
    plans = [replace(PLAN, num_records=n, sampling_rate=10 / n, participations=p) for n, p in ((50, 5), (800, 2))]
    small, large = (built(plan, least_records=50) for plan in plans)
    assert small.noise_multiplier == large.noise_multiplier
    assert (small.expected_batch, large.expected_batch) == (10, 10)
    assert small.planned_costs() == large.planned_costs()
    with pytest.raises(PrivacyError, match=r"privacy.least_records = 60"):
        built(plans[0], least_records=60)


def test_a_grid_too_coarse_for_its_noise_is_refused(monkeypatch):
    assert sum_gap(1000.0, 10) == 0.0
    assert sum_gap(0.5, 10) > LARGEST_GAP
    monkeypatch.setattr(shared_gaussian, "GRID", 1)
    with pytest.raises(PrivacyError, match="no Gaussian"):
        built(noise_multiplier=0.5)


def test_the_gap_bounds_the_sum_of_two_discrete_gaussians():
    """arXiv 2102.06387, theorem 1, against the distributions themselves."""
    deviation, points = 0.8, torch.arange(-40, 41, dtype=torch.float64)
    one = torch.exp(-(points**2) / (2 * deviation**2))
    one /= one.sum()
    both = torch.nn.functional.conv1d(one[None, None], one[None, None].flip(-1), padding=40)[0, 0]
    ideal = torch.exp(-(points**2) / (4 * deviation**2))
    ratio = (both / (ideal / ideal.sum())).log().abs()[30:51]
    assert 1e-9 < float(ratio.max()) <= sum_gap(deviation, 2)


def test_sums_beyond_the_ring_are_refused():
    with pytest.warns(PrivacyWarning), pytest.raises(PrivacyError, match="ring"):
        built(replace(PLAN, num_records=1 << 42))


@pytest.mark.parametrize(
    ("invited", "lost", "colluding"), [(3, 1, 1), (10, 5, 0), (10, 4, 2), (10, 0, 10), (2, 0, 1), (1, 0, 0), (5, 0, 4)]
)
def test_tolerances_that_protect_nobody_are_refused(invited, lost, colluding):
    with pytest.raises(PrivacyError, match=r"privacy.max_lost = \d+ and privacy.max_colluding"):
        tolerance(Config(epsilon=1.0, max_lost=lost, max_colluding=colluding), invited)


def test_tolerances_by_default():
    found = [tolerance(Config(epsilon=1.0), invited) for invited in (3, 10, 40)]
    assert [(one.lost, one.colluding, one.honest) for one in found] == [(0, 1, 2), (1, 3, 6), (4, 13, 23)]
    assert all(2 * one.least > one.invited + one.colluding for one in found)


def test_statistics_that_stay_at_a_site_are_refused():
    with pytest.raises(PrivacyError, match=r"privacy.statistics.weight"):
        built(statistics={"weight": 0.1})
