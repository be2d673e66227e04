"""How a library is fitted to somebody's own few records: six ways, the first to leave it as it is.

Each way is a generator that asks `Query`s, as a client does; the records are the caller's own, so nothing is private
here. It returns variants by name, the simplest first (tuned for fewer steps, less of the demonstrations): which of them
and which way is best is what `auto` finds by cross-validation.
"""

import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ficpd import rng
from ficpd.interfaces import Backbone, Task
from ficpd.library.library import START, PromptLibrary
from ficpd.optimizers import LocalTrainingConfig
from ficpd.tasks.demonstrations import Demonstrations, demonstrate
from ficpd.types import Answer, Batch, Prompt, Query, Record

GLOBAL = "global"
MOST_WEIGHTS = 16
WEIGHT_RATE, WEIGHT_STEPS, WEIGHT_PULL = 0.05, 20, 0.5
"""Adam's rate on a composition's weights, its steps, and the L2 pull to where they began."""
GENERATIONS, CANDIDATES, SPREAD = 20, 8, 0.3
"""CMA-ES on the same weights: 20 queries of 8 candidates, drawn this wide at first."""
TUNE_RATE, TUNE_STEPS = 0.2, (4, 20)
"""Of the library's learning rate, which is for many records, and the numbers of steps that are tried. With 16 records at
the whole rate MiniLM fell from 0.90 to 0.80 on eight intents of BANKING77."""
TUNE_PULL = 0.005
"""The L2 pull to where it began, over the start's mean square."""
BATCH = 32
"""Records of one step, at most."""


@dataclass(frozen=True)
class AdaptedPrompt:
    """A prompt for somebody's records, what it was made of, and what is shown beside it."""

    prompt: Prompt
    note: str
    demonstrations: Demonstrations | None = None

    def encode(self, task: Task, records: Sequence[Record], backbone: Backbone, encoded: Batch | None = None) -> Batch:
        """As `Demonstrations.encode`."""
        if self.demonstrations is None:
            return encoded or task.encode(records, backbone, self.prompt)
        return self.demonstrations.encode(task, records, backbone, self.prompt, encoded)


@dataclass(frozen=True)
class FewShotSet:
    """Somebody's records, encoded once, and the losses [J, B] of all of the library's candidates on them."""

    library: PromptLibrary
    task: Task
    backbone: Backbone
    training: LocalTrainingConfig
    seed: int
    records: Sequence[Record]
    batch: Batch
    loss_JB: Tensor
    composed: dict[str, AdaptedPrompt] = field(default_factory=dict)
    """What these shots' composition came to, once it is known: three ways begin from it."""

    def take(self, rows: Sequence[int]) -> "FewShotSet":
        index = torch.as_tensor(rows, dtype=torch.long)
        records = [self.records[i] for i in rows]
        return replace(
            self, records=records, batch=self.batch.select(index), loss_JB=self.loss_JB[:, index], composed={}
        )

    def ranked(self, names: Sequence[str] | None = None) -> list[str]:
        """Candidates by their loss, lowest first; of equal loss in the library's order."""
        mean_J = dict(zip(self.library.candidates(), self.loss_JB.mean(1).tolist(), strict=True))
        return sorted(names or mean_J, key=mean_J.__getitem__)

    def drawn(self, step: int) -> Batch:
        """The records of one step: all, or as many as a step takes."""
        if len(self.batch) <= BATCH:
            return self.batch
        random = rng.make_generator(self.seed, "adapt", step)
        return self.batch.select(torch.randperm(len(self.batch), generator=random)[:BATCH])


Work = Generator[Query, Answer, dict[str, AdaptedPrompt]]

# ---------------------------------------------------------------- the ways, simplest first


def keep(shots: FewShotSet) -> Work:
    """The global prompt or the start as it is, whichever has the lower loss."""
    yield from ()
    return {"leave": unchanged(shots.library, _usual(shots))}


def nearest(shots: FewShotSet) -> Work:
    """The one prompt of the library with the lowest loss on the shots; their losses were asked already."""
    yield from ()
    return {"nearest": unchanged(shots.library, shots.ranked()[0])}


def compose(shots: FewShotSet) -> Work:
    """start + Σ w_j (prompt_j - start), weights tuned from those of the prompt that `leave` takes; at most 16 of them.

    A basis of prompts and a few weights is what SPoT (Vu et al., ACL 2022, arXiv 2110.07904) and ATTEMPT (Asai et al.,
    EMNLP 2022, arXiv 2205.11961) transfer by. The gradient of a weight is the prompt's gradient along its way; where the
    backbone gives none, the weights are searched by CMA-ES.
    """
    if "compose" not in shots.composed:
        names = _basis(shots)
        begin = torch.tensor([float(name == _usual(shots)) for name in names])
        work = (fit_weights_adam if shots.backbone.supports_gradients else fit_weights_cma)(shots, names, begin)
        weights_J = (yield from work) if names else begin
        weights = dict(zip(names, weights_J.tolist(), strict=True))
        note = " + ".join(f"{weight:.2f} {name}" for name, weight in weights.items()) or START
        shots.composed["compose"] = AdaptedPrompt(shots.library.compose(weights), note)
    return dict(shots.composed)


