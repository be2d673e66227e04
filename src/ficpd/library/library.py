"""What the federation leaves behind: a basis of prompts, keys to find them by, and a card that says what they are."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import LibraryError
from ficpd.interfaces import Backbone, Task
from ficpd.library.card import ADAPTED, join_names, model_card
from ficpd.storage import atomic_write, fsync
from ficpd.types import Batch, Prompt, Query, Record

FORMAT = 2
"""1: the card has one `task` and there are no keys. Still read."""
START = "start"
KEY, READOUT = "key/", "readout/"
CARD = ("backbone", "tasks")
"""The parts of a card that a library cannot be used without."""


@dataclass(frozen=True)
class PromptLibrary:
    """`prompts` by name (`global`, `prototype-0`, ...), all of one shape, layer and backbone; `start` is where all of
    them came from. `card` is JSON: the backbone's name, the tasks by name, privacy spent, how it was made.

    `keys`: by prompt, the unit vector [D] of the tasks it was made for (see `task_key`). `readouts`: by prompt, the
    [C, D] that answers are scored by instead of the task's own, where demonstrations joined it.
    """

    start: Prompt
    prompts: Mapping[str, Prompt]
    card: Mapping[str, Any]
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    readouts: Mapping[str, Tensor] = field(default_factory=dict)

    def offset(self, name: str) -> Tensor:
        """[P, D]: how far a prompt has come from the start."""
        return self.prompts[name].vectors_PD - self.start.vectors_PD

    def nearest(self, key_D: Tensor, n: int = 1) -> list[str]:
        """The n prompts made for what is most like `key_D` (a `task_key`), best first.

        Raises `LibraryError` if the library has no keys.
        """
        if not self.keys:
            raise LibraryError(
                "this library has no keys (it is of an older version, or its backbone knows no words); find prompts by "
                "their loss on shots"
            )
        return _closest(self.keys, key_D)[:n]

    def compose(self, weights: Mapping[str, float]) -> Prompt:
        """start + Σ w_j (prompt_j - start). Raises `LibraryError` for a name the library lacks, or prompts of words."""
        if not self.start.vectors_PD.is_floating_point():
            raise LibraryError(
                "this library's prompts are words of a remote model, which cannot be mixed; use one of them"
            )
        for name in weights:
            if name not in self.prompts:
                raise LibraryError(f"no prompt {name!r} in this library; it has {join_names(self.prompts)}")
        moved = sum((weight * self.offset(name) for name, weight in weights.items()), torch.zeros(()))
        return self.start.with_vectors(self.start.vectors_PD + moved)

    def candidates(self) -> dict[str, Prompt]:
        return {START: self.start, **self.prompts}

    def losses(self, records: Sequence[Record], task: Task, model: QueryEngine) -> dict[str, float]:
        """The mean loss of every prompt on these records, asked in one query. They are the caller's own records."""
        self.check(model.backbone)
        batch = task.encode(records, model.backbone, self.start)
        stacked_KPD = torch.stack([prompt.vectors_PD for prompt in self.candidates().values()])
        loss_KB = model.answer([Query(stacked_KPD, batch)])[0].loss_KB
        return dict(zip(self.candidates(), loss_KB.mean(1).tolist(), strict=True))

    def check(self, backbone: Backbone) -> None:
        """Raises `LibraryError` if the library was made on another backbone."""
        if self.start.backbone != backbone.fingerprint:
            made, here = f"{self.card.get('backbone', {}).get('name', '?')} ({self.start.backbone})", backbone.name
            raise LibraryError(
                f"the library was made on backbone {made}, this is {here} ({backbone.fingerprint}); its "
                "prompts mean nothing here. Load the backbone that the card names"
            )

    def save(self, folder: Path) -> None:
        """One folder: `prompts.safetensors`, `card.json`, `README.md`. Written beside, then renamed."""
        self._check_names()
        folder = Path(folder)
        beside = folder.with_name(folder.name + ".writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        meta = {"format": str(FORMAT), "backbone": self.start.backbone, "enters_at": str(self.start.enters_at),
                "head_rows": str(self.start.head_rows)}  # fmt: skip
        tensors = {name: prompt.vectors_PD for name, prompt in self.candidates().items()}
        tensors |= {KEY + name: key_D for name, key_D in self.keys.items()}
        tensors |= {READOUT + name: readout_CD for name, readout_CD in self.readouts.items()}
        whole = {n: (t.float() if t.is_floating_point() else t).detach().cpu().clone() for n, t in tensors.items()}
        atomic_write(beside / "prompts.safetensors", save(whole, meta))
        atomic_write(beside / "card.json", json.dumps(self.card, indent=2) + "\n")
        atomic_write(beside / "README.md", self.page())
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    def page(self) -> str:
        """For people."""
        return model_card(self.card, self.start, self.prompts, self.readouts)

    def _check_names(self) -> None:
        """Raises `LibraryError` for a prompt whose name a key, a readout or the start would have in the file."""
        for name in self.prompts:
            if name == START or name.startswith((KEY, READOUT)):
                raise LibraryError(f"a prompt cannot be named {name!r}: that is taken in the file; name it otherwise")

    @staticmethod
    def load(folder: Path) -> "PromptLibrary":
        """A library's folder, or a run directory that holds one. Raises `LibraryError` if it is neither or damaged."""
        folder = Path(folder)
        folder = folder / "library" if (folder / "library" / "card.json").exists() else folder
        path = folder / "prompts.safetensors"
        if not path.exists():
            raise LibraryError(
                f"{folder} holds no prompt library (no prompts.safetensors); give a run's or library's folder"
            )
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _assembled(meta, tensors, _read_card(folder / "card.json", int(meta["format"])))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LibraryError(f"{folder} is damaged or of another version: {error}; save the library again") from error


