"""Builds an experiment: backbone, tasks, initial prompt, compression and clients."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ficpd import rng
from ficpd.backbones.loading import load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.backbones.tokenised import warn_unk_rate
from ficpd.data import loading
from ficpd.data.partition import partition
from ficpd.data.subjects import num_scattered
from ficpd.errors import ConfigError, PrivacyWarning, did_you_mean
from ficpd.evaluation.fairness import fairlearn, groups_of
from ficpd.experiments.config import Experiment, Group
from ficpd.experiments.initialization import (
    CLIP_NORM_MULTIPLE,
    calibrate_clipping_and_compression,
    check_rows_apart,
    init_soft_prompt,
    init_token_prompt,
    saved_beginning,
    try_loss,
)
from ficpd.federation.build import make_method
from ficpd.federation.client import Client, Encodings
from ficpd.federation.compression.auto import choose as choose_compression
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.privacy_plan import PrivacyPlan, private_seed
from ficpd.interfaces import Backbone, Compression, Task
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load
from ficpd.tasks.build import build_task
from ficpd.types import ClientCard, ClientData, Prompt, Record


@dataclass(frozen=True)
class ExperimentContext:
    """A built experiment.

    experiment: with every "auto" and default resolved.
    tasks: by group (`Experiment.all_groups`).
    group_of: the group of each client.
    start: the initial prompt.
    unseen: clients that take no part.
    began: of a saved initial prompt, the entry in a library's card (`card.BEGAN`).
    """

    experiment: Experiment
    tasks: Mapping[str, Task]
    group_of: Mapping[str, str]
    model: QueryEngine
    start: Prompt
    compression: Compression
    shards: Mapping[str, ClientData]
    unseen: Mapping[str, ClientData] = field(default_factory=dict)
    encodings: Encodings = field(default_factory=dict, repr=False, compare=False)
    began: Mapping[str, Any] | None = None

    @property
    def task(self) -> Task:
        """Returns the only task. Raises `ConfigError` if the federation has several."""
        if len(self.tasks) != 1:
            raise ConfigError(
                f"groups = {', '.join(self.tasks)}: this needs one task, and the federation has several tasks"
            )
        return next(iter(self.tasks.values()))

    def shards_for(self, pooled: bool = False) -> Mapping[str, ClientData]:
        """Returns the records by client; `pooled`: one client holds all records of its group."""
        if not pooled:
            return self.shards
        found = {}
        for group in self.tasks:
            ordered = [self.shards[name] for name in sorted(self.shards) if self.group_of[name] == group]
            train, test = [r for s in ordered for r in s.train], [r for s in ordered for r in s.test]
            found[f"{group}.everyone" if group else "everyone"] = ClientData(train, test, {})
        return found

    def task_of(self, client: str) -> Task:
        return self.tasks[self.group_of.get(client, client.removesuffix("everyone").removesuffix("."))]

    def init_prompt_for(self, method: Method) -> Prompt:
        """Returns the initial value that a method tunes.

        Raises `ConfigError` for compression of anything but a soft prompt. Raises it also for a soft prompt on a backbone
        that takes token prompts only.
        """
        declared = method.capabilities
        if declared.prompt_type == "soft":
            if declared.trains and not self.start.vectors_PD.is_floating_point():
                raise ConfigError(
                    f"{self.experiment.backbone.name} takes prompts of words, and {method.name} tunes vectors (soft "
                    'prompts). Use method.name = "feddtpt", or a backbone with local weights'
                )
            return self.start
        if self.experiment.compression["name"] not in ("none", "auto"):
            raise ConfigError(
                f"compression.name = {self.experiment.compression['name']!r} is for prompts, and {method.name} tunes "
                'something else. Set compression.name = "none" (compression.bits = 8 or 16 saves bytes)'
            )
        given, backbone = self.start, self.model.backbone
        if declared.prompt_type == "tokens":
            given = init_token_prompt(self.experiment, list(self.tasks.values()), backbone)
        return method.init_prompt(given, backbone, rng.derive_seed(self.experiment.seed, "public"))

    def with_method(self, method: Method, private: bool = True) -> "ExperimentContext":
        """Returns the context with the method's initial value, learning rate, compression and clip norm.

        The method is bound to the compression's subspace. private: whether the experiment's privacy applies.
        """
        declared = method.capabilities
        in_subspace = private and _tunes_in_subspace(method, self.experiment, self.model.backbone)
        part = choose_compression(self.experiment.compression, self.start, in_subspace)
        experiment = self.experiment.model_copy(update={"compression": part})
        soft, start = declared.prompt_type == "soft", self.start
        moved = (part["name"] == "subspace") != (self.compression.subspace is not None)
        if not soft:
            rate = declared.learning_rate or experiment.training.learning_rate
            training = experiment.training.model_copy(update={"learning_rate": rate})
            experiment, start = experiment.model_copy(update={"training": training}), self.init_prompt_for(method)
        context = replace(self, experiment=experiment, start=start)
        if moved or not soft:
            clip = {"clip_norm": declared.record_clip_norm, "clip_norms": {}}
            context = context._recalibrated(clip if private else {})
        if declared.means_per_update and "placement" in experiment.privacy:
            context = context._with_derivative_clip_norm(declared)
        method.bind(context.compression.subspace)
        return context

    def _recalibrated(self, clip: Mapping[str, Any]) -> "ExperimentContext":
        """Builds the compression again, and the clip norm where `clip` leaves it open."""
        privacy = dict(self.experiment.privacy)
        privacy |= {key: value for key, value in clip.items() if key in privacy}
        experiment, compression = calibrate_clipping_and_compression(
            self.experiment.model_copy(update={"privacy": privacy}), list(self.tasks.values()), self.model, self.start
        )
        return replace(self, experiment=experiment, compression=compression)

    def _with_derivative_clip_norm(self, declared: Capabilities) -> "ExperimentContext":
        """Sets the client-level clip norm of a method that sends directional derivatives.

        It is the median norm of a record's derivatives (`calibrate_clip_norm`) times √`means_per_update`.
        """
        alone = self.experiment.model_copy(update={"privacy": {"clip_norm": None}})
        found = calibrate_clipping_and_compression(alone, list(self.tasks.values()), self.model, self.start)[0].privacy
        of_records = found["clip_norm"] or max(found["clip_norms"].values())
        clip = of_records / CLIP_NORM_MULTIPLE * declared.means_per_update**0.5
        privacy = {**self.experiment.privacy, "clip_norm": clip}
        return replace(self, experiment=self.experiment.model_copy(update={"privacy": privacy}))

    def unseen_clients(self) -> dict[str, Client]:
        return replace(self, shards=self.unseen).clients()

    def clients(self, plan: PrivacyPlan | None = None, pooled: bool = False) -> dict[str, Client]:
        """Builds clients without stored state. Without a `plan` they are for evaluation only: release nothing of them."""
        return {
            name: Client(
                ClientCard(name, shard.metadata),
                shard.train,
                shard.test,
                self.task_of(name),
                self.model.backbone,
                plan.mechanisms[name] if plan else NoPrivacy(),
                self.compression,
                self.start,
                private_seed(self.experiment.seed, name),
                plan.accounts.get(name) if plan else None,
                encodings=self.encodings,
            )
            for name, shard in self.shards_for(pooled).items()
        }


def build_context(experiment: Experiment) -> ExperimentContext:
    """Loads the data, then the backbone, so that an error in the data costs no download.

    Raises `DataError` or `ConfigError` for data that do not fit the experiment.
    """
    tasks, shards, group_of = load_records(experiment)
    _check_heads(tasks)
    _warn_of_scattered_subjects(shards, experiment)
    shards, unseen = _split_unseen(shards, group_of, experiment)
    by_group = {group: {n: s for n, s in shards.items() if group_of[n] == group} for group in tasks}
    context = _load(experiment, tasks, {group: list(members.values()) for group, members in by_group.items()})
    for members in by_group.values():
        warn_unk_rate(context.model.backbone, {_describe(n, s): s.train for n, s in members.items()})
    return replace(context, group_of=group_of, shards=shards, unseen=unseen)


def load_records(experiment: Experiment) -> tuple[dict[str, Task], dict[str, ClientData], dict[str, str]]:
    """Returns the tasks by group, and the records and the group of each client, without the backbone.

    Raises `DataError`, naming all unknown labels of a group at once.
    """
    tasks, shards, group_of = {}, {}, {}
    for group, party in experiment.all_groups.items():
        tasks[group] = build_task(party.task, experiment.metrics)
        dealt = _partitioned(group, party, experiment.seed)
        tasks[group].targets([record for shard in dealt.values() for record in (*shard.train, *shard.test)])
        if "." in party.task["name"] or experiment.metrics:
            _try_score(tasks[group], [record for shard in dealt.values() for record in shard.test])
        if experiment.fairness.group:
            fairlearn()
            groups_of([record for shard in dealt.values() for record in shard.test], experiment.fairness.group)
        shards |= dealt
        group_of |= dict.fromkeys(dealt, group)
    return tasks, shards, group_of


def _try_score(task: Task, records: Sequence[Record]) -> None:
    """Scores the targets as predictions, so that an error in a score of one's own costs no run."""
    targets = task.targets(records)
    predictions = [one[0] if isinstance(one, (list, tuple)) else one for one in targets]  # of several references, one
    with warnings.catch_warnings(action="ignore"):
        task.score(predictions, targets)


