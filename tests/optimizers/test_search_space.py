"""What black-box optimizers move in: how far, where, and that everybody draws the same."""

import pytest
import torch

import small
from ficpd.experiments.initialization import estimate_grad_norms_zeroth_order, public_gradients
from ficpd.federation.compression import subspace
from ficpd.optimizers.search_space import SearchSpace, clip_scale, regularizer


def compressed(model, directions: str = "gradient", dimension: int = 8):
    task = small.classes()
    start = small.start(model, task)
    config = subspace.Config(dimension=dimension, directions=directions)  # type: ignore[arg-type]
    return start, subspace.build(config, start, 0, lambda number: public_gradients(model, [task], start, 0, number))


def spaces(model) -> dict[str, SearchSpace]:
    shape = tuple(small.start(model, small.classes()).vectors_PD.shape)
    return {
        "whole": SearchSpace(shape, None),
        "of its own": SearchSpace(shape, None, 12, seed=3),
        "random": SearchSpace(shape, compressed(model, "random")[1].subspace),
        "gradient": SearchSpace(shape, compressed(model)[1].subspace),
    }


@pytest.mark.parametrize("kind", ["whole", "of its own", "random", "gradient"])
def test_a_unit_moves_the_prompts_numbers_by_one(model, kind):
    space = spaces(model)[kind]
    moved = space.lift(space.unit * space.signs(64, "a"))
    assert moved.shape == (64, 3, 16)
    assert float(moved.square().mean().sqrt()) == pytest.approx(1.0, rel=0.15)


def test_a_slope_is_what_a_gradient_is_before_it_is_clipped(model):
    """d loss / d y in the space's own units against the gradient that `ClientContext.private_mean` clips."""
    start, compression = compressed(model)
    coordinates = compression.subspace
    assert coordinates is not None
    space, gradient = SearchSpace(tuple(start.vectors_PD.shape), coordinates), torch.randn(3, 16)
    y = torch.zeros(8, requires_grad=True)
    (space.lift(y) * gradient).sum().backward()
    assert small.close(y.grad, coordinates.project(gradient) * clip_scale(coordinates.grad_scale), 1e-5)  # type: ignore[arg-type]


def test_it_is_the_whole_prompt_where_that_is_no_larger_than_the_subspace():
    assert SearchSpace((3, 16), None, 48).size == 48
    assert torch.equal(SearchSpace((3, 16), None, 500).lift(torch.arange(48.0)), torch.arange(48.0).view(3, 16))


def test_draws_go_by_names_alone(model):
    shape = (3, 16)
    first, again, other = (SearchSpace(shape, None, 12, seed) for seed in (1, 1, 2))
    y = torch.ones(12)
    assert torch.equal(first.lift(y), again.lift(y))
    assert not torch.equal(first.lift(y), other.lift(y))
    signs = first.signs(4, 7, "spsa", 2, 0)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs, other.signs(4, 7, "spsa", 2, 0))
    assert not torch.equal(signs, first.signs(4, 7, "spsa", 3, 0))


def test_pulls_are_those_of_tuners_with_gradients():
    prompt, start = torch.randn(1, 3, 16, requires_grad=True), torch.randn(3, 16)
    regularizer(prompt, start, 0.3, 0.7).sum().backward()
    assert small.close(prompt.grad[0], (0.3 * prompt + 0.7 * (prompt - start))[0].detach(), 1e-5)  # type: ignore[index]


@pytest.mark.parametrize("directions", ["gradient", "random"])
def test_slopes_tell_how_long_gradients_are(model, directions):
    start, compression = compressed(model, directions)
    coordinates, task = compression.subspace, small.classes()
    assert coordinates is not None
    gradients = coordinates.project(public_gradients(model, [task], start, 0, 200)) * clip_scale(coordinates.grad_scale)
    told = estimate_grad_norms_zeroth_order(model, [task], start, compression, 0, 200)
    assert float(told.median()) == pytest.approx(float(gradients.norm(dim=1).median()), rel=0.1)
