"""Everything an experiment describes, built: the backbone, the task, the start prompt, the clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ficpd import seeds
from ficpd.backbones import catalog, weights
from ficpd.clients import Client, Encodings, clip_units
from ficpd.compression.subspace import Gradients
from ficpd.compute import Compute
from ficpd.data import sources
from ficpd.data.partition import Shard, partition
from ficpd.errors import BackboneError, ConfigError, unknown
from ficpd.experiment import BackboneConfig, EngineConfig, Experiment, Group, PromptConfig, checked, settings
from ficpd.guard import Guard, private_seed
from ficpd.library import PromptLibrary
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load
from ficpd.seams import Backbone, Compression, Task
from ficpd.speed import DTYPES, Choice, choose
from ficpd.types import ClientCard, Prompt, Query, Record

HEADROOM = 2.0
"""At the median norm itself half of the records are clipped, those that are answered wrongly most of all, and the most
frequent answer wins: 72.5 and 69.6 % (two noise seeds, ε = 2) where twice the norm gave 76.4 and 77.9 %, thrice 75.3."""


@dataclass(frozen=True)
class World:
    """`experiment` has every "auto" and every default resolved to what is really used. `tasks` by group (see
    `Experiment.parties`); `group_of` says to which one each client belongs."""

    experiment: Experiment
    tasks: Mapping[str, Task]
    group_of: Mapping[str, str]
    model: Compute
    start: Prompt
    compression: Compression
    shards: Mapping[str, Shard]
    encodings: Encodings = field(default_factory=dict, repr=False, compare=False)

    @property
    def task(self) -> Task:
        """The only task. Raises `ConfigError` where the federation has several."""
        if len(self.tasks) != 1:
            raise ConfigError(
                f"this federation has several tasks ({', '.join(self.tasks)}); this is for runs of one task"
            )
        return next(iter(self.tasks.values()))

    def holders(self, pooled: bool = False) -> Mapping[str, Shard]:
        """Who holds which records; `pooled`: one client of each group holds all of that group's."""
        if not pooled:
            return self.shards
        return {
            f"{group}.everyone" if group else "everyone": _pool(
                {name: shard for name, shard in self.shards.items() if self.group_of[name] == group}
            )
            for group in self.tasks
        }

    def task_of(self, client: str) -> Task:
        return self.tasks[self.group_of.get(client, client.removesuffix("everyone").removesuffix("."))]

    def clients(self, guard: Guard | None = None, pooled: bool = False) -> dict[str, Client]:
        """Fresh clients with nothing kept. Without a guard nothing of them may leave: they are for looking at."""
        return {
            name: Client(
                ClientCard(name, shard.metadata),
                shard.train,
                shard.test,
                self.task_of(name),
                self.model.backbone,
                guard.mechanisms[name] if guard else NoPrivacy(),
                self.compression,
                self.start,
                private_seed(self.experiment.seed, name),
                guard.books.get(name) if guard else None,
                encodings=self.encodings,
            )
            for name, shard in self.holders(pooled).items()
        }


def build_world(experiment: Experiment) -> World:
    """Read the data before the weights are fetched: a wrong column should not cost a download."""
    tasks, shards, group_of = {}, {}, {}
    for group, party in experiment.parties.items():
        tasks[group] = build_task(party.task)
        dealt = _dealt(group, party, experiment.seed)
        _check_targets(tasks[group], dealt)
        shards |= dealt
        group_of |= dict.fromkeys(dealt, group)
    _check_heads(tasks)
    backbone, resolved = load_backbone(experiment.backbone, experiment.engine)
    experiment = experiment.model_copy(update={"backbone": resolved})
    start, experiment = start_prompt(experiment, list(tasks.values()), backbone)
    for name, shard in shards.items():
        tasks[group_of[name]].encode(shard.train[:1], backbone, start)  # a prompt that leaves no room is an error now
    engine = experiment.engine
    module, config = settings("compression", experiment.compression)
    model, seed = Compute(backbone, engine.keep_mb << 20, engine.chunk_tokens), seeds.derive(experiment.seed, "public")
    public = lru_cache(partial(public_gradients, model, list(tasks.values()), start, seed))
    gradients = public if backbone.gives_gradients else None
    compression = module.build(config, start, seed, gradients)
    experiment = experiment.model_copy(update={"privacy": open_clip(experiment, start, compression, gradients)})
    return World(experiment, tasks, group_of, model, start, compression, shards)


