"""Opens a library with its backbone, for `ficpd.load_library` and the commands."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ficpd.backbones import openai_api
from ficpd.backbones.loading import ENDPOINT, BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.data.tables import replace_surrogates
from ficpd.data.untyped import is_regression_target
from ficpd.errors import DataError, LibraryError, did_you_mean, needs
from ficpd.evaluation.evaluate import mixture_probabilities, predictions_of
from ficpd.interfaces import Task
from ficpd.library import peft_io
from ficpd.library.card import ADAPTED, join_names
from ficpd.library.library import PromptLibrary, require_new, task_embedding
from ficpd.library.records import NO_COLUMNS, Data, draw_shots, missing_labels, read_records
from ficpd.library.selection import AUTO, check_strategy
from ficpd.library.selection import adapt as fit
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import validate
from ficpd.tasks.build import build_task
from ficpd.tasks.demonstrations import Demonstrations
from ficpd.types import Batch, Predictor, Prompt, Record, Score

if TYPE_CHECKING:
    from pandas import DataFrame

Say = Callable[[str], None]
ZERO_SHOT = "zero-shot"
DEFAULT_PROMPTS = (ADAPTED, "global")
NEW_TASK = "own"
"""The name of a task that is new to the library."""


@dataclass(frozen=True, repr=False)
class LibrarySession:
    """A library with its backbone and tasks.

    engine: the backbone's query engine, or a function that loads it.
    folder: the folder it was loaded from; None for an unsaved library.
    """

    library: PromptLibrary
    engine: QueryEngine | Callable[[], QueryEngine]
    tasks: Mapping[str, Task]
    folder: Path | None = None

    def __repr__(self) -> str:
        backbone = self.library.card["backbone"].get("name", "?")
        return f"<library: {join_names(self.library.prompts)}; {backbone}; {join_names(self.tasks)}>"

    @cached_property
    def model(self) -> QueryEngine:
        """Returns the backbone's query engine, loaded at its first use."""
        return self.engine if isinstance(self.engine, QueryEngine) else self.engine()

    def predict(
        self, texts: str | Sequence[str | Record], *, scores: bool = False, prompt: str | None = None,
        task: str | None = None,
    ) -> "list | DataFrame":  # fmt: skip
        """Predicts each text by the named prompt, else by `default_prompt`. Returns a list of predictions.

        scores: returns a data frame instead: the label, and a column with the probability of each label.

        >>> library.predict("a fast pulse since monday")
        ['cardio']
        >>> library.predict(["a fast pulse since monday", "her hand is numb"], scores=True).round(1)
            label  cardio  neuro
        0  cardio     1.0    0.0
        1   neuro     0.0    1.0

        Raises `LibraryError` for `scores` of a task without labels.
        """
        records = [
            text if isinstance(text, Record) else Record(f"text {place}", {"text": replace_surrogates(text)})
            for place, text in enumerate([texts] if isinstance(texts, str) else texts, 1)
        ]
        name, chosen = prompt or default_prompt(self, task), self.tasks[self.named(task)]
        if not scores:
            predictors, batch = self.predictors(name, task), self.encode(records, name, task)
            return run_queries(self.model, predictions_of(chosen, predictors, batch))
        with needs("predict(scores=True)", "report"):
            import pandas as pd
        labels, rows = self.probabilities(records, prompt=prompt, task=task)
        frame = pd.DataFrame(rows, columns=list(chosen.label_space))
        frame.insert(0, "label", labels, allow_duplicates=True)
        return frame

    def probabilities(
        self, records: Sequence[Record], *, prompt: str | None = None, task: str | None = None
    ) -> tuple[list[str], list[list[float]]]:
        """Returns each record's label and the probabilities of all labels, in the order of the label space.

        Raises `LibraryError` for a task without labels.
        """
        name, space = prompt or default_prompt(self, task), self.tasks[self.named(task)].label_space
        if not self.tasks[self.named(task)].num_labels:
            raise LibraryError(f"scores: the task {self.named(task)} has no labels; leave them out")
        predictors, batch = self.predictors(name, task), self.encode(records, name, task)
        shares_BC = run_queries(self.model, mixture_probabilities(predictors, batch))
        return [space[place] for place in shares_BC.argmax(-1).tolist()], shares_BC.tolist()

    def evaluate(
        self, data: Data, *, prompt: str | None = None, task: str | None = None, columns: Mapping[str, str] = NO_COLUMNS
    ) -> Score:  # fmt: skip
        """Computes the task's metrics of one prompt on labelled records ("zero-shot": without a prompt).

        >>> library.evaluate("notes.csv")
        {'accuracy': 1.0, 'f1': 1.0}
        """
        name = prompt or str(default_prompt(self, task))
        return self.evaluate_prompts(data, [name], task=task, columns=columns)[name]

    def evaluate_prompts(
        self, data: Data, prompts: Sequence[str] | None = None, *, task: str | None = None,
        columns: Mapping[str, str] = NO_COLUMNS,
    ) -> dict[str, Score]:  # fmt: skip
        """Computes the metrics of several prompts; None: of every prompt and of the bare backbone ("zero-shot")."""
        chosen, start = self.tasks[self.named(task)], self.library.start
        records = read_records(data, columns)
        bare_PD, targets = start.vectors_PD[len(start.vectors_PD) - chosen.head_rows :], chosen.targets(records)
        named = [ZERO_SHOT, *self.library.prompts] if prompts is None else prompts
        given = {n: [Predictor(bare_PD)] if n == ZERO_SHOT else self.predictors(n, task) for n in named}
        return {
            name: chosen.score(
                run_queries(self.model, predictions_of(chosen, of, self.encode(records, name, task))), targets
            )
            for name, of in given.items()
        }

    def adapt(
        self, data: Data = (), *, shots: int = 16, per_class: bool = False, how: str = AUTO, task: str | None = None,
        labels: Mapping[str, str] | None = None, instruction: str | None = None, columns: Mapping[str, str] = NO_COLUMNS,
        seed: int = 0, say: Say = lambda line: None,
    ) -> "LibrarySession":  # fmt: skip
        """Fits the library to a few records. The new library also has the prompt `adapted` and its task.

        shots: the number of records used (0: all), in total or `per_class`.
        how: "auto", or one of `adaptation.STRATEGIES`: "leave", "nearest", "head", "ensemble", "tune",
            "mixture" or "demonstrations".
        task: a task of the library. `labels` (label to text) and `instruction` define a new task instead.
        say: receives a sentence about the task, and one about labels without a record.

        >>> mine = library.adapt("few.csv", shots=16, say=print)
        a new task, own: which of eye, skin
        >>> mine.predict(["a rash on the skin", "pain in one eye"])
        ['skin', 'eye']
        """
        if task and (labels or instruction is not None):
            raise LibraryError(
                "task names a task of the library, labels and instruction define a new one; leave out task or both others"
            )
        check_strategy(how)
        records = read_records(data, columns)
        target = resolve_task(self, records, task, labels or {}, instruction)
        chosen = draw_shots(records, shots, per_class, seed)
        target.task.targets(chosen)  # raises early for an unknown label
        say(target.said)
        if absent := missing_labels(target.task, chosen):
            say(f"none of the {len(chosen)} records is: {', '.join(absent)}")
        return adapt_session(self, target, chosen, how, seed)

    def save(self, folder: str | Path) -> None:
        """Writes the library to a new folder. Raises `LibraryError` if it exists or cannot be written."""
        require_new(folder)
        self.library.save(Path(folder))

    def export_peft(
        self, folder: str | Path, prompt: str = "global", *, base: str | None = None, reenter: bool = False,
        data: "Data | None" = None, columns: Mapping[str, str] = NO_COLUMNS, say: Say = lambda line: None, **options: Any,
    ) -> str:  # fmt: skip
        """Writes a prompt as a PEFT prompt-tuning folder; returns the model (folder or hub id) that PEFT loads.

        base: that model; None: the backbone's folder.
        reenter: first tunes an input prompt that imitates this one, on the texts of `data` or on synthetic texts.
            `options` (task, num_tokens, steps, seed): see `distill_library_prompt`. `say` receives the agreement.
        """
        from ficpd.library.peft_distillation import Texts, distill_library_prompt

        enters_at = get_prompt(self.library, prompt).enters_at
        library, base = self.library, base or peft_io.own_base(self.library)
        peft_io.checked_target(library, Path(folder), base, 0 if reenter else enters_at)
        texts = None
        if data is not None:
            source = Path(data).name if isinstance(data, (str, Path)) else "records given"
            texts = Texts(read_records(data, columns, labelled=False), source)
        backbone = self.model.backbone  # loading it checks its fingerprint
        if reenter:
            library = distill_library_prompt(self, prompt, texts, **options)
            for line in peft_io.reentry_lines(library.card):
                say(line)
        peft_io.export(library, prompt, Path(folder), base, backbone)
        return base

    @property
    def task(self) -> Task:
        """Returns the default task. Raises `LibraryError` if there are several to choose from."""
        return self.tasks[self.named()]

    def named(self, task: str | None = None) -> str:
        """Returns a task's name: the given one, else the adapted one, else the only one; else raises `LibraryError`."""
        if task is not None and task not in self.tasks:
            raise LibraryError(f"{did_you_mean('task', task, self.tasks)} (--task)")
        adapted = adapted_facts(self.library).get("task")
        known = [name for name in (task, adapted) if name in self.tasks]
        if not known and len(self.tasks) > 1:
            raise LibraryError(f"this library has several tasks; name one of them with --task: {', '.join(self.tasks)}")
        return str(known[0]) if known else next(iter(self.tasks))

    def encode(self, records: Sequence[Record], prompt: str | None = None, task: str | None = None) -> Batch:
        """Makes a batch of records for a task, with the demonstrations of the named prompt."""
        task = self.named(task)
        shown, start = self._shown(prompt, task), self.library.start
        chosen, backbone = self.tasks[task], self.model.backbone
        batch = chosen.encode(records, backbone, start)
        if prompt not in (None, ZERO_SHOT):
            batch = batch.with_readout(self.library.learned_readout(chosen))
        return shown.encode(chosen, records, backbone, start, batch) if shown else batch

    def predictors(self, prompt: str | None, task: str | None = None) -> Sequence[Predictor]:
        """Returns the prompt's predictor, or the mixture's predictors for an adapted prompt of one, on its task."""
        vectors_PD, mixture = get_prompt(self.library, prompt).vectors_PD, self.library.mixture
        mine = prompt == ADAPTED and adapted_facts(self.library).get("task") == self.named(task)
        return mixture.predictors() if mine and mixture is not None else [Predictor(vectors_PD)]

    def _shown(self, prompt: str | None, task: str) -> Demonstrations | None:
        """Returns the demonstrations of an adapted prompt; None for another prompt or task."""
        adapted, readout = adapted_facts(self.library), self.library.readouts.get(ADAPTED)
        texts = tuple(adapted.get("demonstrations", ()))
        mine = prompt == ADAPTED and adapted.get("task") == task and (texts or readout is not None)
        return Demonstrations(texts, readout) if mine else None


