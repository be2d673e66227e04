"""Meta-learning on the server: a prompt from which each of several tasks is soon learned.

Reptile (Nichol et al., 2018, arXiv 1803.02999) and first-order MAML (Finn et al., ICML 2017, arXiv 1703.03400). A task is a
prototype here: synthetic examples with the labels that it gives them (`refine`), so that no client is asked anything. First
derivatives only. What was gained is measured on examples that were held back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import run_queries_lockstep
from ficpd.errors import ConfigError
from ficpd.interfaces import Model
from ficpd.library.distillation.distill import DistilledPrompt, adam, batches, held_back, mean_gradient, mean_loss
from ficpd.registry import load
from ficpd.types import Batch


class Episode(NamedTuple):
    """One task's examples with their labels: to adapt on, to be judged on, and held back to measure."""

    support: Batch
    query: Batch
    held: Batch


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop: `steps` of a optimizer at `rate` on each of several tasks, all from one prompt and in lock step."""

    steps: int
    rate: float
    batch_size: int = 8
    optimizer: str = "adam"

    def adapted(self, model: Model, start_PD: Tensor, supports: Sequence[Batch], seed: int) -> Tensor:
        """[E, P, D]: the prompt tuned on each support alone."""
        optimizer, works = load("optimizers", self.optimizer), {}
        for place, support in enumerate(supports):
            learner = LocalLearner(str(place), support, rng.derive_seed(seed, place))
            steps = learner.batches(self.steps, self.batch_size)
            works[learner.id] = optimizer.tune(learner, start_PD, steps, learning_rate=self.rate)
        done = dict(run_queries_lockstep(model, works))  # type: ignore[arg-type]  # it asks for no more than a `Model` has
        for result in done.values():
            if isinstance(result, Exception):
                raise result
        return torch.stack([done[name] for name in works]).detach().cpu()  # type: ignore[arg-type]


@dataclass(frozen=True)
class LocalLearner:
    """A client's place in a optimizer (`ClientSide`), taken by examples that are nobody's: no mechanism and no ledger."""

    id: str
    examples: Batch
    seed: int
    weight: float = 1.0
    coordinates: None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        return batches(self.examples, steps, batch_size, self.seed)

    def private_mean(self, values_KB: Tensor) -> Tensor:
        return values_KB.mean(1).cpu()

    def private_sum(self, name: str, values_BN: Tensor) -> Tensor:
        return values_BN.sum(0).cpu()


def reptile(
    model: Model, episodes: Sequence[Batch], start_PD: Tensor, inner: InnerLoop, *, outer_rate: float, outer_steps: int,
    seed: int,
) -> DistilledPrompt:  # fmt: skip
    """start <- start + `outer_rate` · mean over the episodes of (adapted - start), `outer_steps` times.

    `episodes`: a batch with labels per task. `outer_rate` is a share from 0 to 1. Raises `ConfigError` for an episode
    without labels or of fewer than two examples.
    """
    parts = _episodes(episodes, seed)
    prompt_PD = start_PD.detach().float().cpu()
    for step in range(outer_steps):
        together = [_both(part.support, part.query) for part in parts]
        adapted_EPD = inner.adapted(model, prompt_PD, together, rng.derive_seed(seed, "reptile", step))
        prompt_PD = prompt_PD + outer_rate * (adapted_EPD - prompt_PD).mean(0)
    return _measured(model, inner, parts, start_PD, prompt_PD, seed)


def first_order_maml(
    model: Model, episodes: Sequence[Batch], start_PD: Tensor, inner: InnerLoop, *, outer_rate: float, outer_steps: int,
    seed: int,
) -> DistilledPrompt:  # fmt: skip
    """Adam at `outer_rate` on the mean over the episodes of ∇ L_query(adapted on the support), taken at the adapted
    prompt: second derivatives are left out. Support and query change places at every step. Errors as `reptile`."""
    parts = _episodes(episodes, seed)
    prompt, optimiser = adam(start_PD, outer_rate)
    for step in range(outer_steps):
        support, query = zip(*(part[:2] if step % 2 == 0 else part[1::-1] for part in parts), strict=True)
        adapted_EPD = inner.adapted(model, prompt.detach(), support, rng.derive_seed(seed, "maml", step))
        prompt.grad = mean_gradient(model, list(zip(adapted_EPD, query, strict=True)))
        optimiser.step()
    return _measured(model, inner, parts, start_PD, prompt.detach(), seed)


def _episodes(tasks: Sequence[Batch], seed: int) -> list[Episode]:
    if not tasks:
        raise ConfigError("meta-learning was given no episodes; give the examples of at least one task")
    return [_episode(batch, rng.derive_seed(seed, "episode", place)) for place, batch in enumerate(tasks)]


def _episode(batch: Batch, seed: int) -> Episode:
    """What is not held back in halves."""
    if len(batch) < 2 or batch.targets is None:
        raise ConfigError(
            f"an episode has {len(batch)} examples {'without' if batch.targets is None else 'with'} labels; meta-learning "
            "needs at least two with labels (let the prototypes vote)"
        )
    rest, held = held_back(batch, seed)
    half = len(rest) // 2
    return Episode(rest.select(range(half)), rest.select(range(half, len(rest))), held)


def _both(one: Batch, other: Batch) -> Batch:
    assert one.targets is not None
    assert other.targets is not None
    extra = {name: torch.cat([one.extra[name], other.extra[name]]) for name in one.extra}
    return replace(one, items=one.items + other.items, targets=torch.cat([one.targets, other.targets]), extra=extra)


def _measured(
    model: Model, inner: InnerLoop, parts: Sequence[Episode], start_PD: Tensor, tuned_PD: Tensor, seed: int
) -> DistilledPrompt:
    """The mean loss on the held examples after adapting on the support, from the start and from where we came."""

    def loss_from(prompt_PD: Tensor) -> float:
        supports = [part.support for part in parts]
        adapted_EPD = inner.adapted(model, prompt_PD, supports, rng.derive_seed(seed, "measure"))
        return mean_loss(model, [(a_PD, part.held) for a_PD, part in zip(adapted_EPD, parts, strict=True)])

    return DistilledPrompt(tuned_PD, loss_from(start_PD), loss_from(tuned_PD))
