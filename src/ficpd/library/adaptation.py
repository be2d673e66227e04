"""Adapts a library to records by one of seven strategies. The simplest leaves the library unchanged.

Each strategy is a generator that yields `Query`s, as a client does. The records belong to the caller, so nothing is
private here. A strategy returns variants by name, the simplest first: fewer steps, or a smaller share of the
demonstrations. `selection.adapt` (`auto`) chooses strategy and variant by cross-validation.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ficpd import rng
from ficpd.data.subjects import group_by_subject, subject_numbers
from ficpd.interfaces import Backbone, Task
from ficpd.library.distillation.distill import adam
from ficpd.library.library import START, PromptLibrary
from ficpd.library.mixture import Mixture, stack_members
from ficpd.methods.shared.heads import fit_heads
from ficpd.methods.shared.mixture import Candidate, weigh_members
from ficpd.optimizers import LocalTrainingConfig
from ficpd.tasks.demonstrations import (
    Demonstrations,
    demonstrate,
    is_in_context,
    readout_of,
    supports_demonstrations,
)
from ficpd.types import Answer, Batch, Predictor, Prompt, Query, Readout, Record

GLOBAL, ENSEMBLE = "global", "ensemble"
TUNE_RATE, TUNE_STEPS = 0.2, (4, 20)
"""A factor on the library's learning rate (which suits many records), and the numbers of steps to compare."""
TUNE_PULL = 0.005
"""The L2 weight towards the initial prompt, divided by the start's mean square."""
MIXED = 3
"""The number of best prompts in a mixture. The global prompt and the start join them."""
TEXTS_COUNT = 8
"""The label texts of an ensemble weigh as much as this many records."""
HEAD_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
BATCH = 32
"""The maximum number of records in a step."""


@dataclass(frozen=True)
class AdaptedPrompt:
    """A prompt adapted to records, a note on the adaptation, and its demonstrations or its mixture."""

    prompt: Prompt
    note: str
    demonstrations: Demonstrations | None = None
    mixture: Mixture | None = None

    def predictors(self) -> list[Predictor]:
        return [Predictor(self.prompt.vectors_PD)] if self.mixture is None else self.mixture.predictors()

    def encode(self, task: Task, records: Sequence[Record], backbone: Backbone, encoded: Batch | None = None) -> Batch:
        """Encodes records with the demonstrations, as `Demonstrations.encode`."""
        if self.demonstrations is None:
            return encoded or task.encode(records, backbone, self.prompt)
        return self.demonstrations.encode(task, records, backbone, self.prompt, encoded)


@dataclass(frozen=True)
class FewShotSet:
    """The caller's records, encoded once, and the losses [J, B] of all candidates of the library on them."""

    library: PromptLibrary
    task: Task
    backbone: Backbone
    training: LocalTrainingConfig
    seed: int
    records: Sequence[Record]
    batch: Batch
    loss_JB: Tensor

    def take(self, rows: Sequence[int]) -> "FewShotSet":
        index = torch.as_tensor(rows, dtype=torch.long)
        records = [self.records[i] for i in rows]
        return replace(self, records=records, batch=self.batch.select(index), loss_JB=self.loss_JB[:, index])

    def ranked(self, names: Sequence[str] | None = None) -> list[str]:
        """Returns the candidates by increasing loss; ties keep the library's order."""
        mean_J = dict(zip(self.library.candidates(), self.loss_JB.mean(1).tolist(), strict=True))
        return sorted(names or mean_J, key=mean_J.__getitem__)

    def subjects(self) -> Tensor | None:
        """Returns the subject number of each record, [B]; None without subjects, or with a single one."""
        numbers = subject_numbers(self.records)
        return torch.tensor(numbers) if numbers and max(numbers) else None

    def folds(self, count: int, seed: int) -> list[list[int]]:
        """Returns at most `count` folds of the records' indices, stratified by class. No subject is in two folds.

        A class may have fewer records than folds. A subject counts for the class of its first record.
        """
        random, groups = rng.make_generator(seed), group_by_subject(self.records)
        classes: dict[str, list[list[int]]] = {}
        for i in torch.randperm(len(groups), generator=random).tolist():
            classes.setdefault(class_of(self.task, self.records[groups[i][0]]), []).append(groups[i])
        order = [group for name in sorted(classes) for group in classes[name]]
        count = min(count, len(order))
        return [sorted(i for group in order[place::count] for i in group) for place in range(count)]

    def drawn(self, step: int) -> Batch:
        """Draws the records of one step: all, or `BATCH` of them."""
        if len(self.batch) <= BATCH:
            return self.batch
        random = rng.make_generator(self.seed, "adapt", step)
        return self.batch.select(torch.randperm(len(self.batch), generator=random)[:BATCH])


