"""The server's step: plain is FedAvg, momentum and Adam are what their papers say."""

import pytest
import torch
from pydantic import ValidationError

from ficpd.server.optimiser import FIRST, SECOND, ServerStep

DELTAS = [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 4.0]])]


def walked(step: ServerStep) -> list[torch.Tensor]:
    arrays, moves = {}, []
    for delta in DELTAS:
        move, arrays = step.moved(delta, arrays)
        moves.append(move)
    return moves


def test_plain_is_the_mean_update_times_the_rate():
    assert all(torch.equal(move, 0.5 * delta) for move, delta in zip(walked(ServerStep(rate=0.5)), DELTAS, strict=True))
    assert ServerStep().moved(DELTAS[0], {})[1] == {}


def test_momentum_adds_up_what_came_before():
    moves = walked(ServerStep(kind="momentum", momentum=0.5, rate=2.0))
    expected = 2 * (DELTAS[2] + 0.5 * DELTAS[1] + 0.25 * DELTAS[0])
    torch.testing.assert_close(moves[2], expected)


def test_adam_is_algorithm_2():
    moves = walked(ServerStep(kind="adam", rate=0.1, adaptivity=0.01))
    first = second = torch.zeros(1, 2)
    for delta in DELTAS:
        first, second = 0.9 * first + 0.1 * delta, 0.99 * second + 0.01 * delta * delta
    torch.testing.assert_close(moves[2], 0.1 * first / (second.sqrt() + 0.01))


def test_moments_are_found_again_and_no_others_kept():
    _, kept = ServerStep(kind="adam").moved(DELTAS[0], {"else": torch.ones(1)})
    assert set(kept) == {FIRST, SECOND}


@pytest.mark.parametrize("wrong", [{"kind": "sgd"}, {"rate": 0}, {"momentum": 1.0}, {"adaptivity": 0.0}, {"beta": 0.9}])
def test_what_is_no_step_is_refused(wrong):
    with pytest.raises(ValidationError):
        ServerStep(**wrong)
