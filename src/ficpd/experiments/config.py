"""An experiment: one frozen value, read from one TOML file, written back whole beside every result.

What changes the guarantee (`privacy.*`) stands apart from what only changes speed (`engine.*`). `--set a.b=c` changes one
value. A key that does not exist is an error that names the nearest one that does.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, Field, model_validator

from ficpd.backbones.loading import BackboneConfig, EngineConfig
from ficpd.data.loading import Config as Source
from ficpd.data.partition import Config as Partition
from ficpd.errors import ConfigError, did_you_mean
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig, load, search_in, validate, validated_section

QUICKSTART = "quickstart"


class PromptConfig(FrozenConfig):
    """`enters_at` None: the backbone's measured default. `init` "text": from `text` (or the task's own words);
    "vocabulary": from words drawn from the backbone's vocabulary; "library": from the prompt `of` the saved `library`.

    `head_examples`: a file or folder of a few public labelled records, in the columns of the clients' own; a tuned head
    starts from their classes' means, and not from the answers' texts, which some backbones do not know."""

    num_tokens: int = Field(default=10, ge=1)
    enters_at: int | None = Field(default=None, ge=0)
    init: Literal["text", "vocabulary", "library"] = "text"
    text: str | None = None
    library: str | None = None
    of: str = "global"
    head_examples: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> "PromptConfig":
        if (self.init == "library") != (self.library is not None):
            raise ValueError('init = "library" and library = "FOLDER" go together')
        return self


class FederationConfig(FrozenConfig):
    """`clients_per_round` None: all of them. `evaluate_every` 0: only at the end. `accept_late`: how many rounds late an
    update may arrive and still count. `unseen_clients`: so many of all take no part, drawn by the seed; what the others
    leave is tried on them at the end. `max_queries`, in simulations: how many queries (one candidate prompt on one record,
    with a gradient or without) a client may ask in the whole run; it ends before a round that could ask more of anybody."""

    num_rounds: int = Field(default=10, ge=0)
    clients_per_round: int | None = Field(default=None, ge=1)
    max_update_norm: float = Field(default=1e6, gt=0)
    evaluate_every: int = Field(default=0, ge=0)
    accept_late: int = Field(default=0, ge=0)
    unseen_clients: int = Field(default=0, ge=0)
    max_queries: int | None = Field(default=None, ge=1)


class DistillationConfig(FrozenConfig):
    """What the server does when the rounds of a method with prototypes are over. `how`: "squared" or "kl" distil one prompt
    from them, "reptile" or "maml" find one that each task is soon learned from; all on examples that are nobody's.

    `writer`: a backbone that writes (such as smollm2), or `texts`: a file of public texts, one a line; with neither, the
    backbone itself, or words of its vocabulary if it cannot write. `per_label` drafts each; `least_agreement` of the votes.
    """

    how: Literal["none", "squared", "kl", "reptile", "maml"] = "none"
    writer: str | None = None
    texts: str | None = None
    per_label: int = Field(default=20, ge=1)
    least_agreement: float = Field(default=0.75, gt=0, le=1)
    steps: int = Field(default=60, ge=1)
    inner_steps: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _one(self) -> "DistillationConfig":
        if self.writer and self.texts:
            raise ValueError("give a writer or texts, one of them")
        return self


class FairnessConfig(FrozenConfig):
    """`group`: a public column of every test record, named in `data.keep` too, by whose values accuracy is compared."""

    group: str | None = None


class Group(FrozenConfig):
    """Clients that share a task: what it is, where their records are, who holds which. Real sites hold their own."""

    task: dict[str, Any]
    data: Source | None = None
    partition: Partition | None = None

    @property
    def data_and_partition(self) -> tuple[Source, Partition]:
        """Records and who holds them, which a simulation has."""
        if self.data is None or self.partition is None:
            raise ConfigError(f"{'data' if self.data is None else 'partition'} is missing; it has no default")
        return self.data, self.partition


class Experiment(FrozenConfig):
    """The parts of a TOML file. `method`, `task`, `privacy` and `compression` hold a `name` and that module's settings.

    `baselines` are run beside the method, on the same clients and with the same privacy, for the table at the end, each with
    its method's default settings; "fedavg:none" is fedavg without any privacy, and with the run's settings if that is the
    run's own method. `metrics`: further metrics of a simulation's tasks, each a `name` (dotted) and that module's settings.
    A federation of several tasks has `groups.NAME` with a task, data and partition
    each, instead of the one of its own.
    """

    name: str = "experiment"
    seed: int = 0
    baselines: tuple[str, ...] = ()
    backbone: BackboneConfig = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    task: dict[str, Any] | None = None
    data: Source | None = None
    partition: Partition | None = None
    groups: dict[str, Group] = {}
    method: dict[str, Any] = {"name": "ficpd"}
    training: LocalTrainingConfig = LocalTrainingConfig()
    federation: FederationConfig = FederationConfig()
    privacy: dict[str, Any] = {"name": "none"}
    compression: dict[str, Any] = {"name": "none", "bits": 32}
    distillation: DistillationConfig = DistillationConfig()
    fairness: FairnessConfig = FairnessConfig()
    metrics: tuple[dict[str, Any], ...] = ()
    engine: EngineConfig = EngineConfig()

    @property
    def all_groups(self) -> dict[str, Group]:
        """The groups by name; a federation of one task is one group without a name."""
        if self.groups:
            return self.groups
        return {"": Group.model_validate({key: getattr(self, key) for key in Group.model_fields})}

    @property
    def tasks_in_words(self) -> str:
        """The kinds of the tasks, by group."""
        kinds = {group: party.task["name"] for group, party in self.all_groups.items()}
        return ", ".join(f"{group}: {kind}" if group else kind for group, kind in kinds.items())


PARTS: dict[str, type[BaseModel]] = {
    "backbone": BackboneConfig, "prompt": PromptConfig, "data": Source, "partition": Partition,
    "training": LocalTrainingConfig, "federation": FederationConfig, "distillation": DistillationConfig,
    "fairness": FairnessConfig, "engine": EngineConfig,
}  # fmt: skip
REGISTRIES = {"task": "tasks", "method": "methods", "privacy": "privacy", "compression": "compression"}


def parse(text: str, where: str, changes: Iterable[str] = (), records: bool = True) -> Experiment:
    """An experiment from TOML text, with `a.b=c` changes applied. Raises `ConfigError` naming key, value and file.

    Not `records`: it may leave out data and partition, for its sites hold their own."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not TOML: {error}") from error
    for change in changes:
        apply_override(tree, change)
    return build(tree, where, records)