Work = Generator[Query, Answer, dict[str, AdaptedPrompt]]

# ---------------------------------------------------------------- strategies, simplest first


def keep(shots: FewShotSet) -> Work:
    """Returns the global prompt or the start unchanged, whichever has the lower loss."""
    yield from ()
    return {"leave": unchanged(shots.library, _usual(shots))}


def nearest(shots: FewShotSet) -> Work:
    """Returns the prompt of the library with the lowest loss, from the losses computed before."""
    yield from ()
    return {"nearest": unchanged(shots.library, shots.ranked()[0])}


def head(shots: FewShotSet) -> Work:
    """Fits a head to the records' features under the unchanged prompt: ridge regression towards the task's readout.

    The penalty has the lowest leave-one-out log loss (`methods.shared.heads`). At the mean record, all labels have the same
    logit: the label shares of a few records are chance, and a label without a record would never be predicted.
    """
    (begin,) = (yield from keep(shots)).values()
    answer = yield Query(begin.prompt.vectors_PD[None], shots.batch, outputs=True)
    assert answer.outputs_KB is not None
    assert shots.batch.targets is not None
    targets_B, own = shots.batch.targets.cpu(), readout_of(shots.batch)
    features_BD = answer.outputs_KB.features_RD.float().cpu()
    prior = own.rows_CD, own.bias_C
    heads = fit_heads(features_BD, targets_B, len(own.bias_C), prior, HEAD_PENALTIES, shots.subjects())
    best = min(heads, key=lambda tried: tried.loss(targets_B))
    assert best.linear is not None
    rows_CD = best.linear[0] - best.linear[0].mean(0)
    read = Demonstrations(readout=Readout(rows_CD, -rows_CD @ features_BD.mean(0), own.shares_C))
    return {"head": AdaptedPrompt(begin.prompt, f"a head of {len(shots.records)} records on {begin.note}", read)}


def ensemble(shots: FewShotSet) -> Work:
    """Averages the probabilities of three readouts under the unchanged prompt: label texts, a head and demonstrations.

    Each errs in another way with few records, and the average has a lower variance (deep ensembles: Lakshminarayanan et
    al., NeurIPS 2017, arXiv 1612.01474). The label texts have the weight 8/(8 + n), the others share the rest.
    """
    (begin,) = (yield from keep(shots)).values()
    (fitted,) = (yield from head(shots)).values()
    *_, shown = (yield from demonstrations(shots)).values()
    texts = TEXTS_COUNT / (TEXTS_COUNT + len(shots.records))
    readouts = [readout_of(shots.batch)]
    for one in (fitted, shown):
        assert one.demonstrations is not None
        assert one.demonstrations.readout is not None
        readouts.append(one.demonstrations.readout)
    averaged = Mixture(
        begin.prompt.vectors_PD[None],
        torch.zeros(3, dtype=torch.long),
        torch.tensor([texts, (1 - texts) / 2, (1 - texts) / 2]),
        torch.stack([readout.rows_CD for readout in readouts]),
        torch.stack([readout.bias_C for readout in readouts]),
    )
    note = f"label texts ({texts:.2f}), a head and class means on {begin.note}"
    return {ENSEMBLE: AdaptedPrompt(begin.prompt, note, mixture=averaged)}


def tune(shots: FewShotSet) -> Work:
    """Tunes the whole prompt by Adam from the unchanged prompt; returns a variant for each number of steps."""
    (begin,) = (yield from keep(shots)).values()
    rate = TUNE_RATE * shots.training.rate(1, 1)
    pull = TUNE_PULL / float(shots.library.start.vectors_PD.square().mean())
    found = yield from _adam(shots, begin.prompt.vectors_PD, rate, pull, TUNE_STEPS)
    return {
        f"tune {steps}": AdaptedPrompt(begin.prompt.with_vectors(vectors_PD), f"{steps} steps from {begin.note}")
        for steps, vectors_PD in found.items()
    }


