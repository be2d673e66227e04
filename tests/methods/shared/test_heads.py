import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from ficpd.methods.shared import heads
from ficpd.methods.shared.heads import fit_heads, nearest_neighbours


def records(number: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    return F.normalize(torch.eye(6)[labels] + 0.4 * torch.randn(number, 6, generator=random), dim=1), labels


def up_to_scale(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference once the best factor is taken."""
    found, wanted = found.double(), wanted.double()
    return float((found - (found * wanted).sum() / (wanted * wanted).sum() * wanted).abs().max())


@pytest.mark.parametrize("place", range(len(heads.PENALTIES)))
def test_left_out_scores_are_those_of_fits_without_the_record(place):
    features, labels = records()
    penalty, wanted = heads.PENALTIES[place], F.one_hot(labels, 3).double().numpy()
    found = fit_heads(features, labels, 3)[place]
    left_out = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        fit = Ridge(alpha=penalty, tol=1e-12).fit(features[others].double().numpy(), wanted[others])
        left_out.append(torch.tensor(fit.predict(features[[i]].double().numpy())[0]))
    assert up_to_scale(found.loo_BC, torch.stack(left_out)) < 1e-4 * float(found.loo_BC.abs().max())


def test_a_head_without_prior_is_ridge_regression():
    features, labels = records()
    fit = Ridge(alpha=heads.PENALTIES[1]).fit(features.double().numpy(), F.one_hot(labels, 3).double().numpy())
    found = fit_heads(features, labels, 3)[1].logits(features)
    assert up_to_scale(found, torch.tensor(fit.predict(features.double().numpy()))) < 1e-4 * float(found.abs().max())


def test_a_head_is_shrunk_towards_the_one_it_is_given():
    """Three records of one label say nothing of the others; the prior head does."""
    features, labels = records(60)
    few = (labels == 0).nonzero()[:8, 0]
    prior = (10 * torch.eye(6)[:3], torch.zeros(3))
    alone, shrunk = fit_heads(features[few], labels[few], 3), fit_heads(features[few], labels[few], 3, prior)
    accuracy = [float((of[-1].logits(features).argmax(1) == labels).float().mean()) for of in (alone, shrunk)]
    assert accuracy[0] < 0.5 < accuracy[1]


def test_nearest_neighbours_leave_each_record_out():
    features, labels = records()
    found = nearest_neighbours(features, labels, 3)
    assert float((found.logits(features).argmax(1) == labels).float().mean()) > 0.9
    alone = nearest_neighbours(features[:2], labels[:2], 3)
    assert alone.loo_BC.argmax(1).tolist() == [1, 0], "each sees the other alone"


@pytest.mark.parametrize("features", [torch.ones(9, 4), torch.zeros(9, 4)])
def test_constant_features_are_no_error(features):
    for head in [
        *fit_heads(features, torch.zeros(9, dtype=torch.long), 2),
        nearest_neighbours(features, torch.zeros(9, dtype=torch.long), 2),
    ]:
        assert torch.isfinite(head.logits(features)).all()
        assert head.logits(features).argmax(1).tolist() == [0] * 9