def adapted_facts(library: PromptLibrary) -> Mapping[str, Any]:
    """Returns the card's facts about the adaptation; empty if the library is not adapted."""
    return library.card.get(ADAPTED, {})


def load_library(
    folder: str | Path, *, revision: str | None = None, backbone: str | None = None, device: str = "cpu",
    weights: bool = True,
) -> LibrarySession:  # fmt: skip
    """Opens a library's folder, a run directory with one, or hf:OWNER/NAME of the Hugging Face hub.

    revision: a branch, tag or commit of the hub.
    backbone: a name, folder or hub id that replaces the card's, such as the local folder of the weights.
    device: "cpu", "cuda", "cuda:N" or "mps".
    weights: False: loads and checks the backbone at its first use, after names, columns and labels were checked.

    >>> ficpd.load_library("runs/demo")
    <library: global, prototype-0, prototype-1; tiny; classification>

    Raises `LibraryError` if the folder has no library, or the library was made on another backbone.
    """
    folder = Path(folder)
    library = PromptLibrary.load(folder, revision)
    given = library.card["backbone"]
    named = {key: given[key] for key in ("name", "kind", "options") if key in given}
    named |= {"name": backbone} if backbone else {}
    if ENDPOINT in (named.get("name"), named.get("kind")):
        named["options"] = openai_api.options_from_card(named.get("options", {}))
    config = validate(BackboneConfig, named, f"{folder}: card.json: backbone")

    def load() -> QueryEngine:
        loaded, _ = load_backbone(config, validate(EngineConfig, {"device": device}, "--device"))
        library.check(loaded)
        return QueryEngine(loaded)

    tasks = {name: build_task(about) for name, about in library.card["tasks"].items()}
    return LibrarySession(library, load() if weights else load, tasks, folder)


