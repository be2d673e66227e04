"""Everything an experiment describes, built: the backbone, the task, the start prompt, the clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ficpd import rng
from ficpd.backbones import warn_unk_rate
from ficpd.backbones.loading import load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.data import loading
from ficpd.data.partition import partition
from ficpd.errors import ConfigError
from ficpd.evaluation.fairness import groups_of
from ficpd.experiments.config import Experiment, Group
from ficpd.experiments.initialization import (
    CLIP_NORM_MULTIPLE,
    calibrate_clipping_and_compression,
    init_soft_prompt,
    init_token_prompt,
)
from ficpd.federation.client import Client, Encodings
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.privacy_plan import PrivacyPlan, private_seed
from ficpd.interfaces import Compression, Task
from ficpd.privacy.none import NoPrivacy
from ficpd.tasks.build import build_task
from ficpd.types import ClientCard, ClientData, Prompt


@dataclass(frozen=True)
class ExperimentContext:
    """`experiment` has every "auto" and every default resolved to what is really used. `tasks` by group (see
    `Experiment.all_groups`); `group_of` says to which one each client belongs. `unseen`: clients that take
    no part."""

    experiment: Experiment
    tasks: Mapping[str, Task]
    group_of: Mapping[str, str]
    model: QueryEngine
    start: Prompt
    compression: Compression
    shards: Mapping[str, ClientData]
    unseen: Mapping[str, ClientData] = field(default_factory=dict)
    encodings: Encodings = field(default_factory=dict, repr=False, compare=False)

    @property
    def task(self) -> Task:
        """The only task. Raises `ConfigError` where the federation has several."""
        if len(self.tasks) != 1:
            raise ConfigError(
                f"this federation has several tasks ({', '.join(self.tasks)}); this is for runs of one task"
            )
        return next(iter(self.tasks.values()))

    def shards_for(self, pooled: bool = False) -> Mapping[str, ClientData]:
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

    def init_prompt_for(self, method: Method) -> Prompt:
        """What a method's clients start from. Raises `ConfigError` if that is no prompt and compression is for prompts, or
        the backbone takes prompts of words and the method tunes vectors."""
        declared = method.capabilities
        if declared.prompt_type == "soft":
            if declared.trains and not self.start.vectors_PD.is_floating_point():
                raise ConfigError(
                    f"{self.experiment.backbone.name} takes prompts of words, and {method.name} tunes vectors (soft "
                    'prompts); use method.name = "feddtpt", or a backbone whose weights are here'
                )
            return self.start
        if self.experiment.compression["name"] != "none":
            raise ConfigError(
                f"compression.name = {self.experiment.compression['name']!r} is for prompts, and {method.name} tunes "
                'something else; set compression.name = "none" (with compression.bits = 8 or 16, if bytes matter)'
            )
        given, backbone = self.start, self.model.backbone
        if declared.prompt_type == "tokens":
            given = init_token_prompt(self.experiment, list(self.tasks.values()), backbone)
        return method.init_prompt(given, backbone, rng.derive_seed(self.experiment.seed, "public"))

    def with_method(self, method: Method) -> "ExperimentContext":
        """The same world where all start as the method does, with its learning rate, and a clip norm that fits there."""
        declared = method.capabilities
        if declared.means_per_update and "placement" in self.experiment.privacy:
            return self._sending_slopes(declared)
        if declared.prompt_type == "soft":
            return self
        rate = declared.learning_rate or self.experiment.training.learning_rate
        training = self.experiment.training.model_copy(update={"learning_rate": rate})
        privacy, clip = dict(self.experiment.privacy), declared.record_clip_norm
        privacy |= {key: value for key, value in {"clip_norm": clip, "clip_norms": {}}.items() if key in privacy}
        experiment = self.experiment.model_copy(update={"training": training, "privacy": privacy})
        start = self.init_prompt_for(method)
        experiment, compression = calibrate_clipping_and_compression(
            experiment, list(self.tasks.values()), self.model, start
        )
        return replace(self, experiment=experiment, start=start, compression=compression)

    def _sending_slopes(self, declared: Capabilities) -> "ExperimentContext":
        """For whole clients, and a method whose clients send slopes and no prompts: a clip norm of the median length of a
        record's slopes (`open_clip`), times √steps, for that many stand side by side in what a client sends."""
        alone = self.experiment.model_copy(update={"privacy": {"clip_norm": None}})
        found = calibrate_clipping_and_compression(alone, list(self.tasks.values()), self.model, self.start)[0].privacy
        of_records = found["clip_norm"] or max(found["clip_norms"].values())
        clip = declared.client_clip_norm or of_records / CLIP_NORM_MULTIPLE * declared.means_per_update**0.5
        return replace(
            self,
            experiment=self.experiment.model_copy(update={"privacy": {**self.experiment.privacy, "clip_norm": clip}}),
        )

    def unseen_clients(self) -> dict[str, Client]:
        """The clients that take no part."""
        return replace(self, shards=self.unseen).clients()

    def clients(self, plan: PrivacyPlan | None = None, pooled: bool = False) -> dict[str, Client]:
        """Fresh clients with nothing kept. Without a guard nothing of them may leave: they are for looking at."""
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


