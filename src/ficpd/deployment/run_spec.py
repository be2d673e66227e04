"""The specification of a run, which the coordinator sends to each site once and the site stores.

It has all parts of the experiment that a client needs. With it, a site executes assignments and computes the privacy cost
of the whole run before the first assignment.
"""

import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ficpd import storage
from ficpd.backbones.lora import lora_of
from ficpd.backbones.vocabulary import validate_ids
from ficpd.data.subjects import UnitCounts
from ficpd.errors import BackboneError, CodecError, ConfigError
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.federation.compression.subspace import GradientSubspace
from ficpd.federation.method import Method
from ficpd.federation.privacy_plan import client_workloads
from ficpd.federation.rounds import RoundSchedule
from ficpd.interfaces import Backbone, Compression, Subspace, Task
from ficpd.privacy.shared_gaussian import SHARED
from ficpd.registry import build_config
from ficpd.tasks.build import build_task
from ficpd.types import LORA, MAX_PROMPT_NORM_RATIO, ClientWorkload, Prompt, State

MAX_CLIENTS = 10_000
"""The maximum number of names in a spec. A site samples each round's cohort from all of them."""
MAX_NUMBER = 2**63 - 1
MAX_TEXT, MAX_PARTS = 256 << 10, 20
"""The maximum characters of an experiment and parts of a dotted key: the parser's time grows with their square."""
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![\w-]){_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{MAX_PARTS},}}")


@dataclass(frozen=True)
class RunSpec:
    """The settings of a run.

    experiment: the experiment, with every "auto" resolved by the coordinator.
    recipe, recipe_name: the recipe's original text and file name.
    names: all clients. A public seed samples cohorts from them.
    coordinates: the coordinator's gradient subspace, if any.
    """

    experiment: Experiment
    recipe: str
    recipe_name: str
    names: Sequence[str]
    schedule: RoundSchedule
    start: Prompt
    coordinates: Subspace | None

    def digest(self) -> str:
        """Returns a hash of all settings of the noise plan. Sites of a secure sum sign it, so that all agree."""
        told = [to_toml(self.experiment), list(self.names), asdict(self.schedule)]
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def method(self) -> Method:
        module, config = build_config("methods", self.experiment.method)
        method: Method = module.build(config, self.experiment.training)
        method.bind(self.compression().subspace)
        return method

    def tasks(self, own: Sequence[Task]) -> Sequence[Task]:
        """Returns the method's tasks: a site's own, or all if every site plans the same noise."""
        groups = self.experiment.all_groups.values()
        return [build_task(one.task) for one in groups] if self.experiment.privacy["name"] == SHARED else own

    def compression(self) -> Compression:
        """Builds the coordinator's compression with its computed directions."""
        module, config = build_config("compression", self.experiment.compression)
        return module.build(config, self.start, self.schedule.seed, self.coordinates)

    def plan(self, client: str, counts: UnitCounts, method: Method) -> ClientWorkload:
        """Returns a client's planned workload in the whole run. Raises `ConfigError` for an unknown client."""
        if client not in self.names:
            raise ConfigError(f"unknown client {client!r}; the run's spec has {', '.join(sorted(self.names))}")
        return client_workloads(method, State({}), dict.fromkeys(self.names, counts), self.schedule)[client]


def encode(spec: RunSpec) -> bytes:
    arrays: dict[str, Tensor] = {"start": spec.start.vectors_PD}
    if isinstance(spec.coordinates, GradientSubspace):
        arrays |= {"rows": spec.coordinates.rows, "grad_scale": spec.coordinates.grad_scale}
    facts = {
        "experiment": to_toml(spec.experiment),
        "recipe": spec.recipe,
        "recipe_name": spec.recipe_name,
        "names": list(spec.names),
        "schedule": asdict(spec.schedule),
        "prompt": [spec.start.backbone, spec.start.enters_at, spec.start.head_rows],
    }
    return storage.encode_state(State(arrays, facts), {})


