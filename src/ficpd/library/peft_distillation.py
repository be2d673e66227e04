"""A prompt that enters at a later layer, imitated by one that enters at the input: PEFT knows only the latter.

The imitator is tuned until its answers' logits are those of the original on the same texts (squared error on logits: Ba
and Caruana, NIPS 2014, arXiv 1312.6184); where the task writes, on what the original writes (Kim and Rush, EMNLP 2016,
arXiv 1606.07947). How well that worked is measured on texts that were held back.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.loading import EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.data import loading
from ficpd.errors import LibraryError, did_you_mean
from ficpd.federation.client import Client, ClientSession
from ficpd.federation.compression import none
from ficpd.interfaces import Task
from ficpd.library.library import PromptLibrary, require_standalone
from ficpd.library.peft_io import backbone_config
from ficpd.optimizers import LocalTrainingConfig, map_queries, tune
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import validate
from ficpd.tasks import synthetic_records
from ficpd.tasks.build import build_task, start_text
from ficpd.types import LORA, Assignment, Batch, ClientCard, ModelOutput, Prompt, Query, Record

Result = TypeVar("Result")
FEWEST = 8
"""Texts that an imitation needs: with fewer, the quarter held back says nothing."""
MADE_UP = 256
RATE = 0.1
STAGES = 10
"""In how many steps the learning rate falls."""
SYNTHETIC = "synthetic.jsonl"


@dataclass(frozen=True)
class Texts:
    """What an imitation is tuned on. `weak`: words drawn from the vocabulary, which no user will write."""

    records: Sequence[Record]
    source: str
    weak: bool = False


@dataclass(frozen=True)
class Agreement:
    """On texts held back: `same`, the share that is answered as the original answers it; `loss`, what was tuned: the
    mean squared difference of the answers' logits, or minus the mean log-likelihood of the original's words."""

    same: float
    loss: float


@dataclass(frozen=True)
class InputPromptResult:
    """An input prompt that imitates another, and how well: `before` any tuning and `after` it. `facts` is JSON."""

    start: Prompt
    prompt: Prompt
    before: Agreement
    after: Agreement
    facts: dict[str, Any]

    def library(self, library: PromptLibrary, name: str) -> PromptLibrary:
        """The imitation alone, as a library; its card says what it imitates and how well."""
        card = dict(library.card)
        card["backbone"] = {**card["backbone"], "enters_at": 0}
        card["reentered"] = {**self.facts, "before": asdict(self.before), "after": asdict(self.after)}
        return PromptLibrary(self.start, {name: self.prompt}, card)


@dataclass(frozen=True)
class DistillationTarget:
    """What is imitated: records encoded for the input prompt, the loss on them (None: the task's), what the original
    answers [one per record], and how a prompt's answers are read."""

    batch: Batch
    loss: Callable[[ModelOutput, Batch], Tensor] | None
    wanted: Sequence
    said: Callable[[Tensor, Batch], Sequence]


def distill_to_input(
    prompt: Prompt, texts: Texts, task: Task, model: QueryEngine, *, readout_CD: Tensor | None = None,
    num_tokens: int | None = None, steps: int = 200, learning_rate: float = RATE, batch_size: int = 8, seed: int = 0,
) -> InputPromptResult:  # fmt: skip
    """An input prompt of `num_tokens` virtual tokens (None: as many as the original has) that imitates `prompt`.

    A tuned head and a readout of the prompt's own (`readout_CD`) are imitated as well: the input prompt has neither.
    If tuning brings it no closer on a quarter held back, the untuned start is taken. `learning_rate` is Adam's, in
    units of the start's root mean square. Raises `LibraryError` for fewer than `FEWEST` texts.
    """
    if prompt.enters_at == LORA:
        raise LibraryError("LoRA weights are no prompt and need none: export them as they are (without --reenter)")
    if len(texts.records) < FEWEST:
        raise LibraryError(
            f"{len(texts.records)} texts ({texts.source}) are too few to imitate a prompt on; give at least {FEWEST}, "
            "better some hundred, like those that the prompt will be used on"
        )
    start_PD = model.backbone.init_prompt(
        start_text([task]), num_tokens or len(prompt.vectors_PD) - prompt.head_rows, 0, seed
    )
    start = Prompt(start_PD, model.backbone.fingerprint)
    records = [replace(r, fields={k: v for k, v in r.fields.items() if k != "target"}) for r in texts.records]
    goal = (_written if task.max_new_tokens else _answered)(prompt, start, records, task, model, readout_CD)
    order = torch.randperm(len(goal.batch), generator=rng.make_generator(seed, "reenter")).tolist()
    held, rest = order[: len(order) // 4], order[len(order) // 4 :]
    training = LocalTrainingConfig(
        learning_rate=learning_rate * float(start_PD.square().mean().sqrt()), batch_size=batch_size
    )
    tuned = _tuned(start, goal.batch.select(rest), goal.loss, model, training, steps, seed)
    before, after = (_agreement(some, goal, held, model) for some in (start, tuned))
    helped = after.loss < before.loss
    tuned, after = (tuned, after) if helped else (start, before)
    facts = {
        "from_layer": prompt.enters_at, "head_rows": prompt.head_rows, "readout": readout_CD is not None,
        "texts": texts.source, "weak": texts.weak, "tuned_on": len(rest), "held_back": len(held), "steps": steps,
        "writes": bool(task.max_new_tokens), "helped": helped,
    }  # fmt: skip
    return InputPromptResult(start, tuned, before, after, facts)


def distill_library_prompt(
    folder: Path, name: str, data: Texts | None = None, *, task: str | None = None, device: str = "cpu", **options: Any
) -> PromptLibrary:
    """A library (or run) with nothing but an imitation of its prompt `name`, tuned on `data` or on what the library has.

    `task` names one of the library's tasks, if it has several. `options` are `reenter`'s.
    """
    library = PromptLibrary.load(folder)
    if name not in library.prompts:
        raise LibraryError(f"no prompt {name!r} in this library; it has {', '.join(library.prompts) or 'none'}")
    require_standalone(library, name)
    tasks = library.card["tasks"]
    if task not in tasks and (task is not None or len(tasks) > 1):
        given = "no task was named" if task is None else did_you_mean("task", task, tasks)
        raise LibraryError(f"{given}; name the task to imitate the prompt on (--task): {', '.join(tasks)}")
    backbone, _ = load_backbone(backbone_config(library), validate(EngineConfig, {"device": device}, "--device"))
    library.check(backbone)
    model, chosen = QueryEngine(backbone), build_task(tasks[task or next(iter(tasks))])
    texts = data or default_texts(folder, model, options.get("seed", 0))
    done = distill_to_input(
        library.prompts[name], texts, chosen, model, readout_CD=library.readouts.get(name), **options
    )
    return done.library(library, name)


def load_texts(data: str, columns: Mapping[str, str]) -> Texts:
    """The texts of a file, without their labels; `columns`: role to column name."""
    config = validate(loading.Config, {"source": data, "columns": {"text": "text", **columns}}, "--data")
    return Texts(loading.load_all(config), Path(data).name)


def default_texts(folder: Path, model: QueryEngine, seed: int = 0) -> Texts:
    """The library's synthetic examples where it has some (in its folder or its run's), else made-up words."""
    folder = Path(folder)
    for file in (folder / "library" / SYNTHETIC, folder / SYNTHETIC):
        if file.is_file():
            return Texts(_synthetic(file), f"the library's synthetic examples, {file.name}")
    return Texts(synthetic_records(model.backbone, MADE_UP, seed), "made-up words", weak=True)


def _synthetic(file: Path) -> list[Record]:
    """One record a line, by its "text". Raises `LibraryError` naming the line that has none."""
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise LibraryError(
                f'{file}, line {number}: expected a JSON object with a "text"; mend it or give --data'
            ) from error
        records.append(Record(f"{file.name} line {number}", {"text": str(text)}))
    return records


# ---------------------------------------------------------------- what is imitated


def _answered(prompt, start, records, task: Task, model: QueryEngine, readout_CD: Tensor | None) -> DistillationTarget:
    """The logits of the task's answers."""
    backbone, plain = model.backbone, _without_head(task)
    theirs = task.encode(records, backbone, prompt)
    if readout_CD is not None:
        theirs = replace(theirs, readout_CD=readout_CD.to(backbone.device))
    wanted_BC = logits(prompt.vectors_PD, theirs, model)
    batch = replace(plain.encode(records, backbone, start), extra={"wanted": wanted_BC})

    def said(vectors_PD: Tensor, batch: Batch) -> list[int]:
        return logits(vectors_PD, batch, model).argmax(-1).tolist()

    return DistillationTarget(batch, logit_mse, wanted_BC.argmax(-1).tolist(), said)


def _written(prompt, start, records, task: Task, model: QueryEngine, readout_CD: Tensor | None) -> DistillationTarget:
    """The texts that the original writes, where it writes any."""

    def said(vectors_PD: Tensor, batch: Batch) -> list:
        answer = model.answer([Query(vectors_PD[None], batch, max_new_tokens=task.max_new_tokens)])[0]
        return task.predict(answer, batch)

    wanted = said(prompt.vectors_PD, task.encode(records, model.backbone, prompt))
    kept = [i for i, text in enumerate(wanted) if text]
    if len(kept) < FEWEST:
        raise LibraryError(
            f"the prompt writes something after {len(kept)} of {len(records)} texts only; give other texts"
        )
    answered = [replace(records[i], fields={**records[i].fields, "target": wanted[i]}) for i in kept]
    return DistillationTarget(task.encode(answered, model.backbone, start), None, [wanted[i] for i in kept], said)


def _without_head(task: Task) -> Task:
    return build_task({**task.to_config(), "tuned_head": False}) if task.head_rows else task


def logit_mse(outputs: ModelOutput, batch: Batch) -> Tensor:
    """[R]: mean squared difference to the original's logits."""
    return (center_logits(outputs, batch) - batch.extra["wanted"]).square().mean(-1)


def logits(vectors_PD: Tensor, batch: Batch, model: QueryEngine) -> Tensor:
    """[B, C] on the CPU, as `centred`."""
    asked = replace(batch, targets=None, extra={})
    outputs = model.answer([Query(vectors_PD[None], asked, outputs=True)])[0].outputs_KB
    assert outputs is not None
    return center_logits(outputs, batch).cpu()


def center_logits(outputs: ModelOutput, batch: Batch) -> Tensor:
    """[R, C]: the answers' logits about their mean, for a shift of all of them says nothing; 0 where a row lacks one."""
    if outputs.readout_RCD is not None:
        scores_RC = torch.einsum("rd,rcd->rc", outputs.features_RD, outputs.readout_RCD)
    elif batch.readout_CD is not None:
        scores_RC = outputs.features_RD @ batch.readout_CD.T
    else:
        assert outputs.scores_RN is not None
        scores_RC = outputs.scores_RN
    there = torch.isfinite(scores_RC)
    known_RC = scores_RC.where(there, 0.0)
    return (known_RC - known_RC.sum(-1, keepdim=True) / there.sum(-1, keepdim=True)).where(there, 0.0)


# ---------------------------------------------------------------- tuning and measuring


def _tuned(
    start: Prompt, batch: Batch, loss, model: QueryEngine, training: LocalTrainingConfig, steps: int, seed: int
) -> Prompt:
    """Adam in `STAGES` of falling rate, its moments kept from one to the next."""
    whole, records = none.build(none.Config(), start, seed), [Record("text", {})] * len(batch)
    client = Client(ClientCard("imitation"), records, [], batch.task, model.backbone, NoPrivacy(), whole, start, seed)
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
    said = goal.said(prompt.vectors_PD, batch)
    same = sum(mine == goal.wanted[i] for i, mine in zip(held, said, strict=True))
    return Agreement(same / len(held), float(loss_B.mean()))