def mix(shots: FewShotSet) -> Work:
    """Mixes prompts of the library and own heads by the records' evidence (`methods.shared.mixture`)."""
    prompts, own = shots.library.candidates(), readout_of(shots.batch)
    names = [_usual(shots)]
    names += [name for name in (*shots.ranked()[:MIXED], START) if name not in names]
    candidates = [Candidate(prompts[name].vectors_PD, own) for name in names]
    members, weights = yield from weigh_members(candidates, shots.batch, shots.subjects())
    shares = ", ".join(f"{float(w.sum()):.2f} {name}" for name, w in zip(names, weights, strict=True))
    mixture = stack_members(candidates, members, weights)
    return {"mixture": AdaptedPrompt(prompts[names[0]], f"a mixture: {shares}", mixture=mixture)}


def demonstrations(shots: FewShotSet) -> Work:
    """Adds the records as demonstrations to the unchanged prompt."""
    (begin,) = (yield from keep(shots)).values()
    return (yield from _shown(shots, begin, "demonstrations"))


STRATEGIES: dict[str, Callable[[FewShotSet], Work]] = {
    "leave": keep,
    "nearest": nearest,
    "head": head,
    ENSEMBLE: ensemble,
    "tune": tune,
    "mixture": mix,
    "demonstrations": demonstrations,
}

ABOUT = {
    "leave": "the library's prompt as it is",
    "nearest": "the library's prompt that suits your task best",
    "head": "the library's prompt, with a readout fitted to your records",
    ENSEMBLE: "the library's prompt, read by an average of label texts, a head and your records' class means",
    "tune": "the prompt of the library, tuned on your records",
    "mixture": "prompts of the library and heads of your own, weighted by your records",
    "demonstrations": "the library's prompt, with your records shown before each text",
}
"""The result of each strategy, in words."""

# ---------------------------------------------------------------- parts


def _adam(
    shots: FewShotSet, begin_PD: Tensor, rate: float, pull: float, stops: Sequence[int]
) -> Generator[Query, Answer, dict[int, Tensor]]:
    """Returns the prompt after each number of steps in `stops`, tuned on the mean loss + pull/2 |prompt - begin|²."""
    at_PD, optimizer = adam(begin_PD, rate)
    found = {}
    for step in range(1, max(stops) + 1):
        answer = yield Query(at_PD.detach()[None], shots.drawn(step), grad=True)
        assert answer.grad_KBPD is not None
        at_PD.grad = answer.grad_KBPD[0].mean(0).cpu() + pull * (at_PD.detach() - begin_PD)
        optimizer.step()
        if step in stops:
            found[step] = at_PD.detach().clone()
    return found


def _shown(shots: FewShotSet, begin: AdaptedPrompt, way: str) -> Work:
    """Adds the records as demonstrations; returns a variant for each weight of them in the readout."""
    found = yield from demonstrate(shots.task, shots.records, shots.batch, begin.prompt, shots.backbone)
    return {
        f"{way} {mix}".strip(): AdaptedPrompt(
            begin.prompt, f"{len(shots.records)} demonstrations with {begin.note}", shown
        )
        for mix, shown in found.items()
    }


def _usual(shots: FewShotSet) -> str:
    """Returns the global prompt or the start, whichever has the lower loss."""
    return shots.ranked([name for name in (GLOBAL, START) if name in shots.library.candidates()])[0]


def class_of(task: Task, record: Record) -> str:
    return task.targets([record])[0] if task.to_config().get("labels") else ""


def supports_tuning(library: PromptLibrary, backbone: Backbone) -> bool:
    """Returns whether gradients can tune the library's prompts. Prompts of words have none."""
    return backbone.supports_gradients and library.start.vectors_PD.is_floating_point()


def supports_head(task: Task, backbone: Backbone) -> bool:
    """Returns whether the task's scores are features times a readout of label texts, which a head may replace."""
    return supports_demonstrations(task) and backbone.supports_features and not is_in_context(backbone)


def unchanged(library: PromptLibrary, name: str) -> AdaptedPrompt:
    return AdaptedPrompt(library.candidates()[name], name)