def decode(body: bytes, known: Sequence[str] = ()) -> RunSpec:
    """Decodes a run spec. Raises `CodecError` for an invalid one, or one of another version.

    Loads a module outside the package only if it is in `known`: a server must not choose a site's imports.
    """
    state, _ = storage.decode_state(body)
    facts, arrays = state.facts, state.arrays
    try:
        _check_texts(facts["experiment"], facts["recipe"], facts["recipe_name"])
        _check_modules(tomllib.loads(facts["experiment"]), known)
        start = Prompt(arrays["start"], *facts["prompt"])
        coordinates = None
        if "rows" in arrays:
            _check_rows(arrays["rows"], arrays["grad_scale"], start)
            coordinates = GradientSubspace(arrays["rows"], arrays["grad_scale"], tuple(start.vectors_PD.shape))
        experiment = parse(facts["experiment"], "the run's spec", records=False)
        names = _checked_names(facts["names"])
        schedule = _checked_schedule(facts["schedule"], len(names))
        return RunSpec(experiment, facts["recipe"], facts["recipe_name"], names, schedule, start, coordinates)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, ConfigError) as error:
        raise CodecError(f"not a run spec of this version: {error}") from error


def _check_texts(*texts: Any) -> None:
    """Raises `ValueError` for untrusted texts that are too long to parse, or have too long keys."""
    for text in texts:
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise ValueError(f"its texts have at most {MAX_TEXT} characters")
        if _LONG_KEY.search(text):
            raise ValueError(f"a key of its experiment has more than {MAX_PARTS} parts")