class PartitionedData(NamedTuple):
    """Who holds which records, before a backbone is loaded."""

    tasks: dict[str, Task]
    shards: dict[str, ClientData]
    unseen: dict[str, ClientData]
    group_of: dict[str, str]


def load_and_partition(experiment: Experiment) -> PartitionedData:
    """Raises `DataError` or `ConfigError` where the data are not what the experiment says."""
    tasks, shards, group_of = {}, {}, {}
    for group, party in experiment.all_groups.items():
        tasks[group] = build_task(party.task, experiment.metrics)
        dealt = _dealt(group, party, experiment.seed)
        _check_targets(tasks[group], dealt)
        if experiment.fairness.group:
            groups_of([record for shard in dealt.values() for record in shard.test], experiment.fairness.group)
        shards |= dealt
        group_of |= dict.fromkeys(dealt, group)
    _check_heads(tasks)
    return PartitionedData(tasks, *_set_apart(shards, group_of, experiment), group_of)


def build_context(experiment: Experiment) -> ExperimentContext:
    """Read the data before the weights are fetched: a wrong column should not cost a download."""
    tasks, shards, unseen, group_of = load_and_partition(experiment)
    context = _begun(
        experiment, tasks, {group: [s for n, s in shards.items() if group_of[n] == group] for group in tasks}
    )
    for group in tasks:
        warn_unk_rate(context.model.backbone, {_who(n, s): s.train for n, s in shards.items() if group_of[n] == group})
    return replace(context, group_of=group_of, shards=shards, unseen=unseen)


def build_context_without_records(experiment: Experiment) -> ExperimentContext:
    """A world without records: the coordinator's, whose sites hold their own."""
    tasks = {group: build_task(party.task) for group, party in experiment.all_groups.items()}
    _check_heads(tasks)
    if experiment.federation.unseen_clients:
        raise ConfigError("federation.unseen_clients is for simulations; a site that shall not take part is not asked")
    if experiment.federation.max_queries:
        raise ConfigError(
            "federation.max_queries is for simulations; what a site asks of its own model, it does not tell"
        )
    return _begun(experiment, tasks, {})


def with_config(context: ExperimentContext, experiment: Experiment) -> ExperimentContext:
    """The same records on the same backbone, both in memory already, for an experiment that differs in neither: another
    prompt, training, privacy, compression or number of rounds."""
    by_group = {
        group: [s for n, s in context.shards.items() if context.group_of[n] == group] for group in context.tasks
    }
    experiment = experiment.model_copy(update={"backbone": context.experiment.backbone})
    begun = _started(experiment, context.tasks, by_group, context.model)
    return replace(context, experiment=begun.experiment, start=begun.start, compression=begun.compression)


