"""Mixes a client's received prompts and its own models, weighted by its records. The mixture is not sent.

Each candidate is a prompt with a readout. Its members differ in the temperature of the logits and in the strength of the
client's label prior. A readout that was learned from the client's records too is scored by another one
(`readouts.learn_readouts`). A member's weight is

    w_m ∝ π_m exp(-rank_m) exp(-½ n L_m)        L_m: the mean log loss of the client's n records

so the mixture is nearly as good as its best member (exponential weighting: Dalalyan and Tsybakov, Machine Learning 72,
2008; half the evidence, because losses of one client depend on each other). Ranks put shared models first. π puts simple
members first: the readout as received before own heads, no label prior before one. The label prior of a record comes
from the other records' labels. Own heads are scored by leave-one-out (`heads`). If the data name
subjects, both leave out all records of the record's subject.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ficpd.interfaces import ClientContext
from ficpd.methods.shared.class_totals import left_out_priors
from ficpd.methods.shared.heads import MIN_RECORDS, STRENGTHS, OwnHead, fit_heads, nearest_neighbours
from ficpd.methods.shared.readouts import reading
from ficpd.types import Answer, Batch, ModelOutput, Predictor, Query, Readout

TEMPERATURES, HEAD_TEMPERATURES = (0.5, 1.0, 2.0), (0.5, 1.0)
"""The temperatures of a readout as received, and of own heads, whose scale fits the records already."""
AS_RECEIVED, UNSHIFTED = 0.8, 0.5
"""π of the readout as received where there are own heads, and of the members without a label prior."""
WITHOUT_PRIOR = 0.1
"""Minimum weight of the members without a label prior, for clients whose labels shift."""
NEGLIGIBLE = 1e-4
"""Members and candidates with a smaller weight are left out."""


class Candidate(NamedTuple):
    """A prompt [P, D] and its readout (None: the task's label texts).

    neighbours: whether nearest neighbours are a member. They help without a learned readout: heads then shrink towards
        label texts, which do not separate many labels.
    scoring: the readout that scores the client's own records, and towards which heads shrink; None: `readout`.
    """

    prompt_PD: Tensor
    readout: Readout | None = None
    neighbours: bool = False
    scoring: Readout | None = None


class Member(NamedTuple):
    """log_BC: log probabilities of the client's own records, each without its own label.

    plain: logits of any records, before temperature and label prior. linear: their rows [C, D] and bias [C], if known.
    without_prior: whether the label prior is zero.
    share: π. Those of a candidate's members sum to 1.
    """

    log_BC: Tensor
    plain: Callable[[ModelOutput, Batch], Tensor | None]
    linear: tuple[Tensor, Tensor] | None
    temperature: float
    prior_C: Tensor
    without_prior: bool
    share: float

    def read(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns the logits [R, C] of any records."""
        logits_RC = self.plain(outputs, batch)
        assert logits_RC is not None, "a task with labels"
        return self.temperature * logits_RC.float().cpu() + self.prior_C

    def readout(self) -> tuple[Tensor, Tensor]:
        """Returns the rows [C, D] and the bias [C] that give these logits."""
        assert self.linear is not None, "a candidate with a readout"
        rows_CD, bias_C = (part.float().cpu() for part in self.linear)
        return self.temperature * rows_CD, self.temperature * bias_C + self.prior_C


def weigh_candidates(
    client: ClientContext, candidates: Sequence[Candidate]
) -> Generator[Query, Answer, list[Predictor]]:
    """Weights candidates, most shared first, by the client's own records.

    Returns only the first candidate if the task has no labels, or the client no records.
    """
    local = client.local_context()
    batch = local.full_batch()
    if not batch.task.num_labels or batch.targets is None or not len(batch):
        return [Predictor(candidates[0].prompt_PD)]
    members, weights = yield from weigh_members(candidates, batch, local.subject_B)
    return [
        Predictor(candidate.prompt_PD, _mixed(of, weight_M), float(weight_M.sum()))
        for candidate, of, weight_M in zip(candidates, members, weights, strict=True)
        if float(weight_M.sum()) > NEGLIGIBLE
    ]


def weigh_members(
    candidates: Sequence[Candidate], batch: Batch, subject_B: Tensor | None = None
) -> Generator[Query, Answer, tuple[list[list[Member]], list[Tensor]]]:
    """Returns each candidate's members, and their weights from the labelled records of `batch`. All weights sum to 1.

    subject_B: the records' subjects, each left out whole; None: each record alone.
    """
    assert batch.targets is not None
    targets_B = batch.targets.cpu()
    members: list[list[Member]] = []
    for candidate in candidates:
        answer = yield Query(candidate.prompt_PD[None], batch, outputs=True)
        assert answer.outputs_KB is not None
        members.append(_members(candidate, answer.outputs_KB, batch, targets_B, subject_B))
    return members, _weights(members, targets_B)


def _members(
    candidate: Candidate, outputs: ModelOutput, batch: Batch, targets_B: Tensor, subject_B: Tensor | None
) -> list[Member]:
    labels = batch.task.num_labels
    given, scoring = candidate.readout, candidate.scoring or candidate.readout
    shares_C = torch.full((labels,), 1 / labels) if given is None else given.shares_C
    plain = reading(given, None) or batch.task.logits
    logits_BC = (reading(scoring, None) or plain)(outputs, batch)
    assert logits_BC is not None, "a task with labels"
    logits_BC = logits_BC.float().cpu()
    linear = None if given is None else (given.rows_CD, given.bias_C)
    heads: list[OwnHead] = []
    if batch.readout_CD is not None and len(batch) >= MIN_RECORDS:
        prior = (batch.readout_CD, torch.zeros(labels)) if scoring is None else (scoring.rows_CD, scoring.bias_C)
        heads = fit_heads(outputs.features_RD, targets_B, labels, prior, subject_B=subject_B)
        if candidate.neighbours:
            heads.append(_doubled(nearest_neighbours(outputs.features_RD, targets_B, labels, subject_B)))
    priors = _label_priors(targets_B, shares_C, subject_B)
    share = AS_RECEIVED if heads else 1.0
    found = _tempered(logits_BC, plain, linear, priors, TEMPERATURES, share)
    for head in heads:
        share = (1 - AS_RECEIVED) / len(heads)
        found += _tempered(head.loo_BC, _head_logits(head), head.linear, priors, HEAD_TEMPERATURES, share)
    return found


def _doubled(head: OwnHead) -> OwnHead:
    return OwnHead(2 * head.loo_BC, lambda features: 2 * head.logits(features))


def _head_logits(head: OwnHead) -> Callable[[ModelOutput, Batch], Tensor]:
    return lambda outputs, batch: head.logits(outputs.features_RD)


class _LabelPrior(NamedTuple):
    """of_client: [C]. of_others: for each record that of the other records, [B, C]. share: of π."""

    of_client: Tensor
    of_others: Tensor
    none: bool
    share: float


def _label_priors(targets_B: Tensor, shares_C: Tensor, subject_B: Tensor | None) -> list[_LabelPrior]:
    """Returns one for each strength."""
    found = []
    for strength in STRENGTHS:
        none = strength == torch.inf
        share = UNSHIFTED if none else (1 - UNSHIFTED) / (len(STRENGTHS) - 1)
        found.append(_LabelPrior(*left_out_priors(targets_B, shares_C, strength, subject_B), none, share))
    return found


def _tempered(
    logits_BC: Tensor, plain: Callable[[ModelOutput, Batch], Tensor | None], linear: tuple[Tensor, Tensor] | None,
    priors: Sequence[_LabelPrior], temperatures: Sequence[float], share: float,
) -> list[Member]:  # fmt: skip
    """Returns a member for each label prior and temperature. Their π sum to `share`."""
    found = []
    for prior in priors:
        for temperature in temperatures:
            log_BC = (temperature * logits_BC + prior.of_others).log_softmax(1)
            own = share * prior.share / len(temperatures)
            found.append(Member(log_BC, plain, linear, temperature, prior.of_client, prior.none, own))
    return found


def _weights(members: Sequence[Sequence[Member]], targets_B: Tensor) -> list[Tensor]:
    """Returns each candidate's members' weights; all sum to 1."""
    rows = torch.arange(len(targets_B))
    evidence = [
        torch.stack([0.5 * m.log_BC[rows, targets_B].sum() - rank + math.log(m.share) for m in of])
        for rank, of in enumerate(members)
    ]
    weight_M = torch.cat(evidence).softmax(0)
    without_M = torch.tensor([m.without_prior for of in members for m in of])
    without = torch.cat(evidence).masked_fill(~without_M, -torch.inf).softmax(0)
    weight_M = (1 - WITHOUT_PRIOR) * weight_M + WITHOUT_PRIOR * without
    return list(weight_M.split([len(of) for of in members]))


def _mixed(members: Sequence[Member], weight_M: Tensor) -> Callable[[ModelOutput, Batch], Tensor]:
    """Returns logits whose softmax is the members' weighted probabilities."""
    least = NEGLIGIBLE * float(weight_M.max())
    kept = [(m, w) for m, w in zip(members, weight_M.tolist(), strict=True) if w > least]

    def logits(outputs: ModelOutput, batch: Batch) -> Tensor:
        mixed = sum(weight * member.read(outputs, batch).softmax(-1) for member, weight in kept)
        assert isinstance(mixed, Tensor)
        return mixed.clamp(min=1e-12).log()

    return logits
