"""Defines the results of a comparison: `cells/KEY.json` of one run, and `compare.json` of all.

A *cell* is one point of the grid: method, task, partition, budget, sweep, seed. A *setting* is a partition, a budget and a
sweep: it is fixed before methods are compared. A *condition* is a setting on one task. Shares (accuracy, F1) are from 0 to
1; `null`: no value.
"""

from pathlib import Path
from typing import Any, Literal, Self

from ficpd.errors import RunError
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.results import FrozenModel, Interval

COMPARISON = "compare.json"
Sweep = dict[str, Any]
"""`part.key` to value; {} without sweeps."""


class Figures(FrozenModel):
    own: float | None
    """Each client's prompt on its own test records, the mean over clients."""
    everyone: float | None
    """One prompt on all test records; None if the method shares no prompt."""
    worst: float | None
    """The `own` figure of the worst client."""


class BytesOfAll(FrozenModel):
    """The encoded bytes of all clients and rounds."""

    up: int
    down: int
    total: int


class Point(FrozenModel):
    """An evaluated round, and the costs summed from the first round to it."""

    round: int
    own: float | None
    everyone: float | None
    bytes_up: int
    bytes_down: int
    queries: int | None
    seconds: float

    @property
    def bytes(self) -> int:
        return self.bytes_up + self.bytes_down


class RunFigures(FrozenModel):
    """The figures of one run, at its end or at the end of a budget."""

    figures: Figures | None = None
    rounds: int | None = None
    bytes: BytesOfAll | None = None
    queries: int | None = None
    """Candidate prompts times records, summed over all clients; None: not counted."""
    gradients: int | None = None
    """The number of queries with gradients in the whole run."""
    seconds: float | None = None
    """The time of training and aggregation."""
    epsilon: float | None = None
    """The ε spent in the whole run; 0: nothing leaves the clients; None: no guarantee."""
    guarantee: str | None = None
    """The guarantee in a phrase."""
    stopped: str | None = None
    """Why the run ended before its last round."""
    per_client: dict[str, float | None] = {}
    """Each client's own figure at the end of the run."""
    data: str | None = None
    """The SHA-256 of all clients' records, equal in all cells of a condition and seed."""
    curve: list[Point] = []
    """Every evaluated round, and the last one."""


class RunOutcome(RunFigures):
    """The outcome of one run (`cells/KEY.json`)."""

    ficpd: str
    """The version of the package."""
    key: str
    status: Literal["done", "refused", "failed"]
    """`refused`: the method cannot run in this cell."""
    reason: str | None = None
    """The reason for a missing figure."""
    metric: Metric | None = None


class CellResult(RunFigures):
    """A cell of `compare.json`: a run, or its rounds within a budget of bytes or queries."""

    method: str
    task: str
    partition: str
    budget: str
    sweep: Sweep
    seed: int
    status: Literal["done", "refused", "failed", "missing"]
    reason: str | None = None
    key: str
    """The run's folder. Cells with the same run share it."""
    at_round: int | None = None
    """The round of the figures; 0 for a method without rounds."""


class Against(FrozenModel):
    """A method compared with the reference, in pairs of the same seed (and task)."""

    pairs: int
    difference: float | None
    """The mean of method minus reference, in the metric's units."""
    interval: Interval | None
    p: float | None
    """The two-sided p-value; None without a test."""
    p_holm: float | None = None
    """The p-value with Holm's correction over all methods and baselines of the condition or setting."""
    why: str | None
    """The reason for a missing test."""


class Summary(FrozenModel):
    """A method in one condition. Its values are means over seeds."""

    n: int
    """The number of finished seeds."""
    mean: float | None
    sd: float | None
    interval: Interval | None
    """The interval of Student's t, within the metric's bounds; None with fewer than three seeds."""
    everyone: float | None
    worst: float | None
    bytes: float | None
    bytes_up: float | None
    bytes_down: float | None
    queries: float | None
    seconds: float | None
    epsilon: float | None
    against: Against | None
    """None for the reference."""


