"""Where a run begins: the prompt that all start from, and what is measured at it on records that are nobody's."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ficpd import heads, seeds
from ficpd.backbones import catalog
from ficpd.clients import clip_units
from ficpd.compression.subspace import Gradients
from ficpd.compute import Compute
from ficpd.errors import ConfigError, unknown
from ficpd.experiment import Experiment, PromptConfig, settings
from ficpd.library import PromptLibrary
from ficpd.seams import Backbone, Compression, MakesUp, Task
from ficpd.tasks import made_up
from ficpd.types import LORA, Prompt, Query, Record

HEADROOM = 2.0
"""At the median norm itself half of the records are clipped, those that are answered wrongly most of all, and the most
frequent answer wins: 72.5 and 69.6 % (two noise seeds, ε = 2) where twice the norm gave 76.4 and 77.9 %, thrice 75.3."""


def start_prompt(experiment: Experiment, tasks: Sequence[Task], backbone: Backbone) -> tuple[Prompt, Experiment]:
    """Where all clients start, and the experiment with layer and learning rate as chosen for this backbone."""
    config, defaults = (
        experiment.prompt,
        catalog.defaults(experiment.backbone.name, experiment.backbone.kind, backbone.depth),
    )
    saved = _saved_prompt(config, backbone, tasks[0].head_rows) if config.library else None
    enters_at = saved.enters_at if saved else defaults.enters_at if config.enters_at is None else config.enters_at
    if enters_at >= backbone.depth:
        raise ConfigError(
            f"prompt.enters_at = {enters_at}: {backbone.name} has {backbone.depth} layers, so 0 to {backbone.depth - 1}"
        )
    text = None if config.init == "vocabulary" else config.text or start_text(tasks)
    tokens_PD = saved.vectors_PD if saved else backbone.start(text, config.num_tokens, enters_at, experiment.seed)
    rms = float(tokens_PD.square().mean().sqrt())
    vectors_PD = torch.cat([tokens_PD, _head(experiment, tasks[0], backbone) * rms])
    training = experiment.training
    if training.learning_rate is None:
        training = training.model_copy(update={"learning_rate": defaults.learning_rate * rms})
    prompt = config.model_copy(update={"enters_at": enters_at, "num_tokens": len(tokens_PD)})
    return (
        Prompt(vectors_PD, backbone.fingerprint, enters_at, tasks[0].head_rows),
        experiment.model_copy(update={"prompt": prompt, "training": training}),
    )


def _saved_prompt(config: PromptConfig, backbone: Backbone, head_rows: int) -> Prompt:
    """A library's prompt as the start. It was made by a federation: what that spent is stated in its own card."""
    library = PromptLibrary.load(Path(str(config.library)).expanduser())
    library.check(backbone)
    if config.of not in library.prompts:
        raise ConfigError(f"prompt.{unknown('of', config.of, library.prompts)}")
    found = library.prompts[config.of]
    if found.enters_at == LORA:
        raise ConfigError("prompt.init = 'library': that library holds LoRA weights, which no prompt can start from")
    if found.head_rows or head_rows:
        raise ConfigError(
            "prompt.init = 'library': a prompt with a tuned head cannot be started from; leave tuned_head false"
        )
    if config.enters_at not in (None, found.enters_at):
        raise ConfigError(
            f"prompt.enters_at = {config.enters_at}, but {config.of!r} enters at {found.enters_at}; leave it out"
        )
    return found


def start_text(tasks: Sequence[Task]) -> str | None:
    """The task's own words: its instruction and its answers' texts. Of several tasks the instructions; None if there
    are none."""
    configs = [task.describe() for task in tasks]
    words = list(dict.fromkeys(config.get("instruction", "") for config in configs))
    if len(tasks) == 1:
        words += configs[0].get("labels", {}).values() or configs[0].get("anchors", {}).keys()
    return " ".join(words).strip() or None


def _head(experiment: Experiment, task: Task, backbone: Backbone) -> torch.Tensor:
    """The tuned head's rows, of root mean square 1."""
    place = experiment.prompt.head_examples
    if place is None or not task.head_rows:
        if place is not None:
            raise ConfigError("prompt.head_examples: no head is tuned; set task.tuned_head = true, or leave it out")
        return heads.start(task, backbone, None, experiment.seed)
    data, _ = next(iter(experiment.parties.values())).held
    return heads.start(task, backbone, heads.examples(place, data), experiment.seed)


def measured(
    experiment: Experiment, tasks: Sequence[Task], model: Compute, start: Prompt
) -> tuple[Experiment, Compression]:
    """The experiment with a clip norm, and the compression: both may go by gradients at the start on made-up records."""
    module, config = settings("compression", experiment.compression)
    seed = seeds.derive(experiment.seed, "public")
    public = lru_cache(partial(public_gradients, model, tasks, start, seed))
    gradients = public if model.backbone.gives_gradients else None
    compression = module.build(config, start, seed, gradients)
    privacy = open_clip(experiment, start, compression, gradients)
    return experiment.model_copy(update={"privacy": privacy}), compression


def open_clip(
    experiment: Experiment, start: Prompt, compression: Compression, gradients: Gradients | None
) -> dict[str, Any]:
    """The privacy settings with a clip norm: `HEADROOM` times the median norm of the gradients on made-up records, in the
    units that the tuner sees, and of several tasks each its own (those of one of 77 answers are four times as long as those
    of one of two); for whole clients, half of the longest way that Adam can go in one order. No record is looked at."""
    privacy = dict(experiment.privacy)
    if privacy.get("clip_norm", 0) is not None or privacy.get("clip_norms"):
        return privacy
    if "placement" in privacy:
        training = experiment.training
        longest = training.local_steps * (training.learning_rate or 0) * start.vectors_PD.numel() ** 0.5
        return privacy | {"clip_norm": longest / 2}
    if gradients is None:
        raise ConfigError("privacy.clip_norm is open, and this backbone gives no gradients to find one from; state it")
    groups = list(experiment.parties)
    number = max(256, 8 * len(groups))
    found, coordinates = gradients(number), compression.coordinates
    flat = coordinates.down(found) * clip_units(coordinates) if coordinates else found.flatten(1)
    norms = flat.norm(dim=1).split([len(range(place, number, len(groups))) for place in range(len(groups))])
    clips = {group: HEADROOM * float(own.median()) for group, own in zip(groups, norms, strict=True)}
    return privacy | ({"clip_norms": clips} if len(clips) > 1 else {"clip_norm": clips[groups[0]]})


def public_gradients(model: Compute, tasks: Sequence[Task], start: Prompt, seed: int, number: int) -> torch.Tensor:
    """[number, P, D]: gradients at the start prompt on made-up records, every task and every possible answer in turn;
    nobody's data."""
    records, compute, found = made_up(model.backbone, number, seed), Compute(model.backbone, 0, model.chunk_tokens), []
    for place, task in enumerate(tasks[:number]):
        own = [
            Record(r.key, {**r.fields, "target": task.possible[i % len(task.possible)], **_beside(task, i)})
            for i, r in enumerate(records[place :: len(tasks)])
        ]
        query = Query(start.vectors_PD[None], task.encode(own, model.backbone, start), grad=True)
        answer = compute.answer([query])[0]  # nothing below the prompt's layer is worth keeping
        assert answer.grad_KBPD is not None
        found.append(answer.grad_KBPD[0].cpu())
    return torch.cat(found)


def _beside(task: Task, place: int) -> Mapping[str, Any]:
    """What a made-up record of this task has beside text and target."""
    return task.beside(place) if isinstance(task, MakesUp) else {}
