"""Defines the results of a comparison: `cells/KEY.json` of one run, and `compare.json` of all.

A *cell* is one point of the grid: method, task, partition, budget, sweep, seed. A *setting* is partition, budget and sweep
together: all that a researcher fixes before comparing methods. A *condition* is a setting on one task. Shares (accuracy, F1)
are 0..1; `null` means that there is none.
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
    """The worst client's own."""


class BytesOfAll(FrozenModel):
    """Bytes of all clients and rounds, as encoded."""

    up: int
    down: int
    total: int


class Point(FrozenModel):
    """An evaluated round, and the sums from the first round on."""

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
    """Candidate prompts times records, of all clients; None if they were not counted."""
    gradients: int | None = None
    """How many queries of the whole run asked for a gradient."""
    seconds: float | None = None
    """Training and aggregation."""
    epsilon: float | None = None
    """Spent in the whole run; 0: nothing leaves the clients; None: no guarantee."""
    guarantee: str | None = None
    """The same in words."""
    stopped: str | None = None
    """Why the run ended before its last round."""
    per_client: dict[str, float | None] = {}
    """Each client's own figure at the end of the run."""
    data: str | None = None
    """SHA-256 of who holds which records: equal in all cells of one condition and seed."""
    curve: list[Point] = []
    """Every evaluated round, the last one included."""


class RunOutcome(RunFigures):
    """`cells/KEY.json`."""

    ficpd: str
    """The version of the package."""
    key: str
    status: Literal["done", "refused", "failed"]
    """`refused`: the method cannot run in this cell."""
    reason: str | None = None
    """Why there is no figure."""
    metric: Metric | None = None


class CellResult(RunFigures):
    """A cell of `compare.json`: a run, or its rounds within the budget of bytes or queries."""

    method: str
    task: str
    partition: str
    budget: str
    sweep: Sweep
    seed: int
    status: Literal["done", "refused", "failed", "missing"]
    reason: str | None = None
    key: str
    """The run's folder; cells that ask for the same run share it."""
    at_round: int | None = None
    """The round of the figures; 0 for a method without rounds."""


class Against(FrozenModel):
    """A method against the reference, in pairs of the same seed (and task)."""

    pairs: int
    difference: float | None
    """Mean of method minus reference, in the metric's own units."""
    interval: Interval | None
    p: float | None
    """Two-sided."""
    p_holm: float | None = None
    """After Holm's correction over the methods of the condition or setting, baselines too."""
    why: str | None
    """Why there is no test."""


class Summary(FrozenModel):
    """A method in one condition; means over seeds."""

    n: int
    """Finished seeds."""
    mean: float | None
    sd: float | None
    interval: Interval | None
    """Student's t, within the metric's bounds; None below three seeds."""
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
    """The mean over tasks, 1 the best; None if a task lacks the method."""
    against: Against | None
    """Over seeds and tasks; None for the reference."""


class Friedman(FrozenModel):
    statistic: float
    p: float


class Setting(FrozenModel):
    partition: str
    budget: str
    sweep: Sweep
    methods: dict[str, MethodRank]
    ranked: list[str]
    """The tasks where every ranked method has a figure; baselines are not ranked."""
    friedman: Friedman | None
    """None of fewer than three methods or two tasks."""


class FrontPoint(FrozenModel):
    """Means over seeds."""

    method: str
    budget: str
    sweep: Sweep
    cost: float
    value: float
    on_front: bool


class Front(FrozenModel):
    """The figure against one cost. Methods without that cost are left out."""

    task: str
    partition: str
    cost: Literal["bytes", "epsilon", "queries"]
    points: list[FrontPoint]


class Reached(FrozenModel):
    """The first evaluated round at or beyond a target, and the sums up to it."""

    seed: int
    round: int
    bytes: int
    bytes_up: int
    bytes_down: int
    queries: int | None
    seconds: float


class MethodTarget(FrozenModel):
    """The costs are medians over seeds if all of them reached the target, else None."""

    seeds: list[Reached | None]
    """In the order of `of`; None: not reached."""
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
    """Share of the centralised line's final figure."""
    target: float | None
    """The mean over seeds of the figure to reach; each seed has its own."""
    methods: dict[str, MethodTarget]


class MethodInfo(FrozenModel):
    name: str
    line: bool
    private: bool
    settings: dict[str, Any]
    """Settings that differ from the recipe."""


class TaskInfo(FrozenModel):
    task: str
    backbone: str
    metric: Metric | None
    """None if no cell was finished."""


class BudgetInfo(FrozenModel):
    """None: not limited."""

    epsilon: float | None
    rounds: float | None
    bytes: float | None
    queries: float | None


class ComparisonResult(FrozenModel):
    """`compare.json`. A *line* is a method that is always there: zero_shot, local, centralized (without privacy)."""

    ficpd: str
    name: str
    figure: Literal["own", "everyone"]
    """Which of `Figures` is compared."""
    reference: str
    """The method that the others are tested against."""
    lines: list[str]
    confidence: float
    seeds: list[int]
    methods: dict[str, MethodInfo]
    """In the order of the tables."""
    tasks: dict[str, TaskInfo]
    partitions: dict[str, dict[str, Any]]
    """As in the recipe; {}: the task's own."""
    budgets: dict[str, BudgetInfo]
    sweeps: dict[str, list[Any]]
    """Sweeps of `method.*` are methods of their own, such as "ficpd num_prototypes=5"."""
    cells: list[CellResult]
    conditions: list[Condition]
    settings: list[Setting]
    fronts: list[Front]
    targets: list[Target]
    counts: dict[str, int]
    """Cells by status."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a comparison's folder, or the file itself. Raises `RunError` if it is none, or of another version."""
        file = path / COMPARISON if path.is_dir() else path
        if not file.is_file():
            raise RunError(
                f"{path} holds no comparison ({COMPARISON}); make one with `ficpd compare FILE.toml --out {path}`"
            )
        return cls.read(file)
