"""Meta-learns, on the server, a prompt that adapts to each of several tasks in few steps.

Reptile (Nichol et al., 2018, arXiv 1803.02999) and first-order MAML (Finn et al., ICML 2017, arXiv 1703.03400). A
task is a prototype: synthetic examples with its labels (`generation.labelled`). No client is queried. Only first
derivatives are used. The gain is measured on held-out examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ficpd import rng
from ficpd.errors import ConfigError
from ficpd.evaluation.evaluate import run_all
from ficpd.evaluation.personalization import concat_batches
from ficpd.interfaces import Model
from ficpd.library.distillation.distill import DistilledPrompt, adam, batches, held_back, mean_gradient, mean_loss
from ficpd.registry import load
from ficpd.types import Batch


class Episode(NamedTuple):
    """One task's labelled examples: `support` to adapt on, `query` for the outer loss, `held` to measure on."""

    support: Batch
    query: Batch
    held: Batch


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop: `steps` of an optimizer at learning rate `rate` on each task, from one prompt, in lock step."""

    steps: int
    rate: float
    batch_size: int = 8
    optimizer: str = "adam"

    def adapted(self, model: Model, start_PD: Tensor, supports: Sequence[Batch], seed: int) -> Tensor:
        """Tunes the prompt on each support; returns [E, P, D]."""
        optimizer, works = load("optimizers", self.optimizer), {}
        for place, support in enumerate(supports):
            steps = batches(support, self.steps, self.batch_size, rng.derive_seed(seed, place))
            works[str(place)] = optimizer.tune(LocalLearner(str(place)), start_PD, steps, learning_rate=self.rate)
        done = run_all(model, works)  # type: ignore[arg-type]  # `answer` is enough, which a `Model` has
        return torch.stack([done[name] for name in works]).detach().cpu()


@dataclass(frozen=True)
class LocalLearner:
    """The `ClientContext` that an optimizer needs on synthetic examples, without mechanism or ledger."""

    id: str
    subspace: None = None

    def private_mean(self, values_KB: Tensor) -> Tensor:
        return values_KB.mean(1).cpu()


def reptile(
    model: Model, episodes: Sequence[Batch], start_PD: Tensor, inner: InnerLoop, *, outer_rate: float, outer_steps: int,
    seed: int,
) -> DistilledPrompt:  # fmt: skip
    """Repeats start <- start + `outer_rate` · mean over the episodes of (adapted - start), `outer_steps` times.

    episodes: a batch with labels for each task.
    outer_rate: a share from 0 to 1.

    Raises `ConfigError` without episodes, and for one without labels or with fewer than two examples.
    """
    parts = _episodes(episodes, seed)
    prompt_PD = start_PD.detach().float().cpu()
    for step in range(outer_steps):
        together = [concat_batches([part.support, part.query]) for part in parts]
        adapted_EPD = inner.adapted(model, prompt_PD, together, rng.derive_seed(seed, "reptile", step))
        prompt_PD = prompt_PD + outer_rate * (adapted_EPD - prompt_PD).mean(0)
    return _measured(model, inner, parts, start_PD, prompt_PD, seed)


def first_order_maml(
    model: Model, episodes: Sequence[Batch], start_PD: Tensor, inner: InnerLoop, *, outer_rate: float, outer_steps: int,
    seed: int,
) -> DistilledPrompt:  # fmt: skip
    """Runs Adam at `outer_rate` on the mean over the episodes of ∇ L_query(adapted on the support).

    The gradient is taken at the adapted prompt, without second derivatives. Support and query are swapped at every
    step. Raises the errors of `reptile`.
    """
    parts = _episodes(episodes, seed)
    prompt, optimizer = adam(start_PD, outer_rate)
    for step in range(outer_steps):
        support, query = zip(*(part[:2] if step % 2 == 0 else part[1::-1] for part in parts), strict=True)
        adapted_EPD = inner.adapted(model, prompt.detach(), support, rng.derive_seed(seed, "maml", step))
        prompt.grad = mean_gradient(model, list(zip(adapted_EPD, query, strict=True)))
        optimizer.step()
    return _measured(model, inner, parts, start_PD, prompt.detach(), seed)


def _episodes(tasks: Sequence[Batch], seed: int) -> list[Episode]:
    if not tasks:
        raise ConfigError("episodes: expected at least one")
    return [_episode(batch, rng.derive_seed(seed, "episode", place)) for place, batch in enumerate(tasks)]


def _episode(batch: Batch, seed: int) -> Episode:
    """Splits a task's examples by `held_back`, and the examples to tune on into halves."""
    if len(batch) < 2 or batch.targets is None:
        raise ConfigError(
            f"an episode has {len(batch)} examples {'without' if batch.targets is None else 'with'} labels: expected at "
            "least two with labels"
        )
    rest, held = held_back(batch, seed)
    half = len(rest) // 2
    return Episode(rest.select(range(half)), rest.select(range(half, len(rest))), held)


def _measured(
    model: Model, inner: InnerLoop, parts: Sequence[Episode], start_PD: Tensor, tuned_PD: Tensor, seed: int
) -> DistilledPrompt:
    """Measures the mean loss on the held-out examples after adapting, from the start and from the tuned prompt."""

    def loss_from(prompt_PD: Tensor) -> float:
        supports = [part.support for part in parts]
        adapted_EPD = inner.adapted(model, prompt_PD, supports, rng.derive_seed(seed, "measure"))
        return mean_loss(model, [(a_PD, part.held) for a_PD, part in zip(adapted_EPD, parts, strict=True)])

    return DistilledPrompt(tuned_PD, loss_from(start_PD), loss_from(tuned_PD))