def build_context_without_records(experiment: Experiment) -> ExperimentContext:
    """Builds the coordinator's context; the records stay with the sites."""
    tasks = {group: build_task(party.task) for group, party in experiment.all_groups.items()}
    _check_heads(tasks)
    for name in ("unseen_clients", "unseen"):
        if getattr(experiment.federation, name):
            raise ConfigError(f"federation.{name} is for simulations. Start the run without these sites")
    if experiment.federation.max_queries:
        raise ConfigError("federation.max_queries is for simulations: real sites report no query counts. Leave it out")
    return _load(experiment, tasks, {})


def with_config(context: ExperimentContext, experiment: Experiment) -> ExperimentContext:
    """Returns the context for another experiment on the same records and backbone, which stay in memory."""
    by_group = {g: [s for n, s in context.shards.items() if context.group_of[n] == g] for g in context.tasks}
    experiment = experiment.model_copy(update={"backbone": context.experiment.backbone})
    begun = _initialized(experiment, context.tasks, by_group, context.model)
    compression = begun.compression
    return replace(context, experiment=begun.experiment, start=begun.start, compression=compression, began=begun.began)


def _load(
    experiment: Experiment, tasks: Mapping[str, Task], shards: Mapping[str, Sequence[ClientData]]
) -> ExperimentContext:
    """Loads the backbone and initializes prompt, clipping and compression; `shards` by group."""
    backbone, resolved = load_backbone(experiment.backbone, experiment.engine)
    experiment = experiment.model_copy(update={"backbone": resolved})
    engine = experiment.engine
    keep, same = engine.keep_mb << 20, engine.reproducible
    model = QueryEngine(backbone, keep, engine.chunk_tokens, checkpoint=engine.checkpoint, reproducible=same)
    return _initialized(experiment, tasks, shards, model)


