"""Which way of fitting a library to few records is best: tried on the records themselves, by cross-validation.

The simplest way within one standard error of the best is taken (Breiman et al., Classification and Regression Trees, 1984,
section 3.4.3); to leave the library as it is, if that is within two. The standard error is that of the difference to the
best, record by record, for all ways are tried on the same records. So the choice is never worse than to leave the library
as it is, on its own measure.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries, run_queries_lockstep
from ficpd.errors import LibraryError, did_you_mean
from ficpd.interfaces import Backbone, Task
from ficpd.library.adaptation import STRATEGIES, AdaptedPrompt, FewShotSet, unchanged
from ficpd.library.card import join_names
from ficpd.library.distillation.distill import logits
from ficpd.library.library import START, PromptLibrary, task_key
from ficpd.optimizers import LocalTrainingConfig
from ficpd.tasks.demonstrations import supports_demonstrations
from ficpd.types import Answer, Query, Record, Score

AUTO = "auto"
FEWEST = 4
"""Fewer shots than these cannot say which way is best."""
FOLDS = 5
FEW = 12
"""With fewer shots than these the folds are drawn several times."""
REPEATS = 3
SURE = 2.0
"""With one error, as among the others, 16 shots of a language that nobody had moved a prompt that was better left: 73.6 %
where it had 76.0 (SIB-200 on E5, five newcomers); the best of nine ways looks better than it is."""
TEMPERATURES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
SAME = 0.9
"""The cosine of two tasks' keys from which on a prompt is taken unseen: the same labels in another domain or language have
1.0, intents of one bank in parts 0.91 to 0.98, of CLINC's domains 0.60 to 0.87, tasks of different sets at most 0.59
(`bench/unseen.py keys`)."""


@dataclass(frozen=True)
class AdaptationResult:
    """`way` is the variant chosen. `table`: of each that was tried the mean held-out `loss`, the standard `error` of how
    much more that is than the best one's, and its held-out scores; empty if nothing could be tried. `said`: why, in words.
    """

    way: str
    fitted: AdaptedPrompt
    table: Mapping[str, Score]
    said: str


@dataclass(frozen=True)
class HeldOutResult:
    """What one variant did on the records that were held back from it: losses [b], predictions, and the logits [b, C] of a
    task with labels."""

    loss_B: Tensor
    predicted: list
    logits_BC: Tensor | None = None


def adapt(
    library: PromptLibrary, records: Sequence[Record], task: Task, model: QueryEngine, training: LocalTrainingConfig, how: str = AUTO,
    seed: int = 0,
) -> AdaptationResult:  # fmt: skip
    """Fit a library to somebody's own records of any task, in the way named, or (`auto`) in the one that does best.

    With fewer than four records, or all of one class, nothing can be tried: `auto` then takes the prompt that was made for
    the same task, or leaves the start as it is if there is none. Raises `LibraryError` if the way is not known or not for
    this task, or the prompts do not fit.
    """
    _check(library, records, task, model.backbone, how)
    lack = _lacking(task, records)
    if lack and (how == AUTO or (how == "nearest" and not records)):
        return _by_key(library, task, model.backbone, lack)
    shots = prepare_shots(library, records, task, model, training, seed)
    ways = [how] if how != AUTO else _worth_trying(shots)
    table = {} if lack else cross_validate(shots, ways, model)
    found = run_queries(model, STRATEGIES[_way_of(table, ways)](shots))
    way = one_standard_error_rule(table) if table else list(found)[len(found) // 2]
    return AdaptationResult(way, found[way], table, _said(how, way, table, lack))


def prepare_shots(
    library: PromptLibrary,
    records: Sequence[Record],
    task: Task,
    model: QueryEngine,
    training: LocalTrainingConfig,
    seed: int = 0,
) -> FewShotSet:
    """Records encoded, and the loss of every prompt of the library on each of them: one query."""
    batch = task.encode(records, model.backbone, library.start)
    stacked_JPD = torch.stack([prompt.vectors_PD for prompt in library.candidates().values()])
    loss_JB = model.answer([Query(stacked_JPD, batch)])[0].loss_KB.cpu()
    return FewShotSet(library, task, model.backbone, training, seed, list(records), batch, loss_JB)


# ---------------------------------------------------------------- trying


def cross_validate(shots: FewShotSet, ways: Sequence[str], model: QueryEngine) -> dict[str, Score]:
    """The table of `AdaptationResult`: every variant of these ways, in their order, on records held back from it."""
    repeats = 1 if len(shots.records) >= FEW else REPEATS
    draws = [_tried_once(shots, ways, model, rng.derive_seed(shots.seed, "folds", repeat)) for repeat in range(repeats)]
    targets_B = shots.batch.targets
    losses = {
        variant: torch.stack([_comparable(draw[variant], targets_B) for draw in draws]).mean(0) for variant in draws[0]
    }
    return _table(losses, {variant: [_scored(shots, draw[variant]) for draw in draws] for variant in draws[0]})


def _tried_once(shots: FewShotSet, ways: Sequence[str], model: QueryEngine, seed: int) -> dict[str, HeldOutResult]:
    """Every variant on every record, each held back once; all folds are answered in lock step."""
    number, parts = len(shots.records), stratified_folds(shots, seed)
    works = {
        str(place): _tried_on(shots.take([i for i in range(number) if i not in part]), shots.take(part), ways)
        for place, part in enumerate(parts)
    }
    results, whole = dict(run_queries_lockstep(model, works)), {}
    for place, part in enumerate(parts):
        found = results[str(place)]
        if isinstance(found, Exception):
            raise found
        for variant, held in found.items():
            none = None if held.logits_BC is None else torch.zeros(number, held.logits_BC.shape[1])
            whole.setdefault(variant, HeldOutResult(torch.zeros(number), [None] * number, none))
            whole[variant].loss_B[part] = held.loss_B
            if none is not None:
                whole[variant].logits_BC[part] = held.logits_BC
            for i, value in zip(part, held.predicted, strict=True):
                whole[variant].predicted[i] = value
    return whole


def _comparable(held: HeldOutResult, targets_B: Tensor | None) -> Tensor:
    """[B] losses that do not depend on how sure a way is: with labels the cross entropy at the temperature of `TEMPERATURES`
    that is best for this way (Guo et al., ICML 2017, arXiv 1706.04599). Demonstrations spread the logits, and so would win
    by their losses alone where an encoder is timid."""
    if held.logits_BC is None or targets_B is None:
        return held.loss_B
    tried = [F.cross_entropy(held.logits_BC / t, targets_B, reduction="none") for t in TEMPERATURES]
    return min(tried, key=lambda loss_B: float(loss_B.mean()))


def _scored(shots: FewShotSet, held: HeldOutResult) -> Score:
    """The task's score; none where predicting would mean writing, which is slow, and the loss is enough."""
    return {} if shots.task.max_new_tokens else shots.task.score(held.predicted, shots.task.targets(shots.records))


