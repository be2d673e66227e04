"""Heads in closed form: leave-one-out equals refits, and ridge regression equals scikit-learn's."""

import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from ficpd.methods.shared import heads
from ficpd.methods.shared.class_totals import left_out_priors, relative_prior
from ficpd.methods.shared.heads import calibrate, fit_heads, nearest_neighbours

LABELS, WIDTH = 3, 6


@pytest.fixture(autouse=True)
def unscaled(monkeypatch):
    """Keeps scores in units of the labels, and one width."""
    monkeypatch.setattr(heads, "SCALES", (1.0,))
    monkeypatch.setattr(heads, "WIDTHS", (0.1,))


def unit_records(count: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of length one, so that refits on fewer records have the same unit, and labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    features_BD = F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1)
    noisy_BC = features_BD[:, :LABELS] + 0.3 * torch.randn(count, LABELS, generator=generator)
    return features_BD, noisy_BC.argmax(1)


def given_head(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows_CD = torch.eye(LABELS, WIDTH) + 0.3 * torch.randn(LABELS, WIDTH, generator=generator)
    return rows_CD, torch.randn(LABELS, generator=generator)


def without(place: int, *values: torch.Tensor) -> list[torch.Tensor]:
    return [torch.cat([value[:place], value[place + 1 :]]) for value in values]


@pytest.mark.parametrize("prior", [None, given_head()])
@pytest.mark.parametrize("penalty", [0.3, 1.0, 30.0])
def test_leave_one_out_equals_a_refit_without_each_record(prior, penalty):
    features_BD, targets_B = unit_records()
    (head,) = fit_heads(features_BD, targets_B, LABELS, prior, [penalty])
    refits = []
    for place in range(len(features_BD)):
        (refit,) = fit_heads(*without(place, features_BD, targets_B), LABELS, prior, [penalty])
        refits.append(refit.logits(features_BD[place : place + 1]))
    assert torch.allclose(head.loo_BC, torch.cat(refits), atol=1e-5)
    assert not torch.allclose(head.loo_BC, head.logits(features_BD), atol=1e-2)


PEOPLE = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 0, 6, 7, 7, 8, 5, 9, 9, 9, 0])
"""Each of twenty records' subject."""


@pytest.mark.parametrize("prior", [None, given_head()])
@pytest.mark.parametrize("penalty", [0.3, 30.0])
def test_where_subjects_are_named_a_record_is_scored_without_all_of_its_subject(prior, penalty):
    features_BD, targets_B = unit_records()
    (head,) = fit_heads(features_BD, targets_B, LABELS, prior, [penalty], PEOPLE)
    near = nearest_neighbours(features_BD, targets_B, LABELS, PEOPLE)
    _, priors_BC = left_out_priors(targets_B, torch.full((LABELS,), 1 / LABELS), 10.0, PEOPLE)
    for person in PEOPLE.unique():
        own = PEOPLE.eq(person)
        rest = ~own
        (refit,) = fit_heads(features_BD[rest], targets_B[rest], LABELS, prior, [penalty])
        assert torch.allclose(head.loo_BC[own], refit.logits(features_BD[own]), atol=1e-5)
        fewer = nearest_neighbours(features_BD[rest], targets_B[rest], LABELS)
        assert torch.allclose(near.loo_BC[own].softmax(1), fewer.logits(features_BD[own]).softmax(1), atol=1e-5)
        counts_C = F.one_hot(targets_B[rest], LABELS).float().sum(0)
        assert torch.allclose(priors_BC[own], relative_prior(counts_C, torch.full((LABELS,), 1 / LABELS), 10.0))
    alone = fit_heads(features_BD, targets_B, LABELS, prior, [penalty], torch.arange(20))[0]
    plain = fit_heads(features_BD, targets_B, LABELS, prior, [penalty])[0]
    assert torch.allclose(alone.loo_BC, plain.loo_BC, atol=1e-5)


def test_a_subject_who_has_all_records_has_nothing_to_be_scored_by():
    features_BD, targets_B = unit_records()
    assert fit_heads(features_BD, targets_B, LABELS, subject_B=torch.zeros(20, dtype=torch.long)) == []
    everybody = nearest_neighbours(features_BD, targets_B, LABELS, torch.zeros(20, dtype=torch.long))
    assert torch.allclose(everybody.loo_BC.softmax(1), torch.full((20, LABELS), 1 / LABELS))


@pytest.mark.parametrize("length", [1.0, 7.0])
@pytest.mark.parametrize("penalty", [0.3, 3.0])
def test_ridge_regression_equals_scikit_learns_on_features_of_mean_length_one(penalty, length):
    features_BD, targets_B = unit_records()
    (head,) = fit_heads(length * features_BD, targets_B, LABELS, None, [penalty])
    theirs = Ridge(alpha=penalty).fit(features_BD.double().numpy(), F.one_hot(targets_B, LABELS).double().numpy())
    others_BD, _ = unit_records(7, 1)
    expected = torch.as_tensor(theirs.predict(others_BD.double().numpy())).float()
    assert torch.allclose(head.logits(length * others_BD), expected, atol=1e-5)


