"""Expands a comparison's TOML file to the cells of its grid, each with a complete experiment."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ficpd.errors import ConfigError, PrivacyError, did_you_mean
from ficpd.experiments.comparison import overrides
from ficpd.experiments.comparison.overrides import DEFAULT, REFERENCE_METHODS, Piece, Sweeps
from ficpd.experiments.config import QUICKSTART, Experiment, FederationConfig, build, read_recipe, read_tree, to_toml
from ficpd.federation.build import make_method
from ficpd.federation.privacy_plan import privacy_config_for
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig, validate

AXES = ("methods", "tasks", "partitions", "budgets")
SHARED_SECTIONS = {"backbone", "task", "data", "partition", "groups", "seed", "fairness", "metrics", "engine"}


class ComparisonConfig(FrozenConfig):
    """The settings of a comparison file, without its axes.

    evaluate_every: the rounds between two points of a curve. Targets and budgets of bytes and queries use the curve.
    targets: shares of the centralised line's figure, from 0 to 1.
    """

    name: str
    recipe: str = QUICKSTART
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    reference: str | None = None
    figure: Literal["own", "everyone"] = "own"
    targets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.9, 0.95, 0.99)
    sweeps: tuple[str, ...] = ()
    evaluate_every: int = Field(default=1, ge=1)

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len({*seeds}) < len(seeds):
            raise ValueError("a seed is given twice; give each once")
        return seeds


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    limits: the budget's bytes and queries, if any.
    hash: names the run. Cells with the same run have the same hash.
    ground: names the records and the backbone. Cells of one ground can share them in memory."""

    method: str
    task: str
    partition: str
    budget: str
    sweep: Mapping[str, Any]
    seed: int
    experiment: Experiment
    limits: Mapping[str, float]
    hash: str
    ground: str

    @property
    def condition(self) -> tuple[str, str, str, str]:
        return self.task, self.partition, self.budget, json.dumps(self.sweep, sort_keys=True)

    @property
    def readable(self) -> str:
        """Returns a folder name for the run, valid on any file system."""
        swept = map(overrides.format_value, self.sweep.values())
        labels = [self.task, self.partition, self.budget, *swept, self.method]
        words = [re.sub(r"[^A-Za-z0-9=.]+", "_", label).strip("_.")[:24] for label in labels if label != DEFAULT]
        return "-".join([*filter(None, words), f"s{self.seed}", self.hash])


@dataclass(frozen=True)
class Grid:
    """A comparison's cells. `text`: the file. `methods`: all methods, with baselines and variants of sweeps."""

    spec: ComparisonConfig
    text: str
    methods: Mapping[str, Piece]
    axes: Mapping[str, Mapping[str, Piece]]
    sweeps: Sweeps
    cells: list[Cell] = field(repr=False)

    @property
    def reference(self) -> str:
        """Returns the method that the others are tested against. If it is swept, this is its first variant."""
        found = _referred(self.spec.reference, self.methods)
        assert found is not None, "the file was checked"
        return found


def _referred(given: str | None, methods: Iterable[str]) -> str | None:
    """
    >>> _referred("a", ["local", "a k=1", "a k=2"]), _referred("a", ["a b", "a"]), _referred(None, ["local", "b"])
    ('a k=1', 'a', 'b')
    """
    named = [label for label in methods if label == given or (given is None and label not in REFERENCE_METHODS)]
    return next(iter(named or [label for label in methods if label.startswith(f"{given} ")]), None)


def read_plan(name: str, ablate: Sequence[str] = ()) -> Grid:
    """Expands a TOML file, or a comparison of the package by name."""
    return expand(*read_recipe(name, "comparison", "compare"), ablate, Path(name).parent)


