"""The result of a federation: prompts, keys to find them, and a card that describes them."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import LibraryError, describe_os_error
from ficpd.interfaces import Backbone, Task
from ficpd.library.card import (
    ADAPTED,
    CARD,
    FORMAT,
    KEY,
    LEARNED,
    MIXTURE,
    PAGE,
    READOUT,
    START,
    TENSORS,
    check_format,
    damaged,
    model_card,
    read_card,
    weakness,
)
from ficpd.library.hub import find_library, hub_page, locate, push, with_backbone
from ficpd.library.mixture import Mixture
from ficpd.storage import atomic_write, fsync, require_writable
from ficpd.types import Batch, Prompt, Query, Readout


@dataclass(frozen=True)
class PromptLibrary:
    """The prompts of a run, all of one shape, layer and backbone.

    start: the initial prompt of the run.
    prompts: by name (`global`, `prototype-0`, ...).
    card: JSON: the backbone's name, the tasks by name, the privacy spent, the run's settings.
    keys: by prompt, the mean embedding [D] of its tasks, a unit vector (see `task_embedding`).
    readouts: by prompt, a readout fitted to records (demonstrations, a head), which replaces the task's readout.
    learned: by task of the card, the readout that the federation learned with its prompts.
    mixture: the mixture that the prompt `adapted` is part of, if any.
    """

    start: Prompt
    prompts: Mapping[str, Prompt]
    card: Mapping[str, Any]
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    readouts: Mapping[str, Readout] = field(default_factory=dict)
    learned: Mapping[str, Readout] = field(default_factory=dict)
    mixture: Mixture | None = None

    def learned_readout(self, task: Task) -> Readout | None:
        """Returns the learned readout for a task with known label texts and instruction, in its order; else None."""
        own = task.to_config()
        texts = [*own.get("labels", {}).values()]
        for name, readout in self.learned.items():
            known = self.card["tasks"][name]
            order = [*known.get("labels", {}).values()]
            if sorted(order) == sorted(texts) and known.get("instruction") == own.get("instruction"):
                places = [order.index(text) for text in texts]
                rows, bias, shares = (x[places] for x in (readout.rows_CD, readout.bias_C, readout.shares_C))
                return Readout(rows, bias, shares)
        return None

    def offset(self, name: str) -> Tensor:
        """Returns a prompt's difference from the start, [P, D]."""
        return self.prompts[name].vectors_PD - self.start.vectors_PD

    def nearest(self, embedding_D: Tensor, n: int = 1) -> list[str]:
        """Returns the n prompts whose keys are most similar to a task's embedding (`task_embedding`), best first.

        Raises `LibraryError` if the library has no keys.
        """
        if not self.keys:
            raise LibraryError(
                "this library has no keys: its backbone has no text encoder, or gives no features; find prompts by their "
                "loss on shots"
            )
        names = list(self.keys)
        cosine_N = F.cosine_similarity(torch.stack([self.keys[name] for name in names]), embedding_D[None]).tolist()
        return [name for _, name in sorted((-cosine, name) for cosine, name in zip(cosine_N, names, strict=True))][:n]

    def candidates(self) -> dict[str, Prompt]:
        return {START: self.start, **self.prompts}

    def check(self, backbone: Backbone) -> None:
        """Raises `LibraryError` if the library was made on another backbone."""
        if self.start.backbone != backbone.fingerprint:
            made, here = f"{self.card.get('backbone', {}).get('name', '?')} ({self.start.backbone})", backbone.name
            raise LibraryError(
                f"the library was made on backbone {made}, this is {here} ({backbone.fingerprint}). Load the backbone "
                "that the card names"
            )

    def save(self, folder: Path) -> None:
        """Writes `prompts.safetensors`, `card.json` and `README.md` to a staging folder, then renames it.

        Replaces an existing folder. Raises `LibraryError` for a reserved prompt name.
        """
        for name in self.prompts:
            if name == START or name.startswith((KEY, READOUT, LEARNED, MIXTURE)):
                raise LibraryError(f"prompt name {name!r}: reserved in the file; choose another name")
        folder = Path(folder)
        staging = folder.with_name(folder.name + ".writing")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        meta = {"format": str(FORMAT), "backbone": self.start.backbone, "enters_at": str(self.start.enters_at),
                "head_rows": str(self.start.head_rows)}  # fmt: skip
        tensors = {name: prompt.vectors_PD for name, prompt in self.candidates().items()}
        tensors |= {KEY + name: key_D for name, key_D in self.keys.items()}
        of_prompts = {READOUT + name: readout for name, readout in self.readouts.items()}
        for name, found in (of_prompts | {LEARNED + name: readout for name, readout in self.learned.items()}).items():
            tensors[name] = torch.cat([found.rows_CD, found.bias_C[:, None], found.shares_C[:, None]], dim=1)
        if self.mixture is not None:
            tensors |= {MIXTURE + name: part for name, part in self.mixture.to_tensors().items()}
        whole = {n: (t.float() if t.is_floating_point() else t).detach().cpu().clone() for n, t in tensors.items()}
        atomic_write(staging / TENSORS, save(whole, meta))
        atomic_write(staging / CARD, json.dumps(self.card, indent=2) + "\n")
        atomic_write(staging / PAGE, self.page())
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    def page(self) -> str:
        """Returns the README page."""
        return model_card(self.card, self.start, self.prompts, self.readouts)

    def push_to_hub(
        self, repo_id: str, *, private: bool = True, token: str | None = None, backbone: str | None = None,
        unprotected: bool = False,
    ) -> str:  # fmt: skip
        """Sends the library to a repository of the Hugging Face hub; returns its address.

        repo_id: OWNER/NAME; created if missing.
        token: the hub's token; None: that of `hf auth login`.
        backbone: the hub id of the model, if the card names a folder.
        unprotected: also sends a library without a privacy guarantee.

        Guarantees: sends only `prompts.safetensors`, `card.json` and `README.md`, and no path of this machine.

        Raises `LibraryError` for an unprotected library, for a local path in it, and for an error of the hub.
        """
        card = with_backbone(self.card, backbone)
        if not unprotected and (why := weakness(card)):
            raise LibraryError(f"{why}; write unprotected=True if all may see it (push_to_hub)")
        shown = replace(self, card=card)
        return push(shown, repo_id, private, token, hub_page(card, shown.page(), repo_id))

    @staticmethod
    def from_pretrained(name: str | Path, *, revision: str | None = None) -> "PromptLibrary":
        """Loads a library's folder, a run directory with one, or OWNER/NAME of the Hugging Face hub.

        name: a local folder has precedence over the hub.
        revision: a branch, tag or commit of the hub.

        >>> list(ficpd.PromptLibrary.from_pretrained("runs/demo").prompts)
        ['global', 'prototype-0', 'prototype-1']

        Raises `LibraryError` if there is none, or if it is damaged or of another format.
        """
        return PromptLibrary.load(locate(name), revision)

    @staticmethod
    def load(folder: str | Path, revision: str | None = None) -> "PromptLibrary":
        """Loads a library's folder, a run directory with one, or hf:OWNER/NAME.

        Raises `LibraryError` if there is none, or if it is damaged or of another format.
        """
        folder = find_library(folder, revision)
        try:
            with safe_open(folder / TENSORS, "pt") as file:
                meta = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            check_format(meta)
            return _from_tensors(meta, tensors, read_card(folder / CARD))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise damaged(folder, error) from error


