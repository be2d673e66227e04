"""Distills a prompt that enters at a later layer to an input prompt, the only kind that PEFT supports.

The input prompt is tuned to the original's logits on the same texts (squared error: Ba and Caruana, NIPS 2014, arXiv
1312.6184). For a generation task it is tuned on the original's outputs (Kim and Rush, EMNLP 2016, arXiv 1606.07947).
The agreement is measured on held-out texts.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.errors import LibraryError
from ficpd.federation.client import Client, ClientSession
from ficpd.federation.compression import none
from ficpd.interfaces import Task
from ficpd.library.distillation.distill import logits as answer_scores
from ficpd.library.library import PromptLibrary, require_standalone
from ficpd.optimizers import LocalTrainingConfig, map_queries, tune
from ficpd.privacy.none import NoPrivacy
from ficpd.tasks import synthetic_records
from ficpd.tasks.build import build_task, start_text
from ficpd.types import LORA, Assignment, Batch, ClientCard, ModelOutput, Prompt, Query, Readout, Record

if TYPE_CHECKING:
    from ficpd.library.session import LibrarySession

Result = TypeVar("Result")
FEWEST = 8
"""The minimum number of texts. A quarter of the texts is held out."""
NUM_RANDOM_TEXTS = 256
RATE = 0.1
STAGES = 10
"""The number of learning rates in the schedule."""
SYNTHETIC = "synthetic.jsonl"


@dataclass(frozen=True)
class Texts:
    """The texts to distill on. `weak`: random words of the vocabulary."""

    records: Sequence[Record]
    source: str
    weak: bool = False


@dataclass(frozen=True)
class Agreement:
    """Agreement on held-out texts.

    same: the share of equal answers.
    loss: the mean squared difference of the logits, or minus the log-likelihood of the original's text.
    """

    same: float
    loss: float


@dataclass(frozen=True)
class InputPromptResult:
    """An input prompt and its agreement with the original before and after tuning. `facts` is JSON."""

    start: Prompt
    prompt: Prompt
    before: Agreement
    after: Agreement
    facts: dict[str, Any]

    def library(self, library: PromptLibrary, name: str) -> PromptLibrary:
        """Returns a library with this prompt only; its card describes the distillation."""
        card = dict(library.card)
        card["backbone"] = {**card["backbone"], "enters_at": 0}
        card["reentered"] = {**self.facts, "before": asdict(self.before), "after": asdict(self.after)}
        return PromptLibrary(self.start, {name: self.prompt}, card)


@dataclass(frozen=True)
class DistillationTarget:
    """The records to distill on and the original's answers.

    batch: the records, encoded for the input prompt.
    loss: the loss on them; None: the task's.
    wanted: the original's answer to each record.
    predict: returns a prompt's answers.
    """

    batch: Batch
    loss: Callable[[ModelOutput, Batch], Tensor] | None
    wanted: Sequence
    predict: Callable[[Tensor, Batch], Sequence]


def distill_to_input(
    prompt: Prompt, texts: Texts, task: Task, model: QueryEngine, *, readout: Readout | None = None,
    num_tokens: int | None = None, steps: int = 200, learning_rate: float = RATE, batch_size: int = 8, seed: int = 0,
) -> InputPromptResult:  # fmt: skip
    """Tunes an input prompt of `num_tokens` virtual tokens (None: as many as the original) to imitate `prompt`.

    It also imitates a tuned head and the prompt's readout (`readout`). Returns the untuned start if tuning does not
    lower the held-out loss. `learning_rate` is Adam's, relative to the start's root mean square. Raises `LibraryError`
    for LoRA weights, and for fewer than `FEWEST` texts (or answers, for a generation task).
    """
    if prompt.enters_at == LORA:
        raise LibraryError("LoRA weights cannot be distilled to a prompt: export them without --reenter")
    if len(texts.records) < FEWEST:
        raise LibraryError(
            f"{len(texts.records)} texts ({texts.source}) are too few to imitate a prompt on; give at least {FEWEST}, "
            "better some hundred of the kind that the prompt is used on"
        )
    tokens = num_tokens or len(prompt.vectors_PD) - prompt.head_rows
    start_PD = model.backbone.init_prompt(start_text([task]), tokens, 0, seed)
    start = Prompt(start_PD, model.backbone.fingerprint)
    records = [replace(r, fields={k: v for k, v in r.fields.items() if k != "target"}) for r in texts.records]
    goal = (_written if task.max_new_tokens else _answered)(prompt, start, records, task, model, readout)
    order = torch.randperm(len(goal.batch), generator=rng.make_generator(seed, "reenter")).tolist()
    held, rest = order[: len(order) // 4], order[len(order) // 4 :]
    rate = learning_rate * float(start_PD.square().mean().sqrt())
    training = LocalTrainingConfig(learning_rate=rate, batch_size=batch_size)
    tuned = _tuned(start, task, goal.batch.select(rest), goal.loss, model, training, steps, seed)
    before, after = (_agreement(some, goal, held, model) for some in (start, tuned))
    helped = after.loss < before.loss
    tuned, after = (tuned, after) if helped else (start, before)
    facts = {
        "from_layer": prompt.enters_at, "head_rows": prompt.head_rows, "readout": readout is not None,
        "texts": texts.source, "weak": texts.weak, "tuned_on": len(rest), "held_back": len(held), "steps": steps,
        "writes": bool(task.max_new_tokens), "helped": helped,
    }  # fmt: skip
    return InputPromptResult(start, tuned, before, after, facts)


def distill_library_prompt(
    opened: "LibrarySession", name: str, data: Texts | None = None, *, task: str | None = None, **options: Any
) -> PromptLibrary:
    """Returns a library with an input prompt distilled from the prompt `name`, on `data` or the library's texts.

    `task`: one of the library's tasks, if it has several. `options`: those of `distill_to_input`.
    """
    library = opened.library
    if name not in library.prompts:
        raise LibraryError(f"no prompt {name!r} in this library; it has {', '.join(library.prompts) or 'none'}")
    require_standalone(library, name)
    model, chosen = opened.model, opened.tasks[opened.named(task)]
    texts = data or default_texts(opened.folder, model, options.get("seed", 0))
    done = distill_to_input(library.prompts[name], texts, chosen, model, readout=library.readouts.get(name), **options)
    return done.library(library, name)


def default_texts(folder: Path | None, model: QueryEngine, seed: int = 0) -> Texts:
    """Returns the synthetic examples of the library or its run, else random words."""
    for file in (folder / "library" / SYNTHETIC, folder / SYNTHETIC) if folder else ():
        if file.is_file():
            return Texts(_synthetic(file), f"the library's synthetic examples, {file.name}")
    return Texts(synthetic_records(model.backbone, NUM_RANDOM_TEXTS, seed), "random words", weak=True)


def _synthetic(file: Path) -> list[Record]:
    """Reads one record a line. Raises `LibraryError` for a line without a "text"."""
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise LibraryError(
                f'{file}, line {number}: expected a JSON object with a "text"; correct it or give --data'
            ) from error
        records.append(Record(f"{file.name} line {number}", {"text": str(text)}))
    return records


# ---------------------------------------------------------------- targets


def _answered(prompt, start, records, task: Task, model: QueryEngine, readout: Readout | None) -> DistillationTarget:
    """Returns the target for a task with fixed answers: the original's logits."""
    backbone = model.backbone
    plain = build_task({**task.to_config(), "tuned_head": False}) if task.head_rows else task
    theirs = task.encode(records, backbone, prompt)
    wanted_BC = logits(prompt.vectors_PD, theirs.with_readout(readout), model)
    batch = replace(plain.encode(records, backbone, start), extra={"wanted": wanted_BC})

    def predict(vectors_PD: Tensor, batch: Batch) -> list[int]:
        return logits(vectors_PD, batch, model).argmax(-1).tolist()

    return DistillationTarget(batch, logit_mse, wanted_BC.argmax(-1).tolist(), predict)


