"""Selects the best adaptation strategy for a few records, by cross-validation on them.

On an encoder the choice is among the unchanged library, its nearest prompt, an ensemble of readouts and, for 32 records or
more, a mixture. Elsewhere it is among all strategies that can run. The default is the ensemble of 16 records or more (32
if the library has a prompt for the same task), else the unchanged library. Another strategy is taken only if it is
better by two standard errors of the paired difference: then the simplest within one standard error of the best (Breiman
et al., Classification and Regression Trees, 1984, section 3.4.3). The choice never has a higher cross-validated loss
than the default.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.data.subjects import group_by_subject
from ficpd.errors import LibraryError, did_you_mean
from ficpd.evaluation.evaluate import mixture_probabilities, run_all
from ficpd.interfaces import Backbone, Task
from ficpd.library.adaptation import (
    ABOUT,
    ENSEMBLE,
    GLOBAL,
    STRATEGIES,
    AdaptedPrompt,
    FewShotSet,
    class_of,
    supports_head,
    supports_tuning,
    unchanged,
)
from ficpd.library.card import join_names
from ficpd.library.library import START, PromptLibrary, task_embedding
from ficpd.optimizers import LocalTrainingConfig
from ficpd.tasks.demonstrations import supports_demonstrations
from ficpd.types import Answer, Query, Record, Score

AUTO = "auto"
FEWEST = 4
"""The minimum number of records for cross-validation."""
FOLDS = 5
ONCE = 12
"""With fewer records than this, the folds are drawn several times."""
REPEATS = 3
SURE = 2.0
"""The default is taken within this many standard errors of the best. One is too few: the minimum over strategies is
biased."""
TEMPERATURES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
ENOUGH, ENOUGH_KNOWN = 16, 32
"""With fewer records the unchanged library is the default, and the ensemble has to be surely better. The second is for a
task that the library has a prompt for."""
MIN_MIXTURE_RECORDS = 32
"""With fewer records a mixture is not compared: its weights are uncertain."""
NEEDS_HEAD = ("head", ENSEMBLE, "mixture")
"""The strategies that need features and label texts."""
NEEDS_GRADIENTS = ("tune",)
SAME = 0.9
"""The minimum cosine of a task's embedding and a key to take its prompt without comparison (`bench/unseen.py keys`)."""


@dataclass(frozen=True)
class AdaptationResult:
    """The chosen variant.

    way: the variant's name.
    fitted: its prompt.
    table: for each variant its held-out `loss`, the standard `error` of the difference to the best, and its scores;
        empty without cross-validation.
    said: the reason, in words.
    """

    way: str
    fitted: AdaptedPrompt
    table: Mapping[str, Score]
    said: str


@dataclass(frozen=True)
class HeldOutResult:
    """One variant on held-out records: losses [B], predictions, and the logits [B, C] of a task with labels."""

    loss_B: Tensor
    predicted: list
    logits_BC: Tensor | None = None


