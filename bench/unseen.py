"""What a library is worth to somebody whom no site resembles: a task, a domain or a language that was left out.

python bench/unseen.py tasks|fine|domains|languages|keys [--seeds 0 1 2] [--data FOLDER] [--e5 FOLDER]

A federation without it leaves a library; few records of what was left out are then fitted to it by every way of `adapt`,
and scored on test records. Beside it stand the same ways without a library: no prompt, a prompt of the task's own words,
the prompt that every federation begins with (words of the vocabulary, which are public). What was measured before is
not run again, nor the federation if only its start is missing.

`tasks`: each task of `library.py`'s mix in turn. `fine`: the same with CLINC150 and Banking77 as many small tasks, and a
prompt meta-learned on public texts. `domains`: polarity without one of its four. `languages`: SIB-200 in 16 languages on
multilingual E5, and three of the eight others. `keys`: how similar tasks are by their keys. Figures are accuracies in
percent; shots are records in all.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from ficpd.backbones.query_engine import run_queries
from ficpd.evaluation.evaluate import predictions_of
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress, run_method
from ficpd.interfaces import Task
from ficpd.library.adaptation import STRATEGIES, AdaptedPrompt
from ficpd.library.library import PromptLibrary, task_embedding
from ficpd.library.records import draw_shots
from ficpd.library.selection import adapt, prepare_shots
from ficpd.registry import validated_section
from ficpd.tasks.build import start_text
from ficpd.types import Record
from library import CLIENTS, POLARITY, PROTOTYPES, RECORDS, faster, group, setting, told, world_of
from measure import Cells, parse, save

MOST_TESTED = 300
DOMAINS = ("tweets", "films", "products", "editorials")
LEFT = ("swh_Latn", "tha_Thai", "fin_Latn")
"""Of the eight languages that nobody has: three families."""
NOBODYS = (*LEFT, "urd_Arab", "bul_Cyrl", "pol_Latn", "ukr_Cyrl", "vie_Latn")
E5_RATE = 10.0
"""Of the default rate: 50 steps of 32 in one place reach 76.9 in languages left out, 73.8 at it and thrice it."""
FINE = {"clinc": ("domain", 10), "banking": ("label_name", 7)}
"""Group: the column that it is cut up by, and into how many small tasks."""


# ---------------------------------------------------------------- the library, and those who come to it


def library_of(
    context: ExperimentContext, method: dict[str, Any], distillation: dict[str, Any] | None = None
) -> PromptLibrary:
    experiment = context.experiment.model_copy(
        update={"method": validated_section("methods", PROTOTYPES | method, "bench")}
    )
    if distillation:
        asked = experiment.distillation.model_copy(update=distillation)
        experiment = experiment.model_copy(update={"distillation": asked})
    with tempfile.TemporaryDirectory() as folder:
        run_method(
            replace(context, experiment=experiment), experiment.method, RunDir(Path(folder) / "run"), None, no_progress
        )
        return PromptLibrary.load(Path(folder) / "run")


class Newcomer:
    """Somebody with records of a task, come to a library of this world's backbone."""

    def __init__(
        self, context: ExperimentContext, task: Task, train: Sequence[Record], test: Sequence[Record], seed: int
    ):
        self.context, self.task, self.seed = context, task, seed
        self.train, self.test = draw_shots(train, 0, False, seed), draw_shots(test, MOST_TESTED, False, seed)
        self.encoded = task.encode(self.test, context.model.backbone, context.start)

    def score(self, fitted: AdaptedPrompt) -> float:
        batch = fitted.encode(self.task, self.test, self.context.model.backbone, self.encoded)
        found = run_queries(self.context.model, predictions_of(self.task, fitted.predictors(), batch))
        return 100 * self.task.score(found, self.task.targets(self.test))["accuracy"]

    def alone(self) -> PromptLibrary:
        """No library: a start of this task's own words."""
        start, text = self.context.start, start_text([self.task])
        vectors_PD = self.context.model.backbone.init_prompt(text, len(start.vectors_PD), start.enters_at, self.seed)
        return PromptLibrary(start.with_vectors(vectors_PD), {}, {})

    def begun(self) -> PromptLibrary:
        """No library: the start that the federation had."""
        return PromptLibrary(self.context.start, {}, {})

    def bare(self) -> PromptLibrary:
        """Not even a start: a prompt of no vectors."""
        start = self.context.start
        return PromptLibrary(start.with_vectors(start.vectors_PD[:0]), {}, {})

    def unfitted(self, library: PromptLibrary) -> dict[str, float]:
        """Without a record: every prompt as it is, and what `auto` takes."""
        named = {
            name: AdaptedPrompt(prompt, name) for name, prompt in {"start": library.start, **library.prompts}.items()
        }
        found = {name: self.score(fitted) for name, fitted in named.items()}
        if library.keys:
            embedding_D = task_embedding(self.task, self.context.model.backbone)
            found["nearest key"] = found[library.nearest(embedding_D)[0]]
        return found | {"auto": self.score(self._adapted(library, 0, "auto"))}

    def fitted(self, library: PromptLibrary, shots: int, ways: Sequence[str], auto: bool) -> dict[str, float]:
        """Every variant of these ways, and what `auto` chooses among all."""
        records, context = self.train[:shots], self.context
        given = prepare_shots(library, records, self.task, context.model, context.experiment.training, self.seed)
        found = {}
        for way in ways:
            found |= {
                variant: self.score(one) for variant, one in run_queries(context.model, STRATEGIES[way](given)).items()
            }
        return found | ({"auto": self.score(self._adapted(library, shots, "auto"))} if auto else {})

    def _adapted(self, library: PromptLibrary, shots: int, how: str) -> AdaptedPrompt:
        context = self.context
        records = self.train[:shots]
        return adapt(library, records, self.task, context.model, context.experiment.training, how, self.seed).fitted


