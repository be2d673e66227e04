"""What the federation leaves behind: a basis of prompts, and a card that says what they are and how they were made."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ficpd import seeds
from ficpd.clients import Client, Visit
from ficpd.compression import none
from ficpd.compute import Compute, drive
from ficpd.errors import LibraryError
from ficpd.privacy.none import NoPrivacy
from ficpd.seams import Backbone, Task
from ficpd.tuners import Training, tune
from ficpd.types import Assignment, ClientCard, Prompt, Query, Record

FORMAT = 1
START = "start"
CARD = ("backbone", "task")
"""The parts of a card that a library cannot be used without."""


@dataclass(frozen=True)
class Adapted:
    """A prompt for one's own records: which of the library it began from, and whether tuning it helped."""

    prompt: Prompt
    began_from: str
    tuned: bool
    losses: Mapping[str, float]


@dataclass(frozen=True)
class PromptLibrary:
    """`prompts` by name (`global`, `prototype-0`, ...), all of one shape, layer and backbone; `start` is where all of
    them came from. `card` is JSON: the backbone's name, the task, privacy spent, how it was made."""

    start: Prompt
    prompts: Mapping[str, Prompt]
    card: Mapping[str, Any]

    def way(self, name: str) -> Tensor:
        """[P, D]: how far a prompt has come from the start; the key it is found by."""
        return self.prompts[name].vectors_PD - self.start.vectors_PD

    def nearest(self, key_PD: Tensor, n: int = 1) -> list[str]:
        """The n prompts whose way has the highest cosine to `key_PD`, best first."""
        cosine = {
            name: float(F.cosine_similarity(self.way(name).flatten(), key_PD.flatten(), dim=0)) for name in self.prompts
        }
        return sorted(cosine, key=lambda name: (-cosine[name], name))[:n]

    def compose(self, weights: Mapping[str, float]) -> Prompt:
        """start + Σ w_j (prompt_j - start). Raises `LibraryError` for a name the library lacks."""
        for name in weights:
            if name not in self.prompts:
                raise LibraryError(f"no prompt {name!r} in this library; it has {', '.join(self.prompts)}")
        moved = sum((weight * self.way(name) for name, weight in weights.items()), torch.zeros(()))
        return self.start.with_vectors(self.start.vectors_PD + moved)

    def candidates(self) -> dict[str, Prompt]:
        return {START: self.start, **self.prompts}

    def losses(self, records: Sequence[Record], task: Task, model: Compute) -> dict[str, float]:
        """The mean loss of every prompt on these records, asked in one query. They are the caller's own records."""
        self.check(model.backbone)
        batch = task.encode(records, model.backbone, self.start)
        stacked_KPD = torch.stack([prompt.vectors_PD for prompt in self.candidates().values()])
        loss_KB = model.answer([Query(stacked_KPD, batch)])[0].loss_KB
        return dict(zip(self.candidates(), loss_KB.mean(1).tolist(), strict=True))

    def adapt(
        self, records: Sequence[Record], task: Task, model: Compute, training: Training, steps: int = 30, seed: int = 0
    ) -> Adapted:
        """Take the prompt that fits the records best and tune it on them, if that helps on a quarter held back.

        With fewer than eight records nothing is held back and the best prompt is taken as it is.
        """
        order = torch.randperm(len(records), generator=seeds.generator(seed, "adapt")).tolist()
        held = [records[i] for i in order[: len(records) // 4]] if len(records) >= 8 else []
        rest = [records[i] for i in order[len(held) :]]
        losses = self.losses(rest, task, model)
        best = min(losses, key=lambda name: (losses[name], name))
        prompt = self.candidates()[best]
        if not held:
            return Adapted(prompt, best, False, losses)
        tried = self._tuned(prompt, rest, task, model, training, steps, seed)
        batch = task.encode(held, model.backbone, prompt)
        both_KPD = torch.stack([prompt.vectors_PD, tried.vectors_PD])
        before, after = model.answer([Query(both_KPD, batch)])[0].loss_KB.mean(1).tolist()
        if after >= before:
            return Adapted(prompt, best, False, losses)
        return Adapted(self._tuned(prompt, records, task, model, training, steps, seed), best, True, losses)

    def _tuned(self, prompt, records, task, model, training, steps, seed) -> Prompt:
        whole = none.build(none.Config(), prompt, seed)
        client = Client(ClientCard("me"), records, [], task, model.backbone, NoPrivacy(), whole, prompt, seed)
        order = Assignment("adapt", 1, {}, {"rate": training.rate(1, 1)})
        return prompt.with_vectors(
            drive(model, tune(training, Visit(client, 1), order, prompt.vectors_PD, steps=steps))
        )

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
        folder = Path(folder)
        beside = folder.with_name(folder.name + ".writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        meta = {"format": str(FORMAT), "backbone": self.start.backbone, "enters_at": str(self.start.enters_at),
                "head_rows": str(self.start.head_rows)}  # fmt: skip
        save_file({n: p.vectors_PD.clone() for n, p in self.candidates().items()}, beside / "prompts.safetensors", meta)
        (beside / "card.json").write_text(json.dumps(self.card, indent=2) + "\n")
        (beside / "README.md").write_text(model_card(self))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

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
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            card = json.loads((folder / "card.json").read_text())
            if not isinstance(card, dict) or not all(isinstance(card.get(part), dict) for part in CARD):
                raise ValueError(f"card.json is no object with {', '.join(CARD)}")
            if len({vector.shape for vector in vectors.values()}) != 1:
                raise ValueError("its prompts have different shapes")
            shape = int(meta["enters_at"]), int(meta["head_rows"])
            prompts = {name: Prompt(value, meta["backbone"], *shape) for name, value in sorted(vectors.items())}
            return PromptLibrary(prompts.pop(START), prompts, card)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LibraryError(f"{folder} is damaged or of another version: {error}; save the library again") from error


def model_card(library: PromptLibrary) -> str:
    """A page for people: what the library is, for which backbone, what it cost in privacy."""
    card, start = library.card, library.start
    tokens = len(start.vectors_PD) - start.head_rows
    return (
        f"# Prompt library: {', '.join(library.prompts) or 'start only'}\n\n"
        f"- backbone: {card.get('backbone', {}).get('name', '?')} (`{start.backbone}`)\n"
        f"- {tokens} virtual tokens of width {start.vectors_PD.shape[1]}, entering at layer {start.enters_at}\n"
        f"- task: {card.get('task', {}).get('name', '?')}\n"
        f"- made by: {made_by(card)}\n"
        f"- privacy: {guarantee(card.get('privacy', {}))}\n\n"
        'Use it: `ficpd predict THIS_FOLDER --text "..."`, or fit it to your own records: '
        "`ficpd adapt THIS_FOLDER --data few.jsonl --shots 16 --out DIR`.\n"
    )


def guarantee(privacy: Mapping[str, Any]) -> str:
    """A run's `privacy` block in one phrase.

    >>> guarantee({"unit": "record", "epsilon": 1.987, "delta": 1e-5, "noise": "simulated"})
    'ε = 1.99 per record, simulated noise'
    """
    if privacy.get("epsilon") is None:
        return "none"
    if privacy.get("noise") is None:
        return "nothing leaves"
    return f"ε = {privacy['epsilon']:.2f} per {privacy['unit']}, {privacy['noise']} noise"


def made_by(card: Mapping[str, Any]) -> str:
    """Which run a card is of, in one phrase."""
    method, clients, rounds, seed = (card.get(key, "?") for key in ("method", "num_clients", "num_rounds", "seed"))
    return f"{method}, {clients} clients, {rounds} rounds, seed {seed}"
