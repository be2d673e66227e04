"""Initializes a run: the prompt, and the clip norm and compression, calibrated on synthetic records."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ficpd import rng
from ficpd.backbones import catalog
from ficpd.backbones.guards import difference
from ficpd.backbones.query_engine import QueryEngine
from ficpd.backbones.vocabulary import token_prompt
from ficpd.errors import ConfigError, PrivacyError, did_you_mean
from ficpd.experiments import head_init
from ficpd.experiments.config import Experiment, PromptConfig
from ficpd.federation.compression.subspace import Gradients
from ficpd.interfaces import Backbone, Compression, Task
from ficpd.library.card import beginning
from ficpd.library.library import PromptLibrary
from ficpd.optimizers.search_space import SearchSpace
from ficpd.privacy.clipping import clip_scale
from ficpd.registry import build_config
from ficpd.tasks import synthetic_records
from ficpd.tasks.build import start_text
from ficpd.types import LORA, Batch, Prompt, Query, Record

CLIP_NORM_MULTIPLE = 2.0
"""The clip norm as a multiple of the median gradient norm. The median itself would clip half of the records, mostly those
that the model answers wrongly, and favour the most frequent answer."""
NUM_PROBES, PROBE_STEP = 32, 0.05
NUM_TRIED, ROW_TOLERANCE = 8, 5e-2
"""Synthetic records in the trial of a task's loss, and the largest relative difference: bfloat16 kernels differ so much."""
Norms = Callable[[int], torch.Tensor]
"""Returns the norms of M public gradients for a number M."""


def init_soft_prompt(experiment: Experiment, tasks: Sequence[Task], backbone: Backbone) -> tuple[Prompt, Experiment]:
    """Returns the initial prompt, and the experiment with layer, learning rate and training seed resolved."""
    config, named = experiment.prompt, experiment.backbone
    defaults = catalog.defaults(named.name, named.kind, backbone.depth)
    saved = _saved_prompt(config, backbone, tasks[0].head_rows) if config.library else None
    enters_at = saved.enters_at if saved else defaults.enters_at if config.enters_at is None else config.enters_at
    if enters_at >= backbone.depth:
        raise ConfigError(
            f"prompt.enters_at = {enters_at}: {backbone.name} has {backbone.depth} layers, so 0 to {backbone.depth - 1}"
        )
    text = None if config.init == "vocabulary" else config.text or start_text(tasks)
    tokens_PD = saved.vectors_PD if saved else backbone.init_prompt(text, config.num_tokens, enters_at, experiment.seed)
    rms = float(tokens_PD.float().square().mean().sqrt())
    head_CD = _head(experiment, tasks[0], backbone)
    vectors_PD = torch.cat([tokens_PD, head_CD * rms]) if len(head_CD) else tokens_PD
    training = experiment.training
    if training.learning_rate is None:
        training = training.model_copy(update={"learning_rate": defaults.learning_rate * rms})
    if training.seed is None:
        training = training.model_copy(update={"seed": rng.derive_seed(experiment.seed, "public", "training")})
    prompt = config.model_copy(update={"enters_at": enters_at, "num_tokens": len(tokens_PD)})
    return (
        Prompt(vectors_PD, backbone.fingerprint, enters_at, tasks[0].head_rows),
        experiment.model_copy(update={"prompt": prompt, "training": training}),
    )


def init_token_prompt(experiment: Experiment, tasks: Sequence[Task], backbone: Backbone) -> Prompt:
    """Returns the initial prompt as token ids [P, 1]. Raises `ConfigError` for a library's prompt or a tuned head."""
    config = experiment.prompt
    if config.library or tasks[0].head_rows:
        setting = "task.tuned_head = true" if tasks[0].head_rows else "prompt.init = 'library'"
        raise ConfigError(f"{setting}: this method tunes token prompts, not vectors. Leave it out")
    text = None if config.init == "vocabulary" else config.text or start_text(tasks)
    ids_P1 = token_prompt(backbone.vocabulary, backbone.name, text, config.num_tokens, experiment.seed)
    return Prompt(ids_P1, backbone.fingerprint)


def saved_beginning(experiment: Experiment) -> dict[str, Any] | None:
    """Describes a saved initial prompt for a card (`card.BEGAN`); None if the prompt is new."""
    config = experiment.prompt
    if not config.library:
        return None
    return beginning(PromptLibrary.load(Path(str(config.library)).expanduser()).card, config.of)


