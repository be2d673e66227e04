"""Using a library: open it with the backbone its card names, score, adapt, predict. What the CLI's doors call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ficpd.backbones import openai_api
from ficpd.backbones.loading import ENDPOINT, BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.data import loading
from ficpd.data.untyped import is_regression_target
from ficpd.errors import DataError, LibraryError, did_you_mean
from ficpd.evaluation.evaluate import predictions, score_prompt
from ficpd.interfaces import Task
from ficpd.library.card import ADAPTED, describe_run, describe_shape, guarantee, join_names
from ficpd.library.library import PromptLibrary, task_key
from ficpd.library.selection import AUTO, AdaptationResult
from ficpd.library.selection import adapt as fit
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import validate
from ficpd.tasks.build import build_task
from ficpd.tasks.demonstrations import Demonstrations
from ficpd.types import Batch, Prompt, Record, Score

ZERO_SHOT = "zero-shot"
DEFAULT_PROMPTS = (ADAPTED, "global")
NEW_TASK = "own"
"""The name of a task that is new to the library."""


@dataclass(frozen=True)
class LibrarySession:
    """A library with its backbone and tasks, ready to use."""

    library: PromptLibrary
    model: QueryEngine
    tasks: Mapping[str, Task]

    @property
    def task(self) -> Task:
        """The task where none is named. Raises `LibraryError` if there are several to choose from."""
        return self.tasks[self.named()]

    def named(self, task: str | None = None) -> str:
        """Which task: the one named, else what the library was adapted to, else the only one."""
        if task is not None and task not in self.tasks:
            raise LibraryError(f"{did_you_mean('task', task, self.tasks)} (--task)")
        adapted = adapted_facts(self.library).get("task")
        known = [name for name in (task, adapted) if name in self.tasks]
        if not known and len(self.tasks) > 1:
            raise LibraryError(f"this library has several tasks; name one of them with --task: {', '.join(self.tasks)}")
        return str(known[0]) if known else next(iter(self.tasks))

    def encode(self, records: Sequence[Record], prompt: str | None = None, task: str | None = None) -> Batch:
        """Records as a task of the library, with what is shown beside the prompt named."""
        task = self.named(task)
        shown, start = self._shown(prompt, task), self.library.start
        chosen, backbone = self.tasks[task], self.model.backbone
        return shown.encode(chosen, records, backbone, start) if shown else chosen.encode(records, backbone, start)

    def _shown(self, prompt: str | None, task: str) -> Demonstrations | None:
        """What an adapted prompt was chosen with; it means nothing beside another prompt, or for another task."""
        adapted, readout = adapted_facts(self.library), self.library.readouts.get(ADAPTED)
        texts = tuple(adapted.get("demonstrations", ()))
        mine = prompt == ADAPTED and adapted.get("task") == task and (texts or readout is not None)
        return Demonstrations(texts, readout) if mine else None


def adapted_facts(library: PromptLibrary) -> Mapping[str, Any]:
    """How the library was adapted; empty if it was not."""
    return library.card.get(ADAPTED, {})


def open_library(folder: Path, device: str = "cpu") -> LibrarySession:
    """Raises `LibraryError` if the folder holds no library, or the backbone is not the one it was made on."""
    library = PromptLibrary.load(folder)
    given = library.card["backbone"]
    named = {key: given[key] for key in ("name", "kind", "options") if key in given}
    if ENDPOINT in (named.get("name"), named.get("kind")):
        named["options"] = openai_api.options_from_card(named.get("options", {}))
    config = validate(BackboneConfig, named, f"{folder}: card.json: backbone")
    backbone, _ = load_backbone(config, validate(EngineConfig, {"device": device}, "--device"))
    library.check(backbone)
    tasks = {name: build_task(about) for name, about in library.card["tasks"].items()}
    return LibrarySession(library, QueryEngine(backbone), tasks)


def read_records(data: str, columns: Mapping[str, str], labelled: bool) -> list[Record]:
    """All records of a file, in its order. Without labels only `text` (or `image`, if that is named) and what else is named
    are read. Options may be in several columns (`options=a,b,c`)."""
    roles = {
        **({} if "image" in columns else {"text": "text"}),
        **({"target": "target"} if labelled else {}),
        **columns,
    }
    options = roles.pop("options").split(",") if "," in roles.get("options", "") else []
    return loading.load_all(validate(loading.Config, {"source": data, "columns": roles, "options": options}, "--data"))


def texts_as_records(texts: Sequence[str]) -> list[Record]:
    return [Record(f"text {place}", {"text": text}) for place, text in enumerate(texts, 1)]


def score_library(
    opened: LibrarySession, records: Sequence[Record], name: str | None, task: str | None = None
) -> dict[str, Score]:
    """The score of the named prompt (or all), beside the backbone without any."""
    library, chosen = opened.library, opened.tasks[opened.named(task)]
    prompts = library.prompts if name is None else {name: get_prompt(library, name)}
    bare = replace(
        library.start, vectors_PD=library.start.vectors_PD[len(library.start.vectors_PD) - chosen.head_rows :]
    )
    batch, targets = opened.encode(records, None, task), chosen.targets(records)
    found = {ZERO_SHOT: score_prompt(chosen, bare.vectors_PD, batch, targets, opened.model)}
    for key, prompt in prompts.items():
        own = opened.encode(records, key, task) if key == ADAPTED else batch
        found[key] = score_prompt(chosen, prompt.vectors_PD, own, targets, opened.model)
    return found


def predicted(opened: LibrarySession, records: Sequence[Record], name: str | None, task: str | None = None) -> list:
    """One prediction per record, by the named prompt, else by `usual`."""
    name = name or default_prompt(opened, task)
    prompt = get_prompt(opened.library, name)
    own = opened.tasks[opened.named(task)]
    return run_queries(opened.model, predictions(own, prompt.vectors_PD, opened.encode(records, name, task)))


def default_prompt(opened: LibrarySession, task: str | None = None) -> str | None:
    """The prompt for a task where none is named: the one adapted to it, the global one, else that of the nearest key."""
    library, task = opened.library, opened.named(task)
    for name in DEFAULT_PROMPTS:
        if name in library.prompts and (name != ADAPTED or adapted_facts(library).get("task", task) == task):
            return name
    return library.nearest(task_key(opened.tasks[task], opened.model.backbone))[0] if library.keys else None


def get_prompt(library: PromptLibrary, name: str | None) -> Prompt:
    if name is None or name not in library.prompts:
        raise LibraryError(f"no prompt {name!r} in this library; it has {join_names(library.prompts)}")
    return library.prompts[name]


@dataclass(frozen=True)
class TargetTask:
    """A task to adapt to: its name in the adapted library, and what is to be said of it."""

    name: str
    task: Task
    said: str


def resolve_task(
    opened: LibrarySession,
    records: Sequence[Record],
    name: str | None,
    labels: Mapping[str, str],
    instruction: str | None,
) -> TargetTask:
    """The task named; else a new classification into `labels`; else the task of the library that all targets are of;
    else a new classification whose labels are the targets found.

    Raises `LibraryError` if the targets make no classification.
    """
    if name is not None or not (records or labels):
        name = opened.named(name)
        return TargetTask(name, opened.tasks[name], f"task {name}")
    if not labels and instruction is None and (known := _task_of(opened, records)) is not None:
        return TargetTask(known, opened.tasks[known], f"task {known}, for all targets are its own")
    labels = labels or _labels_of(records)
    task = build_task({"name": "classification", "labels": dict(labels), "instruction": instruction or ""})
    task.targets(records)
    taken = {key for key in opened.tasks if key != adapted_facts(opened.library).get("task")}
    free = next(key for key in (NEW_TASK, *(f"{NEW_TASK}-{i}" for i in range(2, len(taken) + 3))) if key not in taken)
    return TargetTask(free, task, f"a new task, {free}: which of {join_names(labels)}")


def _task_of(opened: LibrarySession, records: Sequence[Record]) -> str | None:
    """The library's task that all targets are of: of several, the one with the fewest answers. A task without fixed answers
    takes any text, and is meant only if it is the only one."""
    fitting = {}
    for name, task in opened.tasks.items():
        about = task.to_config()
        told = about.get("labels") or about.get("anchors") or about["name"] == "multiple_choice"
        if (told or len(opened.tasks) == 1) and _fits(task, records):
            fitting[name] = len(task.label_space)
    return min(fitting, key=fitting.__getitem__) if fitting else None


def _fits(task: Task, records: Sequence[Record]) -> bool:
    try:
        task.targets(records)
    except DataError:
        return False
    return True


def _labels_of(records: Sequence[Record]) -> dict[str, str]:
    """Each target found, with the text that stands for it: underscores are blanks."""
    found = sorted({str(record.fields["target"]) for record in records})
    if is_regression_target(record.fields["target"] for record in records):
        raise LibraryError("the targets are real numbers, which are no labels, and the library has no task of numbers")
    if len(found) < 2:
        raise LibraryError(
            f"all targets are {found[0]!r}, and one label makes no classification; name the others as well: "
            f"--label {found[0]}=TEXT --label OTHER=TEXT"
        )
    return {label: label.replace("_", " ").strip() or label for label in found}


def draw_shots(records: Sequence[Record], shots: int, per_class: bool, seed: int) -> list[Record]:
    """The first `shots` of the records in a seeded order (0: all), or of each class."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    if not shots or not per_class:
        return [records[i] for i in order[: shots or len(order)]]
    taken: dict[str, int] = {}
    chosen = []
    for i in order:
        label = str(records[i].fields["target"])
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= shots:
            chosen.append(records[i])
    return chosen