def default_prompt(opened: LibrarySession, task: str | None = None) -> str | None:
    """Returns a task's prompt: the one adapted to it, else `global`, else that of the nearest key (None: no keys)."""
    library, task = opened.library, opened.named(task)
    for name in DEFAULT_PROMPTS:
        if name in library.prompts and (name != ADAPTED or adapted_facts(library).get("task", task) == task):
            return name
    return library.nearest(task_embedding(opened.tasks[task], opened.model.backbone))[0] if library.keys else None


def get_prompt(library: PromptLibrary, name: str | None) -> Prompt:
    if name is None or name not in library.prompts:
        raise LibraryError(f"no prompt {name!r} in this library; it has {join_names(library.prompts)}")
    return library.prompts[name]


@dataclass(frozen=True)
class TargetTask:
    """A task to adapt to: its name in the adapted library, and a sentence about the choice."""

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
    """Returns the named task, a new classification into `labels`, or the library's task that fits all targets.

    If none fits, or with an `instruction`, the targets are the labels of a new classification. Raises `LibraryError` if
    the targets are numbers or all the same, and `DataError` for a target without a label.
    """
    if name is not None or not (records or labels):
        name = opened.named(name)
        return TargetTask(name, opened.tasks[name], f"task {name}")
    if not labels and instruction is None and (known := _task_of(opened, records)) is not None:
        return TargetTask(known, opened.tasks[known], f"task {known}, because it fits all targets")
    labels = labels or _labels_of(records)
    task = build_task({"name": "classification", "labels": dict(labels), "instruction": instruction or ""})
    task.targets(records)
    taken = {key for key in opened.tasks if key != adapted_facts(opened.library).get("task")}
    free = next(key for key in (NEW_TASK, *(f"{NEW_TASK}-{i}" for i in range(2, len(taken) + 3))) if key not in taken)
    return TargetTask(free, task, f"a new task, {free}: which of {join_names(labels)}")