def _saved_prompt(config: PromptConfig, backbone: Backbone, head_rows: int) -> Prompt:
    """Loads the initial prompt from a library. The library's card states the privacy cost of that prompt."""
    library = PromptLibrary.load(Path(str(config.library)).expanduser())
    library.check(backbone)
    if config.of not in library.prompts:
        raise ConfigError(f"prompt.{did_you_mean('of', config.of, library.prompts)}")
    found = library.prompts[config.of]
    if found.enters_at == LORA:
        raise ConfigError("prompt.init = 'library': this library holds LoRA weights. Use a library of prompts")
    if found.head_rows or head_rows:
        raise ConfigError(
            "prompt.init = 'library': a prompt with a tuned head is no initial prompt. Leave tuned_head false"
        )
    if config.enters_at not in (None, found.enters_at):
        raise ConfigError(
            f"prompt.enters_at = {config.enters_at}, but {config.of!r} enters at {found.enters_at}. Leave it out"
        )
    return found


def _head(experiment: Experiment, task: Task, backbone: Backbone) -> torch.Tensor:
    """Returns the tuned head's rows, of root mean square 1."""
    examples, place = None, experiment.prompt.head_examples
    if place is not None and not task.head_rows:
        raise ConfigError("prompt.head_examples: no head is tuned. Set task.tuned_head = true, or leave it out")
    if place is not None:
        data, _ = next(iter(experiment.all_groups.values())).data_and_partition
        examples = head_init.examples(place, data)
    return head_init.init_head(task, backbone, examples, experiment.seed)


def calibrate_clipping_and_compression(
    experiment: Experiment, tasks: Sequence[Task], model: QueryEngine, start: Prompt
) -> tuple[Experiment, Compression]:
    """Returns the experiment with a clip norm, and the compression; both may use public gradients."""
    module, config = build_config("compression", experiment.compression)
    seed = rng.derive_seed(experiment.seed, "public")
    public = lru_cache(partial(public_gradients, model, tasks, start, seed))
    gradients = public if model.backbone.supports_gradients else None
    compression = module.build(config, start, seed, gradients)
    norms = partial(estimate_grad_norms_zeroth_order, model, tasks, start, compression, seed)
    privacy = calibrate_clip_norm(experiment, start, compression, gradients, norms)
    return experiment.model_copy(update={"privacy": privacy}), compression


def calibrate_clip_norm(
    experiment: Experiment, start: Prompt, compression: Compression, gradients: Gradients | None, norms_of: Norms
) -> dict[str, Any]:
    """Returns the privacy settings with a clip norm, found without any record.

    Record level: `CLIP_NORM_MULTIPLE` times the median gradient norm on synthetic records, in the optimizer's units, one
    norm per task. Client level: half of the largest distance that Adam can move in one assignment. Without gradients,
    `norms_of` estimates the norms.
    """
    privacy = dict(experiment.privacy)
    if privacy.get("clip_norm", 0) is not None or privacy.get("clip_norms"):
        return privacy
    if "placement" in privacy:
        training = experiment.training
        longest = training.local_steps * (training.learning_rate or 0) * start.vectors_PD.numel() ** 0.5
        return privacy | {"clip_norm": longest / 2}
    if not start.vectors_PD.is_floating_point():  # token prompts: the method may declare a clip norm
        return privacy
    groups = list(experiment.all_groups)
    number = max(256, 8 * len(groups))
    if gradients is None:
        lengths = norms_of(number)
    else:
        found, coordinates = gradients(number), compression.subspace
        flat = coordinates.project(found) * clip_scale(coordinates.grad_scale) if coordinates else found.flatten(1)
        lengths = flat.norm(dim=1)
    norms = lengths.split([len(range(place, number, len(groups))) for place in range(len(groups))])
    clips = {group: CLIP_NORM_MULTIPLE * float(own.median()) for group, own in zip(groups, norms, strict=True)}
    return privacy | ({"clip_norms": clips} if len(clips) > 1 else {"clip_norm": clips[groups[0]]})