def build(tree: Mapping[str, Any], where: str, records: bool = True) -> Experiment:
    """Check each part against its own model, so that every error names `part.key`."""
    engine = tree.get("engine")
    if isinstance(engine, Mapping) and engine.get("name") == "flower":
        records = False  # its sites hold their own
    for key in tree:
        if key not in Experiment.model_fields:
            raise ConfigError(f"{where}: {did_you_mean('part', key, Experiment.model_fields)}")
    parts: dict[str, Any] = dict(tree)
    own = [key for key in Group.model_fields if key in tree]
    if tree.get("groups") and own:
        raise ConfigError(f"{where}: {own[0]!r} stands beside groups; move it into each group that it is for")
    if tree.get("groups"):
        parts["groups"] = {
            name: _group(group, f"{where}: groups.{name}", records) for name, group in tree["groups"].items()
        }
    elif missing := [key for key in Group.model_fields if key not in tree and (records or key == "task")]:
        raise ConfigError(f"{where}: {missing[0]} is missing; it has no default")
    for key, model in PARTS.items():
        if key in parts:
            parts[key] = validate(model, parts[key], f"{where}: {key}")
    for key, registry in REGISTRIES.items():
        if key in parts:
            parts[key] = validated_section(registry, parts[key], f"{where}: {key}")
    if isinstance(tree.get("metrics"), Sequence):
        parts["metrics"] = [validated_section("metrics", metric, f"{where}: metrics") for metric in tree["metrics"]]
    built = validate(Experiment, parts, where)
    for name in built.baselines:
        method, _, private = name.partition(":")
        load("methods", method)
        if private not in ("", "none"):
            raise ConfigError(f"{where}.baselines: {name!r} is no baseline; write {method!r}, or '{method}:none'")
    load("optimizers", built.training.optimizer)
    load("engines", built.engine.name)
    return built


def _group(tree: Any, where: str, records: bool) -> Group:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected task, data and partition")
    if records and (missing := [key for key in Group.model_fields if key not in tree]):
        raise ConfigError(f"{where}: {missing[0]} is missing; it has no default")
    parts: dict[str, Any] = dict(tree)
    if "task" in parts:
        parts["task"] = validated_section("tasks", parts["task"], f"{where}.task")
    for key in ("data", "partition"):
        if key in parts:
            parts[key] = validate(PARTS[key], parts[key], f"{where}.{key}")
    return validate(Group, parts, where)


def read(recipe: str | None, changes: Iterable[str] = ()) -> Experiment:
    """A TOML file, or one of the recipes that come with the package (`quickstart` if none is named)."""
    return parse(*read_recipe(recipe or QUICKSTART), changes)


def read_recipe(name: str, kind: str = "recipe", under: str = "") -> tuple[str, str]:
    """The text of a TOML file or of a recipe that comes with the package, and what to call it in a message."""
    path, known = Path(name), recipes(under)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise ConfigError(f"no {kind} file {name}; the ones that come with ficpd: {', '.join(known)}")
        try:
            search_in(path.parent)
            return path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path.name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if name not in known:
        raise ConfigError(did_you_mean(kind, name, known) + " (or give a .toml file)")
    file = resources.files("ficpd.experiments") / "recipes" / under / f"{name}.toml"
    return file.read_text(encoding="utf-8"), f"{name}.toml"


def recipes(under: str = "") -> list[str]:
    """The names of the recipes that come with the package; under "compare", of the comparisons."""
    folder = resources.files("ficpd.experiments") / "recipes" / under
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def to_toml(experiment: Experiment) -> str:
    """The whole experiment, defaults and all (TOML has no null: an absent key is None)."""
    return tomli_w.dumps(_without_none(experiment.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def apply_override(tree: dict[str, Any], change: str) -> None:
    """Apply `a.b=c`; c is read as TOML, and as plain text if it is none."""
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {change!r}: expected part.key=value, such as method.name=fedavg")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    inner = tree
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change!r}: {key} is a value, not a part with keys of its own")
    if keys[-1] == "name" and len(keys) == 2 and keys[0] in REGISTRIES and inner.get("name") != value:
        inner.clear()  # another module's settings mean nothing to this one
    inner[keys[-1]] = value
