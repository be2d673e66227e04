"""Distils the prototypes into one prompt on synthetic examples, after the last round.

The server uses prototypes, public label texts and texts from a frozen backbone, so this is post-processing. A simulation
also counts synthetic examples that copy a training record. It drops them only without privacy, because a choice that
depends on records is no post-processing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ficpd import rng
from ficpd.backbones import catalog
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone, resolve_backbone
from ficpd.errors import BackboneError, ConfigError, DataError
from ficpd.experiments.build import ExperimentContext
from ficpd.experiments.config import DistillationConfig
from ficpd.experiments.results import Distillation
from ficpd.experiments.run_directory import RunDir
from ficpd.federation.method import Method
from ficpd.federation.privacy_plan import public_seed
from ficpd.interfaces import Backbone, Task
from ficpd.library.distillation import filters, generation
from ficpd.library.distillation.distill import DistilledPrompt, TaskExamples, distill
from ficpd.library.distillation.filters import FilterResult, SyntheticExample
from ficpd.library.distillation.meta_learning import InnerLoop, first_order_maml, reptile
from ficpd.types import Batch, ClientCard, FederationInfo, Prompt, Record

SYNTHETIC = "synthetic.jsonl"
DISTILLED = "distilled"
WRITER_KIND = "causal_lm"
"""The kind of backbone that `distillation.writer` accepts."""
INNER_STEPS = 5
"""Local steps of an episode of Reptile and MAML."""


@dataclass(frozen=True)
class DistillationResult:
    """`prompt`: the distilled prompt, or the global one if the loss did not fall. `facts`: for the result."""

    prompt: Prompt
    facts: Distillation


def validate_distillation(context: ExperimentContext, method: Method) -> None:
    """Raises before the first round the errors that `distill_library` would raise after the last.

    `ConfigError`: no task has labels. `DataError`: the texts cannot be read. `BackboneError`: the writer cannot be found or
    cannot generate. Methods without prototypes have nothing to distil.
    """
    config = context.experiment.distillation
    if config.how == "none":
        return
    labels = {group: task.num_labels for group, task in context.tasks.items()}
    setup = FederationInfo(context.init_prompt_for(method), [ClientCard("any")], 1, 1, 0, labels)
    if "clusters" not in method.init(setup).facts:
        return
    if not any(generation.has_labels(task) for task in context.tasks.values()):
        try:
            generation.label_requests(next(iter(context.tasks.values())))
        except ConfigError as error:
            raise ConfigError(f'distillation.how = "{config.how}": {error}. Set it to "none"') from error
    if config.texts:
        try:
            generation.read_texts(Path(config.texts).expanduser())
        except DataError as error:
            raise DataError(f"distillation.texts: {error}") from error
    if config.writer:
        _check_writer(config.writer)


def _check_writer(name: str) -> None:
    """Finds the writer's weights without loading them. Raises `BackboneError` if there are none, or of another kind."""
    known = ", ".join(key for key, named in catalog.NAMED.items() if named.kind == WRITER_KIND)
    instead = f"name a {WRITER_KIND} backbone ({known}, a folder, a hub id), or give distillation.texts in its place"
    try:
        kind = resolve_backbone(BackboneConfig(name=name))[0]
    except BackboneError as error:
        raise BackboneError(f"distillation.writer: {error} For a writer {instead}") from error
    if kind != WRITER_KIND:
        raise BackboneError(f"distillation.writer = {name!r} is of kind {kind}, which writes nothing here: {instead}")


def distill_library(
    context: ExperimentContext, basis: Mapping[str, Prompt], tasks_of: Mapping[str, Sequence[str]], sizes: Mapping[str, int],
    directory: RunDir,
) -> DistillationResult:  # fmt: skip
    """Generates synthetic examples, labels them by vote and distils the prototypes on them.

    basis: the global prompt and the prototypes, by name.
    tasks_of: the groups that each prototype serves.
    sizes: the clients of each prototype.

    Writes the examples to `SYNTHETIC`. A task without labels or examples is left out and reported.
    """
    config, seed = context.experiment.distillation, public_seed(context.experiment.seed)
    writer = _writer(config, context)
    made = {
        group: _examples(context, group, task, basis, tasks_of, writer, seed)
        for group, task in context.tasks.items()
        if generation.has_labels(task)
    }
    directory.path.mkdir(parents=True, exist_ok=True)
    filters.save([example for found in made.values() for example in found.examples], directory.path / SYNTHETIC)
    facts = Distillation(
        how=config.how,
        writer=writer.name if writer else config.texts or "words of the vocabulary",
        examples={
            group or "all": made[group].summary() if group in made else "0 examples: a task without labels"
            for group in context.tasks
        },
        memorised={g or "all": len(filters.memorised(m.examples, _records(context, g))) for g, m in made.items()},
        gained=False,
    )
    taught = {group: found.examples for group, found in made.items() if len(found.examples) > 1}
    if not taught:
        return DistillationResult(basis["global"], facts)
    learned = _learned(context, config, basis, tasks_of, sizes, taught, seed)
    losses = {"loss_before": learned.before, "loss_after": learned.after}
    prompt = basis["global"].with_vectors(learned.vectors_PD) if learned.gained else basis["global"]
    return DistillationResult(prompt, facts.model_copy(update={"gained": learned.gained, **losses}))


