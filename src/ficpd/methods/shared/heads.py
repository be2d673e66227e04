"""Fits heads in closed form to one client's records: ridge regression towards a prior head, and nearest neighbours.

Both give exact leave-one-out scores, so no records have to be held back. Ridge regression of one-hot labels Y on features A,
shrunk towards a multiple m of a prior's scores S, in the dual:

    H = 11ᵀ/n + K (K + ρ)⁻¹, K the centred Gram matrix     left-out residual ((I - H)(Y - m_i S))_i / (1 - H_ii)

m_i is the multiple that fits the other records (PRESS: Allen, Technometrics 16, 1974; Hastie, Tibshirani and Friedman,
The Elements of Statistical Learning, section 7.10). If subjects are named, all records of one subject S are left out
together: (I - H)_SS⁻¹ ((I - H)(Y - m_S S))_S (Cook and Weisberg, Residuals and Influence in Regression, 1982).

Nearest neighbours weigh the client's records by exp(cosine / τ), as the memory of kNN-Per does (Marfoq et al., ICML 2022,
arXiv 2111.09360).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd.methods.shared.class_totals import left_out_priors, sum_over_subject

MIN_RECORDS = 8
"""Clients with fewer records fit no head."""
PENALTIES = (0.3, 3.0, 30.0)
SCALES = (2.0, 4.0, 8.0, 16.0, 32.0)
WIDTHS = (0.02, 0.05, 0.1)
TEMPERATURES = (1.0, 0.5, 2.0, 0.25)
STRENGTHS = (torch.inf, 50.0, 10.0, 2.0)
"""Strengths of the shared label shares in a client's label prior, in records. The first means no prior."""
SMOOTHING = 0.1
"""Pseudo-count of every label among nearest neighbours, in records."""


class OwnHead(NamedTuple):
    """loo_BC: leave-one-out logits of the client's records. A record's whole subject is left out.

    logits: [R, D] to [R, C] for any features.
    linear: rows [C, D] and bias [C], if the logits are linear in the features.
    """

    loo_BC: Tensor
    logits: Callable[[Tensor], Tensor]
    linear: tuple[Tensor, Tensor] | None = None

    def loss(self, targets_B: Tensor) -> float:
        return float(F.cross_entropy(self.loo_BC, targets_B))


def fit_heads(
    features_BD: Tensor,
    targets_B: Tensor,
    num_labels: int,
    prior: tuple[Tensor, Tensor] | None = None,
    penalties: Sequence[float] = PENALTIES,
    subject_B: Tensor | None = None,
) -> list[OwnHead]:
    """Fits one head for each penalty, at the scale with the smallest leave-one-out log loss.

    `prior`: rows [C, D] and bias [C] of a head to shrink towards, at the multiple that fits the records; None: zero.
    `subject_B`: numbers of the records' subjects, which are left out whole. Returns no head for a single subject.
    """
    if subject_B is not None and len(subject_B.unique()) < 2:
        return []
    rows_CD, bias_C = (
        (torch.zeros(num_labels, features_BD.shape[1]), torch.zeros(num_labels)) if prior is None else prior
    )
    rows_CD, bias_C = rows_CD.double().cpu(), bias_C.double().cpu()
    unit = max(float(features_BD.norm(dim=1).mean()), 1e-9)
    features = features_BD.double().cpu()
    wanted_BC = F.one_hot(targets_B.cpu(), num_labels).double()
    given_BC = features @ rows_CD.T + bias_C
    given_BC = given_BC - given_BC.mean(1, keepdim=True)
    along_B, squared_B = ((wanted_BC - 1 / num_labels) * given_BC).sum(1), (given_BC**2).sum(1)
    fit = _multiple(along_B.sum(), squared_B.sum())
    fit_B = _multiple(
        along_B.sum() - sum_over_subject(along_B, subject_B), squared_B.sum() - sum_over_subject(squared_B, subject_B)
    )
    rest_BC = wanted_BC - fit * given_BC
    mean_D, records = features.mean(0), len(features)
    inputs_BD = (features - mean_D) / unit
    kernel, identity = inputs_BD @ inputs_BD.T, torch.eye(records, dtype=torch.double)
    prior_rows, prior_bias = fit * (rows_CD - rows_CD.mean(0)), fit * (bias_C - bias_C.mean())
    heads = []
    for penalty in penalties:
        residual_BB = penalty * torch.linalg.inv(kernel + penalty * identity) - 1 / records  # I - H
        left_out_BC = residual_BB @ wanted_BC - fit_B[:, None] * (residual_BB @ given_BC)
        left_out_BC = _without_own(residual_BB, left_out_BC, subject_B)
        change_CD = (residual_BB @ rest_BC).T @ inputs_BD / (penalty * unit)
        bias = prior_bias + rest_BC.mean(0) - change_CD @ mean_D
        heads.append(_scaled(wanted_BC - left_out_BC, prior_rows + change_CD, bias, targets_B.cpu()))
    return heads