def _from_tensors(meta: Mapping[str, str], tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> PromptLibrary:
    """Builds the library from its tensors. Raises `KeyError` or `ValueError` if parts do not match."""
    keys = {name.removeprefix(KEY): t for name, t in tensors.items() if name.startswith(KEY)}
    readouts = {name.removeprefix(READOUT): t for name, t in sorted(tensors.items()) if name.startswith(READOUT)}
    learned = {name.removeprefix(LEARNED): t for name, t in sorted(tensors.items()) if name.startswith(LEARNED)}
    parts = {name.removeprefix(MIXTURE): t for name, t in tensors.items() if name.startswith(MIXTURE)}
    others = (KEY, READOUT, LEARNED, MIXTURE)
    vectors = {name: t for name, t in tensors.items() if not name.startswith(others)}
    if len({vector.shape for vector in vectors.values()}) != 1:
        raise ValueError("its prompts have different shapes")
    width = vectors[START].shape[1]
    if {*keys, *readouts} - vectors.keys() or any(t.shape[-1] != width for t in keys.values()):
        raise ValueError("a key or readout has no prompt, or another width")
    if any(t.ndim != 2 or t.shape[1] != width + 2 for t in readouts.values()):
        raise ValueError("a readout has another width")
    labels = {name: len(card["tasks"].get(name, {}).get("labels", ())) for name in learned}
    if any(t.shape != (labels[name], width + 2) for name, t in learned.items()):
        raise ValueError("a learned readout has no task in the card, or another shape")
    of_prompts, of_tasks = (
        {name: Readout(t[:, :-2], t[:, -2], t[:, -1]) for name, t in found.items()} for found in (readouts, learned)
    )
    shape = int(meta["enters_at"]), int(meta["head_rows"])
    prompts = {name: Prompt(value, meta["backbone"], *shape) for name, value in sorted(vectors.items())}
    mixture = Mixture.from_tensors(parts) if parts else None
    return PromptLibrary(prompts.pop(START), prompts, card, keys, of_prompts, of_tasks, mixture)


def task_embedding(task: Task, backbone: Backbone) -> Tensor:
    """Returns the embedding [D] of a task, a unit vector computed from its public description.

    It is the mean feature, under the bare backbone, of the texts "INSTRUCTION ANSWER." of all answers. A task without
    fixed answers uses the instruction alone. A vision backbone uses the mean row of the task's readout.
    """
    if backbone.modality == "image":
        readout_CD = task.readout(backbone)
        assert readout_CD is not None
        return F.normalize(readout_CD.float().mean(0), dim=0).cpu()
    items = tuple((backbone.tokenize(text, None, "", None, 0),) for text in _framed(task.to_config()))
    empty = torch.zeros(1, task.head_rows, backbone.width)
    query = Query(empty, Batch(task, items, None, None, 0), outputs=True)
    outputs = QueryEngine(backbone, 0).answer([query])[0].outputs_KB
    assert outputs is not None
    return F.normalize(outputs.features_RD.float().mean(0), dim=0).cpu()


def prompt_keys(
    names: Iterable[str], tasks: Mapping[str, Task], tasks_of: Mapping[str, Sequence[str]], backbone: Backbone
) -> dict[str, Tensor]:
    """Returns a key for each prompt: the mean embedding of its tasks, or of all tasks if they are unknown.

    Returns no keys if the backbone has no text encoder or gives no features.
    """
    names = list(names) if backbone.has_text_encoder and backbone.supports_features else []
    found = {name: task_embedding(task, backbone) for name, task in tasks.items()} if names else {}
    of_prompt = {name: [found[task] for task in tasks_of.get(name, ())] or list(found.values()) for name in names}
    return {name: F.normalize(torch.stack(of).mean(0), dim=0) for name, of in of_prompt.items()}


def _framed(described: Mapping[str, Any]) -> list[str]:
    """Returns the texts to embed: each answer after the instruction, else the instruction, else the task kind."""
    instruction = described.get("instruction", "")
    answers = [*described.get("labels", {}).values()] or [*described.get("anchors", {})]
    return [f"{instruction} {answer}".strip() + "." for answer in answers] or [instruction or str(described["name"])]


def require_standalone(library: PromptLibrary, name: str) -> None:
    """Raises `LibraryError` for a prompt that needs demonstrations or is part of a mixture."""
    if name == ADAPTED and library.mixture is not None:
        raise LibraryError(
            f"the prompt {name!r} is one of a mixture of {len(library.mixture.prompts_KPD)} prompts; fit a single prompt "
            "(`ficpd adapt --how tune`, or head)"
        )
    texts = library.card.get(ADAPTED, {}).get("demonstrations", ()) if name == ADAPTED else ()
    if texts:
        raise LibraryError(
            f"the prompt {name!r} needs {len(texts)} demonstrations, which are not part of a prompt; fit one without them "
            "(`ficpd adapt --how tune`), or load both with examples/plain_transformers.py"
        )


def require_new(folder: str | Path) -> None:
    """Raises `LibraryError` if the folder exists, or cannot be written."""
    try:
        if Path(folder).exists():
            raise LibraryError(f"{folder} exists already; choose another folder (--out)")
        require_writable(Path(folder))
    except OSError as error:
        raise LibraryError(f"--out {describe_os_error(error)}") from error
