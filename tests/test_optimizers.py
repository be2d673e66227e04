"""Tuners in coordinates: what they ask, how far they go, and that steps are linear where they say so."""

import pytest
import torch

import small
from ficpd.backbones.query_engine import run_queries
from ficpd.errors import BackboneError
from ficpd.experiments.initialization import public_gradients
from ficpd.federation.client import ClientSession
from ficpd.federation.compression import subspace
from ficpd.methods.shared.readouts import with_reading
from ficpd.optimizers import LocalTrainingConfig, map_queries, tune
from ficpd.privacy import record_gaussian
from ficpd.privacy.clipping import clip_scale
from ficpd.types import Assignment, ClientWorkload, Query


def session(model, directions: str = "gradient", dimension: int = 5) -> ClientSession:
    task = small.classes()
    start = small.start(model, task)
    compression = subspace.build(
        subspace.Config(dimension=dimension, directions=directions),  # type: ignore[arg-type]
        start, 0, lambda number: public_gradients(model, [task], start, 0, number),
    )  # fmt: skip
    members = small.clients(model, small.method("fedavg"), 3, compression=compression)
    return ClientSession(members["site-2"], 1)


def tuned(model, seen: ClientSession, optimizer: str, rate: float, steps: int = 3) -> torch.Tensor:
    training = LocalTrainingConfig(optimizer=optimizer, local_steps=steps, batch_size=9, learning_rate=rate)
    order = Assignment("fedavg", 1, {}, {"rate": rate})
    return run_queries(model, tune(training, seen, order, seen.client.start.vectors_PD))


def test_a_prompt_tuned_in_coordinates_stays_in_the_subspace(model):
    for optimizer in ("adam", "sgd"):
        for directions in ("gradient", "random"):
            seen = session(model, directions)
            delta = tuned(model, seen, optimizer, 0.05) - seen.client.start.vectors_PD
            assert float(delta.norm()) > 1e-3
            back = seen.subspace.lift(seen.subspace.project(delta))
            assert small.close(back, delta, 1e-5)


def test_gradients_in_coordinates_are_those_of_the_prompt(model):
    """d loss(rest + A z) / dz = A · d loss / d prompt, against a finite difference."""
    seen = session(model)
    batch, prompt = seen.client.encoded(), seen.client.start.vectors_PD
    grad = model.answer([Query(prompt[None], batch, grad=True)])[0].grad_KBPD[0].mean(0)
    z, step = torch.zeros(5), 1e-2
    for place in range(5):
        z = torch.zeros(5)
        z[place] = step
        both = torch.stack([prompt + seen.subspace.lift(z), prompt - seen.subspace.lift(z)])
        up, down = model.answer([Query(both, batch)])[0].loss_KB.mean(1)
        slope = float(up - down) / (2 * step)
        assert abs(slope - float(seen.subspace.project(grad)[place])) < 2e-3


def test_sgd_is_linear_in_the_gradient(model):
    seen = session(model)
    start = seen.client.start.vectors_PD
    once = tuned(model, seen, "sgd", 0.01, steps=1) - start
    twice = tuned(model, session(model), "sgd", 0.02, steps=1) - start
    assert small.close(twice, 2 * once, 1e-4)


def test_both_tuners_lower_the_loss(model):
    for optimizer in ("adam", "sgd"):
        seen = session(model, dimension=12)
        after, before = tuned(model, seen, optimizer, 0.05, steps=8), seen.client.start.vectors_PD
        losses = model.answer([Query(torch.stack([before, after]), seen.client.encoded())])[0].loss_KB.mean(1)
        assert losses[1] < losses[0]


def test_clipping_is_in_units_of_what_is_typical(model):
    """The longest direction counts as it is, shorter ones more: what comes back is in the units that went in."""
    seen = session(model)
    units = clip_scale(seen.subspace.grad_scale)
    assert float(units.min()) == 1.0
    assert units.argmin() == seen.subspace.grad_scale.argmax()
    next(iter(seen.batches(1, 9)))
    values = torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(0))
    assert small.close(seen.private_mean(values)[0], values[0].mean(0), 1e-5)


def test_public_gradients_see_no_record(model):
    """From the task's answers and the vocabulary alone: the same whatever anybody's records are."""
    task = small.classes()
    start = small.start(model, task)
    first, again = (public_gradients(model, [task], start, 4, 12) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (12, *start.vectors_PD.shape)
    assert not torch.equal(first, public_gradients(model, [task], start, 5, 12))


@pytest.mark.parametrize("candidates", [2, 6])
def test_zeroth_order_queries_pay_one_step_for_all_candidates(model, candidates):
    """Two points (Spall, 1992) or a population: a record's losses under all candidates are one contribution."""
    plan = ClientWorkload(9, 4 / 9, 3, 1, 3, 1.0, 1)
    mechanism = record_gaussian.build(record_gaussian.Config(noise_multiplier=1.0, clip_norm=1.0), plan)
    client = small.clients(model, small.method("fedavg"), 3, mechanism=mechanism)["site-2"]
    seen = ClientSession(client, 1)

    def tuned():
        prompt = client.start.vectors_PD
        for batch in seen.batches(3, 4):
            shifts = torch.randn(candidates, *prompt.shape, generator=torch.Generator().manual_seed(len(batch)))
            answer = yield Query(prompt + 0.1 * shifts, batch)
            loss_K = seen.private_mean(answer.loss_KB)
            prompt = prompt - 0.01 * torch.einsum("k,kpd->pd", loss_K - loss_K.mean(), shifts)
        return prompt

    after = run_queries(model, tuned())
    assert torch.isfinite(after).all()
    assert [(spend.name, spend.count) for spend in seen.costs] == [("prompt", 3)]


def test_a_failure_of_the_model_passes_through_every_wrapper_to_the_method(model):
    """The optimizer hears of it at its query, then each wrapper ends, then the method."""
    heard = []

    def work(name, inner=None):
        try:
            yield from inner or iter(())
            if inner is None:
                yield Query(torch.zeros(1, 4, 10), None)
        except BackboneError:
            heard.append(name)
            raise

    inner = map_queries(work("optimizer"), lambda query: query._replace(grad=True))
    outer = map_queries(work("method", with_reading(inner, None, None)), lambda query: query._replace(outputs=True))
    query = next(outer)
    assert query.grad
    assert query.outputs
    with pytest.raises(BackboneError, match="out of memory"):
        outer.throw(BackboneError("out of memory"))
    assert heard == ["optimizer", "method"]


def test_a_wrapper_rewrites_queries_and_answers_and_returns_the_result():
    def work():
        answer = yield Query(torch.ones(1, 2, 3), None)
        return answer

    wrapped = map_queries(
        work(),
        lambda query: query._replace(prompts_KPD=query.prompts_KPD * 2),
        lambda query, answer: (float(query.prompts_KPD.max()), answer),
    )
    assert float(next(wrapped).prompts_KPD.max()) == 2.0
    with pytest.raises(StopIteration) as end:
        wrapped.send("answer")
    assert end.value.value == (1.0, "answer")