def test_ridge_regression_towards_a_prior_equals_scikit_learns_on_its_residual():
    features_BD, targets_B = unit_records()
    rows_CD, bias_C = given_head()
    scores_BC = features_BD @ rows_CD.T + bias_C
    scores_BC = scores_BC - scores_BC.mean(1, keepdim=True)
    wanted_BC = F.one_hot(targets_B, LABELS).float()
    fit = torch.linalg.lstsq(scores_BC.reshape(-1, 1), (wanted_BC - 1 / LABELS).reshape(-1, 1)).solution.squeeze()
    assert fit > 0
    rest_BC = (wanted_BC - fit * scores_BC).double()
    theirs = Ridge(alpha=3.0).fit(features_BD.double().numpy(), rest_BC.numpy())
    expected = fit * scores_BC + torch.as_tensor(theirs.predict(features_BD.double().numpy())).float()
    (head,) = fit_heads(features_BD, targets_B, LABELS, (rows_CD, bias_C), [3.0])
    assert torch.allclose(head.logits(features_BD), expected, atol=1e-5)


def test_a_prior_that_fits_the_opposite_labels_is_left_out():
    features_BD, targets_B = unit_records()
    rows_CD = -torch.eye(LABELS, WIDTH)
    pairs = [fit_heads(features_BD, targets_B, LABELS, prior) for prior in ((rows_CD, torch.zeros(LABELS)), None)]
    for with_prior, plain in zip(*pairs, strict=True):
        assert torch.allclose(with_prior.logits(features_BD), plain.logits(features_BD), atol=1e-6)


def test_a_strong_penalty_keeps_the_prior_for_a_label_without_records():
    features_BD, targets_B = unit_records()
    seen = targets_B < LABELS - 1
    prior = (torch.eye(LABELS, WIDTH), torch.zeros(LABELS))
    (head,) = fit_heads(features_BD[seen], targets_B[seen], LABELS, prior, [1e6])
    found_C = head.logits(torch.eye(WIDTH)[LABELS - 1 : LABELS])[0]
    assert found_C[-1] > head.logits(torch.eye(WIDTH)[:1])[0, -1]


def test_the_scale_has_the_least_leave_one_out_log_loss(monkeypatch):
    features_BD, targets_B = unit_records()
    (plain,) = fit_heads(features_BD, targets_B, LABELS, None, [1.0])
    monkeypatch.setattr(heads, "SCALES", (1.0, 2.0, 4.0, 8.0))
    (head,) = fit_heads(features_BD, targets_B, LABELS, None, [1.0])
    losses = {s: float(F.cross_entropy(s * plain.loo_BC, targets_B)) for s in (1.0, 2.0, 4.0, 8.0)}
    best = min(losses, key=losses.__getitem__)
    assert best > 1.0
    assert torch.allclose(head.logits(features_BD), best * plain.logits(features_BD), rtol=1e-5)
    assert head.loss(targets_B) == pytest.approx(losses[best])


def test_nearest_neighbours_leave_each_record_out_of_its_own_neighbours():
    features_BD, targets_B = unit_records()
    head = nearest_neighbours(3.0 * features_BD, targets_B, LABELS)
    refits = []
    for place in range(len(features_BD)):
        refit = nearest_neighbours(*without(place, features_BD, targets_B), LABELS)
        refits.append(refit.logits(features_BD[place : place + 1]))
    assert torch.allclose(head.loo_BC, torch.cat(refits), atol=1e-4)
    assert head.logits(features_BD).argmax(1).tolist() == targets_B.tolist()


def test_constant_features_give_finite_scores_of_the_majority():
    targets_B = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1])
    features_BD = torch.ones(len(targets_B), WIDTH)
    for head in [*fit_heads(features_BD, targets_B, LABELS), nearest_neighbours(features_BD, targets_B, LABELS)]:
        assert head.loo_BC.isfinite().all()
        assert head.logits(features_BD).argmax(1).tolist() == [1] * len(targets_B)


def test_the_label_prior_of_a_record_is_made_of_the_others(monkeypatch):
    monkeypatch.setattr(heads, "STRENGTHS", (10.0,))
    monkeypatch.setattr(heads, "TEMPERATURES", (1.0,))
    _, targets_B = unit_records()
    logits_BC = torch.randn(len(targets_B), LABELS, generator=torch.Generator().manual_seed(2))
    equal_C, counts_C = torch.full((LABELS,), 1 / LABELS), F.one_hot(targets_B, LABELS).float().sum(0)
    priors = [relative_prior(counts_C - one, equal_C, 10.0) for one in F.one_hot(targets_B, LABELS).float()]
    found = calibrate(logits_BC, targets_B)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits_BC + torch.stack(priors), targets_B)))
    assert torch.allclose(found.prior_C, relative_prior(counts_C, equal_C, 10.0))


def test_a_client_of_few_labels_has_a_strong_prior():
    targets_B = torch.tensor([0] * 30 + [1] * 2)
    found = calibrate(torch.zeros(len(targets_B), LABELS), targets_B)
    assert found.prior_C.argmax() == 0
    assert found.loss < float(F.cross_entropy(torch.zeros(len(targets_B), LABELS), targets_B))


def test_labels_that_logits_explain_need_no_prior_and_sharper_logits():
    targets_B = torch.arange(30) % LABELS
    found = calibrate(2.0 * F.one_hot(targets_B, LABELS).float(), targets_B)
    assert found.temperature == max(heads.TEMPERATURES)
    assert not found.prior_C.any()


def test_one_record_gives_no_prior():
    assert not calibrate(torch.zeros(1, LABELS), torch.tensor([2])).prior_C.any()