def _without_own(residual_BB: Tensor, residuals_BC: Tensor, subject_B: Tensor | None) -> Tensor:
    """Returns the residuals [B, C] of fits without each record's subject, from those of the whole fit."""
    if subject_B is None:
        return residuals_BC / residual_BB.diagonal().clamp(min=1e-6)[:, None]
    found_BC = torch.empty_like(residuals_BC)
    for subject in subject_B.unique():
        own = (subject_B == subject).nonzero()[:, 0]
        block_SS = residual_BB[own[:, None], own] + 1e-9 * torch.eye(len(own), dtype=torch.double)
        found_BC[own] = torch.linalg.solve(block_SS, residuals_BC[own])
    return found_BC


def _multiple(along: Tensor, squared: Tensor) -> Tensor:
    """Returns the least-squares multiple of a prior's scores, at least 0, from its products with labels and itself."""
    return (along / squared.clamp(min=1e-9)).clamp(min=0)


def _scaled(scores_BC: Tensor, rows_CD: Tensor, bias_C: Tensor, targets_B: Tensor) -> OwnHead:
    scale = min(SCALES, key=lambda s: float(F.cross_entropy(s * scores_BC, targets_B)))
    rows, bias = (scale * rows_CD).float(), (scale * bias_C).float()
    return OwnHead((scale * scores_BC).float(), lambda features: features.float().cpu() @ rows.T + bias, (rows, bias))


def nearest_neighbours(
    features_BD: Tensor, targets_B: Tensor, num_labels: int, subject_B: Tensor | None = None
) -> OwnHead:
    """Returns log label shares among a record's neighbours. The width has the smallest leave-one-out log loss."""
    memory_BD = F.normalize(features_BD.float().cpu(), dim=1)
    votes_BC = F.one_hot(targets_B.cpu(), num_labels).float()

    def shares(cosine_RB: Tensor, width: float) -> Tensor:
        nearest_R1 = cosine_RB.max(1, keepdim=True).values.clamp(min=-1.0)  # -1: a record without others
        weight_RB = ((cosine_RB - nearest_R1) / width).exp()
        return (weight_RB @ votes_BC + SMOOTHING).log()

    subject_B = torch.arange(len(memory_BD)) if subject_B is None else subject_B
    own_BB = (memory_BD @ memory_BD.T).masked_fill(subject_B[:, None] == subject_B, -torch.inf)
    found = {width: shares(own_BB, width) for width in WIDTHS}
    best = min(WIDTHS, key=lambda width: float(F.cross_entropy(found[width], targets_B.cpu())))
    return OwnHead(found[best], lambda features: shares(F.normalize(features.float().cpu(), dim=1) @ memory_BD.T, best))


class Calibration(NamedTuple):
    """loss: leave-one-out log loss of `temperature * logits + prior_C`."""

    loss: float
    temperature: float
    prior_C: Tensor


def calibrate(loo_BC: Tensor, targets_B: Tensor, subject_B: Tensor | None = None) -> Calibration:
    """Chooses the temperature and the strength of the client's label prior with the least leave-one-out log loss.

    The prior of a record is made of the labels of other records (subjects). Equal losses keep temperature 1 and no prior.
    """
    labels, found = loo_BC.shape[1], []
    for strength in STRENGTHS:
        prior_C, others_BC = left_out_priors(targets_B, torch.full((labels,), 1 / labels), strength, subject_B)
        for temperature in TEMPERATURES:
            loss = float(F.cross_entropy(temperature * loo_BC + others_BC, targets_B))
            found.append(Calibration(loss, temperature, prior_C))
    return min(found, key=lambda one: one.loss)
