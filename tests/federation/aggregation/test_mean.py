"""Weighted means of what clients sent."""

import pytest
import torch

import small
from ficpd.federation.aggregation.mean import weighted_mean, weighted_mean_of
from ficpd.types import ClientUpdate


def updates(count: int = 6, scale: float = 1.0) -> list[ClientUpdate]:
    random = torch.Generator().manual_seed(count)
    deltas = [scale * torch.randn(3, 4, generator=random) for _ in range(count)]
    return [ClientUpdate(f"site-{i}", {"delta": delta}, 1.0 + i) for i, delta in enumerate(deltas)]


def test_each_counts_by_its_weight():
    two = [
        ClientUpdate("a", {"x": torch.tensor([0.0, 8.0])}, 3.0),
        ClientUpdate("b", {"x": torch.tensor([4.0, 0.0])}, 1.0),
    ]
    assert weighted_mean(two, "x").tolist() == [1.0, 6.0]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_the_order_changes_not_even_a_rounding(scale):
    given = updates(scale=scale)
    mean = weighted_mean(given, "delta")
    assert all(torch.equal(weighted_mean(small.shuffled(given, seed), "delta"), mean) for seed in range(5))
    expected = sum(u.weight * u.arrays["delta"].double() for u in given) / sum(u.weight for u in given)
    assert torch.allclose(mean.double(), expected, rtol=1e-6)
    assert mean.dtype == torch.float32


def test_the_order_does_not_matter_where_numbers_nearly_cancel():
    large = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(30)[:, None]
    values = [*large, *-large, torch.ones(16)]
    given = [ClientUpdate(f"site-{i:02}", {"x": value}) for i, value in enumerate(values)]
    means = {tuple(weighted_mean(small.shuffled(given, seed), "x").tolist()) for seed in range(8)}
    assert len(means) == 1


def test_only_the_ratio_of_weights_counts():
    given = updates()
    lighter = [ClientUpdate(u.client, u.arrays, u.weight * 1e-3) for u in given]
    assert small.close(weighted_mean(given, "delta"), weighted_mean(lighter, "delta"), 1e-6)


def test_a_mean_of_one_is_that_one_and_of_equals_theirs():
    (one,) = updates(1)
    assert torch.equal(weighted_mean([one], "delta"), one.arrays["delta"])
    same = [ClientUpdate(name, one.arrays, weight) for name, weight in (("a", 1.0), ("b", 7.0), ("c", 0.3))]
    assert torch.equal(weighted_mean(same, "delta"), one.arrays["delta"])


def test_named_arrays_are_averaged_alike_and_absent_names_ignored():
    given = updates()
    arrays, weights = {u.client: u.arrays["delta"] for u in given}, {u.client: u.weight for u in given} | {"gone": 9.0}
    assert torch.equal(weighted_mean_of(arrays, weights), weighted_mean(given, "delta"))
    assert torch.equal(weighted_mean_of(dict(reversed(list(arrays.items()))), weights), weighted_mean(given, "delta"))