def _initialized(
    experiment: Experiment, tasks: Mapping[str, Task], shards: Mapping[str, Sequence[ClientData]], model: QueryEngine
) -> ExperimentContext:
    backbone = model.backbone
    if backbone.modality == "image" and experiment.distillation.how != "none":
        raise ConfigError(f'distillation.how: examples are texts, and {backbone.name} sees images. Leave it "none"')
    start, experiment = init_soft_prompt(experiment, list(tasks.values()), backbone)
    for group, of_group in shards.items():
        for shard in of_group:
            tasks[group].encode(shard.train[:1], backbone, start)  # raises early if the prompt leaves no room
        name = experiment.all_groups[group].task["name"]
        if "." in name and of_group:
            try_loss(name, tasks[group], of_group[0].train, model, start)
    check_rows_apart(experiment, tasks, model, start)
    in_subspace = _tunes_in_subspace(make_method(experiment.method, experiment.training), experiment, backbone)
    part = choose_compression(experiment.compression, start, in_subspace)
    calibrated, compression = calibrate_clipping_and_compression(
        experiment.model_copy(update={"compression": part}), list(tasks.values()), model, start
    )
    experiment = calibrated.model_copy(update={"compression": experiment.compression})
    return ExperimentContext(experiment, tasks, {}, model, start, compression, {}, began=saved_beginning(experiment))