def _task_of(opened: LibrarySession, records: Sequence[Record]) -> str | None:
    """Returns the library's task that fits all targets: of several, the one with the fewest answers.

    A task without fixed answers fits any text, so it counts only if it is the only task."""
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
    """Maps each target to a label text, with blanks for underscores. Raises `LibraryError`, as `resolve_task`."""
    found = sorted({str(record.fields["target"]).strip() for record in records})
    if is_regression_target(record.fields["target"] for record in records):
        raise LibraryError("the targets are real numbers, and the library has no regression; give labels as targets")
    if len(found) < 2:
        raise LibraryError(
            f"all targets are {found[0]!r}, and one label makes no classification; name the others as well: "
            f"--label {found[0]}=TEXT --label OTHER=TEXT"
        )
    return {label: label.replace("_", " ").strip() or label for label in found}


def adapt_session(
    opened: LibrarySession, own: TargetTask, shots: Sequence[Record], how: str = AUTO, seed: int = 0
) -> LibrarySession:
    """Fits the library to the records of one task. `card["adapted"]` has the choice and the table of strategies."""
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
    keys = {**library.keys, ADAPTED: task_embedding(own.task, opened.model.backbone)} if library.keys else {}
    readouts = {name: readout for name, readout in library.readouts.items() if name != ADAPTED}
    if shown is not None and shown.readout is not None:
        readouts[ADAPTED] = shown.readout
    prompts = {**library.prompts, ADAPTED: found.fitted.prompt}
    return LibrarySession(
        PromptLibrary(library.start, prompts, card, keys, readouts, library.learned, found.fitted.mixture), opened.model,
        {**opened.tasks, own.name: own.task},
    )  # fmt: skip


def local_training_config(library: PromptLibrary) -> LocalTrainingConfig:
    """Returns the settings to tune on a caller's records: those of the library, with Adam.

    Raises `LibraryError` if the card states no learning rate.
    """
    training = validate(LocalTrainingConfig, library.card.get("training", {}), "card.json: training")
    if training.learning_rate is None:
        raise LibraryError("card.json states no training.learning_rate; make the library with this version of ficpd")
    return training.model_copy(update={"optimizer": "adam"})