def _closest(vectors: Mapping[str, Tensor], wanted: Tensor) -> list[str]:
    """All names by falling cosine to `wanted`, those of equal cosine by name."""
    names = list(vectors)
    stacked = torch.stack([vectors[name].flatten() for name in names]) if names else torch.zeros(0, wanted.numel())
    cosine = dict(zip(names, F.cosine_similarity(stacked, wanted.flatten()[None]).tolist(), strict=True))
    return sorted(names, key=lambda name: (-cosine[name], name))


def _read_card(path: Path, format: int) -> dict[str, Any]:
    """Raises `ValueError` or `OSError` if it is none. A card of format 1 has one task, named by its kind."""
    if format not in (1, FORMAT):
        raise ValueError(f"format {format}, and this version of ficpd reads 1 to {FORMAT}")
    card = json.loads(path.read_text())
    if isinstance(card, dict) and format == 1 and isinstance(card.get("task"), dict):
        task = card.pop("task")
        card["tasks"] = {str(task.get("name", "task")): task}
    if not isinstance(card, dict) or not all(isinstance(card.get(part), dict) and card[part] for part in CARD):
        raise ValueError(f"card.json is no object with {', '.join(CARD)}")
    if wrong := [name for name, task in card["tasks"].items() if not isinstance(task, dict) or "name" not in task]:
        raise ValueError(f"card.json: tasks: {wrong[0]} does not say which kind of task it is (`name`)")
    if not isinstance(card.get(ADAPTED, {}), dict):
        raise ValueError(f"card.json: {ADAPTED} is no object")
    return card


def _assembled(meta: Mapping[str, str], tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> PromptLibrary:
    """The library from what lay in its files. Raises `KeyError` or `ValueError` if parts do not fit."""
    keys = {name.removeprefix(KEY): t for name, t in tensors.items() if name.startswith(KEY)}
    readouts = {name.removeprefix(READOUT): t for name, t in tensors.items() if name.startswith(READOUT)}
    vectors = {name: t for name, t in tensors.items() if not name.startswith((KEY, READOUT))}
    if len({vector.shape for vector in vectors.values()}) != 1:
        raise ValueError("its prompts have different shapes")
    width = vectors[START].shape[1]
    if {*keys, *readouts} - vectors.keys() or any(t.shape[-1] != width for t in [*keys.values(), *readouts.values()]):
        raise ValueError("a key or readout belongs to no prompt, or is of another width")
    shape = int(meta["enters_at"]), int(meta["head_rows"])
    prompts = {name: Prompt(value, meta["backbone"], *shape) for name, value in sorted(vectors.items())}
    return PromptLibrary(prompts.pop(START), prompts, card, keys, readouts)


def task_key(task: Task, backbone: Backbone) -> Tensor:
    """[D], of length 1: where a task lies among others, from nothing but its public description.

    The mean feature that the bare backbone gives the task's answers, each framed by the instruction (an encoder's readout
    rows); the instruction's alone where a task has no fixed answers.
    """
    if backbone.modality == "image":
        readout_CD = task.readout(backbone)
        assert readout_CD is not None
        return F.normalize(readout_CD.float().mean(0), dim=0).cpu()
    items = tuple((backbone.tokenize(text, None, "", None, 0),) for text in _framed(task.to_config()))
    nothing = torch.zeros(1, task.head_rows, backbone.width)
    query = Query(nothing, Batch(task, items, None, None, 0), outputs=True)
    outputs = QueryEngine(backbone, 0).answer([query])[0].outputs_KB
    assert outputs is not None
    return F.normalize(outputs.features_RD.float().mean(0), dim=0).cpu()


def prompt_keys(
    names: Iterable[str], tasks: Mapping[str, Task], tasks_of: Mapping[str, Sequence[str]], backbone: Backbone
) -> dict[str, Tensor]:
    """A key for each prompt: the mean over the tasks it was made for, over all of them where that is not known. None where
    the backbone knows no words to describe a task by, or gives no features of them."""
    names = list(names) if backbone.has_text_encoder and backbone.supports_features else []
    keys = {name: task_key(task, backbone) for name, task in tasks.items()} if names else {}
    mine = {name: [keys[task] for task in tasks_of.get(name, ())] or list(keys.values()) for name in names}
    return {name: F.normalize(torch.stack(of).mean(0), dim=0) for name, of in mine.items()}


def _framed(described: Mapping[str, Any]) -> list[str]:
    """What is embedded of a task: each answer behind the instruction, else the instruction, else the kind's name."""
    instruction = described.get("instruction", "")
    answers = [*described.get("labels", {}).values()] or [*described.get("anchors", {})]
    return [f"{instruction} {answer}".strip() + "." for answer in answers] or [instruction or str(described["name"])]


def require_standalone(library: PromptLibrary, name: str) -> None:
    """Raises `LibraryError` for a prompt that means nothing without the texts shown beside it."""
    texts = library.card.get(ADAPTED, {}).get("demonstrations", ()) if name == ADAPTED else ()
    if texts:
        raise LibraryError(
            f"the prompt {name!r} answers beside {len(texts)} demonstrations, texts of its owner's that are no part of a "
            "prompt; fit one that stands alone (`ficpd adapt --how tune`, or compose), or load it with "
            "examples/plain_transformers.py with them in front"
        )