def _check_modules(tree: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises `ValueError` if the experiment names a module outside the package that is not in `known`."""
    tasks = [group.get("task", {}) for group in tree.get("groups", {}).values()]
    parts = [tree.get(part, {}) for part in ("method", "privacy", "compression", "task", "engine")]
    named = [part.get("name") for part in (*parts, *tasks, *tree.get("metrics", ()))]
    named += [tree.get("training", {}).get("optimizer"), tree.get("backbone", {}).get("kind")]
    baselines = tree.get("baselines", ())
    named += [] if baselines == "auto" else baselines
    for name in named:
        if "." in str(name or "") and name not in known:
            raise ValueError(
                f"{name!r} is a module outside the package; a site loads it only if its policy.methods name it"
            )


def _checked_names(names: Any) -> list[str]:
    """Returns the clients' names, if valid. Invented clients would lower the sampling rate, and so a sum's cost."""
    named = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not named or not 1 <= len(names) <= MAX_CLIENTS or len(set(names)) < len(names):
        given = f"{len(names)} names" if isinstance(names, list) else repr(names)
        raise ValueError(f"names are {given}, expected 1 to {MAX_CLIENTS} different ones")
    return names


def _checked_schedule(facts: Any, clients: int) -> RoundSchedule:
    """Returns the schedule, if valid. Each of its numbers is part of a cost, so each is checked."""
    schedule = RoundSchedule(**facts)
    expected = {
        "num_rounds": (int, 1, MAX_NUMBER),
        "cohort": (int, 1, clients),
        "seed": (int, 0, MAX_NUMBER),
        "max_norm": (float, sys.float_info.min, sys.float_info.max),
        "everyone_first": (bool, False, True),
        "everyone_last": (bool, False, True),
        "accept_late": (int, 0, MAX_NUMBER),
    }
    for name, (kind, least, most) in expected.items():
        value = getattr(schedule, name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or not least <= value <= most:
            raise ValueError(
                f"schedule.{name} is {value!r}, expected {least:g} to {most:g}, of type {kind.__name__}. Send the schedule "
                "that the coordinator made"
            )
    return schedule


def _check_rows(rows: Tensor, grad_scale: Tensor, start: Prompt) -> None:
    """Raises `ValueError` unless the basis is orthonormal. Only then the clip norm bounds the sensitivity."""
    wanted = (len(rows), start.vectors_PD.numel())
    if len(rows) > wanted[1]:
        raise ValueError(f"directions are {tuple(rows.shape)}, expected at most {(wanted[1], wanted[1])}")
    if rows.dim() != 2 or tuple(rows.shape) != wanted or grad_scale.shape != rows.shape[:1]:
        raise ValueError(f"directions are {tuple(rows.shape)}, expected {wanted}")
    positive = bool((grad_scale > 0).all()) and bool(torch.isfinite(grad_scale).all())
    if not torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-3) or not positive:
        raise ValueError("directions are not orthonormal, or not of positive scale")


def validate_initial_prompt(start: Prompt, task: Task, backbone: Backbone, prompt_type: str = "soft") -> None:
    """Raises `CodecError` if the initial prompt has another type (`Capabilities`), or does not fit backbone and task.

    A wrong number of head rows would change where texts are truncated; long records would then fail, which leaks their
    length. With numbers far outside the backbone's range, rounding would make records depend on each other.
    """
    vectors_PD, enters_at, head_rows = start.vectors_PD, start.enters_at, start.head_rows
    kind = "tokens" if not vectors_PD.is_floating_point() else "lora" if enters_at == LORA else "soft"
    if kind != prompt_type:
        raise CodecError(f"the initial prompt is of type {kind!r}, expected the method's {prompt_type!r}")
    if kind == "tokens":
        _validate_words(start, backbone)
        return
    if vectors_PD.dtype != torch.float32 or vectors_PD.dim() != 2 or vectors_PD.shape[1] != backbone.width:
        given = f"{vectors_PD.dtype} {tuple(vectors_PD.shape)}"
        raise CodecError(f"the initial prompt is {given}, expected float32 rows of {backbone.width}")
    if type(head_rows) is not int or head_rows != task.head_rows or len(vectors_PD) < head_rows:
        raise CodecError(
            f"the initial prompt has {head_rows} head rows of {len(vectors_PD)} rows, expected {task.head_rows}"
        )
    if type(enters_at) is not int or enters_at not in (LORA, *range(backbone.depth)):
        raise CodecError(f"the run's prompts enter at layer {enters_at}, expected 0 to {backbone.depth - 1}")
    if not bool(torch.isfinite(vectors_PD).all()):
        raise CodecError("the initial prompt has numbers that are not finite")
    if enters_at == LORA:
        known_PD = _lora_start(vectors_PD[: len(vectors_PD) - head_rows], backbone)
    else:
        known_PD = backbone.init_prompt(None, max(start.num_virtual_tokens, 1), enters_at, 0)
    if not Prompt(known_PD, backbone.fingerprint).within_max_norm(vectors_PD):
        raise CodecError(
            f"the initial prompt is more than {MAX_PROMPT_NORM_RATIO:g} times as long as words of {backbone.name}"
        )


def _lora_start(rows_PD: Tensor, backbone: Backbone) -> Tensor:
    """Returns LoRA weights of the same rank. Raises `CodecError` for weights of another model."""
    try:
        adapters = lora_of(backbone)
        return adapters.start(adapters.rank(rows_PD), 0)
    except BackboneError as error:
        raise CodecError(f"the initial weights: {error}") from error


def _validate_words(start: Prompt, backbone: Backbone) -> None:
    """Raises `CodecError` unless the initial prompt is token ids [P, 1] of the backbone's vocabulary, at layer 0."""
    ids, words = start.vectors_PD, backbone.vocabulary
    if words is None or ids.dtype != torch.int64 or ids.shape != (start.num_virtual_tokens, 1) or start.head_rows:
        raise CodecError(
            f"the initial prompt is {ids.dtype} {tuple(ids.shape)} with {start.head_rows} head rows, expected float32 rows "
            f"of {backbone.width}" + ("" if words is None else ", or int64 ids in one column without head rows")
        )
    if type(start.enters_at) is not int or start.enters_at != 0:
        raise CodecError(f"the run's prompts of words enter at layer {start.enters_at}, expected 0")
    try:
        validate_ids(ids, words.size)
    except BackboneError as error:
        raise CodecError(f"the initial prompt: {error}") from error


def group_of(client: str, groups: Mapping[str, object]) -> str:
    """Returns the group at the beginning of a client's name; "" without a known group."""
    group = client.partition(".")[0]
    return group if group in groups else ""
