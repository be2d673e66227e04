"""DP-FPL: what is noised, together and once; that the local prompt is made of noised numbers; and what it is good for."""

import pytest
import torch
from pydantic import ValidationError

import small
from contracts.test_leak import deaf
from contracts.test_mechanism import Silent
from ficpd.errors import ConfigError
from ficpd.federation.execution import personal_prompt
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.dp_fpl import Config, LowRankContext, low_rank_factors, low_rank_gradient
from ficpd.privacy import record_gaussian
from ficpd.types import ClientWorkload, Query

EXACT = small.LocalTrainingConfig(local_steps=3, batch_size=64, learning_rate=0.1)
"""Every step sees all records."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("local", [torch.zeros(6, 16), normal(6, 16), normal(6, 2) @ normal(2, 16, seed=1)])
@pytest.mark.parametrize("rank", [1, 3, 6, 40])
def test_factors_are_orthonormal_also_of_nothing(local, rank):
    u, v = low_rank_factors(local, rank, random())
    k = min(rank, 6)
    assert (u.shape, v.shape) == ((6, k), (k, 16))
    assert small.close(u.T @ u, torch.eye(k))
    assert small.close(v @ v.T, torch.eye(k))


def test_factors_span_a_local_prompt_of_their_rank():
    """One power iteration finds all of a matrix of rank k."""
    local = normal(6, 2) @ normal(2, 16, seed=1)
    u, v = low_rank_factors(local, 2, random())
    assert small.close(u @ (u.T @ local), local, 1e-4)
    assert small.close(local @ v.T @ v, local, 1e-4)


def test_what_is_rebuilt_is_the_gradients_projection_and_never_longer():
    u, v = low_rank_factors(normal(6, 16), 3, random())
    gradient = normal(6, 16, seed=2)
    found = low_rank_gradient(gradient @ v.T, u.T @ gradient, u, v)
    across = (torch.eye(6) - u @ u.T) @ gradient @ (torch.eye(16) - v.T @ v)  # what neither factor sees
    assert small.close(found, gradient - across)
    assert found.norm() < gradient.norm()
    assert small.close(low_rank_gradient(found @ v.T, u.T @ found, u, v), found)
    whole = low_rank_factors(normal(6, 16), 6, random())
    assert small.close(low_rank_gradient(gradient @ whole[1].T, whole[0].T @ gradient, *whole), gradient)


@pytest.mark.parametrize(("rank", "numbers"), [(1, 21), (2, 40), (4, 72), (6, 96)])
def test_the_lower_the_rank_the_less_noise_there_is_in_what_is_rebuilt(rank, numbers):
    """Of noise of variance 1 on both factors' gradients k(P + D) - k² numbers' worth stays in g_l: all P·D at full rank."""
    u, v = low_rank_factors(normal(6, 16), rank, random())
    draws = [low_rank_gradient(normal(6, rank, seed=3 * i), normal(rank, 16, seed=3 * i + 1), u, v) for i in range(400)]
    assert sum(float(one.square().sum()) for one in draws) / len(draws) == pytest.approx(numbers, rel=0.06)


class Noting:
    """A client whose mean notes the rows that it was given."""

    id = "site-0"

    def __init__(self):
        self.given = []

    def private_mean(self, values):
        self.given.append(values)
        return values.mean(1)


def test_a_records_three_gradients_are_those_of_the_factors_and_averaged_as_one(model):
    """g_u and g_v by autograd: with the residual held, as in the paper."""
    client = small.clients(model, small.method("local"), 1)["site-0"]
    shared, batch = client.start.vectors_PD, client.encoded()
    local, noting = 0.1 * normal(*shared.shape), Noting()
    carried = LowRankContext(noting, 2, 1)
    carried.factors = u, v = low_rank_factors(local, 2, random())
    answer = model.answer([Query((shared + local)[None], batch, grad=True)])[0]
    carried.private_mean(answer.grad_KBPD)
    (rows,) = noting.given
    tokens, width = shared.shape
    assert rows.shape == (1, len(batch), tokens * width + tokens * 2 + 2 * width)
    residual = local - u @ v
    for row, gradient in zip(rows[0], answer.grad_KBPD[0], strict=True):
        free = [factor.clone().requires_grad_() for factor in (u, v)]
        ((shared + free[0] @ free[1] + residual) * gradient).sum().backward()
        expected = torch.cat([gradient.flatten(), free[0].grad.flatten(), free[1].grad.flatten()])
        assert small.close(row, expected)


def test_one_record_moves_all_that_is_noised_by_at_most_the_clip_norm(model):
    clip, silent = 0.05, Silent()
    plan = ClientWorkload(8, 1.0, 1, 1, 1, 1.0, 1)
    mechanism = record_gaussian.build(record_gaussian.Config(noise_multiplier=1.0, delta=1e-3, clip_norm=clip), plan)
    gradients = 10 * normal(1, 8, 6, 16)
    found = []
    for rows in (gradients, gradients[:, 1:]):
        noting = Noting()
        noting.private_mean = lambda values: found.append(mechanism.noisy_mean(values, 1, silent)) or found[-1]
        carried = LowRankContext(noting, 3, 1)
        carried.factors = low_rank_factors(normal(6, 16), 3, random())
        carried.private_mean(rows)
    assert (found[0] - found[1]).norm() <= clip * (1 + 1e-5)
    assert (found[0] - found[1]).norm() > 0.9 * clip
    assert silent.deviations == [clip] * 2  # one noise, on all of it


def test_gradients_are_taken_where_only_noised_numbers_lead(model):
    """Under a mechanism that is deaf to the records all prompts that are asked about are the same, residual and all."""
    heard = []
    for seed in (1, 2):
        method, listening = small.method("dp_fpl", rank=1), small.Listening(model)
        list(small.alone(method, client := deaf(method, model, 12, seed), listening))
        heard.append([*listening.asked, client.client_state["local"]])
        assert client.client_state["local"].abs().max() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(*heard, strict=True))


def test_it_costs_what_fedavg_does_and_the_plan_is_what_is_spent(model):
    spent = {}
    for name in ("dp_fpl", "fedavg"):
        plan = ClientWorkload(12, 1 / 3, small.TRAINING.local_steps, 2, 1, 1.0, 2)
        mechanism = record_gaussian.build(record_gaussian.Config(epsilon=8.0, clip_norm=1.0), plan)
        method = small.method(name)
        members = small.clients(model, method, 1, mechanism=mechanism)
        members["site-0"].train = small.records(12)
        small.rounds(method, members, model)
        spent[name] = members["site-0"].account.spent()
        assert spent[name] == list(mechanism.planned_costs())
    assert spent["dp_fpl"] == spent["fedavg"]


@pytest.mark.parametrize("rank", [1, 8])
def test_the_local_prompt_is_better_at_home_than_the_global_alone(model, rank):
    method = small.method("dp_fpl", EXACT, rank=rank)
    members = small.clients(model, method)
    state, _ = small.rounds(method, members, model, RoundSchedule(8, 5, 0))
    losses = []
    for client in members.values():
        mine = personal_prompt(method, client, method.make_assignment(state, client.card, 9))
        asked = Query(torch.stack([method.global_prompt(state), mine]), client.encoded())
        losses.append(model.answer([asked])[0].loss_KB.mean(1))
    at_shared, at_mine = torch.stack(losses).mean(0)
    assert at_mine < 0.9 * at_shared


def test_a_newcomer_uses_the_global_prompt(model):
    method = small.method("dp_fpl")
    members = small.clients(model, method)
    state, _ = small.rounds(method, members, model)
    new = small.clients(model, method, 1)["site-0"]
    assignment = method.make_assignment(state, new.card, 3)
    assert torch.equal(personal_prompt(method, new, assignment), method.global_prompt(state))


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ValidationError):
        Config(rank=rank)


@pytest.mark.parametrize("optimizer", ["spsa", "cma_es"])
def test_losses_alone_have_nothing_to_carry(tmp_path, optimizer):
    with pytest.raises(ConfigError, match=f"training.optimizer = '{optimizer}' on tiny: dp_fpl needs gradients"):
        small.run(tmp_path, "dp_fpl", f"training.optimizer={optimizer}")
    assert not (tmp_path / "run").exists()