def _table(loss_B: Mapping[str, Tensor], scores: Mapping[str, list[Score]]) -> dict[str, Score]:
    best_B = min(loss_B.values(), key=lambda of: float(of.mean()))
    table = {}
    for variant, of in loss_B.items():
        more_B = of - best_B
        mean = {name: sum(s[name] for s in scores[variant]) / len(scores[variant]) for name in scores[variant][0]
                if all(name in s for s in scores[variant])}  # fmt: skip
        table[variant] = {"loss": float(of.mean()), "error": float(more_B.std()) / len(more_B) ** 0.5, **mean}
    return table


def _tried_on(
    train: FewShotSet, held: FewShotSet, ways: Sequence[str]
) -> Generator[Query, Answer, dict[str, HeldOutResult]]:
    """Every variant fitted to `train` and asked about `held`; all folds do this in lock step."""
    fitted: dict[str, AdaptedPrompt] = {}
    for way in ways:
        fitted |= yield from STRATEGIES[way](train)
    found = {}
    for variant, one in fitted.items():
        batch = one.encode(held.task, held.records, held.backbone, held.batch)
        answer = yield Query(one.prompt.vectors_PD[None], batch, outputs=True)
        told = [None] * len(batch) if held.task.max_new_tokens else held.task.predict(answer, batch)
        assert answer.outputs_KB is not None
        labelled = bool(held.task.to_config().get("labels"))
        found[variant] = HeldOutResult(
            answer.loss_KB[0].cpu(), told, logits(answer.outputs_KB, batch).cpu() if labelled else None
        )
    return found


def stratified_folds(shots: FewShotSet, seed: int) -> list[list[int]]:
    """At most five parts of the shots' places; each class is dealt out evenly. As many also where a class has fewer
    shots: with two parts half of the shots would be missing, and what lives on them would look worse than it is."""
    random, number = rng.make_generator(seed), len(shots.records)
    classes: dict[str, list[int]] = {}
    for i in torch.randperm(number, generator=random).tolist():
        classes.setdefault(_class_of(shots.task, shots.records[i]), []).append(i)
    order = [i for name in sorted(classes) for i in classes[name]]
    count = min(FOLDS, number)
    return [sorted(order[place::count]) for place in range(count)]