def _written(prompt, start, records, task: Task, model: QueryEngine, readout: Readout | None) -> DistillationTarget:
    """Returns the target for a generation task: the original's texts."""

    def predict(vectors_PD: Tensor, batch: Batch) -> list:
        answer = model.answer([Query(vectors_PD[None], batch, max_new_tokens=task.max_new_tokens)])[0]
        return task.predict(answer, batch)

    wanted = predict(prompt.vectors_PD, task.encode(records, model.backbone, prompt))
    kept = [i for i, text in enumerate(wanted) if text]
    if len(kept) < FEWEST:
        raise LibraryError(f"the prompt writes a text for only {len(kept)} of {len(records)} texts; give other texts")
    answered = [replace(records[i], fields={**records[i].fields, "target": wanted[i]}) for i in kept]
    return DistillationTarget(task.encode(answered, model.backbone, start), None, [wanted[i] for i in kept], predict)


def logit_mse(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns the mean squared difference to the original's centered logits, [R]."""
    return (center_logits(outputs, batch) - batch.extra["wanted"]).square().mean(-1)


def logits(vectors_PD: Tensor, batch: Batch, model: QueryEngine) -> Tensor:
    """Returns the centered logits [B, C] on the CPU."""
    asked = replace(batch, targets=None, extra={})
    outputs = model.answer([Query(vectors_PD[None], asked, outputs=True)])[0].outputs_KB
    assert outputs is not None
    return center_logits(outputs, batch).cpu()


def center_logits(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns the answers' logits minus their mean, [R, C]; 0 for missing answers."""
    scores_RC = answer_scores(outputs, batch)
    there = torch.isfinite(scores_RC)
    known_RC = scores_RC.where(there, 0.0)
    return (known_RC - known_RC.sum(-1, keepdim=True) / there.sum(-1, keepdim=True)).where(there, 0.0)


# ---------------------------------------------------------------- tuning and measuring


def _tuned(
    start: Prompt, task: Task, batch: Batch, loss, model: QueryEngine, training: LocalTrainingConfig, steps: int, seed: int
) -> Prompt:  # fmt: skip
    """Tunes by Adam in `STAGES` stages of falling learning rate. Adam's moments are kept between stages."""
    whole, records = none.build(none.Config(), start, seed), [Record("text", {})] * len(batch)
    client = Client(ClientCard("imitation"), records, [], task, model.backbone, NoPrivacy(), whole, start, seed)
    client.set_encoding("train", batch)
    vectors_PD, memory = start.vectors_PD, {}
    for stage in range(1, STAGES + 1):
        order = Assignment("reenter", stage, {}, {"rate": training.rate(stage, STAGES)})
        if some := steps * stage // STAGES - steps * (stage - 1) // STAGES:
            work = tune(training, ClientSession(client, stage, "reenter"), order, vectors_PD, memory=memory, steps=some)
            vectors_PD = run_queries(model, map_queries(work, lambda query: query._replace(loss=loss)))
    return start.with_vectors(vectors_PD)


def _agreement(prompt: Prompt, goal: DistillationTarget, held: Sequence[int], model: QueryEngine) -> Agreement:
    batch = goal.batch.select(held)
    loss_B = model.answer([Query(prompt.vectors_PD[None], batch, loss=goal.loss)])[0].loss_KB[0]
    predicted = goal.predict(prompt.vectors_PD, batch)
    same = sum(mine == goal.wanted[i] for i, mine in zip(held, predicted, strict=True))
    return Agreement(same / len(held), float(loss_B.mean()))
