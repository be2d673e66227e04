"""Everything an experiment describes, built: the backbone, the task, the start prompt, the clients."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from ficpd.errors import BackboneError, ConfigError
from ficpd.experiment import BackboneConfig, EngineConfig, Experiment, checked, settings
from ficpd.guard import Guard, private_seed
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load
from ficpd.seams import Backbone, Compression, Task
from ficpd.speed import DTYPES, Choice, choose
from ficpd.types import ClientCard, Prompt, Query, Record


@dataclass(frozen=True)
class World:
    """`experiment` has every "auto" and every default resolved to what is really used."""

    experiment: Experiment
    task: Task
    model: Compute
    start: Prompt
    compression: Compression
    shards: Mapping[str, Shard]
    encodings: Encodings = field(default_factory=dict, repr=False, compare=False)

    def holders(self, pooled: bool = False) -> Mapping[str, Shard]:
        """Who holds which records; `pooled`: one client holds everybody's."""
        return {"everyone": _pool(self.shards)} if pooled else self.shards

    def clients(self, guard: Guard | None = None, pooled: bool = False) -> dict[str, Client]:
        """Fresh clients with nothing kept. Without a guard nothing of them may leave: they are for looking at."""
        return {
            name: Client(
                ClientCard(name, shard.metadata),
                shard.train,
                shard.test,
                self.task,
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
    data = sources.read(experiment.data, experiment.seed)
    shards = partition(experiment.partition, data, "target", experiment.seed)
    module, config = settings("tasks", experiment.task)
    task = module.build(config)
    _check_targets(task, shards)
    backbone, resolved = load_backbone(experiment.backbone, experiment.engine)
    experiment = experiment.model_copy(update={"backbone": resolved})
    start, experiment = start_prompt(experiment, task, backbone)
    engine, first = experiment.engine, next(iter(shards.values())).train[:1]
    task.encode(first, backbone, start)  # a prompt that leaves no room for a text is an error now, not in a client
    module, config = settings("compression", experiment.compression)
    model, seed = Compute(backbone, engine.keep_mb << 20, engine.chunk_tokens), seeds.derive(experiment.seed, "public")
    gradients = lru_cache(partial(public_gradients, model, task, start, seed)) if backbone.gives_gradients else None
    compression = module.build(config, start, seed, gradients)
    experiment = experiment.model_copy(update={"privacy": open_clip(experiment, start, compression, gradients)})
    return World(experiment, task, model, start, compression, shards)


def open_clip(
    experiment: Experiment, start: Prompt, compression: Compression, gradients: Gradients | None
) -> dict[str, Any]:
    """The privacy settings with a clip norm: the median norm of the gradients on made-up records, in the units that the
    tuner sees; for whole clients, half of the longest way that Adam can go in one order. No record is looked at."""
    privacy = dict(experiment.privacy)
    if privacy.get("clip_norm", 0) is not None:
        return privacy
    if "placement" in privacy:
        training = experiment.training
        longest = training.local_steps * (training.learning_rate or 0) * start.vectors_PD.numel() ** 0.5
        return privacy | {"clip_norm": longest / 2}
    if gradients is None:
        raise ConfigError("privacy.clip_norm is open, and this backbone gives no gradients to find one from; state it")
    found, coordinates = gradients(256), compression.coordinates
    flat = coordinates.down(found) * clip_units(coordinates) if coordinates else found.flatten(1)
    return privacy | {"clip_norm": float(flat.norm(dim=1).median())}


def public_gradients(model: Compute, task: Task, start: Prompt, seed: int, number: int) -> torch.Tensor:
    """[number, P, D]: gradients at the start prompt on made-up records, every possible answer in turn; nobody's data."""
    texts = model.backbone.nonsense(number, seed)
    made_up = [
        Record(f"made-up {i}", {"text": text, "target": task.possible[i % len(task.possible)]})
        for i, text in enumerate(texts)
    ]
    query = Query(start.vectors_PD[None], task.encode(made_up, model.backbone, start), grad=True)
    answer = Compute(model.backbone, 0, model.chunk_tokens).answer([query])[0]  # nothing of them is worth keeping
    assert answer.grad_KBPD is not None
    return answer.grad_KBPD[0].cpu()


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


def start_prompt(experiment: Experiment, task: Task, backbone: Backbone) -> tuple[Prompt, Experiment]:
    """Where all clients start, and the experiment with layer and learning rate as chosen for this backbone."""
    config, defaults = (
        experiment.prompt,
        catalog.defaults(experiment.backbone.name, experiment.backbone.kind, backbone.depth),
    )
    enters_at = defaults.enters_at if config.enters_at is None else config.enters_at
    if enters_at >= backbone.depth:
        raise ConfigError(
            f"prompt.enters_at = {enters_at}: {backbone.name} has {backbone.depth} layers, so 0 to {backbone.depth - 1}"
        )
    text = None if config.init == "vocabulary" else config.text or start_text(task)
    tokens_PD = backbone.start(text, config.num_tokens, enters_at, experiment.seed)
    rms = float(tokens_PD.square().mean().sqrt())
    vectors_PD = torch.cat([tokens_PD, _head_rows(task, backbone, rms)])
    training = experiment.training
    if training.learning_rate is None:
        training = training.model_copy(update={"learning_rate": defaults.learning_rate * rms})
    prompt = config.model_copy(update={"enters_at": enters_at})
    return (
        Prompt(vectors_PD, backbone.fingerprint, enters_at, task.head_rows),
        experiment.model_copy(update={"prompt": prompt, "training": training}),
    )


def start_text(task: Task) -> str:
    """The task's own words: its instruction and its answers' texts."""
    config = task.describe()
    words = config.get("labels", {}).values() or config.get("anchors", {}).keys()
    return " ".join([config.get("instruction", ""), *words]).strip()


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
