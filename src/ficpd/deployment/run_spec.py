"""What a run asks of the sites that take part, as bytes that each of them keeps: all of the experiment that a client's half
depends on, so that a site can carry out orders, and count before the first one what the whole run will cost it."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ficpd import storage
from ficpd.errors import CodecError, ConfigError
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.federation.compression.subspace import GradientSubspace
from ficpd.federation.privacy_plan import client_workloads
from ficpd.federation.rounds import RoundSchedule
from ficpd.interfaces import Backbone, Compression, Subspace, Task
from ficpd.method import Method
from ficpd.registry import build_config
from ficpd.types import MAX_PROMPT_NORM_RATIO, ClientWorkload, Prompt, State


@dataclass(frozen=True)
class RunSpec:
    """`experiment` with every "auto" resolved at the coordinator; `recipe` is the text as it was written, `recipe_name` its
    file. `names`: all clients, because cohorts are drawn from them by a public seed."""

    experiment: Experiment
    recipe: str
    recipe_name: str
    names: Sequence[str]
    schedule: RoundSchedule
    start: Prompt
    coordinates: Subspace | None

    def method(self) -> Method:
        module, config = build_config("methods", self.experiment.method)
        method: Method = module.build(config, self.experiment.training)
        method.bind(self.compression().subspace)
        return method

    def compression(self) -> Compression:
        """The same as the coordinator's: directions that were found there are taken from there."""
        module, config = build_config("compression", self.experiment.compression)
        return module.build(config, self.start, self.schedule.seed, self.coordinates)

    def plan(self, client: str, num_records: int) -> ClientWorkload:
        """What this client will be asked in the whole run."""
        if client not in self.names:
            raise ConfigError(f"the run's terms know no client {client!r}, but {', '.join(sorted(self.names))}")
        return client_workloads(self.method(), State({}), dict.fromkeys(self.names, num_records), self.schedule)[client]


def encode(terms: RunSpec) -> bytes:
    arrays: dict[str, Tensor] = {"start": terms.start.vectors_PD}
    if isinstance(terms.coordinates, GradientSubspace):
        arrays |= {"rows": terms.coordinates.rows, "typical": terms.coordinates.grad_scale}
    facts = {
        "experiment": to_toml(terms.experiment),
        "recipe": terms.recipe,
        "recipe_name": terms.recipe_name,
        "names": list(terms.names),
        "schedule": asdict(terms.schedule),
        "prompt": [terms.start.backbone, terms.start.enters_at, terms.start.head_rows],
    }
    return storage.encode_state(State(arrays, facts), {})


def decode(body: bytes, known: Sequence[str] = ()) -> RunSpec:
    """Raises `CodecError` for anything but whole terms of this version. A module outside the package is loaded only if it is
    `known`: whoever sends terms shall not choose what a site imports."""
    state, _ = storage.decode_state(body)
    facts, arrays = state.facts, state.arrays
    try:
        _check_modules(tomllib.loads(facts["experiment"]), known)
        start = Prompt(arrays["start"], *facts["prompt"])
        coordinates = None
        if "rows" in arrays:
            _check_rows(arrays["rows"], arrays["typical"], start)
            coordinates = GradientSubspace(arrays["rows"], arrays["typical"], tuple(start.vectors_PD.shape))
        experiment = parse(facts["experiment"], "the run's terms", records=False)
        schedule = RoundSchedule(**facts["schedule"])
        return RunSpec(experiment, facts["recipe"], facts["recipe_name"], facts["names"], schedule, start, coordinates)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CodecError(f"these are no terms of this version: {error}") from error


def _check_modules(tree: Mapping[str, Any], known: Sequence[str]) -> None:
    """Everything in the experiment that names a module."""
    tasks = [group.get("task", {}) for group in tree.get("groups", {}).values()]
    parts = [tree.get(part, {}) for part in ("method", "privacy", "compression", "task", "engine")]
    named = [part.get("name") for part in (*parts, *tasks)]
    named += [
        tree.get("training", {}).get("optimizer"),
        tree.get("backbone", {}).get("kind"),
        *tree.get("baselines", ()),
    ]
    for name in named:
        if "." in str(name or "") and name not in known:
            raise ValueError(
                f"{name!r} is a module of somebody's own; a site loads it only if its policy.methods name it"
            )


def _check_rows(rows: Tensor, typical: Tensor, start: Prompt) -> None:
    """A basis that stretched would let more out than the clip norm says."""
    wanted = (len(rows), start.vectors_PD.numel())
    if rows.dim() != 2 or tuple(rows.shape) != wanted or typical.shape != rows.shape[:1]:
        raise ValueError(f"directions of {tuple(rows.shape)} where {wanted} were expected")
    positive = bool((typical > 0).all()) and bool(torch.isfinite(typical).all())
    if not torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-3) or not positive:
        raise ValueError("directions that are not orthonormal, or not of positive length")


def validate_initial_prompt(start: Prompt, task: Task, backbone: Backbone) -> None:
    """Raises `CodecError` for a start that no run on this backbone and task has: one with more or fewer rows of a readout
    would have the site cut its texts elsewhere than it uses them, so that long records fail and tell of themselves; one far
    outside of what the backbone knows is where rounding lets records depend on one another."""
    vectors_PD, enters_at, head_rows = start.vectors_PD, start.enters_at, start.head_rows
    if vectors_PD.dtype != torch.float32 or vectors_PD.dim() != 2 or vectors_PD.shape[1] != backbone.width:
        given = f"{vectors_PD.dtype} {tuple(vectors_PD.shape)}"
        raise CodecError(f"the run's start is {given}, expected float32 rows of {backbone.width}")
    if type(head_rows) is not int or head_rows != task.head_rows or len(vectors_PD) < head_rows:
        raise CodecError(
            f"the run's start says that {head_rows} of its {len(vectors_PD)} rows are a readout, and of this task "
            f"{task.head_rows} are"
        )
    if type(enters_at) is not int or not 0 <= enters_at < backbone.depth:
        raise CodecError(f"the run's prompts enter at layer {enters_at}, expected 0 to {backbone.depth - 1}")
    if not bool(torch.isfinite(vectors_PD).all()):
        raise CodecError("the run's start has numbers that are not finite")
    known_PD = backbone.init_prompt(None, max(start.num_virtual_tokens, 1), enters_at, 0)
    if not Prompt(known_PD, backbone.fingerprint).within_max_norm(vectors_PD):
        raise CodecError(
            f"the run's start is more than {MAX_PROMPT_NORM_RATIO:g} times as long as words of {backbone.name}"
        )


def group_of(client: str, groups: Mapping[str, object]) -> str:
    """The group that a client's name begins with; in a federation of one task there is one without a name."""
    group = client.partition(".")[0]
    return group if group in groups else ""