def _dealt(group: str, party: Group, seed: int) -> dict[str, Shard]:
    """A group's clients; in a federation of several they bear its name, and it is public which group each is of."""
    shards = partition(party.partition, sources.read(party.data, seed), "target", seed)
    if not group:
        return shards
    return {f"{group}.{name}": replace(s, metadata={**s.metadata, "group": group}) for name, s in shards.items()}


def _check_heads(tasks: Mapping[str, Task]) -> None:
    """Prompts of one federation have one shape: with several tasks no head can be tuned."""
    if len(tasks) > 1 and (heads := [name for name, task in tasks.items() if task.head_rows]):
        raise ConfigError(
            f"groups.{heads[0]}.task.tuned_head: a head fits one label set, and this federation has {len(tasks)} tasks; "
            "leave it false"
        )


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
    texts, compute, found = model.backbone.nonsense(number, seed), Compute(model.backbone, 0, model.chunk_tokens), []
    for place, task in enumerate(tasks[:number]):
        made_up = [
            Record(f"made-up {i}", {"text": text, "target": task.possible[i % len(task.possible)]})
            for i, text in enumerate(texts[place :: len(tasks)])
        ]
        query = Query(start.vectors_PD[None], task.encode(made_up, model.backbone, start), grad=True)
        answer = compute.answer([query])[0]  # nothing below the prompt's layer is worth keeping
        assert answer.grad_KBPD is not None
        found.append(answer.grad_KBPD[0].cpu())
    return torch.cat(found)


def load_backbone(config: BackboneConfig, engine: EngineConfig) -> tuple[Backbone, BackboneConfig]:
    """The backbone, and its configuration with dtype and attention as chosen for this machine."""
    device = _device(engine.device)
    kind, found = locate(config)
    module = load("backbones", kind)
    options = checked(module.Config, config.options, "backbone.options")

    def build(choice: Choice) -> Backbone:
        dtype = DTYPES[choice.dtype]
        return module.build(options, found, dtype=dtype, attention=choice.attention, device=device, name=config.name)

    identity = config.name if found is None else found.sha256
    choice = choose(build, identity, device, Choice(config.dtype, config.attention))
    update = {"kind": kind, "dtype": choice.dtype, "attention": choice.attention}
    return build(choice), config.model_copy(update=update)


def locate(config: BackboneConfig) -> tuple[str, weights.Weights | None]:
    """The kind of a backbone and its weights. Raises `BackboneError` if they cannot be had or are of no known kind."""
    if config.name == "tiny":
        return "tiny", None
    named = catalog.NAMED.get(config.name)
    found = weights.resolve(named.weights if named else config.name)
    return config.kind or (named.kind if named else catalog.kind_of(Path(found.folder))), found


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
    vectors_PD = torch.cat([tokens_PD, _head_rows(tasks[0], backbone, rms)])
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


def build_task(description: Mapping[str, Any]) -> Task:
    """A task from what `Task.describe` said of it."""
    module, config = settings("tasks", description)
    return module.build(config)


def _head_rows(task: Task, backbone: Backbone, rms: float) -> torch.Tensor:
    """The tuned readout's first rows: the answers' own, scaled to the prompt's RMS so that one rate fits both."""
    if not task.head_rows:
        return torch.zeros(0, backbone.width)
    readout_CD = task.readout(backbone)
    if readout_CD is None:
        raise ConfigError(
            "task.tuned_head needs answers of one token each on this backbone; choose shorter answer texts"
        )
    rows_CD = readout_CD.float().cpu()
    return rows_CD / rows_CD.square().mean(1, keepdim=True).sqrt() * rms


def _pool(shards: Mapping[str, Shard]) -> Shard:
    ordered = [shards[name] for name in sorted(shards)]
    return Shard([r for s in ordered for r in s.train], [r for s in ordered for r in s.test], {})


def _check_targets(task: Task, shards: Mapping[str, Shard]) -> None:
    """Every label known and every number a number, before anything slow begins."""
    for shard in shards.values():
        task.targets([*shard.train, *shard.test])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"engine.device = {name!r} is no device; write cpu or cuda") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise BackboneError(f"engine.device = {name!r} is not available here; --set engine.device=cpu")
    return device