ALONE = ("leave", "tune", "demonstrations", "head", "ensemble")


def measured(
    cells: Cells, name: str, seed: int, newcomer: Newcomer, library: Callable[[], PromptLibrary], shots: Sequence[int]
) -> None:
    """The cells of one newcomer: with the library; with its start alone (vocabulary); with a start of the task's own words
    (none); with no prompt at all."""
    alone, begun, bare = newcomer.alone(), newcomer.begun(), newcomer.bare()

    def given(few: int, auto: bool) -> dict[str, float]:
        return newcomer.fitted(library(), few, list(STRATEGIES), auto) if few else newcomer.unfitted(library())

    for few in shots:
        said, auto = f"{name}, {few} shots", few > 0
        cells.add(f"{said}, library", seed, partial(given, few, auto))
        if not few:
            cells.add(f"{said}, none", seed, partial(newcomer.unfitted, alone))
            cells.add(f"{said}, no prompt", seed, partial(newcomer.unfitted, bare))
            continue
        cells.add(f"{said}, none", seed, partial(newcomer.fitted, alone, few, ALONE, auto))
        cells.add(
            f"{said}, no prompt",
            seed,
            partial(newcomer.fitted, bare, few, ["leave", "demonstrations", "head", "ensemble"], False),
        )
        cells.add(f"{said}, vocabulary", seed, partial(newcomer.fitted, begun, few, ALONE, False))


def held_by(context: ExperimentContext, task: Task, among: ExperimentContext, seed: int) -> Newcomer:
    """All records of another world's only task, brought to the library of this one."""
    shards = among.shards.values()
    return Newcomer(context, task, [r for s in shards for r in s.train], [r for s in shards for r in s.test], seed)


# ---------------------------------------------------------------- what is left out


def tasks(args: argparse.Namespace) -> None:
    cells = Cells("unseen_tasks", f"library of four tasks, 5 prototypes, {setting(args)}")
    for seed, left in ((seed, left) for seed in args.seeds for left in CLIENTS):
        if cells.has(f"{left}, {args.shots[-1]} shots, vocabulary", seed):
            continue
        context = world_of(args, seed, {name: n for name, n in CLIENTS.items() if name != left})
        library = cache(partial(library_of, context, {}))
        other = whole(args, seed, left)
        measured(cells, left, seed, held_by(context, other.task, other, seed), library, args.shots)


def whole(args: argparse.Namespace, seed: int, name: str) -> ExperimentContext:
    """One task alone, with all of its records."""
    parts = group(name, args.data, CLIENTS[name], RECORDS)
    parts["data"].pop("max_records")
    return world_of(args, seed, groups={name: parts})


def fine(args: argparse.Namespace) -> None:
    """As `tasks`, at 16 shots; `meta` is Reptile's prompt."""
    cells = Cells(
        "unseen_fine", f"library of many small tasks, 20 prototypes, Reptile on {told(args.texts)}, {setting(args)}"
    )
    meta = {"how": "reptile", "texts": args.texts, "steps": 30}
    for seed, left in ((seed, left) for seed in args.seeds for left in CLIENTS):
        if cells.has(f"{left}, 16 shots, meta", seed):
            continue
        context = world_of(args, seed, groups=dict(cut_up(args, left)))
        library = library_of(context, {"num_prototypes": 20}, meta)
        other = whole(args, seed, left)
        newcomer = held_by(context, other.task, other, seed)
        learned = PromptLibrary(library.prompts["distilled"], {}, library.card)
        cells.add(f"{left}, 0 shots, library", seed, partial(newcomer.unfitted, library))
        cells.add(f"{left}, 16 shots, library", seed, partial(newcomer.fitted, library, 16, list(STRATEGIES), True))
        cells.add(f"{left}, 16 shots, meta", seed, partial(newcomer.fitted, learned, 16, ALONE, False))


