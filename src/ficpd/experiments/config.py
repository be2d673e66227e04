"""Reads and writes experiments: one TOML file is one frozen `Experiment`.

`privacy.*` changes the guarantee; `engine.*` changes only the speed. `--set a.b=c` changes one value. An unknown key is an
error that names the nearest known one.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, Field, model_validator

from ficpd.backbones.loading import BackboneConfig, EngineConfig
from ficpd.data.loading import ROLES
from ficpd.data.loading import Config as Source
from ficpd.data.partition import Config as Partition
from ficpd.data.tables import COMPRESSED, READERS
from ficpd.errors import ConfigError, RunError, did_you_mean
from ficpd.experiments.facts import RECIPE, recipes
from ficpd.experiments.other_words import setting_for
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig, load, names, search_in, validate, validated_section

QUICKSTART = "quickstart"
STANDARD_BASELINES = ("local", "linear_probe")
"""Methods that a client can run alone."""


class PromptConfig(FrozenConfig):
    """The initial prompt.

    num_tokens: its virtual tokens.
    enters_at: the layer; None: the backbone's measured default.
    init: "text" (`text`, or the task's start text), "vocabulary" (random words) or "library" (a saved prompt).
    text: the text of init = "text"; None: the start text of the task.
    library: the folder of init = "library".
    of: the name of the prompt in `library`.
    head_examples: a file or folder of public labelled records, in the same columns as the clients'. A tuned head starts
        from their class means; without them, from the answers' texts.
    """

    num_tokens: int = Field(default=10, ge=1)
    enters_at: int | None = Field(default=None, ge=0)
    init: Literal["text", "vocabulary", "library"] = "text"
    text: str | None = None
    library: str | None = None
    of: str = "global"
    head_examples: str | None = None

    @model_validator(mode="after")
    def _check_library(self) -> "PromptConfig":
        if (self.init == "library") != (self.library is not None):
            raise ValueError('init = "library" and library = "FOLDER" go together')
        return self


class FederationConfig(FrozenConfig):
    """The rounds and their clients.

    num_rounds: rounds of the run.
    clients_per_round: size of a cohort; None: all clients.
    max_update_norm: bound of every update's L2 norm.
    evaluate_every: in simulations, rounds between two points of the accuracy curve; 0: no curve.
    evaluate_records: test records, of all clients together, that a point is measured on; each is read with its client's
        prompt, as the server would send it. 0: all test records, with each client's own model, which takes longer.
    accept_late: how many rounds late an update may arrive and still count.
    unseen_clients: clients drawn by the seed that take no part and are evaluated at the end.
    unseen: names of further ones. Clients with test records alone take no part, either.
    max_queries: in simulations, queries per client in the run. A query is one candidate prompt on one record. The run ends
        before a round in which a client could exceed it.
    """

    num_rounds: int = Field(default=10, ge=0)
    clients_per_round: int | None = Field(default=None, ge=1)
    max_update_norm: float = Field(default=1e6, gt=0)
    evaluate_every: int = Field(default=1, ge=0)
    evaluate_records: int = Field(default=256, ge=0)
    accept_late: int = Field(default=0, ge=0)
    unseen_clients: int = Field(default=0, ge=0)
    unseen: tuple[str, ...] = ()
    max_queries: int | None = Field(default=None, ge=1)


class DistillationConfig(FrozenConfig):
    """The server's distillation of prototypes on synthetic examples, after the last round.

    how: "squared" or "kl" distil one prompt; "reptile" or "maml" meta-learn an initial prompt.
    writer: a generative backbone (such as smollm2) that writes the examples.
    texts: a file of public texts, one a line. Without both, the run's backbone writes, or random words are used.
    per_label: drafts per label.
    least_agreement: the share of votes that an example needs.
    steps: optimizer steps.
    """

    how: Literal["none", "squared", "kl", "reptile", "maml"] = "none"
    writer: str | None = None
    texts: str | None = None
    per_label: int = Field(default=20, ge=1)
    least_agreement: float = Field(default=0.75, gt=0, le=1)
    steps: int = Field(default=60, ge=1)

    @model_validator(mode="after")
    def _check_source(self) -> "DistillationConfig":
        if self.writer and self.texts:
            raise ValueError("writer and texts are both set: give one of them")
        return self


class FairnessConfig(FrozenConfig):
    """`group`: a public column of all test records, also named in `data.keep`. Its values are the compared groups."""

    group: str | None = None


class Group(FrozenConfig):
    """Clients that share a task, with its data and partition. Real sites have their own records and need neither."""

    task: dict[str, Any]
    data: Source | None = None
    partition: Partition | None = None

    @property
    def data_and_partition(self) -> tuple[Source, Partition]:
        """Returns data and partition of a simulation. Raises `ConfigError` if one is missing."""
        if self.data is None or self.partition is None:
            raise ConfigError(f"{'data' if self.data is None else 'partition'} is missing; it has no default")
        return self.data, self.partition


class Experiment(FrozenConfig):
    """The parts of a TOML file. `method`, `task`, `privacy` and `compression` hold a `name` and that module's settings.

    name: names the run directory.
    seed: of all draws but those of cryptographic noise.
    baselines: methods to compare with, on the same clients, with the same privacy and default settings. "fedavg:none" is
        fedavg without privacy; for the run's method it keeps the run's settings. "auto": local and
        linear_probe, where they fit the tasks.
    metrics: further metrics of a simulation's tasks, each a dotted `name` and that module's settings.
    compression: "auto": a subspace of 64 numbers for methods that add noise to gradients, else the whole prompt.
    groups: with several tasks, a task, data and partition for each name. They replace `task`, `data` and `partition`.
    """

    name: str = "experiment"
    seed: int = 0
    baselines: tuple[str, ...] | Literal["auto"] = "auto"
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
    compression: dict[str, Any] = {"name": "auto", "bits": None}
    distillation: DistillationConfig = DistillationConfig()
    fairness: FairnessConfig = FairnessConfig()
    metrics: tuple[dict[str, Any], ...] = ()
    engine: EngineConfig = EngineConfig()

    @property
    def all_groups(self) -> dict[str, Group]:
        """Returns the groups by name; a federation of one task has one group, named ""."""
        if self.groups:
            return self.groups
        return {"": Group.model_validate({key: getattr(self, key) for key in Group.model_fields})}

    @property
    def tasks_in_words(self) -> str:
        """Describes the kinds of the tasks, by group."""
        kinds = {group: party.task["name"] for group, party in self.all_groups.items()}
        return ", ".join(f"{group}: {kind}" if group else kind for group, kind in kinds.items())


PARTS: dict[str, type[BaseModel]] = {
    "backbone": BackboneConfig, "prompt": PromptConfig, "data": Source, "partition": Partition,
    "training": LocalTrainingConfig, "federation": FederationConfig, "distillation": DistillationConfig,
    "fairness": FairnessConfig, "engine": EngineConfig,
}  # fmt: skip
REGISTRIES = {"task": "tasks", "method": "methods", "privacy": "privacy", "compression": "compression"}
RECORD_LEVEL = "record_gaussian"
"""The mechanism of privacy settings without a name. Where the data name subjects, it protects subjects."""
USUAL = {"task": "classification", "privacy": RECORD_LEVEL}
"""The modules whose keys an error looks for, where the recipe names none."""


def parse(text: str, where: str, changes: Iterable[str] = (), records: bool = True) -> Experiment:
    """Reads an experiment by `read_tree`. Not `records`: data and partition may be missing."""
    return build(read_tree(text, where, changes), where, records)


def read_tree(text: str, where: str, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Parses TOML text and applies `a.b=c` changes. Raises `ConfigError` naming key, value and file."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not TOML: {error}") from error
    for change in changes:
        apply_override(tree, change)
    return tree


def build(tree: Mapping[str, Any], where: str, records: bool = True) -> Experiment:
    """Validates each part by its model, so that every error names `part.key`."""
    engine = tree.get("engine")
    if isinstance(engine, Mapping) and engine.get("name") == "flower":
        records = False
    for key in tree:
        if key not in Experiment.model_fields:
            raise ConfigError(f"{where}: {_place_of(key, tree) or did_you_mean('part', key, Experiment.model_fields)}")
    parts, groups = dict(tree), tree.get("groups")
    if isinstance(tree.get("privacy"), Mapping):
        parts["privacy"] = {"name": RECORD_LEVEL, **tree["privacy"]}
    _check_places(parts, where)
    own = [key for key in Group.model_fields if key in tree]
    if groups and not isinstance(groups, Mapping):
        raise ConfigError(f"{where}: groups = {groups!r}: a table is expected: write [groups.NAME]")
    if groups and own:
        raise ConfigError(f"{where}: {own[0]!r} stands outside the groups. Move it into each group that it is for")
    if groups:
        parts["groups"] = {name: _group(group, f"{where}: groups.{name}", records) for name, group in groups.items()}
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
    for name in built.baselines if built.baselines != "auto" else ():
        method, _, private = name.partition(":")
        load("methods", method)
        if private not in ("", "none"):
            raise ConfigError(f"{where}.baselines: {name!r} is no baseline. Write {method!r}, or '{method}:none'")
    load("optimizers", built.training.optimizer)
    load("engines", built.engine.name)
    return built


def _check_places(parts: Mapping[str, Any], where: str) -> None:
    """Raises `ConfigError` for a part, or a key of another part, that stands inside a part."""
    for part, tree in parts.items():
        if not (part in PARTS or part in REGISTRIES) or not isinstance(tree, Mapping):
            continue
        model = PARTS.get(part) or getattr(_module(REGISTRIES[part], tree), "Config", None)
        own = ["name", *(model.model_fields if model else ())]
        for key in tree if model else ():
            if not get_close_matches(key, own, cutoff=0.8) and (place := _place_of(key, parts, part)):
                raise ConfigError(f"{where}: {part}: {place}")


def _module(registry: str, tree: Mapping[str, Any]) -> Any:
    """Returns the module that a part names; None without one."""
    return load(registry, tree["name"]) if isinstance(tree.get("name"), str) else None


def _place_of(key: str, parts: Mapping[str, Any], inside: str = "") -> str:
    """Returns where a part, a key or a word of other software belongs, as an error text; else nothing."""
    known = {*PARTS, *REGISTRIES, "groups"}
    if inside and key in Experiment.model_fields:
        place = f"Write it as [{key}] on lines of its own" if key in known else "Write it above the first [section]"
        return f"{key!r} is no key of [{inside}], but a part of the recipe. {place}"
    stands = f"no key of [{inside}]" if inside else "no part"
    models = {**PARTS, **_named_models(parts)}
    homes = ["data.columns"] if key in ROLES else []
    if homes := [*homes, *(part for part, model in models.items() if key in model.model_fields and part != inside)]:
        return f"{key!r} is {stands}. It belongs to {' or '.join(f'[{part}]' for part in homes)}"
    setting = setting_for(key, (parts[inside] if inside else parts)[key])
    return f"{key!r} is {stands}; did you mean {setting}?" if setting else ""


def _named_models(parts: Mapping[str, Any]) -> dict[str, type[BaseModel]]:
    """Returns the settings of the modules that the parts name, or usually name."""
    named = {part: tree["name"] for part, tree in parts.items() if part in REGISTRIES and "name" in (tree or {})}
    known = {part: name for part, name in named.items() if name in names(REGISTRIES[part])}
    return {part: load(REGISTRIES[part], name).Config for part, name in {**USUAL, **known}.items()}


def _group(tree: Any, where: str, records: bool) -> Group:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where} = {tree!r}: a table is expected, with task, data and partition")
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
    """Reads a TOML file or a recipe of the package; None: `QUICKSTART`."""
    return parse(*read_recipe(recipe or QUICKSTART), changes)


def begun(directory: Path) -> str:
    """Returns the recipe of the run in a directory. Raises `RunError` if there is none."""
    file = directory / RECIPE
    if not file.is_file():
        raise RunError(f"{directory} holds no run to resume (no {RECIPE}); name the recipe, or another --out")
    return str(file)


def read_recipe(name: str, kind: str = "recipe", under: str = "") -> tuple[str, str]:
    """Returns the text of a TOML file or of a recipe of the package, and its name for error messages."""
    path, known = Path(name), recipes(under)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise ConfigError(f"no {kind} file {name}. Those of ficpd: {', '.join(known)}")
        if path.suffix.lower() in (*READERS, *COMPRESSED):
            raise ConfigError(
                f"{name} is a table; expected a {kind}, a TOML file. `ficpd init {name}` writes a recipe for it"
            )
        try:
            search_in(path.parent)
            return path.read_text(encoding="utf-8-sig"), path.name
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path.name} is not UTF-8 at byte {error.start}. Save it as UTF-8") from error
    if name not in known:
        raise ConfigError(did_you_mean(kind, name, known) + " (or give a .toml file)")
    file = resources.files("ficpd.experiments") / "recipes" / under / f"{name}.toml"
    return file.read_text(encoding="utf-8"), f"{name}.toml"


def to_toml(experiment: Experiment) -> str:
    """Writes the experiment with all defaults. TOML has no null, so settings that are None are left out."""
    return tomli_w.dumps(_without_none(experiment.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def parse_value(text: str) -> Any:
    """Returns the value of a TOML expression; other text as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def apply_override(tree: dict[str, Any], change: str) -> None:
    """Applies `a.b=c` to `tree`; c is TOML, or else plain text.

    A change of a part's module keeps the settings that the new module has, too. A method begins with its own defaults.
    """
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {change!r}: expected part.key=value, such as method.name=fedavg")
    value, inner = parse_value(text.strip()), tree
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change!r}: {key} is a value, not a part with keys")
    if keys[0] == "privacy" and keys[-1] != "name" and inner.get("name") == "none":
        inner["name"] = RECORD_LEVEL
    if keys[-1] == "name" and len(keys) == 2 and keys[0] in REGISTRIES and inner.get("name") != value:
        kept = _common_settings(keys[0], value, inner)
        inner.clear()
        inner.update(kept)
    inner[keys[-1]] = value


def _common_settings(part: str, name: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the module of this name has, too. An unknown module is named later."""
    if part == "method" or name == "none" or not isinstance(name, str):
        return {}
    with suppress(ConfigError):
        fields = load(REGISTRIES[part], name).Config.model_fields
        return {key: value for key, value in settings.items() if key in fields and key != "name"}
    return {}
