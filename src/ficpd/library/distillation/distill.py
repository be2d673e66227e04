"""Prototype distillation: one prompt with which the backbone answers as with the prototypes, on synthetic examples.

Hinton et al., 2015, arXiv 1503.02531 (Kullback-Leibler, with a temperature); Ba and Caruana, NIPS 2014, arXiv 1312.6184
(squared error of logits). On the server, and of examples that are nobody's: no client is asked anything.
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
from ficpd.types import Answer, Batch, ModelOutput, Query

Loss = Callable[[ModelOutput, Batch], Tensor]
TEACHER = "teacher"
"""The name under which what the teachers said travels in `Batch.extra`."""
FEWEST = 8
"""From so many examples on, a quarter is held back to measure on; with fewer all serve for both."""
TEMPERATURE = 2.0


class DistilledPrompt(NamedTuple):
    """A tuned prompt [P, D], and the loss on examples held back: `before`, with the start, and `after`."""

    vectors_PD: Tensor
    before: float
    after: float

    @property
    def gained(self) -> bool:
        """Whether it is better than the start; if not, keep the start."""
        return self.after < self.before


@dataclass(frozen=True)
class TaskExamples:
    """What is taught on one task: its examples, encoded, and the prototypes [K, P, D] that teach it.

    `assignment` [B] names one teacher for each example; without it all teach every example, in shares of `weights` [K]
    (None: equal).
    """

    batch: Batch
    teachers_KPD: Tensor
    assignment: Sequence[int] | None = None
    weights: Sequence[float] | None = None


def distill(
    model: Model, start_PD: Tensor, lessons: Sequence[TaskExamples], *, steps: int, learning_rate: float, seed: int,
    loss: Literal["squared", "kl"] = "squared", batch_size: int = 16,
) -> DistilledPrompt:  # fmt: skip
    """One prompt [P, D] that answers each lesson's examples as its teachers do, by `steps` of Adam at `learning_rate`.

    "squared": mean squared difference of the logits; "kl": Kullback-Leibler divergence from the teachers' mean
    probabilities at temperature 2, times 4. Every step takes a batch of every lesson, answered together, and the mean of
    their gradients. Raises `ConfigError` for a lesson without examples, or whose teachers do not fit it.
    """
    if not lessons or not all(len(lesson.batch) for lesson in lessons):
        raise ConfigError("there is nothing to distil on: every lesson needs examples (make some, or give seed texts)")
    parts = [held_back(_taught(model, lesson, loss), rng.derive_seed(seed, i)) for i, lesson in enumerate(lessons)]
    streams = [batches(rest, steps, batch_size, rng.derive_seed(seed, i, "steps")) for i, (rest, _) in enumerate(parts)]
    prompt, optimiser = adam(start_PD, learning_rate)
    for together in zip(*streams, strict=True):
        prompt.grad = mean_gradient(model, [(prompt.detach(), batch) for batch in together], LOSSES[loss])
        optimiser.step()
    tuned_PD = prompt.detach()
    before, after = (mean_loss(model, [(p, held) for _, held in parts], LOSSES[loss]) for p in (start_PD, tuned_PD))
    return DistilledPrompt(tuned_PD, before, after)


# ---------------------------------------------------------------- what the teachers say


def _taught(model: Model, lesson: TaskExamples, loss: str) -> Batch:
    """The examples with what they are to be answered with: [B, C] logits, or probabilities. Asked once."""
    answer = model.answer([Query(lesson.teachers_KPD, lesson.batch, outputs=True)])[0]
    assert answer.outputs_KB is not None
    said_KBC = logits(answer.outputs_KB, lesson.batch).view(*answer.loss_KB.shape, -1).cpu()
    if loss == "kl":
        said_KBC = (said_KBC / TEMPERATURE).softmax(-1)
    teacher = _of_all(said_KBC, lesson) if lesson.assignment is None else _of_one(said_KBC, lesson.assignment)
    return replace(lesson.batch, extra={**lesson.batch.extra, TEACHER: teacher})


def _of_one(said_KBC: Tensor, assignment: Sequence[int]) -> Tensor:
    """[B, C]: what each example's own teacher says."""
    K, B, _ = said_KBC.shape
    if len(assignment) != B or not all(0 <= teacher < K for teacher in assignment):
        raise ConfigError(
            f"an assignment of {len(assignment)} examples to teachers {sorted(set(assignment))} was given; expected one of "
            f"the {K} teachers (0 to {K - 1}) for each of {B} examples"
        )
    return said_KBC[torch.tensor(list(assignment)), torch.arange(B)]