def one_standard_error_rule(table: Mapping[str, Score]) -> str:
    """The first variant whose loss is within its error of the lowest, and no higher than the first of all's; the first of
    all (to leave the prompt as it is) where it is within `SURE` errors."""
    lowest = min(row["loss"] for row in table.values())
    first, row = next(iter(table.items()))
    if row["loss"] <= lowest + SURE * row["error"]:
        return first
    return next(v for v, other in table.items() if other["loss"] <= min(lowest + other["error"], row["loss"]))


# ---------------------------------------------------------------- what can be tried


def _check(library: PromptLibrary, records: Sequence[Record], task: Task, backbone: Backbone, how: str) -> None:
    """Raises `LibraryError` for what cannot be done at all."""
    library.check(backbone)
    if how not in (AUTO, *STRATEGIES):
        raise LibraryError(did_you_mean("way to adapt", how, [AUTO, *STRATEGIES]))
    if task.head_rows != library.start.head_rows:
        raise LibraryError(
            f"the library's prompts carry a tuned head of {library.start.head_rows} rows and this task needs "
            f"{task.head_rows}: such prompts serve only the label set they were tuned on"
        )
    if not records and how not in (AUTO, "nearest", "leave"):
        raise LibraryError(f"there is no record to adapt to; give some, or take --how nearest or leave, not {how}")
    if "demonstrations" in how and not supports_demonstrations(task):
        raise LibraryError(
            "only a classification without a tuned head can be shown demonstrations; adapt in another way"
        )


def _worth_trying(shots: FewShotSet) -> list[str]:
    can_show, can_tune = supports_demonstrations(shots.task), shots.backbone.supports_gradients
    return [way for way in STRATEGIES if (can_show or "demonstrations" not in way) and (can_tune or way != "tune")]


def _class_of(task: Task, record: Record) -> str:
    return str(record.fields["target"]) if task.to_config().get("labels") else ""


def _lacking(task: Task, records: Sequence[Record]) -> str:
    """Why nothing can be tried on these records, in words; empty if it can."""
    if len(records) < FEWEST:
        return f"{len(records)} records are too few to try anything on (at least {FEWEST})"
    found = {_class_of(task, record) for record in records}
    if task.to_config().get("labels") and len(found) == 1:
        return f"all {len(records)} records are {found.pop()!r}, so that nothing can be told apart"
    return ""


def _by_key(library: PromptLibrary, task: Task, backbone: Backbone, lack: str) -> AdaptationResult:
    """The prompt made for the same task; the start as it is where no task is that similar: a prompt of another task leans
    to that one's answers. Without keys nothing is known, and the global prompt is left."""
    if library.keys:
        key_D = task_key(task, backbone)
        name = library.nearest(key_D)[0]
        cosine = float(library.keys[name] @ key_D)
        if cosine >= SAME:
            return AdaptationResult(
                "nearest", unchanged(library, name), {}, f"{lack}; took {name}, made for such a task ({cosine:.2f})"
            )
        said = (
            f"{lack}; no prompt was made for such a task (the nearest is {name}, {cosine:.2f}); left the start as it is"
        )
        return AdaptationResult("leave", unchanged(library, START), {}, said)
    name = "global" if "global" in library.prompts else START
    return AdaptationResult("leave", unchanged(library, name), {}, f"{lack}; took {name} as it is")


def _way_of(table: Mapping[str, Score], ways: Sequence[str]) -> str:
    """The way that the chosen variant is of."""
    variant = one_standard_error_rule(table) if table else ways[0]
    return max((way for way in ways if variant.startswith(way)), key=len)


def _said(how: str, way: str, table: Mapping[str, Score], lack: str) -> str:
    if lack:
        return f"{lack}; {way} as asked"
    if how != AUTO:
        return f"{way} as asked" + (f", the best of {join_names(table)}" if len(table) > 1 else "")
    best = min(table, key=lambda variant: table[variant]["loss"])
    if way == best:
        return f"{way}: the best"
    if way == next(iter(table)):
        return f"{way}: nothing is surely better ({best} looked best)"
    return f"{way}: the simplest within a standard error of the best ({best})"
