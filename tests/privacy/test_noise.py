"""Both sources of randomness: the deviation and rate they state, and what each promises of its stream.

Tests of `SecureNoise` cannot fix a seed: their bounds are such that an honest source fails once in 10^9 runs.
"""

import random

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, norm

from ficpd.privacy.noise import GRID_BITS, MARGIN, SecureNoise, SeededNoise, gaussian_measurement

CHANCE = 1e-9
NUMBERS = 20_000


def deviation_bounds(count: int, deviation: float, chance: float) -> tuple[float, float]:
    """Between which the root mean square of `count` Gaussian numbers lies, but for `chance`."""
    low, high = chi2.ppf([chance / 2, 1 - chance / 2], count)
    return deviation * (low / count) ** 0.5, deviation * (high / count) ** 0.5


def check_gaussian(source, deviation: float, centre: float, chance: float) -> None:
    values = torch.full((NUMBERS // 100, 100), centre)
    noise = source.add_gaussian(values, deviation).double() - values.double()
    assert noise.shape == values.shape
    low, high = deviation_bounds(NUMBERS, deviation * MARGIN if source.kind == "cryptographic" else deviation, chance)
    assert low < float(noise.square().mean()) ** 0.5 < high
    assert abs(float(noise.mean())) < norm.ppf(1 - chance / 2) * high / NUMBERS**0.5
    beyond = int((noise.abs() > 2 * deviation).sum())  # its tails are a Gaussian's, too
    assert binom.ppf(chance / 2, NUMBERS, 0.04550) <= beyond <= binom.ppf(1 - chance / 2, NUMBERS, 0.04552) + 1


def check_poisson(source, rate: float, chance: float) -> None:
    chosen = source.poisson_sample(NUMBERS, rate)
    low, high = binom.ppf([chance / 2, 1 - chance / 2], NUMBERS, rate)
    assert low <= len(chosen) <= high
    assert torch.equal(chosen, chosen.unique())
    assert 0 <= int(chosen.min()) < NUMBERS / 10 < NUMBERS * 9 / 10 < int(chosen.max()) < NUMBERS


def draws(source) -> list[torch.Tensor]:
    return [source.permutation(50), source.poisson_sample(500, 0.5), source.add_gaussian(torch.zeros(20), 1.0)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


SOURCES = [lambda: SeededNoise(1, "noise", 2), SecureNoise]


@pytest.mark.parametrize("source", SOURCES)
def test_what_any_source_returns(source):
    assert sorted(source().permutation(30).tolist()) == list(range(30))
    assert source().permutation(0).tolist() == source().poisson_sample(0, 0.5).tolist() == []
    assert source().poisson_sample(7, 1.0).tolist() == list(range(7))
    assert source().poisson_sample(1000, 0.0).tolist() == []
    noised = source().add_gaussian(torch.zeros(2, 3, dtype=torch.float64), 1.0)
    assert (noised.shape, noised.dtype, noised.device.type) == ((2, 3), torch.float32, "cpu")
    assert len(noised.unique()) == 6


@pytest.mark.parametrize("source", SOURCES)
def test_no_source_touches_a_global_generator(source):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    draws(source())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_noised_is_not_changed_and_carries_no_gradient(source):
    values = torch.ones(3, requires_grad=True)
    assert not source().add_gaussian(values, 1.0).requires_grad
    assert torch.equal(values, torch.ones(3))


def test_equal_names_give_one_stream_others_another():
    first = draws(SeededNoise(7, "noise", 3))
    assert equal(first, draws(SeededNoise(7, "noise", 3))) == [True] * 3
    for names in [(7, "noise", 4), (8, "noise", 3), (7, "cohort", 3), ("7", "noise", 3), (7, "noise", 3, 0)]:
        assert equal(first, draws(SeededNoise(*names))) == [False] * 3


def test_a_stream_goes_on():
    source = SeededNoise(7, "noise", 3)
    assert equal(draws(source), draws(source)) == [False] * 3


@pytest.mark.parametrize("rate", [0.003, 0.3, 0.9])
def test_simulated_samples_have_the_rate(rate):
    check_poisson(SeededNoise("sampled", rate), rate, 0.01)


@pytest.mark.parametrize(("deviation", "centre"), [(1.0, 0.0), (0.02, 0.0), (30.0, 1000.0)])
def test_simulated_noise_has_the_deviation(deviation, centre):
    check_gaussian(SeededNoise("deviation", deviation), deviation, centre, 0.01)


def test_records_join_independently():
    """Of pairs of records, as many join together as chance would have it."""
    source = SeededNoise("independent")
    together = sum({0, 1} <= set(source.poisson_sample(2, 0.3).tolist()) for _ in range(2000))
    assert binom.ppf(0.005, 2000, 0.09) <= together <= binom.ppf(0.995, 2000, 0.09)


def test_no_seed_repeats_a_cryptographic_stream():
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        seen.append(draws(SecureNoise()))
    assert equal(*seen) == [False] * 3


@pytest.mark.parametrize("rate", [0.003, 0.3, 0.9])
def test_cryptographic_samples_have_the_rate(rate):
    check_poisson(SecureNoise(), rate, CHANCE)


@pytest.mark.parametrize(("deviation", "centre"), [(1.0, 0.0), (0.02, 0.0), (30.0, 1000.0)])
def test_cryptographic_noise_has_the_deviation(deviation, centre):
    check_gaussian(SecureNoise(), deviation, centre, CHANCE)


def test_cryptographic_orders_put_each_number_anywhere():
    first = [int(SecureNoise().permutation(4)[0]) for _ in range(2000)]
    for place in range(4):
        assert binom.ppf(CHANCE / 8, 2000, 0.25) <= first.count(place) <= binom.ppf(1 - CHANCE / 8, 2000, 0.25)


@pytest.mark.parametrize("deviation", [0.013, 1.0, 1.5, 300.0])
def test_cryptographic_noise_lies_on_the_stated_grid(deviation):
    """2^-GRID_BITS of the deviation rounded down to a power of two: whatever the values' low bits were, they are gone."""
    step = 2.0 ** (np.floor(np.log2(deviation)) - GRID_BITS)
    values = (deviation * np.linspace(-3, 3, 200) * np.pi).tolist()
    noised = np.array(gaussian_measurement(200, deviation)(values)) / step
    assert (noised == np.round(noised)).all()
    assert (noised % 2 == 1).any()  # and on no coarser one


def test_cryptographic_noise_is_the_measurements_and_nothing_else(monkeypatch):
    def measurement(size, deviation):
        return lambda values: [value + size + deviation for value in values]

    monkeypatch.setattr("ficpd.privacy.noise.gaussian_measurement", measurement)
    assert torch.equal(SecureNoise().add_gaussian(torch.ones(2, 3), 0.5), torch.full((2, 3), 7.5))


@pytest.mark.parametrize("sensitivity", [1e-4, 0.01, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 256, 7680])
@pytest.mark.parametrize("multiplier", [0.3, 1.0, 5.0, 50.0, 1000.0])
def test_a_release_costs_no_more_than_the_gaussian_that_is_accounted(multiplier, size, sensitivity):
    cost = gaussian_measurement(size, multiplier * sensitivity).map(sensitivity)
    assert cost <= 1 / (2 * multiplier**2)
    assert cost > 0.99 / (2 * multiplier**2)  # nor is much more noise added than that