def _of_all(said_KBC: Tensor, lesson: TaskExamples) -> Tensor:
    """[B, C]: the teachers' weighted mean; a teacher of weight 0 is not heard."""
    K, weights = len(said_KBC), list(lesson.weights or [1.0] * len(said_KBC))
    if len(weights) != K or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(f"weights {weights} were given for {K} teachers; expected {K} numbers from 0 on, not all 0")
    heard = [weight * said_BC for weight, said_BC in zip(weights, said_KBC, strict=True) if weight]
    return torch.stack(heard).sum(0) / sum(weights)


# ---------------------------------------------------------------- how far the student is from it


def logits(outputs: ModelOutput, batch: Batch) -> Tensor:
    """[R, C]: the scores of a task's answers, however it has them; `-inf` where a row has fewer answers."""
    if outputs.readout_RCD is not None:
        return torch.einsum("rd,rcd->rc", outputs.features_RD, outputs.readout_RCD)
    if batch.readout_CD is not None:
        return outputs.features_RD @ batch.readout_CD.to(outputs.features_RD.device).T
    if outputs.scores_RN is None:
        raise ConfigError("the examples have no answers to score; a task that writes needs a target text for each")
    return outputs.scores_RN


def squared(outputs: ModelOutput, batch: Batch) -> Tensor:
    """[R]: mean over the answers of (student's logit - teacher's)²; answers that a row has not do not count."""
    mine_RC = logits(outputs, batch)
    theirs_RC = batch.extra[TEACHER][:, : mine_RC.shape[1]]
    known_RC = theirs_RC.isfinite() & mine_RC.isfinite()
    apart_RC = (mine_RC - theirs_RC).masked_fill(~known_RC, 0.0)
    return apart_RC.square().sum(1) / known_RC.sum(1).clamp(min=1)


def kl_loss(outputs: ModelOutput, batch: Batch) -> Tensor:
    """[R]: KL(teacher ‖ student) at the temperature, times its square, so that gradients keep their size."""
    mine_RC = logits(outputs, batch)
    theirs_RC = batch.extra[TEACHER][:, : mine_RC.shape[1]]
    log_mine_RC = (mine_RC / TEMPERATURE).log_softmax(-1).masked_fill(theirs_RC == 0, 0.0)
    return TEMPERATURE**2 * F.kl_div(log_mine_RC, theirs_RC, reduction="none").sum(1)


LOSSES: Mapping[str, Loss] = {"squared": squared, "kl": kl_loss}


# ---------------------------------------------------------------- steps on the server


def held_back(batch: Batch, seed: int) -> tuple[Batch, Batch]:
    """In an order drawn from the seed: three quarters, and one to measure on. Few examples are all in both."""
    order = torch.randperm(len(batch), generator=rng.make_generator(seed, "held back"))
    if len(batch) < FEWEST:
        return batch.select(order), batch
    return batch.select(order[len(batch) // 4 :]), batch.select(order[: len(batch) // 4])


def batches(batch: Batch, steps: int, size: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of `size` (all examples, if there are fewer), each drawn anew."""
    random = rng.make_generator(seed, "batches")
    for _ in range(steps):
        yield batch.select(torch.randperm(len(batch), generator=random)[:size])


def mean_gradient(model: Model, asked: Sequence[tuple[Tensor, Batch]], loss: Loss | None = None) -> Tensor:
    """[P, D]: over pairs of prompt and batch, asked together, the mean of each batch's mean. `loss` None: the task's."""
    answers = _asked(model, asked, loss, grad=True)
    return torch.stack([a.grad_KBPD[0].mean(0).cpu() for a in answers if a.grad_KBPD is not None]).mean(0)


def mean_loss(model: Model, asked: Sequence[tuple[Tensor, Batch]], loss: Loss | None = None) -> float:
    """The same of the losses."""
    return float(torch.stack([answer.loss_KB.mean().cpu() for answer in _asked(model, asked, loss)]).mean())


def _asked(model: Model, asked: Sequence[tuple[Tensor, Batch]], loss: Loss | None, grad: bool = False) -> list[Answer]:
    return model.answer([Query(prompt_PD[None], batch, grad=grad, loss=loss) for prompt_PD, batch in asked])


def adam(start_PD: Tensor, rate: float) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A copy of the start, and Adam on it, with the constants of `optimizers.adam`."""
    prompt = torch.nn.Parameter(start_PD.detach().float().cpu().clone())
    return prompt, torch.optim.Adam([prompt], lr=rate, betas=(0.9, 0.99))