def check_rows_apart(experiment: Experiment, tasks: Mapping[str, Task], model: QueryEngine, start: Prompt) -> None:
    """Compares the losses of synthetic records alone and among others, for tasks outside the package.

    Raises `PrivacyError` where they differ: the clip of one record would then not bound its influence.
    """
    compute, seed = QueryEngine(model.backbone, 0, model.chunk_tokens), rng.derive_seed(experiment.seed, "public")
    for group, task in tasks.items():
        name = experiment.all_groups[group].task["name"]
        if "." not in name or experiment.privacy["name"] == "none":
            continue
        (batch,) = synthetic_batches(model.backbone, [task], start, seed, NUM_TRIED)
        alone = [Query(start.vectors_PD[None], batch.select([place])) for place in range(len(batch))]
        together_B = compute.answer([Query(start.vectors_PD[None], batch)])[0].loss_KB[0]
        alone_B = torch.cat([compute.answer([query])[0].loss_KB[0] for query in alone])
        if (differs := difference(together_B, alone_B)) > ROW_TOLERANCE:
            raise PrivacyError(
                f"task {name!r}: the loss of a record among others differs from its loss alone by {differs:.2g}; expected "
                f"at most {ROW_TOLERANCE:g}. No guarantee holds then. Let `loss` and `encode` use each row alone"
            )


def try_loss(name: str, task: Task, records: Sequence[Record], model: QueryEngine, start: Prompt) -> None:
    """Computes the losses of a few records at the initial prompt, for a task outside the package.

    Raises `ConfigError` for a loss that is not finite or, where gradients are taken, has none.
    """
    tried = records[:NUM_TRIED]
    batch = task.encode(tried, model.backbone, start)
    grad = model.backbone.supports_gradients and start.vectors_PD.is_floating_point()
    compute = QueryEngine(model.backbone, 0, model.chunk_tokens)
    losses_B = compute.answer([Query(start.vectors_PD[None], batch, grad=grad)])[0].loss_KB[0]
    for record, loss in zip(tried, losses_B.tolist(), strict=True):
        if batch.targets is not None and not math.isfinite(loss):
            raise ConfigError(
                f"task {name!r}: the loss of {record.key} is {loss} at the initial prompt; expected a finite number. Look "
                "for a division by 0 or a logarithm of 0 in `loss`"
            )


def public_gradients(model: QueryEngine, tasks: Sequence[Task], start: Prompt, seed: int, number: int) -> torch.Tensor:
    """Returns [number, P, D]: gradients at the initial prompt on `synthetic_batches`."""
    compute, found = QueryEngine(model.backbone, 0, model.chunk_tokens), []
    for batch in synthetic_batches(model.backbone, tasks, start, seed, number):
        answer = compute.answer([Query(start.vectors_PD[None], batch, grad=True)])[0]
        assert answer.grad_KBPD is not None
        found.append(answer.grad_KBPD[0].cpu())
    return torch.cat(found)


def estimate_grad_norms_zeroth_order(
    model: QueryEngine, tasks: Sequence[Task], start: Prompt, compression: Compression, seed: int, number: int
) -> torch.Tensor:
    """Returns [number]: estimated norms of the gradients at the initial prompt, from losses alone.

    The estimate is the RMS of the directional derivatives along `NUM_PROBES` directions of random signs. Central
    differences step `PROBE_STEP` times the initial prompt's RMS in each number.
    """
    space = SearchSpace(tuple(start.vectors_PD.shape), compression.subspace)
    apart = PROBE_STEP * float(start.vectors_PD.square().mean().sqrt()) * space.unit
    signs_KN, found = space.signs(NUM_PROBES, seed, "norms"), []
    compute = QueryEngine(model.backbone, 0, model.chunk_tokens)
    prompts_KPD = start.vectors_PD + space.lift(torch.cat([apart * signs_KN, -apart * signs_KN]))
    for batch in synthetic_batches(model.backbone, tasks, start, seed, number):
        up_KB, down_KB = compute.answer([Query(prompts_KPD, batch)])[0].loss_KB.cpu().chunk(2)
        found.append(((up_KB - down_KB) / (2 * apart)).square().mean(0).sqrt())
    return torch.cat(found)


def synthetic_batches(
    backbone: Backbone, tasks: Sequence[Task], start: Prompt, seed: int, number: int
) -> Iterator[Batch]:
    """Yields `number` synthetic records, one batch per task; the targets are all possible answers in turn."""
    records = synthetic_records(backbone, number, seed)
    for place, task in enumerate(tasks[:number]):
        own = [
            Record(
                r.key, {**r.fields, "target": task.label_space[i % len(task.label_space)], **task.synthetic_fields(i)}
            )
            for i, r in enumerate(records[place :: len(tasks)])
        ]
        yield task.encode(own, backbone, start)