def _tunes_in_subspace(method: Method, experiment: Experiment, backbone: Backbone) -> bool:
    """Tells whether an open compression is a subspace: if gradients of a soft prompt are noised."""
    declared, unit = method.capabilities, "client" if "placement" in experiment.privacy else "record"
    return (
        experiment.privacy["name"] != "none"
        and unit in declared.private_units
        and declared.subspace
        and declared.prompt_type == "soft"
        and backbone.supports_gradients
        and not load("optimizers", experiment.training.optimizer).black_box
    )


def _split_unseen(
    shards: Mapping[str, ClientData], group_of: Mapping[str, str], experiment: Experiment
) -> tuple[dict[str, ClientData], dict[str, ClientData]]:
    """Returns the clients that take part, and the others: named, without training records, or drawn by the seed.

    Every group keeps a client.
    """
    federation, everybody = experiment.federation, sorted(shards)
    for name in federation.unseen:
        if name not in shards:
            raise ConfigError(f"federation.unseen: {did_you_mean('client', name, everybody)}")
    apart = {name for name in everybody if name in federation.unseen or not shards[name].train}
    for group in sorted(set(group_of.values())):
        if all(name in apart for name in everybody if group_of[name] == group):
            raise ConfigError(
                f"no client{f' of groups.{group}' if group else ''} takes part: each is in federation.unseen or has no "
                "training records. Leave one of them out of federation.unseen, or give one training records"
            )
    number, names = federation.unseen_clients, [name for name in everybody if name not in apart]
    random, drawn = rng.make_generator(rng.derive_seed(experiment.seed, "public"), "unseen"), set()
    for place in torch.randperm(len(names), generator=random).tolist():
        group = [name for name in names if group_of[name] == group_of[names[place]]]
        if len(drawn) < number and len(drawn.intersection(group)) < len(group) - 1:
            drawn.add(names[place])
    if len(drawn) < number:
        raise ConfigError(
            f"federation.unseen_clients = {number} of {len(names)} clients: expected at most {len(drawn)}, so that every "
            "task keeps a client"
        )
    apart |= drawn
    return {n: shards[n] for n in everybody if n not in apart}, {n: shards[n] for n in everybody if n in apart}


def _partitioned(group: str, party: Group, seed: int) -> dict[str, ClientData]:
    """Loads and partitions a group's records. With several groups, names and cards state the group, which is public."""
    source, how = party.data_and_partition
    shards = partition(how, loading.load(source, seed), "target", seed)
    if not group:
        return shards
    return {f"{group}.{name}": replace(s, metadata={**s.metadata, "group": group}) for name, s in shards.items()}


def _warn_of_scattered_subjects(shards: Mapping[str, ClientData], experiment: Experiment) -> None:
    """Warns where a guarantee per subject does not hold, because a subject has records at several clients."""
    scattered = num_scattered([*shard.train, *shard.test] for shard in shards.values())
    if scattered and experiment.privacy["name"] != "none" and "placement" not in experiment.privacy:
        warnings.warn(
            f"data.columns.subject: {scattered} subjects have records at several clients. Each client covers its own of "
            "them; nothing covers them together. Partition so that each subject is at one client, or read epsilon as a "
            "bound for each client alone",
            PrivacyWarning,
            stacklevel=2,
        )


def _describe(name: str, shard: ClientData) -> str:
    """Names a client and its metadata, for a warning."""
    facts = ", ".join(f"{key} {value}" for key, value in shard.metadata.items() if key != "group")
    return f"client {name!r} ({facts})" if facts else f"client {name!r}"


def _check_heads(tasks: Mapping[str, Task]) -> None:
    """Refuses a tuned head with several tasks, because all prompts of a federation have one shape."""
    if len(tasks) > 1 and (heads := [name for name, task in tasks.items() if task.head_rows]):
        raise ConfigError(
            f"groups.{heads[0]}.task.tuned_head: a head fits one label set, and this federation has {len(tasks)} tasks. "
            "Leave it false"
        )
