"""Using a library: open it with the backbone its card names, score, adapt, predict. What the CLI's doors call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ficpd import __version__, registry
from ficpd.backbones.catalog import NAMED
from ficpd.compute import Compute, drive
from ficpd.data import sources
from ficpd.errors import LibraryError
from ficpd.experiment import BackboneConfig, EngineConfig, checked, recipes
from ficpd.library import Adapted, PromptLibrary, guarantee, made_by
from ficpd.metrics.evaluate import predictions, score_prompt
from ficpd.seams import Task
from ficpd.speed import machine
from ficpd.tuners import Training
from ficpd.types import Prompt, Record, Score
from ficpd.world import build_task, load_backbone

ZERO_SHOT = "zero-shot"
PREFERRED = ("adapted", "global")


@dataclass(frozen=True)
class Opened:
    """A library with its backbone and task, ready to use."""

    library: PromptLibrary
    model: Compute
    task: Task


def open_library(folder: Path, device: str = "cpu") -> Opened:
    """Raises `LibraryError` if the folder holds no library, or the backbone is not the one it was made on."""
    library = PromptLibrary.load(folder)
    given = library.card["backbone"]
    named = {key: given[key] for key in ("name", "kind", "options") if key in given}
    config = checked(BackboneConfig, named, f"{folder}: card.json: backbone")
    backbone, _ = load_backbone(config, checked(EngineConfig, {"device": device}, "--device"))
    library.check(backbone)
    return Opened(library, Compute(backbone), build_task(library.card["task"]))


def read_records(data: str, columns: Mapping[str, str], labelled: bool) -> list[Record]:
    """All records of a file, in its order. Without labels only `text` (and `text_pair`, if named) is read."""
    roles = {"text": "text", **({"target": "target"} if labelled else {}), **columns}
    return sources.read_all(checked(sources.Config, {"source": data, "columns": roles}, "--data"))


def texts_as_records(texts: Sequence[str]) -> list[Record]:
    return [Record(f"text {place}", {"text": text}) for place, text in enumerate(texts, 1)]


def scores(opened: Opened, records: Sequence[Record], name: str | None) -> dict[str, Score]:
    """The score of the named prompt (or all), beside the backbone without any."""
    library, task = opened.library, opened.task
    prompts = library.prompts if name is None else {name: pick(library, name)}
    bare = replace(library.start, vectors_PD=library.start.vectors_PD[len(library.start.vectors_PD) - task.head_rows :])
    batch = task.encode(records, opened.model.backbone, library.start)
    targets = task.targets(records)
    wanted = {ZERO_SHOT: bare, **prompts}
    return {key: score_prompt(prompt.vectors_PD, batch, targets, opened.model) for key, prompt in wanted.items()}


def predicted(opened: Opened, records: Sequence[Record], name: str | None) -> list:
    """One prediction per record, by the named prompt, else the adapted, else the global one."""
    prompt = pick(opened.library, name or next((n for n in PREFERRED if n in opened.library.prompts), None))
    batch = opened.task.encode(records, opened.model.backbone, prompt)
    return drive(opened.model, predictions(prompt.vectors_PD, batch))


def pick(library: PromptLibrary, name: str | None) -> Prompt:
    if name is None or name not in library.prompts:
        raise LibraryError(f"no prompt {name!r} in this library; it has {', '.join(library.prompts) or 'none'}")
    return library.prompts[name]


def adapt_library(
    opened: Opened, records: Sequence[Record], shots: int, steps: int, seed: int, out: Path
) -> tuple[Adapted, int]:
    """Adapt to the first `shots` of the records in a seeded order (0: all); saves a library with one more prompt."""
    if out.exists():
        raise LibraryError(f"{out} exists already; choose another --out")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [records[i] for i in order[: shots or len(order)]]
    adapted = opened.library.adapt(chosen, opened.task, opened.model, training_at_home(opened.library), steps, seed)
    card = {
        **opened.library.card,
        "adapted": {"began_from": adapted.began_from, "tuned": adapted.tuned, "shots": len(chosen)},
    }
    PromptLibrary(opened.library.start, {**opened.library.prompts, "adapted": adapted.prompt}, card).save(out)
    return adapted, len(chosen)


def training_at_home(library: PromptLibrary) -> Training:
    """How the library's prompts were tuned, as it is done on one's own records: the whole prompt by Adam, no noise.

    Raises `LibraryError` if the card states no learning rate.
    """
    training = checked(Training, library.card.get("training", {}), "card.json: training")
    if training.learning_rate is None:
        raise LibraryError("card.json states no training.learning_rate; make the library with this version of ficpd")
    return training.model_copy(update={"tuner": "adam"})


def library_facts(path: Path) -> dict[str, Any]:
    """What `ficpd info` says of a library or run."""
    library = PromptLibrary.load(path)
    card, start = library.card, library.start
    return {
        "prompts": ", ".join(library.prompts) or "none",
        "backbone": f"{card['backbone'].get('name', '?')} ({start.backbone})",
        "shape": f"{len(start.vectors_PD) - start.head_rows} virtual tokens x {start.vectors_PD.shape[1]}, "
        f"entering at layer {start.enters_at}",
        "task": card["task"],
        "made by": made_by(card),
        "privacy": guarantee(card.get("privacy", {})),
        "adapted": card.get("adapted", "no"),
    }


def installed() -> dict[str, Any]:
    """What this installation knows: the registries, recipes and the machine."""
    known = {
        kind: ", ".join(registry.names(kind))
        for kind in ("methods", "tasks", "backbones", "tuners", "privacy", "engines")
    }
    named = "; ".join(f"{name}: {entry.about}" for name, entry in NAMED.items())
    return {
        "ficpd": __version__, **known, "named backbones": named, "recipes": ", ".join(recipes()),
        "machine": machine(torch.device("cpu")), "cuda": torch.cuda.is_available(),
    }  # fmt: skip