def missing_labels(task: Task, records: Sequence[Record]) -> list[str]:
    """The labels of a classification that no record has."""
    seen = {str(record.fields.get("target")) for record in records}
    return [label for label in task.to_config().get("labels", {}) if label not in seen]


def adapt_library(
    opened: LibrarySession, own: TargetTask, shots: Sequence[Record], out: Path, how: str = AUTO, seed: int = 0
) -> AdaptationResult:
    """Fit the library to these records; saves a library with one prompt more, `adapted`, and the task it is for."""
    if out.exists():
        raise LibraryError(f"{out} exists already; choose another --out")
    library = opened.library
    found = fit(library, shots, own.task, opened.model, local_training_config(library), how, seed)
    shown = found.fitted.demonstrations
    facts = {
        "task": own.name, "how": how, "way": found.way, "made_of": found.fitted.note, "why": found.said,
        "shots": len(shots), "seed": seed, "table": found.table, "demonstrations": list(shown.texts) if shown else [],
    }  # fmt: skip
    card = {
        **library.card,
        "tasks": {**library.card["tasks"], own.name: dict(own.task.to_config())},
        ADAPTED: facts,
    }
    keys = {**library.keys, ADAPTED: task_key(own.task, opened.model.backbone)} if library.keys else {}
    readouts = {name: readout for name, readout in library.readouts.items() if name != ADAPTED}
    if shown is not None and shown.readout_CD is not None:
        readouts[ADAPTED] = shown.readout_CD
    PromptLibrary(library.start, {**library.prompts, ADAPTED: found.fitted.prompt}, card, keys, readouts).save(out)
    return found