def expand(text: str, where: str, ablate: Sequence[str] = (), beside: Path | None = None) -> Grid:
    """Returns the grid with all cells. Raises `ConfigError` for the first invalid cell, before any run.

    `where`: the file's name, for errors. Paths of recipes are relative to the last argument."""
    tree = read_tree(text, where)
    spec: ComparisonConfig = validate(
        ComparisonConfig, {key: value for key, value in tree.items() if key not in AXES}, where
    )
    axes = {axis: overrides.validate_overrides(axis, tree.get(axis, {}), where) for axis in AXES}
    if not axes["methods"].keys() - REFERENCE_METHODS.keys():
        raise ConfigError(
            f"{where}: methods is missing, or names only the baselines that are always added; name others, such "
            "as [methods.fedavg]"
        )
    sweeps = overrides.parsed_sweeps([*spec.sweeps, *ablate])
    methods = overrides.methods_of(axes["methods"], sweeps, where)
    if _referred(spec.reference, methods) is None:
        raise ConfigError(f"{where}: {did_you_mean('reference', str(spec.reference), methods)}")
    axes = {axis: entries or {DEFAULT: {}} for axis, entries in axes.items() if axis != "methods"}
    beyond = {path: values for path, values in sweeps.items() if not path.startswith("method.")}
    cells = _cells(spec, axes, methods, beyond, where, beside)
    beside_it = f"# with --ablate {' '.join(ablate)}\n" if ablate else ""
    return Grid(spec, beside_it + text, methods, axes, beyond, cells)


def _cells(
    spec: ComparisonConfig, axes: Mapping[str, Mapping[str, Piece]], methods: Mapping[str, Piece], sweeps: Sweeps,
    where: str, beside: Path | None,
) -> list[Cell]:  # fmt: skip
    points = [dict(zip(sweeps, values, strict=True)) for values in product(*sweeps.values())]
    found = []
    for (task, of_task), (part, of_part), (budget, of_budget) in product(*(axes[a].items() for a in AXES[1:])):
        base, recipe = overrides.load_base(of_task.get("recipe", spec.recipe), spec.set, beside)
        tree = overrides.with_budget(overrides.with_partition(overrides.with_task(base, of_task), of_part), of_budget)
        budgeted = {key: of_budget[key] for key in ("bytes", "queries") if key in of_budget}
        for point, seed, (method, of_method) in product(points, spec.seeds, methods.items()):
            at = ", ".join([method, *(x for x in (task, part, budget) if x != DEFAULT), *map(str, point.values())])
            experiment = _experiment(tree, spec, point, seed, of_method, f"{where}, cell {at} on {recipe}")
            limits = {} if method in REFERENCE_METHODS else budgeted  # lines have no communication to limit
            experiment = canonical_experiment(experiment)
            shared = experiment.model_dump(mode="json", include=SHARED_SECTIONS)
            federation = experiment.federation
            apart = {"drawn": federation.unseen_clients, "named": federation.unseen}
            ground = json.dumps(shared | {"apart": apart}, sort_keys=True)
            names = [hashlib.sha256(text.encode()).hexdigest()[:10] for text in (to_toml(experiment), ground)]
            found.append(Cell(method, task, part, budget, point, seed, experiment, limits, *names))
    return found


def _experiment(
    tree: dict[str, Any], spec: ComparisonConfig, point: Mapping[str, Any], seed: int, of_method: Piece, where: str
) -> Experiment:
    """Applies the method's piece, the sweep and the common settings to the recipe, in this order."""
    tree = {key: part for key, part in tree.items() if key != "method"}
    tree = overrides.merge(tree, {key: part for key, part in of_method.items() if key != "private"})
    tree = overrides.with_sweep(tree, point)
    if not of_method.get("private", True):
        tree["privacy"] = {"name": "none"}
    tree |= {"seed": seed, "baselines": []}
    built = build(
        overrides.merge(tree, {"federation": {"evaluate_every": spec.evaluate_every, "evaluate_records": 0}}), where
    )
    if built.engine.name == "flower":
        raise ConfigError(
            f'{where}: engine.name = "flower" is for real sites, and a comparison is a simulation; leave it out'
        )
    return built


def canonical_experiment(experiment: Experiment) -> Experiment:
    """Drops the settings that the method does not use. Cells that differ only in those share a run."""
    method = make_method(experiment.method, experiment.training)
    try:
        privacy = dict(privacy_config_for(method, experiment.privacy))
    except PrivacyError:  # the run will raise it
        privacy = experiment.privacy
    update: dict[str, Any] = {"privacy": privacy}
    if experiment.method["name"] == "zero_shot":
        apart = experiment.federation.model_dump(include={"unseen", "unseen_clients"})
        federation = FederationConfig(num_rounds=0, **apart)
        update |= {"training": LocalTrainingConfig(), "federation": federation}
        update |= {"compression": Experiment.model_fields["compression"].default}
    return experiment.model_copy(update=update)
