"""Two-point estimates: what they ask, that they point downhill, and what a record counts for."""

import pytest
import torch

import small
from ficpd.backbones.query_engine import run_queries, run_queries_lockstep
from ficpd.federation.client import ClientSession
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.optimizers.spsa import directional_derivatives
from ficpd.privacy import record_gaussian
from ficpd.types import Assignment, ClientWorkload, Query

RATE = 0.1


def training(**more) -> LocalTrainingConfig:
    given = {"optimizer": "spsa", "local_steps": 1, "batch_size": 13, "learning_rate": RATE, **more}
    return LocalTrainingConfig(**given)


def work(seen: ClientSession, of: LocalTrainingConfig, round: int = 1, **more):
    order = Assignment("fedavg", round, {}, {"rate": of.learning_rate})
    return tune(of, seen, order, seen.client.start.vectors_PD, **more)


def session(model, name: str = "site-4", mechanism=None) -> ClientSession:
    return ClientSession(small.clients(model, small.method("fedavg"), mechanism=mechanism)[name], 1)


def losses(model, seen: ClientSession, *prompts: torch.Tensor) -> torch.Tensor:
    return model.answer([Query(torch.stack(prompts), seen.client.encoded())])[0].loss_KB.mean(1)


def asked(model, of: LocalTrainingConfig, name: str, round: int = 1) -> list[Query]:
    queries, generator = [], work(session(model, name), of, round)
    answer = None
    try:
        while True:
            queries.append(generator.send(answer))  # type: ignore[arg-type]
            answer = model.answer([queries[-1]])[0]
    except StopIteration:
        return queries


def test_a_step_is_one_query_of_two_candidates_a_direction_and_no_gradient(model):
    queries = asked(model, training(directions=3, local_steps=2), "site-4")
    assert [(len(query.prompts_KPD), query.grad, len(query.batch)) for query in queries] == [(6, False, 13)] * 2
    start = small.start(model, small.classes()).vectors_PD
    up, down = queries[0].prompts_KPD.chunk(2)
    assert small.close(up - start, start - down, 1e-5)
    assert small.close((up - start).abs(), torch.full_like(up, RATE), 1e-5)


def test_all_clients_try_the_same_and_other_rounds_others(model):
    first, other = (asked(model, training(), name)[0].prompts_KPD for name in ("site-1", "site-4"))
    assert torch.equal(first, other)
    assert not torch.equal(first, asked(model, training(), "site-1", round=2)[0].prompts_KPD)
    assert not torch.equal(first, asked(model, training(seed=5), "site-1")[0].prompts_KPD)


def test_with_many_directions_it_goes_where_the_gradient_does(model):
    seen = session(model)
    start = seen.client.start.vectors_PD
    grad_KBPD = model.answer([Query(start[None], seen.client.encoded(), grad=True)])[0].grad_KBPD
    moved = run_queries(model, work(seen, training(directions=2000, perturbation=0.01))) - start
    cosine = torch.nn.functional.cosine_similarity(-moved.flatten(), grad_KBPD[0].mean(0).flatten(), dim=0)
    assert cosine > 0.95


def test_it_learns_from_losses_alone(model, monkeypatch):
    monkeypatch.setattr(type(model.backbone), "supports_gradients", False)
    seen = session(model)
    after = run_queries(model, work(seen, training(local_steps=40, directions=8)))
    first, last = losses(model, seen, seen.client.start.vectors_PD, after)
    assert last < 0.9 * first


def test_in_lock_step_as_one_by_one(model):
    names, of = ("site-0", "site-3"), training(local_steps=3)
    alone = {name: run_queries(model, work(session(model, name), of)) for name in names}
    together = dict(run_queries_lockstep(model, {name: work(session(model, name), of) for name in names}))
    assert all(small.close(alone[name], together[name], 1e-4) for name in names)


def test_a_record_counts_about_as_much_as_its_gradient(model):
    """So that a clip norm found for gradients fits: the K slopes of a record together, over √K."""
    seen = session(model)
    start, batch, apart = seen.client.start.vectors_PD, seen.client.encoded(), 0.01
    grad_KBPD = model.answer([Query(start[None], batch, grad=True)])[0].grad_KBPD
    signs = 1.0 - 2.0 * torch.randint(2, (400, *start.shape), generator=torch.Generator().manual_seed(0))
    both = torch.cat([start + apart * signs, start - apart * signs])
    norms_B = directional_derivatives(model.answer([Query(both, batch)])[0].loss_KB, apart).norm(dim=0)
    assert torch.allclose(norms_B, grad_KBPD[0].flatten(1).norm(dim=1), rtol=0.2)


def test_a_private_step_pays_once_for_all_directions(model):
    plan = ClientWorkload(13, 4 / 13, 3, 1, 5, 1.0, 1)
    mechanism = record_gaussian.build(record_gaussian.Config(noise_multiplier=1.0, clip_norm=1.0), plan)
    seen = session(model, mechanism=mechanism)
    after = run_queries(model, work(seen, training(local_steps=3, batch_size=4)))
    assert torch.isfinite(after).all()
    assert [(spend.name, spend.count) for spend in seen.costs] == [("prompt", 3)]


def test_a_strong_pull_keeps_it_where_it_began(model):
    of = training(local_steps=20, directions=8)
    start = small.start(model, small.classes()).vectors_PD
    ends = [run_queries(model, work(session(model), of, proximal_weight=weight)) for weight in (0.0, 30.0)]
    free, held = (end - start for end in ends)
    assert float(held.norm()) < 0.5 * float(free.norm())


@pytest.mark.slow
def test_a_whole_run_without_gradients_finds_its_clip_norm(tmp_path, monkeypatch):
    from ficpd.backbones.tiny import Tiny

    monkeypatch.setattr(Tiny, "supports_gradients", False)
    private = ("privacy.name=record_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3")
    for place, changes in enumerate(((), private, (*private, "compression.name=subspace", "compression.dimension=8",
                                                   "compression.directions=random"))):  # fmt: skip
        result = small.run(tmp_path / str(place), "fedavg", "training.optimizer=spsa", *changes)
        assert result.dropped_updates == 0
        assert result.queries.gradient == 0
    assert result.privacy.clip_norm == pytest.approx(0.2, abs=0.15)