def local_training_config(library: PromptLibrary) -> LocalTrainingConfig:
    """How the library's prompts were tuned, as it is done on one's own records: the whole prompt by Adam, no noise.

    Raises `LibraryError` if the card states no learning rate.
    """
    training = validate(LocalTrainingConfig, library.card.get("training", {}), "card.json: training")
    if training.learning_rate is None:
        raise LibraryError("card.json states no training.learning_rate; make the library with this version of ficpd")
    return training.model_copy(update={"optimizer": "adam"})


def library_facts(path: Path) -> dict[str, Any]:
    """What `ficpd info` says of a library or run."""
    library = PromptLibrary.load(path)
    card, start = library.card, library.start
    return {
        "prompts": join_names(library.prompts),
        "backbone": f"{card['backbone'].get('name', '?')} ({start.backbone})",
        "shape": describe_shape(start),
        "tasks": _tasks(card["tasks"]),
        "made by": describe_run(card),
        "privacy": guarantee(card.get("privacy", {})),
        "adapted": {k: v for k, v in adapted_facts(library).items() if k not in ("table", "demonstrations")} or "no",
    }


def _tasks(tasks: Mapping[str, Any]) -> str:
    """Tasks in a line or a few: whole where there is one, else their names and kinds.

    >>> _tasks({"a": {"name": "classification", "labels": {"x": "x", "y": "y"}}, "b": {"name": "generation"}})
    'a (classification, 2 labels), b (generation)'
    """
    if len(tasks) == 1:
        return "; ".join(f"{name}: {about}" for name, about in tasks.items())
    counts = {name: f", {len(about['labels'])} labels" if about.get("labels") else "" for name, about in tasks.items()}
    return join_names(f"{name} ({about['name']}{counts[name]})" for name, about in tasks.items())
