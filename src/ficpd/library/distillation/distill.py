"""Distills the prototypes to one prompt, on synthetic examples.

Hinton et al., 2015, arXiv 1503.02531 (Kullback-Leibler, with a temperature); Ba and Caruana, NIPS 2014, arXiv
1312.6184 (squared error of logits). It runs on the server and queries no client.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng
from ficpd.errors import ConfigError
from ficpd.interfaces import Model
from ficpd.types import LABEL_PRIOR, Answer, Batch, ModelOutput, Query

Loss = Callable[[ModelOutput, Batch], Tensor]
TEACHER = "teacher"
"""The key of the teachers' answers in `Batch.extra`."""
FEWEST = 8
"""With fewer examples, all are used for tuning and for measuring; else a quarter is held out."""
TEMPERATURE = 2.0


class DistilledPrompt(NamedTuple):
    """A tuned prompt [P, D], and the held-out loss of the start (`before`) and of the prompt (`after`)."""

    vectors_PD: Tensor
    before: float
    after: float

    @property
    def gained(self) -> bool:
        """Tells whether the held-out loss is lower than the start's. If not, the caller keeps the start."""
        return self.after < self.before


@dataclass(frozen=True)
class TaskExamples:
    """The encoded examples of one task, and its teachers [K, P, D] with their `weights` [K] (None: equal)."""

    batch: Batch
    teachers_KPD: Tensor
    weights: Sequence[float] | None = None


def distill(
    model: Model, start_PD: Tensor, lessons: Sequence[TaskExamples], *, steps: int, learning_rate: float, seed: int,
    loss: Literal["squared", "kl"] = "squared", batch_size: int = 16,
) -> DistilledPrompt:  # fmt: skip
    """Tunes one prompt [P, D] to the teachers' answers on each lesson, by `steps` of Adam.

    loss: "squared": the mean squared difference of the logits; "kl": the Kullback-Leibler divergence from the teachers'
        mean probabilities at temperature 2, times 4.

    Each step takes a batch of every lesson and the mean of their gradients. Raises `ConfigError` for a lesson without
    examples, or for weights that do not match its teachers.
    """
    if not lessons or not all(len(lesson.batch) for lesson in lessons):
        raise ConfigError("lessons: expected examples for each; generate some, or give seed texts")
    parts = [held_back(_taught(model, lesson, loss), rng.derive_seed(seed, i)) for i, lesson in enumerate(lessons)]
    streams = [batches(rest, steps, batch_size, rng.derive_seed(seed, i, "steps")) for i, (rest, _) in enumerate(parts)]
    prompt, optimizer = adam(start_PD, learning_rate)
    for together in zip(*streams, strict=True):
        prompt.grad = mean_gradient(model, [(prompt.detach(), batch) for batch in together], LOSSES[loss])
        optimizer.step()
    tuned_PD = prompt.detach()
    before, after = (mean_loss(model, [(p, held) for _, held in parts], LOSSES[loss]) for p in (start_PD, tuned_PD))
    return DistilledPrompt(tuned_PD, before, after)


# ---------------------------------------------------------------- teachers


def _taught(model: Model, lesson: TaskExamples, loss: str) -> Batch:
    """Adds the teachers' mean answer to a lesson's examples: logits [B, C], or probabilities."""
    answer = model.answer([Query(lesson.teachers_KPD, lesson.batch, outputs=True)])[0]
    assert answer.outputs_KB is not None
    logits_KBC = logits(answer.outputs_KB, lesson.batch).view(*answer.loss_KB.shape, -1).cpu()
    if loss == "kl":
        logits_KBC = (logits_KBC / TEMPERATURE).softmax(-1)
    return replace(lesson.batch, extra={**lesson.batch.extra, TEACHER: _of_all(logits_KBC, lesson)})


def _of_all(logits_KBC: Tensor, lesson: TaskExamples) -> Tensor:
    """Returns the teachers' weighted mean, [B, C]. A teacher of weight 0 is left out."""
    K, weights = len(logits_KBC), list(lesson.weights or [1.0] * len(logits_KBC))
    if len(weights) != K or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(f"weights = {weights}: expected {K} numbers from 0 on, not all 0")
    weighted = [weight * said_BC for weight, said_BC in zip(weights, logits_KBC, strict=True) if weight]
    return torch.stack(weighted).sum(0) / sum(weights)


