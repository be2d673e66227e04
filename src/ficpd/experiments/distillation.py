"""After the rounds: examples that are nobody's, written under the prototypes, and one prompt distilled from all of them.

The server's last step. It sees prototypes, public label texts and what a frozen backbone writes: post-processing of what
clients released. A simulation also holds the examples against the training records and counts copies; it drops them only
where no privacy was asked, for to choose by looking at records is no post-processing.
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
from ficpd.library.distillation import filters as nobodys
from ficpd.library.distillation import generation
from ficpd.library.distillation.distill import DistilledPrompt, TaskExamples, distill
from ficpd.library.distillation.filters import FilterResult, SyntheticExample
from ficpd.library.distillation.meta_learning import InnerLoop, first_order_maml, reptile
from ficpd.types import Batch, ClientCard, FederationInfo, Prompt, Record

SYNTHETIC = "synthetic.jsonl"
DISTILLED = "distilled"
WRITES = "causal_lm"
"""The one kind of backbone that `distillation.writer` can name."""


@dataclass(frozen=True)
class DistillationResult:
    """`prompt`: the distilled one, or the global one where nothing was gained. `facts`: for the result."""

    prompt: Prompt
    facts: Distillation


def validate_distillation(context: ExperimentContext, method: Method) -> None:
    """Before the first round: raises what `refine` would raise after the last one, `ConfigError` if no task has labels,
    `DataError` for texts that are not there, `BackboneError` for a writer that cannot be had or cannot write. A method
    without prototypes has nothing to distil."""
    config = context.experiment.distillation
    if config.how == "none" or not _has_prototypes(context, method):
        return
    if not any(generation.has_labels(task) for task in context.tasks.values()):
        try:
            generation.label_requests(next(iter(context.tasks.values())))
        except ConfigError as error:
            raise ConfigError(f'distillation.how = "{config.how}": {error}; set it to "none"') from error
    if config.texts:
        try:
            _texts(config.texts)
        except DataError as error:
            raise DataError(f"distillation.texts: {error}") from error
    if config.writer:
        _check_writer(config.writer)


def _has_prototypes(context: ExperimentContext, method: Method) -> bool:
    """Whether its state says who is alike, whoever the clients are."""
    labels = {group: task.num_labels for group, task in context.tasks.items()}
    setup = FederationInfo(context.init_prompt_for(method), [ClientCard("somebody")], 1, 1, 0, labels)
    return "clusters" in method.init(setup).facts


def _check_writer(name: str) -> None:
    """Finds the weights and does not load them. Raises `BackboneError` if there are none, or they are of a kind that cannot
    write."""
    known = ", ".join(key for key, named in catalog.NAMED.items() if named.kind == WRITES)
    instead = f"name a {WRITES} backbone ({known}, a folder, a hub id), or give distillation.texts in its place"
    try:
        kind = resolve_backbone(BackboneConfig(name=name))[0]
    except BackboneError as error:
        raise BackboneError(f"distillation.writer: {error} For a writer {instead}") from error
    if kind != WRITES:
        raise BackboneError(f"distillation.writer = {name!r} is of kind {kind}, which writes nothing here; {instead}")


def distill_library(
    context: ExperimentContext, basis: Mapping[str, Prompt], tasks_of: Mapping[str, Sequence[str]], sizes: Mapping[str, int],
    directory: RunDir,
) -> DistillationResult:  # fmt: skip
    """Write, vote, keep, distil; the examples lie in the run's `synthetic.jsonl`.

    `basis` holds the global prompt and the prototypes; `tasks_of` the groups that each prototype serves and `sizes` how many
    clients it has. A task without labels, or for which no example survives, teaches nothing, and the facts say so.
    """
    config, seed = context.experiment.distillation, public_seed(context.experiment.seed)
    writer = _writer(config, context)
    made = {
        group: _examples(context, group, task, basis, tasks_of, writer, seed)
        for group, task in context.tasks.items()
        if generation.has_labels(task)
    }
    directory.path.mkdir(parents=True, exist_ok=True)
    nobodys.save([example for found in made.values() for example in found.examples], directory.path / SYNTHETIC)
    facts = Distillation(
        how=config.how,
        writer=writer.name if writer else config.texts or "words of the vocabulary",
        examples={
            group or "all": made[group].summary() if group in made else "0 examples: a task without labels"
            for group in context.tasks
        },
        memorised={g or "all": len(nobodys.memorised(m.examples, _records(context, g))) for g, m in made.items()},
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
    """Who writes: the configured writer, else the federation's own backbone if it can; None if nobody does."""
    if config.texts:
        return None
    if config.writer:
        return load_backbone(BackboneConfig(name=config.writer), EngineConfig(device=context.experiment.engine.device))[
            0
        ]
    return context.model.backbone if context.model.backbone.can_generate else None


def _texts(path: str) -> list[str]:
    return generation.read_texts(Path(path).expanduser())


def _examples(
    context: ExperimentContext, group: str, task: Task, basis: Mapping[str, Prompt], tasks_of: Mapping[str, Sequence[str]],
    writer: Backbone | None, seed: int,
) -> FilterResult:  # fmt: skip
    """Of one task: drafts, labelled by vote of the prototypes that serve it and the global prompt, without copies."""
    config, own = context.experiment.distillation, rng.derive_seed(seed, "synthetic", group)
    mine = {name: prompt for name, prompt in basis.items() if name == "global" or group in tasks_of.get(name, ())}
    if writer:
        drafts = generation.generate_texts(writer, mine, task, config.per_label, own)
    elif config.texts:
        drafts = generation.from_texts(_texts(config.texts))
    else:
        drafts = generation.from_nonsense(context.model.backbone, config.per_label * len(task.label_space), own)

    def voted(drafts: list[SyntheticExample]) -> FilterResult:
        return generation.vote_labels(context.model, mine, task, drafts, config.least_agreement)

    def unremembered(kept: list[SyntheticExample]) -> FilterResult:
        return nobodys.drop_memorised(kept, _records(context, group))

    found = drafts.then(voted)
    return (found if context.experiment.privacy["name"] != "none" else found.then(unremembered)).then(nobodys.balanced)


def _records(context: ExperimentContext, group: str) -> list[Record]:
    return [
        record for name, shard in context.shards.items() if context.group_of[name] == group for record in shard.train
    ]


def _learned(
    context: ExperimentContext, config: DistillationConfig, basis: Mapping[str, Prompt],
    tasks_of: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int], taught: Mapping[str, Sequence[SyntheticExample]], seed: int,
) -> DistilledPrompt:  # fmt: skip
    """Of synthetic examples: from all prototypes of a task at once, or (Reptile, MAML) each prototype a task of its own,
    the examples with the labels that it gives them."""
    model, start, rate = context.model, basis["global"], context.experiment.training.learning_rate or 0.0
    teachers = {
        group: {name: prompt for name, prompt in basis.items() if group in tasks_of.get(name, ())} or {"global": start}
        for group in taught
    }

    def encoded(group: str, found: Sequence[SyntheticExample]) -> Batch:
        return context.tasks[group].encode(nobodys.records(found), model.backbone, start)

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
    inner = InnerLoop(config.inner_steps, rate)
    if config.how == "reptile":
        return reptile(model, episodes, start.vectors_PD, inner, outer_rate=0.3, outer_steps=config.steps, seed=seed)
    return first_order_maml(
        model, episodes, start.vectors_PD, inner, outer_rate=rate, outer_steps=config.steps, seed=seed
    )
