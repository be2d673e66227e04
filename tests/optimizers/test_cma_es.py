"""CMA-ES on pycma: its state in tensors goes on as if it had never stopped, and it learns from losses alone."""

import numpy as np
import pytest
import torch

import small
from ficpd import rng, storage
from ficpd.backbones.query_engine import run_queries
from ficpd.federation.client import ClientSession
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.optimizers.cma_es import CMAES, FULL, center_losses, init_state, spread
from ficpd.types import Assignment, Query, State


def long(candidates_KN: torch.Tensor) -> torch.Tensor:
    """A long valley: the last number counts a thousand times the first."""
    return (candidates_KN.double() - 1).square() @ torch.logspace(0, 3, candidates_KN.shape[1], dtype=torch.float64)


def random(place: int) -> torch.Generator:
    return rng.make_generator("a test", place)


@pytest.mark.parametrize("full", [True, False])
def test_a_state_written_and_read_after_every_generation_goes_on_as_one_search(full):
    whole, state = CMAES(init_state(6, 0.5, full), 9), init_state(6, 0.5, full)
    for place in range(25):
        ours = whole.ask(random(place))
        whole.tell(ours, long(ours))
        theirs = CMAES(state, 9).ask(random(place))
        assert torch.equal(ours, theirs)
        found = CMAES(state, 9).tell(theirs, long(theirs)).state  # another object than the one that was asked
        state = dict(storage.decode_state(storage.encode_state(State(found), {}))[0].arrays)
    assert small.same(whole.state, state)
    assert int(state["generation"]) == 25


@pytest.mark.parametrize("full", [True, False])
def test_it_finds_the_bottom_of_a_valley(full):
    search = CMAES(init_state(6, 0.5, full), 12)
    for place in range(150):
        candidates = search.ask(random(place))
        search.tell(candidates, long(candidates))
    assert small.close(search.mean, torch.ones(6), 1e-2)


def test_no_global_random_state_is_touched():
    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    search = CMAES(init_state(5, 1.0), 8)
    for place in range(3):
        candidates = search.ask(random(place))
        search.tell(candidates, long(candidates))
    assert (np.random.get_state()[1] == before[0]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_counts_like_the_worst(bad):
    candidates = CMAES(init_state(5, 1.0), 8).ask(random(0))
    losses = torch.arange(8.0)
    worst, broken = losses.clone(), losses.clone()
    worst[2], broken[2] = 7.0, bad
    told = [CMAES(init_state(5, 1.0), 8).tell(candidates, given).state for given in (worst, broken)]
    assert small.same(*told)
    assert torch.isfinite(CMAES(init_state(5, 1.0), 8).tell(candidates, torch.full((8,), bad)).mean).all()


def test_many_dimensions_have_a_diagonal():
    assert init_state(FULL, 1.0)["shape"].shape == (FULL, FULL)
    assert init_state(FULL + 1, 1.0)["shape"].shape == (FULL + 1,)


def training(**more) -> LocalTrainingConfig:
    given = {"optimizer": "cma_es", "local_steps": 1, "batch_size": 13, "learning_rate": 0.1, **more}
    return LocalTrainingConfig(**given)


def session(model, name: str = "site-4", **more) -> ClientSession:
    return ClientSession(small.clients(model, small.method("fedavg"), **more)[name], 1)


def work(seen: ClientSession, of: LocalTrainingConfig):
    return tune(of, seen, Assignment("fedavg", 1, {}, {"rate": 0.1}), seen.client.start.vectors_PD)


@pytest.mark.parametrize("dimension", [500, 12])
def test_it_learns_from_losses_alone(model, monkeypatch, dimension):
    monkeypatch.setattr(type(model.backbone), "supports_gradients", False)
    seen = session(model)
    after = run_queries(model, work(seen, training(local_steps=30, search_dimension=dimension)))
    both = torch.stack([seen.client.start.vectors_PD, after])
    first, last = model.answer([Query(both, seen.client.encoded())])[0].loss_KB.mean(1)
    assert last < 0.9 * first


def test_a_generation_is_one_query_the_same_for_all_clients(model):
    first, other = (next(work(session(model, name), training(population=7))) for name in ("site-1", "site-4"))
    assert torch.equal(first.prompts_KPD, other.prompts_KPD)
    assert (len(first.prompts_KPD), first.grad) == (7, False)


def test_candidates_lie_in_a_random_subspace_of_its_own(model):
    query = next(work(session(model), training(population=30, search_dimension=5)))
    offsets = (query.prompts_KPD - small.start(model, small.classes()).vectors_PD).flatten(1)
    assert int(torch.linalg.matrix_rank(offsets, atol=1e-4)) == 5
    assert float(offsets.square().mean().sqrt()) == pytest.approx(0.1, rel=0.3)


def test_a_record_counts_about_as_much_as_its_gradient(model):
    seen = session(model)
    start, batch = seen.client.start.vectors_PD, seen.client.encoded()
    grad_KBPD = model.answer([Query(start[None], batch, grad=True)])[0].grad_KBPD
    candidates = 0.01 * torch.randn(400, start.numel(), generator=torch.Generator().manual_seed(0))
    loss_KB = model.answer([Query(start + candidates.view(400, *start.shape), batch)])[0].loss_KB
    norms_B = (center_losses(loss_KB) / spread(candidates) / 400**0.5).norm(dim=0)
    assert torch.allclose(norms_B, grad_KBPD[0].flatten(1).norm(dim=1), rtol=0.2)


def test_a_whole_run_without_gradients(tmp_path, monkeypatch):
    from ficpd.backbones.tiny import Tiny

    monkeypatch.setattr(Tiny, "supports_gradients", False)
    for place, changes in enumerate(((), ("privacy.name=record_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3"))):
        given = ("training.optimizer=cma_es", "training.population=6", *changes)
        result = small.run(tmp_path / str(place), "fedavg", *given)
        assert result.dropped_updates == 0
        assert result.queries.gradient == 0