def cut_up(args: argparse.Namespace, left: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The groups of the mix but one, two of them as many small tasks with a client each."""
    for name, number in CLIENTS.items():
        if name == left:
            continue
        yield name, group(name, args.data, number, RECORDS)
        if name not in FINE:
            continue
        column, parts = FINE[name]
        table = pd.read_parquet(Path(args.data) / f"{'clinc150' if name == 'clinc' else 'banking77'}.parquet")
        values = sorted(table[column].unique())
        for place in range(parts):
            mine = group(name, args.data, 1, RECORDS)
            mine["data"]["where"] = {column: values[place::parts]}
            mine["data"]["columns"]["target"] = "label_name"
            labels = sorted(table[table[column].isin(values[place::parts])].label_name.unique())
            mine["task"]["labels"] = {label: label.replace("_", " ").lower() for label in labels}
            yield f"{name}{place}", mine


def domains(args: argparse.Namespace) -> None:
    cells = Cells(
        "unseen_domains", f"polarity in three domains, 3 prototypes, 24 clients of 100 records, {setting(args)}"
    )
    for seed, left in ((seed, left) for seed in args.seeds for left in DOMAINS):
        if cells.has(f"{left}, {args.shots[-1]} shots, vocabulary", seed):
            continue
        context, other = (polarity(args, seed, where) for where in ([d for d in DOMAINS if d != left], [left]))
        library = cache(partial(library_of, context, {"num_prototypes": 3, "by": "domain"}))
        measured(cells, left, seed, held_by(context, context.task, other, seed), library, args.shots)


def polarity(args: argparse.Namespace, seed: int, where: Sequence[str]) -> ExperimentContext:
    parts = {key: dict(value) for key, value in POLARITY.items()}
    parts["data"] |= {"where": {"domain": list(where)}, "max_records": round(800 * len(where) / 0.7)}
    parts["partition"]["num_clients"] = 8 * len(where)
    return world_of(args, seed, groups={"polarity": parts})


def languages(args: argparse.Namespace) -> None:
    cells = Cells(
        "unseen_languages", f"SIB-200, multilingual E5, 16 clients of a language and 100 records, rate {E5_RATE:g}"
    )
    for seed in args.seeds:
        if cells.has(f"{LEFT[-1]}, {args.shots[-1]} shots, vocabulary", seed):
            continue
        table = pd.read_parquet(Path(args.data) / "sib200.parquet")
        context = sib(args, seed, [lang for lang in sorted(table.lang.unique()) if lang not in NOBODYS])
        library = cache(partial(library_of, context, {"num_prototypes": 5, "by": "lang"}))
        for left in LEFT:
            other = sib(args, seed, (left,), records=0)
            measured(cells, left, seed, held_by(context, context.task, other, seed), library, args.shots)


def sib(args: argparse.Namespace, seed: int, where: Sequence[str], records: int = RECORDS) -> ExperimentContext:
    """A client for each language with so many records (0: all)."""
    parts = group("sib", args.data, len(where), records or 10_000)
    parts["data"] |= {
        "where": {"lang": list(where)},
        "columns": {"text": "text", "target": "label_name", "lang": "lang"},
    }
    parts["partition"] = {"kind": "column", "column": "lang"}
    tree = {
        "seed": seed,
        "backbone": {
            "name": str(args.e5),
            "kind": "sentence_encoder",
            "options": {"max_tokens": 64, "prefix": "query: "},
        },
        "prompt": {"num_tokens": 10, "enters_at": 6, "init": "vocabulary"},
        "training": {"local_steps": 5, "batch_size": 16},
        "federation": {"num_rounds": args.rounds},
        "groups": {"sib": parts},
    }
    return faster(build_context(parse(tomli_w.dumps(tree))), E5_RATE)


def keys(args: argparse.Namespace) -> None:
    """The cosine of every two tasks' embeddings."""
    groups = dict(cut_up(args, ""))
    context = world_of(args, 0, groups=groups)
    found = {name: task_embedding(task, context.model.backbone) for name, task in context.tasks.items()}
    pairs = [(a, b) for a in found for b in found if a < b]
    save("unseen_keys", {"cosine": {f"{a}, {b}": round(float(found[a] @ found[b]), 3) for a, b in pairs}})


PARTS = {"tasks": tasks, "fine": fine, "domains": domains, "languages": languages, "keys": keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4, 16, 64])
    parser.add_argument("--data", default="data", help="folder of the sets")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--texts", help="fine: public texts to meta-learn on, one a line")
    parser.add_argument("--e5", type=Path, help="languages: folder of multilingual-e5-small")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
