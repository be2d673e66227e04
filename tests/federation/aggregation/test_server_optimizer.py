"""The server's step: plain is FedAvg, momentum and Adam are what their papers say."""

import pytest
import torch
from pydantic import ValidationError

from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig
from ficpd.federation.aggregation.server_optimizer import FIRST, SECOND, ServerOptimizer, fedexp_factor
from ficpd.types import ClientUpdate

DELTAS = [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 4.0]])]


def walked(step: ServerOptimizer) -> list[torch.Tensor]:
    arrays, moves = {}, []
    for delta in DELTAS:
        move, arrays = step.step(delta, arrays)
        moves.append(move)
    return moves


def test_plain_is_the_mean_update_times_the_rate():
    moves = walked(ServerOptimizer(rate=0.5))
    assert all(torch.equal(move, 0.5 * delta) for move, delta in zip(moves, DELTAS, strict=True))
    assert ServerOptimizer().step(DELTAS[0], {})[1] == {}


def test_momentum_adds_up_what_came_before():
    moves = walked(ServerOptimizer(kind="momentum", momentum=0.5, rate=2.0))
    expected = 2 * (DELTAS[2] + 0.5 * DELTAS[1] + 0.25 * DELTAS[0])
    torch.testing.assert_close(moves[2], expected)


def test_adam_is_algorithm_2():
    moves = walked(ServerOptimizer(kind="adam", rate=0.1, adaptivity=0.01))
    first = second = torch.zeros(1, 2)
    for delta in DELTAS:
        first, second = 0.9 * first + 0.1 * delta, 0.99 * second + 0.01 * delta * delta
    torch.testing.assert_close(moves[2], 0.1 * first / (second.sqrt() + 0.01))


def test_moments_are_found_again_and_no_others_kept():
    _, kept = ServerOptimizer(kind="adam").step(DELTAS[0], {"else": torch.ones(1)})
    assert set(kept) == {FIRST, SECOND}


@pytest.mark.parametrize("wrong", [{"kind": "sgd"}, {"rate": 0}, {"momentum": 1.0}, {"adaptivity": 0.0}, {"beta": 0.9}])
def test_what_is_no_step_is_refused(wrong):
    with pytest.raises(ValidationError):
        ServerOptimizer(**wrong)


def eta(deltas: torch.Tensor, weights: list[float] | None = None, noise: float | None = 0.0) -> float:
    shares = weights or [1.0] * len(deltas)
    mean = torch.tensordot(torch.tensor(shares) / sum(shares), deltas, dims=1)
    named = {str(place): delta for place, delta in enumerate(deltas)}
    return fedexp_factor(mean, named, dict(zip(named, shares, strict=True)), noise)


def test_a_step_is_longer_by_as_much_as_clients_disagree():
    eight = torch.eye(8)[:, None]
    assert eta(torch.ones(8, 1, 3)) == 1
    assert eta(eight) == pytest.approx(4)
    half_way = eight + eight.mean(0)  # Σ|δ|² / 8 = 1.375, |mean|² = 0.5
    assert eta(half_way) == pytest.approx(1.375)
    assert eta(eight[:2]) == 1


def test_weights_count_as_in_the_mean():
    eight = torch.eye(8)[:, None]
    weights = [3.0] * 4 + [1.0] * 4
    assert eta(eight, weights) == pytest.approx(1 / (2 * 4 * (9 + 1) / 256))
    assert eta(eight[:4], [1.0, 1.0, 1.0, 1e6]) == pytest.approx(1)


def test_a_mean_of_nearly_nothing_is_not_followed_far():
    """Eight who pull north and nine who pull south: the paper's η would be 144, and the step longer than any of them."""
    opposed = torch.cat([torch.ones(8, 1, 1), -torch.ones(9, 1, 1)])
    assert eta(opposed) == pytest.approx(8.5)
    assert eta(torch.cat([torch.ones(8, 1, 1), -torch.ones(8, 1, 1)])) == 1


def test_noise_is_no_disagreement():
    """Alike but for noise: their lengths alone would make the step nearly five times as long."""
    drawn = torch.Generator().manual_seed(0)
    clean, noise = torch.ones(16, 1, 50) / 50**0.5, torch.randn(16, 1, 50, generator=drawn)
    noisy = clean + noise
    assert eta(noisy) > 4
    assert eta(noisy, noise=50.0) < 1.05
    assert eta(noisy, noise=None) == 1


def test_lengths_are_not_taken_of_what_a_rule_distrusts():
    step = ServerOptimizer(kind="extrapolated")
    step.check(RobustConfig(rule="norm_bound"))
    for rule in ("trimmed_mean", "multi_krum"):
        with pytest.raises(ValueError, match=f'"{rule}"'):
            step.check(RobustConfig(rule=rule))
        ServerOptimizer().check(RobustConfig(rule=rule))


def test_by_another_rule_than_the_mean_no_claimed_weight_makes_a_step_longer():
    """Four at right angles; the first says that it counts a million times."""
    claims = (1e6, 1.0, 1.0, 1.0)
    came = [ClientUpdate(str(i), {"delta": torch.eye(4)[None, i]}, claims[i]) for i in range(4)]
    step, member = ServerOptimizer(kind="extrapolated"), dict.fromkeys("0123", 0)
    more = step.per_client_extrapolation(RobustAggregator(RobustConfig(rule="norm_bound"), came), member, 0.0)
    torch.testing.assert_close(more["3"], torch.full((1, 4), 0.25))  # η = 2: once more the mean
    assert ServerOptimizer().per_client_extrapolation(RobustAggregator(RobustConfig(), came), member, 0.0) == {}