# ---------------------------------------------------------------- losses


def logits(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns the logits of a task's answers, [R, C], with the readout's bias; `-inf` for missing answers."""
    if outputs.readout_RCD is not None:
        return torch.einsum("rd,rcd->rc", outputs.features_RD, outputs.readout_RCD)
    if batch.readout_CD is not None:
        scores_RC = outputs.features_RD @ batch.readout_CD.to(outputs.features_RD.device).T
        return scores_RC + batch.extra[LABEL_PRIOR].to(scores_RC.device) if LABEL_PRIOR in batch.extra else scores_RC
    if outputs.scores_RN is None:
        raise ConfigError("the examples have no answers to score; a generation task needs a target text for each")
    return outputs.scores_RN


def squared(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns the mean of (student's logit - teacher's)² over a row's answers, [R]."""
    mine_RC = logits(outputs, batch)
    theirs_RC = batch.extra[TEACHER][:, : mine_RC.shape[1]]
    known_RC = theirs_RC.isfinite() & mine_RC.isfinite()
    apart_RC = (mine_RC - theirs_RC).masked_fill(~known_RC, 0.0)
    return apart_RC.square().sum(1) / known_RC.sum(1).clamp(min=1)


def kl_loss(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns T² · KL(teacher ‖ student) at temperature T, [R]. The factor T² keeps the size of gradients."""
    mine_RC = logits(outputs, batch)
    theirs_RC = batch.extra[TEACHER][:, : mine_RC.shape[1]]
    log_mine_RC = (mine_RC / TEMPERATURE).log_softmax(-1).masked_fill(theirs_RC == 0, 0.0)
    return TEMPERATURE**2 * F.kl_div(log_mine_RC, theirs_RC, reduction="none").sum(1)


LOSSES: Mapping[str, Loss] = {"squared": squared, "kl": kl_loss}


# ---------------------------------------------------------------- steps on the server


def held_back(batch: Batch, seed: int) -> tuple[Batch, Batch]:
    """Splits a batch at random: three quarters to tune on, one to measure on. Both are the whole below `FEWEST`."""
    order = torch.randperm(len(batch), generator=rng.make_generator(seed, "held back"))
    if len(batch) < FEWEST:
        return batch.select(order), batch
    return batch.select(order[len(batch) // 4 :]), batch.select(order[: len(batch) // 4])


def batches(batch: Batch, steps: int, size: int, seed: int) -> Iterator[Batch]:
    """Yields `steps` random batches of `size` examples, or of all if there are fewer."""
    random = rng.make_generator(seed, "batches")
    for _ in range(steps):
        yield batch.select(torch.randperm(len(batch), generator=random)[:size])


def mean_gradient(model: Model, asked: Sequence[tuple[Tensor, Batch]], loss: Loss | None = None) -> Tensor:
    """Returns the mean over pairs of prompt and batch of the mean gradient, [P, D]. `loss` None: the task's."""
    answers = _answers(model, asked, loss, grad=True)
    return torch.stack([a.grad_KBPD[0].mean(0).cpu() for a in answers if a.grad_KBPD is not None]).mean(0)


def mean_loss(model: Model, asked: Sequence[tuple[Tensor, Batch]], loss: Loss | None = None) -> float:
    """Returns the mean over pairs of prompt and batch of the mean loss."""
    return float(torch.stack([answer.loss_KB.mean().cpu() for answer in _answers(model, asked, loss)]).mean())


def _answers(
    model: Model, asked: Sequence[tuple[Tensor, Batch]], loss: Loss | None, grad: bool = False
) -> list[Answer]:
    return model.answer([Query(prompt_PD[None], batch, grad=grad, loss=loss) for prompt_PD, batch in asked])


def adam(start_PD: Tensor, rate: float) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """Returns a copy of the start, and Adam on it with the constants of `optimizers.adam`."""
    prompt = torch.nn.Parameter(start_PD.detach().float().cpu().clone())
    return prompt, torch.optim.Adam([prompt], lr=rate, betas=(0.9, 0.99))