class Condition(FrozenModel):
    task: str
    partition: str
    budget: str
    sweep: Sweep
    methods: dict[str, Summary]


class MethodRank(FrozenModel):
    rank: float | None
    """The mean over the `ranked` tasks (1: the best); None for baselines and for methods without a figure."""
    against: Against | None
    """The comparison over seeds and tasks; None for the reference."""


class Friedman(FrozenModel):
    statistic: float
    p: float


class Setting(FrozenModel):
    partition: str
    budget: str
    sweep: Sweep
    methods: dict[str, MethodRank]
    ranked: list[str]
    """The tasks in which every ranked method has a figure. Baselines are not ranked."""
    friedman: Friedman | None
    """None for fewer than three methods or two tasks, and for equal figures."""


class FrontPoint(FrozenModel):
    """A point of a front: means over seeds."""

    method: str
    budget: str
    sweep: Sweep
    cost: float
    value: float
    on_front: bool


class Front(FrozenModel):
    """The figures against one cost. Methods without that cost are left out."""

    task: str
    partition: str
    cost: Literal["bytes", "epsilon", "queries"]
    points: list[FrontPoint]


class Reached(FrozenModel):
    """The first evaluated round at or beyond a target, and the costs up to it."""

    seed: int
    round: int
    bytes: int
    bytes_up: int
    bytes_down: int
    queries: int | None
    seconds: float


class MethodTarget(FrozenModel):
    """A method's costs to reach a target: medians over seeds, or None unless all seeds reached it."""

    seeds: list[Reached | None]
    """In the order of `of` (None: the target was not reached)."""
    of: list[int]
    reached: int
    rounds: float | None
    bytes: float | None
    bytes_up: float | None
    bytes_down: float | None
    queries: float | None
    seconds: float | None


class Target(FrozenModel):
    task: str
    partition: str
    budget: str
    sweep: Sweep
    share: float
    """The share of the centralised line's final figure."""
    target: float | None
    """The figure to reach: the mean of the seeds' targets."""
    methods: dict[str, MethodTarget]


class MethodInfo(FrozenModel):
    name: str
    line: bool
    private: bool
    settings: dict[str, Any]
    """The settings that differ from the recipe."""


class TaskInfo(FrozenModel):
    task: str
    backbone: str
    metric: Metric | None
    """None if no cell was finished."""


class BudgetInfo(FrozenModel):
    """The limits of a budget (None: not limited)."""

    epsilon: float | None
    rounds: float | None
    bytes: float | None
    queries: float | None


class ComparisonResult(FrozenModel):
    """The content of `compare.json`. A *line* is a baseline of every comparison: zero_shot, local, centralized."""

    ficpd: str
    name: str
    figure: Literal["own", "everyone"]
    """The compared field of `Figures`."""
    reference: str
    """The method that the others are tested against."""
    lines: list[str]
    confidence: float
    seeds: list[int]
    methods: dict[str, MethodInfo]
    """In the order of the tables."""
    tasks: dict[str, TaskInfo]
    partitions: dict[str, dict[str, Any]]
    """The recipe's section `partition` by label; {}: not changed."""
    budgets: dict[str, BudgetInfo]
    sweeps: dict[str, list[Any]]
    """The values by setting. Sweeps of `method.*` are separate methods, such as "ficpd num_prototypes=5"."""
    cells: list[CellResult]
    conditions: list[Condition]
    settings: list[Setting]
    fronts: list[Front]
    targets: list[Target]
    counts: dict[str, int]
    """The number of cells by status."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a comparison's folder or file. Raises `RunError` if there is none, or if it has another version."""
        file = path / COMPARISON if path.is_dir() else path
        if not file.is_file():
            raise RunError(
                f"{path} holds no comparison ({COMPARISON}); make one with `ficpd compare FILE.toml --out {path}`"
            )
        return cls.read(file)