def tune(shots: FewShotSet) -> Work:
    """The whole prompt, by Adam at a fifth of the library's rate, from the composed prompt; a variant for each number of
    steps, so few that it stays near where it began."""
    (begin,) = (yield from compose(shots)).values()
    rate = TUNE_RATE * shots.training.rate(1, 1)
    pull = TUNE_PULL / float(shots.library.start.vectors_PD.square().mean())
    found = yield from _adam(shots, begin.prompt.vectors_PD, lambda prompt_PD: prompt_PD, rate, pull, TUNE_STEPS)
    return {
        f"tune {steps}": AdaptedPrompt(begin.prompt.with_vectors(vectors_PD), f"{steps} steps from {begin.note}")
        for steps, vectors_PD in found.items()
    }


def demonstrations(shots: FewShotSet) -> Work:
    """The library's prompt as it is, with the shots shown beside it."""
    (begin,) = (yield from keep(shots)).values()
    found = yield from _shown(shots, begin, "demonstrations")
    return found


def compose_and_demonstrate(shots: FewShotSet) -> Work:
    """The composed prompt, with the shots shown beside it."""
    (begin,) = (yield from compose(shots)).values()
    found = yield from _shown(shots, begin, "compose+demonstrations")
    return found


STRATEGIES: dict[str, Callable[[FewShotSet], Work]] = {
    "leave": keep,
    "nearest": nearest,
    "compose": compose,
    "tune": tune,
    "demonstrations": demonstrations,
    "compose+demonstrations": compose_and_demonstrate,
}

# ---------------------------------------------------------------- what they are made of


def fit_weights_adam(
    shots: FewShotSet, names: Sequence[str], begin_J: Tensor, pull: float = WEIGHT_PULL
) -> Generator[Query, Answer, Tensor]:
    """[J]: weights by Adam on the shots' mean loss + pull/2 |w - begin|²."""
    ways_JPD, start_PD = _ways(shots, names), shots.library.start.vectors_PD

    def lift(weights_J: Tensor) -> Tensor:
        return start_PD + torch.einsum("j,jpd->pd", weights_J, ways_JPD)

    found = yield from _adam(shots, begin_J, lift, WEIGHT_RATE, pull, (WEIGHT_STEPS,))
    return found[WEIGHT_STEPS]


def fit_weights_cma(
    shots: FewShotSet, names: Sequence[str], begin_J: Tensor, pull: float = WEIGHT_PULL
) -> Generator[Query, Answer, Tensor]:
    """[J]: the same without gradients, by CMA-ES (Hansen, arXiv 1604.00772): each query asks of one generation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of plots that it cannot draw
        import cma
    ways_JPD, start_PD = _ways(shots, names), shots.library.start.vectors_PD
    random = np.random.default_rng(rng.derive_seed(shots.seed, "cma"))
    options = {
        "seed": np.nan,
        "randn": lambda *shape: random.standard_normal(shape),
        "popsize": CANDIDATES,
        "verbose": -9,
    }
    search = cma.CMAEvolutionStrategy(begin_J.tolist(), SPREAD, options)
    for step in range(GENERATIONS):
        asked = search.ask()
        weights_KJ = torch.tensor(np.array(asked), dtype=torch.float32)
        prompts_KPD = start_PD + torch.einsum("kj,jpd->kpd", weights_KJ, ways_JPD)
        answer = yield Query(prompts_KPD, shots.drawn(step))
        loss_K = answer.loss_KB.mean(1).cpu() + pull / 2 * (weights_KJ - begin_J).square().sum(1)
        search.tell(asked, loss_K.tolist())
    return torch.tensor(search.result.xfavorite, dtype=torch.float32)


def _adam(
    shots: FewShotSet, begin: Tensor, lift: Callable[[Tensor], Tensor], rate: float, pull: float, stops: Sequence[int]
) -> Generator[Query, Answer, dict[int, Tensor]]:
    """What `begin` has become after each number of steps, where `lift` makes a prompt [P, D] of it."""
    at = begin.clone().requires_grad_()
    adam, found = torch.optim.Adam([at], rate, betas=(0.9, 0.99)), {}
    for step in range(1, max(stops) + 1):
        prompt_PD = lift(at)
        answer = yield Query(prompt_PD.detach()[None], shots.drawn(step), grad=True)
        assert answer.grad_KBPD is not None
        at.grad = torch.autograd.grad(prompt_PD, at, answer.grad_KBPD[0].mean(0).cpu())[0] + pull * (
            at.detach() - begin
        )
        adam.step()
        if step in stops:
            found[step] = at.detach().clone()
    return found


def _shown(shots: FewShotSet, begin: AdaptedPrompt, way: str) -> Work:
    """The shots shown beside a prompt, a variant for each share that they have in the readout."""
    found = yield from demonstrate(shots.task, shots.records, shots.batch, begin.prompt, shots.backbone)
    return {
        f"{way} {mix}".strip(): AdaptedPrompt(begin.prompt, f"{len(shots.records)} records beside {begin.note}", shown)
        for mix, shown in found.items()
    }


def _usual(shots: FewShotSet) -> str:
    """The global prompt or the start, whichever has the lower loss."""
    return shots.ranked([name for name in (GLOBAL, START) if name in shots.library.candidates()])[0]


def _basis(shots: FewShotSet) -> list[str]:
    """The prompts that are composed: those of the lowest loss, the global one always among them."""
    ranked = [name for name in shots.ranked() if name != START]
    first = [GLOBAL] if GLOBAL in ranked else []
    return [*first, *(name for name in ranked if name not in first)][:MOST_WEIGHTS]


def _ways(shots: FewShotSet, names: Sequence[str]) -> Tensor:
    return torch.stack([shots.library.offset(name) for name in names])


def unchanged(library: PromptLibrary, name: str) -> AdaptedPrompt:
    return AdaptedPrompt(library.candidates()[name], name)
