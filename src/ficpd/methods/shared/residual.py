"""Tunes a client's residual on its shared prompt. The residual stays on the client."""

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng
from ficpd.interfaces import LocalContext
from ficpd.optimizers import LocalTrainingConfig, map_queries, tune
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, Batch, ModelOutput, Query

Result = TypeVar("Result")
TOWARDS, WEIGHT = "aligned/towards", "aligned/weight"


class ContrastiveConfig(FrozenConfig):
    """The contrastive loss of a cluster.

    weight: in the first round; it falls to 0, because a constant one undoes personalisation.
    space: "prompt" needs no forward pass, "output" one for each prototype and the start.
    temperature: divides cosines.
    """

    weight: float = Field(default=0.0, ge=0)
    space: Literal["prompt", "output", "both"] = "prompt"
    temperature: float = Field(default=0.5, gt=0)


class ResidualConfig(Protocol):
    """The settings of a method with client residuals."""

    @property
    def residual(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def held_back(self) -> float: ...
    @property
    def contrast(self) -> ContrastiveConfig: ...


def tune_residual(
    config: ResidualConfig, training: LocalTrainingConfig, local: LocalContext, assignment: Assignment
) -> Generator[Query, Answer, None]:
    """Tunes the client state's "residual" [P, D] on the assigned prompt, with the optimizer's moments kept. Then
    selects a share of it (`_chosen`).

    The loss is the task's plus the contrastive loss. "low_rank": the residual is U V with U [P, r] and V [r, D]. Both are
    tuned, and V is zero at first.
    """
    base, steps = assignment.arrays["prompt"], training.local_steps
    if config.residual == "low_rank":
        begin = local.client_state.get("factors", _factors(base, config.rank, local.id))
        work = tune(training, local, assignment, begin, memory=local.client_state, steps=steps)
        work = _multiplied(work, base)
    else:
        begin = base + local.client_state.get("residual", torch.zeros_like(base))
        work = tune(training, local, assignment, begin, memory=local.client_state, steps=steps)
    found = yield from _kept_near(work, config, local, assignment)
    if config.residual == "low_rank":
        local.client_state["factors"] = found
        found = base + _product(found, len(base))
    local.client_state["residual"] = found - base
    yield from _chosen(local, assignment)


SHARES = (0.0, 0.25, 0.5, 1.0)


def personal_prompt(kept: Mapping[str, Tensor], assignment: Assignment) -> Tensor:
    """Returns the client's own prompt [P, D], given its current assignment."""
    base = (
        assignment.arrays["global"]
        if "global" in assignment.arrays and kept.get("global", ZERO)
        else assignment.arrays["prompt"]
    )
    return base + kept["share"] * kept["residual"] if "share" in kept else base


ZERO = torch.zeros(())


def _chosen(local: LocalContext, assignment: Assignment) -> Generator[Query, Answer, None]:
    """Selects a prompt: the global one, the cluster's, or that with a quarter, half or all of the residual.

    It takes the first, in this order, whose held-out loss is within a standard error (of the paired difference) of the
    lowest. Without held-out records the choice is unchanged, at first the whole residual.
    """
    held, base = local.holdout(), assignment.arrays["prompt"]
    local.client_state.setdefault("share", torch.ones(()))
    local.client_state.setdefault("global", ZERO)
    if not len(held):
        return
    tried = [assignment.arrays["global"]] if "global" in assignment.arrays else []
    tried += [base + share * local.client_state["residual"] for share in SHARES]
    answer = yield Query(torch.stack(tried), held)
    best = _simplest(answer.loss_KB.cpu()) - (len(tried) - len(SHARES))
    local.client_state |= {"share": torch.tensor(SHARES[max(best, 0)]), "global": torch.tensor(float(best < 0))}


def _simplest(loss_KB: Tensor) -> int:
    """Returns the first candidate within one standard error of the best."""
    worse_KB = loss_KB - loss_KB[loss_KB.mean(1).argmin()]
    error_K = worse_KB.std(1, correction=0) / max(loss_KB.shape[1] - 1, 1) ** 0.5
    return int((worse_KB.mean(1) <= error_K).int().argmax())


def _factors(base_PD: Tensor, rank: int, client: str) -> Tensor:
    """Returns [r, P + D]: U and V. A step of V moves the product about as far as a step of the whole prompt."""
    random = torch.randn(rank, len(base_PD), generator=rng.make_generator("residual", client)) / rank**0.5
    return torch.cat([random, torch.zeros(rank, base_PD.shape[1])], dim=1)


def _product(factors: Tensor, num_tokens: int) -> Tensor:
    """Maps [..., r, P + D] to [..., P, D]."""
    return factors[..., :num_tokens].transpose(-1, -2) @ factors[..., num_tokens:]


def _multiplied(work: Generator[Query, Answer, Tensor], base_PD: Tensor) -> Generator[Query, Answer, Tensor]:
    """Replaces the optimizer's queries of U and V by base + U V. Returns gradients with respect to U and V."""
    num_tokens = len(base_PD)

    def on_query(query: Query) -> Query:
        return query._replace(prompts_KPD=base_PD + _product(query.prompts_KPD, num_tokens))

    def on_answer(query: Query, answer: Answer) -> Answer:
        factors, grad = query.prompts_KPD, answer.grad_KBPD
        if grad is None:
            return answer
        left_KPr, right_KrD = factors[..., :num_tokens].transpose(-1, -2), factors[..., num_tokens:]
        for_left = (grad @ right_KrD[:, None].to(grad.device).transpose(-1, -2)).transpose(-1, -2)
        for_right = left_KPr[:, None].to(grad.device).transpose(-1, -2) @ grad
        return answer._replace(grad_KBPD=torch.cat([for_left, for_right], dim=-1))

    return map_queries(work, on_query, on_answer)


def _kept_near(
    work: Generator[Query, Answer, Tensor], config: ResidualConfig, local: LocalContext, assignment: Assignment
) -> Generator[Query, Answer, Tensor]:
    """Adds the contrastive loss to an optimizer's answers."""
    base, start, others = assignment.arrays["prompt"], local.start, assignment.arrays.get("others_KPD")
    contrast, weight = config.contrast, assignment.facts["contrast"]
    alone = others is None or not len(others) or weight == 0
    in_outputs, in_prompts = contrast.space != "prompt" and not alone, contrast.space != "output" and not alone
    try:
        query = next(work)
        while True:
            if in_outputs and len(query.batch):
                seen = yield Query(torch.stack([base, start, *others]), query.batch, outputs=True)  # type: ignore[misc]
                query = _towards(query, seen, weight, contrast.temperature)
            answer = yield query
            assert answer.grad_KBPD is not None
            if in_prompts:
                prompt = query.prompts_KPD[0]
                pull = weight * _pull(prompt - start, base - start, others - start, contrast.temperature)  # type: ignore[operator]
                answer = answer._replace(grad_KBPD=answer.grad_KBPD + pull.to(answer.grad_KBPD.device))
            query = work.send(answer)
    except StopIteration as end:
        return end.value


def _pull(way_PD: Tensor, towards_PD: Tensor, away_KPD: Tensor, temperature: float) -> Tensor:
    """Returns the gradient [P, D] of -log exp(cos(way, towards)/τ) / Σ exp(cos(way, ·)/τ), Σ over both targets.

    Vectors are offsets from the shared start, because whole prompts are nearly parallel to it. A zero offset has a
    zero gradient.
    """
    if way_PD.abs().max() < 1e-12 or towards_PD.abs().max() < 1e-12:
        return torch.zeros_like(way_PD)
    way = way_PD.clone().requires_grad_()
    targets = torch.stack([towards_PD, *away_KPD]).flatten(1)
    cosines = F.cosine_similarity(way.flatten()[None], targets, dim=1) / temperature
    (-cosines.log_softmax(0)[0]).backward()
    assert way.grad is not None
    return way.grad


def _towards(query: Query, seen: Answer, weight: float, temperature: float) -> Query:
    """Adds the features of `seen` ([cluster, start, others]) and the contrastive loss to a query."""
    assert seen.outputs_KB is not None
    features = seen.outputs_KB.features_RD.cpu()
    towards_BND = features.view(len(features) // len(query.batch), len(query.batch), -1).transpose(0, 1)
    scale = torch.full((len(query.batch), 2), weight)
    scale[:, 1] = temperature
    extra = {**query.batch.extra, TOWARDS: towards_BND, WEIGHT: scale}
    return query._replace(batch=replace(query.batch, extra=extra), loss=contrastive_loss)


def contrastive_loss(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns the task's loss plus weight · InfoNCE on features, [R].

    The cluster's prompt and the frozen start are the positives, other clusters' prompts the negatives (after FedPGP,
    Cui et al., ICML 2024, arXiv 2405.09771).
    """
    weight_R, temperature_R = batch.extra[WEIGHT].unbind(1)
    cosines_RN = F.cosine_similarity(outputs.features_RD[:, None], batch.extra[TOWARDS], dim=-1)
    scores_RN = cosines_RN / temperature_R[:, None]
    apart_R1 = scores_RN[:, 2:].logsumexp(1, keepdim=True)
    misses_R2 = torch.logaddexp(scores_RN[:, :2], apart_R1) - scores_RN[:, :2]
    return batch.task.loss(outputs, batch) + weight_R * misses_R2.mean(1)