def _writer(config: DistillationConfig, context: ExperimentContext) -> Backbone | None:
    """Returns the configured writer, else the run's backbone if it can generate, else None."""
    if config.texts:
        return None
    if config.writer:
        engine = EngineConfig(device=context.experiment.engine.device)
        return load_backbone(BackboneConfig(name=config.writer), engine)[0]
    return context.model.backbone if context.model.backbone.can_generate else None


def _examples(
    context: ExperimentContext, group: str, task: Task, basis: Mapping[str, Prompt], tasks_of: Mapping[str, Sequence[str]],
    writer: Backbone | None, seed: int,
) -> FilterResult:  # fmt: skip
    """Drafts one task's examples, labels them by vote of its prototypes and the global prompt, and balances labels."""
    config, own = context.experiment.distillation, rng.derive_seed(seed, "synthetic", group)
    mine = {name: prompt for name, prompt in basis.items() if name == "global" or group in tasks_of.get(name, ())}
    if writer:
        drafts = generation.generate_texts(writer, mine, task, config.per_label, own)
    elif config.texts:
        drafts = generation.from_texts(generation.read_texts(Path(config.texts).expanduser()))
    else:
        drafts = generation.from_nonsense(context.model.backbone, config.per_label * len(task.label_space), own)

    found = drafts.then(lambda texts: generation.vote_labels(context.model, mine, task, texts, config.least_agreement))
    if context.experiment.privacy["name"] == "none":
        found = found.then(lambda kept: filters.drop_memorised(kept, _records(context, group)))
    return found.then(filters.balanced)


def _records(context: ExperimentContext, group: str) -> list[Record]:
    return [
        record for name, shard in context.shards.items() if context.group_of[name] == group for record in shard.train
    ]


def _learned(
    context: ExperimentContext, config: DistillationConfig, basis: Mapping[str, Prompt],
    tasks_of: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int], taught: Mapping[str, Sequence[SyntheticExample]], seed: int,
) -> DistilledPrompt:  # fmt: skip
    """Distils from all prototypes of a task together, or meta-learns (Reptile, MAML).

    Meta-learning has one episode for each prototype and task: the examples with that prototype's labels.
    """
    model, start, rate = context.model, basis["global"], context.experiment.training.learning_rate or 0.0
    teachers = {
        group: {name: prompt for name, prompt in basis.items() if group in tasks_of.get(name, ())} or {"global": start}
        for group in taught
    }

    def encoded(group: str, found: Sequence[SyntheticExample]) -> Batch:
        return context.tasks[group].encode(filters.records(found), model.backbone, start)

    if config.how in ("squared", "kl"):
        lessons = []
        for group, found in taught.items():
            stacked = torch.stack([prompt.vectors_PD for prompt in teachers[group].values()])
            weights = [sizes.get(name, 1) for name in teachers[group]]
            lessons.append(TaskExamples(encoded(group, found), stacked, weights=weights))
        return distill(
            model, start.vectors_PD, lessons, steps=config.steps, learning_rate=rate, seed=seed, loss=config.how
        )
    episodes = [
        encoded(group, own)
        for group, found in taught.items()
        for own in generation.labelled(model, teachers[group], context.tasks[group], found).values()
    ]
    inner = InnerLoop(INNER_STEPS, rate)
    if config.how == "reptile":
        return reptile(model, episodes, start.vectors_PD, inner, outer_rate=0.3, outer_steps=config.steps, seed=seed)
    return first_order_maml(
        model, episodes, start.vectors_PD, inner, outer_rate=rate, outer_steps=config.steps, seed=seed
    )