def adapt(
    library: PromptLibrary, records: Sequence[Record], task: Task, model: QueryEngine, training: LocalTrainingConfig,
    how: str = AUTO,
    seed: int = 0,
) -> AdaptationResult:  # fmt: skip
    """Adapts a library to records of any task, by the strategy `how` or by the best one (`auto`).

    Strategies cannot be compared on fewer than four records, one class or one subject. `auto` then takes the prompt of
    a similar task, else the start; without keys the global prompt. Raises `LibraryError` for an unknown or unsuitable
    strategy, for another backbone, or for prompts that do not fit the task.
    """
    _check(library, records, task, model.backbone, how)
    lack = _lacking(task, records)
    if lack and (how == AUTO or (how == "nearest" and not records)):
        return _by_key(library, task, model.backbone, lack)
    shots = prepare_shots(library, records, task, model, training, seed)
    ways = [how] if how != AUTO else _compared(shots)
    table = {} if lack else cross_validate(shots, ways, model)
    known = bool(library.keys) and _most_similar(library, task, model.backbone)[1] >= SAME
    usual = default_variant(table or ways, len(records), known)
    best = one_standard_error_rule(table, usual) if table else ways[0]
    found = run_queries(model, STRATEGIES[strategy_of(best, ways)](shots))
    way = best if table else list(found)[len(found) // 2]
    return AdaptationResult(way, found[way], table, _reason(how, way, table, lack, usual))


def prepare_shots(
    library: PromptLibrary, records: Sequence[Record], task: Task, model: QueryEngine, training: LocalTrainingConfig,
    seed: int = 0,
) -> FewShotSet:  # fmt: skip
    """Encodes the records and computes the loss of every prompt of the library, in one query."""
    batch = task.encode(records, model.backbone, library.start).with_readout(library.learned_readout(task))
    stacked_JPD = torch.stack([prompt.vectors_PD for prompt in library.candidates().values()])
    loss_JB = model.answer([Query(stacked_JPD, batch)])[0].loss_KB.cpu()
    return FewShotSet(library, task, model.backbone, training, seed, list(records), batch, loss_JB)


def _compared(shots: FewShotSet) -> list[str]:
    """Returns the strategies that `auto` compares.

    An encoder's ensemble contains the head and the class means. Tuning is slow there.
    """
    ways = ["leave", "nearest"]
    if supports_head(shots.task, shots.backbone):
        return [*ways, ENSEMBLE, "mixture"] if len(shots.records) >= MIN_MIXTURE_RECORDS else [*ways, ENSEMBLE]
    if supports_tuning(shots.library, shots.backbone):
        ways.append("tune")
    if supports_demonstrations(shots.task):
        ways.append("demonstrations")
    return ways


# ---------------------------------------------------------------- cross-validation


def cross_validate(shots: FewShotSet, ways: Sequence[str], model: QueryEngine) -> dict[str, Score]:
    """Evaluates every variant of these strategies on held-out records; returns `AdaptationResult.table`."""
    repeats = 1 if len(shots.records) >= ONCE else REPEATS
    draws = [
        _cross_validate_once(shots, ways, model, rng.derive_seed(shots.seed, "folds", repeat))
        for repeat in range(repeats)
    ]
    targets_B = shots.batch.targets
    variants = draws[0]
    losses = {name: torch.stack([_comparable(draw[name], targets_B) for draw in draws]).mean(0) for name in variants}
    if shots.task.max_new_tokens:  # decoding is slow
        return _table(losses, {name: [{}] for name in variants})
    truths = shots.task.targets(shots.records)
    scores = {name: [shots.task.score(draw[name].predicted, truths) for draw in draws] for name in variants}
    return _table(losses, scores)


def _cross_validate_once(
    shots: FewShotSet, ways: Sequence[str], model: QueryEngine, seed: int
) -> dict[str, HeldOutResult]:
    """Evaluates every variant on every record, each held out once. All folds run in lock step."""
    number, parts = len(shots.records), shots.folds(FOLDS, seed)
    works = {
        str(place): _fit_and_predict(shots.take([i for i in range(number) if i not in part]), shots.take(part), ways)
        for place, part in enumerate(parts)
    }
    results, whole = run_all(model, works), {}
    for place, part in enumerate(parts):
        for variant, held in results[str(place)].items():
            none = None if held.logits_BC is None else torch.zeros(number, held.logits_BC.shape[1])
            whole.setdefault(variant, HeldOutResult(torch.zeros(number), [None] * number, none))
            whole[variant].loss_B[part] = held.loss_B
            if none is not None:
                whole[variant].logits_BC[part] = held.logits_BC
            for i, value in zip(part, held.predicted, strict=True):
                whole[variant].predicted[i] = value
    return whole


def _comparable(held: HeldOutResult, targets_B: Tensor | None) -> Tensor:
    """Returns losses [B] that do not depend on the scale of the logits.

    With labels this is the cross entropy at the best temperature of `TEMPERATURES` (Guo et al., ICML 2017, arXiv
    1706.04599). Without it, demonstrations would lower the loss only because they scale up an encoder's logits.
    """
    if held.logits_BC is None or targets_B is None:
        return held.loss_B
    tried = [F.cross_entropy(held.logits_BC / t, targets_B, reduction="none") for t in TEMPERATURES]
    return min(tried, key=lambda loss_B: float(loss_B.mean()))


def _table(loss_B: Mapping[str, Tensor], scores: Mapping[str, list[Score]]) -> dict[str, Score]:
    best_B = min(loss_B.values(), key=lambda of: float(of.mean()))
    table = {}
    for variant, of in loss_B.items():
        more_B = of - best_B
        mean = {name: sum(s[name] for s in scores[variant]) / len(scores[variant]) for name in scores[variant][0]
                if all(name in s for s in scores[variant])}  # fmt: skip
        table[variant] = {"loss": float(of.mean()), "error": float(more_B.std()) / len(more_B) ** 0.5, **mean}
    return table


def _fit_and_predict(
    train: FewShotSet, held: FewShotSet, ways: Sequence[str]
) -> Generator[Query, Answer, dict[str, HeldOutResult]]:
    """Fits every variant to `train` and evaluates it on `held`."""
    fitted: dict[str, AdaptedPrompt] = {}
    for way in ways:
        fitted |= yield from STRATEGIES[way](train)
    found = {}
    for variant, one in fitted.items():
        if one.mixture is not None:
            assert held.batch.targets is not None
            log_BC = (yield from mixture_probabilities(one.predictors(), held.batch)).log()
            loss_B = F.nll_loss(log_BC, held.batch.targets.cpu(), reduction="none")
            predicted = [held.task.label_space[place] for place in log_BC.argmax(-1).tolist()]
            found[variant] = HeldOutResult(loss_B, predicted, log_BC)
            continue
        batch = one.encode(held.task, held.records, held.backbone, held.batch)
        answer = yield Query(one.prompt.vectors_PD[None], batch, outputs=True)
        predicted = [None] * len(batch) if held.task.max_new_tokens else held.task.predict(answer, batch)
        assert answer.outputs_KB is not None
        labelled = bool(held.task.to_config().get("labels"))
        logits_BC = held.task.logits(answer.outputs_KB, batch) if labelled else None
        logits_BC = None if logits_BC is None else logits_BC.cpu()
        found[variant] = HeldOutResult(answer.loss_KB[0].cpu(), predicted, logits_BC)
    return found


def default_variant(table: Iterable[str], records: int, known: bool = False) -> str:
    """Returns the ensemble if it has enough records, else the unchanged prompt, the first variant.

    known: whether the library has a prompt for the same task.
    """
    names = list(table)
    return ENSEMBLE if ENSEMBLE in names and records >= (ENOUGH_KNOWN if known else ENOUGH) else names[0]


def one_standard_error_rule(table: Mapping[str, Score], usual: str) -> str:
    """Returns the default `usual` if no variant's loss is lower by `SURE` standard errors.

    Otherwise returns the first variant within one standard error of the lowest loss and no worse than the default.
    """
    lowest, default = min(row["loss"] for row in table.values()), table[usual]
    if default["loss"] <= lowest + SURE * default["error"]:
        return usual
    return next(v for v, row in table.items() if row["loss"] <= min(lowest + row["error"], default["loss"]))


# ---------------------------------------------------------------- checks


def _check(library: PromptLibrary, records: Sequence[Record], task: Task, backbone: Backbone, how: str) -> None:
    """Raises `LibraryError` if the strategy cannot run."""
    library.check(backbone)
    check_strategy(how)
    if task.head_rows != library.start.head_rows:
        raise LibraryError(
            f"the library's prompts have a tuned head of {library.start.head_rows} rows and this task needs "
            f"{task.head_rows}; adapt to the label set they were tuned on"
        )
    if not records and how not in (AUTO, "nearest", "leave"):
        raise LibraryError(f"no records for --how {how}; give some, or use --how nearest or leave")
    if how in NEEDS_GRADIENTS and not supports_tuning(library, backbone):
        lack = (
            "the library's prompts are words" if backbone.supports_gradients else f"{backbone.name} gives no gradients"
        )
        raise LibraryError(f"--how {how}: {lack}; choose another strategy")
    if how in NEEDS_HEAD and not supports_head(task, backbone):
        raise LibraryError(
            f"--how {how}: expected a classification on an encoder, without a tuned head; choose another strategy"
        )
    if "demonstrations" in how and not supports_demonstrations(task):
        raise LibraryError(f"--how {how}: expected a classification without a tuned head; choose another strategy")


def check_strategy(how: str) -> None:
    """Raises `LibraryError` for an unknown strategy."""
    if how not in (AUTO, *STRATEGIES):
        raise LibraryError(did_you_mean("strategy", how, [AUTO, *STRATEGIES]))


def _lacking(task: Task, records: Sequence[Record]) -> str:
    """Returns the reason why the records do not allow cross-validation; empty if they do."""
    if len(group_by_subject(records)) < 2 <= len(records):
        return f"all {len(records)} records are of one subject"
    if len(records) < FEWEST:
        return f"{len(records)} records are too few to compare strategies (at least {FEWEST})"
    found = {class_of(task, record) for record in records}
    if task.to_config().get("labels") and len(found) == 1:
        return f"all {len(records)} records have the label {found.pop()!r}"
    return ""


def _by_key(library: PromptLibrary, task: Task, backbone: Backbone, lack: str) -> AdaptationResult:
    """Returns the prompt of the most similar task, or the start if no task is similar enough.

    Without keys it returns the global prompt.
    """
    if library.keys:
        name, cosine = _most_similar(library, task, backbone)
        if cosine >= SAME:
            reason = f"{lack}; took {name}, tuned for a similar task ({cosine:.2f})"
            return AdaptationResult("nearest", unchanged(library, name), {}, reason)
        reason = f"{lack}; no prompt was tuned for a similar task (nearest: {name}, {cosine:.2f}); took the start"
        return AdaptationResult("leave", unchanged(library, START), {}, reason)
    name = GLOBAL if GLOBAL in library.prompts else START
    return AdaptationResult("leave", unchanged(library, name), {}, f"{lack}; took {name} unchanged")


def _most_similar(library: PromptLibrary, task: Task, backbone: Backbone) -> tuple[str, float]:
    """Returns the prompt whose key is the most similar to the task's embedding, and the cosine."""
    embedding_D = task_embedding(task, backbone)
    name = library.nearest(embedding_D)[0]
    return name, float(library.keys[name] @ embedding_D)


def _reason(how: str, way: str, table: Mapping[str, Score], lack: str, usual: str) -> str:
    if lack:
        return f"{lack}; {way} as requested"
    if how != AUTO:
        return f"{way} as requested" + (f", the best of {join_names(table)}" if len(table) > 1 else "")
    best = min(table, key=lambda variant: table[variant]["loss"])
    if way == best:
        return "it has the lowest loss on records held back"
    if way == usual:
        return f"no other strategy is better by {SURE:g} standard errors; {best} comes closest"
    return f"it is the simplest within a standard error of the best, {best}"


def describe_choice(way: str, why: str, how: str) -> list[str]:
    """Returns sentences on the choice, its reason, and how to take another strategy.

    >>> describe_choice("tune 4", "tune 4 as requested", "tune")
    ['Chosen: tune 4, the prompt of the library, tuned on your records (tune 4 as requested).']
    """
    said = f"Chosen: {way}, {ABOUT[strategy_of(way, STRATEGIES)]} ({why})."
    if how != AUTO:
        return [said]
    others = " ".join(name for name in STRATEGIES if name != strategy_of(way, STRATEGIES))
    return [said, f"To have another, add --how and one of: {others}."]


def strategy_of(variant: str, ways: Iterable[str]) -> str:
    """Returns the strategy of a variant.

    >>> strategy_of("tune 4", ["leave", "tune"])
    'tune'
    """
    return max((way for way in ways if variant.startswith(way)), key=len)