def _begun(
    experiment: Experiment, tasks: Mapping[str, Task], shards: Mapping[str, Sequence[ClientData]]
) -> ExperimentContext:
    """Backbone, start prompt and compression, for clients that are yet to come."""
    backbone, resolved = load_backbone(experiment.backbone, experiment.engine)
    experiment = experiment.model_copy(update={"backbone": resolved})
    model = QueryEngine(backbone, experiment.engine.keep_mb << 20, experiment.engine.chunk_tokens)
    return _started(experiment, tasks, shards, model)


def _started(
    experiment: Experiment, tasks: Mapping[str, Task], shards: Mapping[str, Sequence[ClientData]], model: QueryEngine
) -> ExperimentContext:
    backbone = model.backbone
    if backbone.modality == "image" and experiment.distillation.how != "none":
        raise ConfigError(f'distillation.how: examples are texts, and {backbone.name} sees images; leave it "none"')
    start, experiment = init_soft_prompt(experiment, list(tasks.values()), backbone)
    for group, of_group in shards.items():
        for shard in of_group:
            tasks[group].encode(shard.train[:1], backbone, start)  # a prompt that leaves no room is an error now
    experiment, compression = calibrate_clipping_and_compression(experiment, list(tasks.values()), model, start)
    return ExperimentContext(experiment, tasks, {}, model, start, compression, {})


def _set_apart(
    shards: Mapping[str, ClientData], group_of: Mapping[str, str], experiment: Experiment
) -> tuple[dict[str, ClientData], dict[str, ClientData]]:
    """Those who take part, and those who do not. Every group keeps a client."""
    number, names = experiment.federation.unseen_clients, sorted(shards)
    random = rng.make_generator(rng.derive_seed(experiment.seed, "public"), "unseen")
    apart: set[str] = set()
    for place in torch.randperm(len(names), generator=random).tolist():
        group = [name for name in names if group_of[name] == group_of[names[place]]]
        if len(apart) < number and len(apart.intersection(group)) < len(group) - 1:
            apart.add(names[place])
    if len(apart) < number:
        raise ConfigError(
            f"federation.unseen_clients = {number} of {len(names)} clients leaves a task without any; at most {len(apart)}"
        )
    return {n: shards[n] for n in names if n not in apart}, {n: shards[n] for n in names if n in apart}


def _dealt(group: str, party: Group, seed: int) -> dict[str, ClientData]:
    """A group's clients; in a federation of several they bear its name, and it is public which group each is of."""
    source, how = party.data_and_partition
    shards = partition(how, loading.load(source, seed), "target", seed)
    if not group:
        return shards
    return {f"{group}.{name}": replace(s, metadata={**s.metadata, "group": group}) for name, s in shards.items()}


def _who(name: str, shard: ClientData) -> str:
    """A client and what its card says, for a sentence."""
    facts = ", ".join(f"{key} {value}" for key, value in shard.metadata.items() if key != "group")
    return f"client {name!r} ({facts})" if facts else f"client {name!r}"


def _check_heads(tasks: Mapping[str, Task]) -> None:
    """Prompts of one federation have one shape: with several tasks no head can be tuned."""
    if len(tasks) > 1 and (heads := [name for name, task in tasks.items() if task.head_rows]):
        raise ConfigError(
            f"groups.{heads[0]}.task.tuned_head: a head fits one label set, and this federation has {len(tasks)} tasks; "
            "leave it false"
        )


def _pool(shards: Mapping[str, ClientData]) -> ClientData:
    ordered = [shards[name] for name in sorted(shards)]
    return ClientData([r for s in ordered for r in s.train], [r for s in ordered for r in s.test], {})


def _check_targets(task: Task, shards: Mapping[str, ClientData]) -> None:
    """Every label known and every number a number, before anything slow begins."""
    for shard in shards.values():
        task.targets([*shard.train, *shard.test])
