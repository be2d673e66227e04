"""Defines the schema of a run's result, `result.json`."""

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ficpd import __version__
from ficpd.errors import RunError
from ficpd.evaluation.metrics import Metric, main_metric
from ficpd.library.card import guarantee
from ficpd.storage import atomic_write
from ficpd.types import JSON

FILE = "result.json"
Scores = dict[str, float]
"""By metric: `accuracy`, `f1`, `rmse`, ...; shares are 0..1."""
Interval = tuple[float, float]
"""Low and high end, at 95 %."""


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Reads a JSON file. Raises `RunError` if it cannot be read, or is of another version."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{file} cannot be read: {error}. Delete it and run the same command again") from error
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RunError(
                f"{file} is of another version than this ficpd {__version__} ({where}: {first['msg']}). Make it anew"
            ) from error

    def write(self, file: Path) -> Path:
        return atomic_write(file, json.dumps(self.model_dump(), indent=1) + "\n")


class BackboneInfo(FrozenModel):
    name: str
    fingerprint: str
    dtype: str
    attention: str
    enters_at: int
    """The layer that the prompt enters at; -1: LoRA weights of all layers."""


class NumRecords(FrozenModel):
    train: int
    test: int


class Metrics(FrozenModel):
    """Scores at the end of a simulation."""

    global_prompt: Scores | None
    """One prompt on all test records, mean over tasks; None if the method shares no prompt."""
    per_client: dict[str, Scores]
    """Each client's prompt on its own test records."""
    per_client_mean: Scores
    """The mean over clients, each counting once."""
    per_client_worst: Scores
    """Each metric of the client with the worst score in it."""
    zero_shot: Scores | None
    """The frozen backbone without a prompt, on all test records."""
    distilled: Scores | None = None
    """The distilled prompt on all test records."""
    test_records: dict[str, int] = {}
    """The number of each client's test records."""
    sample: Scores | None = None
    """The last point of the curve, on `federation.evaluate_records` test records; None if there is no curve of them."""


class Bytes(FrozenModel):
    """Sizes of the encoded messages."""

    up_per_client_round: float
    down_per_client_round: float
    up_total: int
    down_total: int
    run_spec_per_client: int = 0
    """Real sites: the run's settings, sent to each site once."""


class Seconds(FrozenModel):
    """Seconds of wall time."""

    train: float
    aggregate: float
    evaluate: float = 0.0

    @property
    def total(self) -> float:
        return self.train + self.aggregate + self.evaluate


class Clusters(FrozenModel):
    """The prototype of each client, for methods with prototypes."""

    member: dict[str, int]
    number: int
    adjusted_rand: dict[str, float | None]
    """Adjusted Rand index against each public column of the clients; 1: the same groups."""


class LevelScores(FrozenModel):
    """One level of the prompts; means over clients."""

    own: Scores | None
    """On the client's own test records."""
    others: Scores | None
    """On test records of other clusters, or of other clients where there is one cluster."""


class UnseenClients(FrozenModel):
    """Clients that took no part, on their own test records; means over clients."""

    global_prompt: Scores | None
    assigned: Scores | None
    """With the prompt that the method assigns to their cards."""


class ClientSpread(FrozenModel):
    """One metric over the clients."""

    clients: int
    mean: float
    mean_interval: Interval | None
    deviation: float | None
    """With n - 1; None of one client."""
    worst: float
    worst_client: str
    worst_tenth: float
    """The mean of the worst tenth of the clients, rounded up to whole clients."""
    worst_tenth_interval: Interval | None
    best: float


class WorseOff(FrozenModel):
    """Clients with a lower score than under the baseline `local`, by one metric."""

    clients: int
    worse: list[str]
    share: float
    interval: Interval


class GroupScore(FrozenModel):
    records: int
    accuracy: float
    interval: Interval


class Gap(FrozenModel):
    """The largest gap of a rate between two groups."""

    gap: float
    label: JSON = None
    among: str | None = None
    """Equalised odds: the records that the rate is over."""
    between: tuple[str, str]
    """The group with the higher rate first."""
    records: tuple[int, int]
    interval: Interval | None
    """None for fewer than ten records, or if all are alike."""


class GroupGaps(FrozenModel):
    """Gaps between the groups of a public column, in one task."""

    groups: dict[str, GroupScore]
    few: list[str] = []
    """Groups of fewer than ten records."""
    said: str | None = None
    """Why there are no gaps."""
    accuracy: Gap | None = None
    demographic_parity: Gap | None = None
    equalised_odds: Gap | None = None


class Fairness(FrozenModel):
    clients: dict[str, ClientSpread]
    """By metric."""
    worse_off_than_local: dict[str, WorseOff] = {}
    """By metric; empty without the baseline `local`."""
    column: str | None = None
    """`fairness.group` of the experiment."""
    groups: dict[str, GroupGaps] = {}
    """By task."""


class Distillation(FrozenModel):
    """The server's distillation of the prototypes."""

    how: str
    writer: str
    examples: dict[str, str]
    """By group, the number of synthetic examples that were kept."""
    memorised: dict[str, int]
    """By group, the number of examples that copy a training record."""
    gained: bool
    """False: the global prompt is kept."""
    loss_before: float | None = None
    loss_after: float | None = None


class LedgerLine(FrozenModel):
    """Equal releases of the client that spent most."""

    name: str
    releases: int
    sampling_rate: float
    noise_multiplier: float
    epsilon_alone: float
    """The ε of these releases without the others."""
    share: float
    """The part of the sum of `epsilon_alone` over all lines."""


class PrivacyReport(FrozenModel):
    """The guarantee of the run, and its privacy cost."""

    mechanism: str
    unit: str
    """`record`, `subject`, `client` or `none`."""
    epsilon: float | None
    """The cost of the client that spent most; 0: the clients release nothing; None: no guarantee."""
    delta: float | None
    noise: str | None = None
    """`simulated` (from the experiment's seed), `cryptographic`, or `each site's own`."""
    noise_multiplier: tuple[float | None, float | None] | None = None
    """The least and the largest of all members."""
    neighbouring: str | None = None
    max_records_per_subject: int | None = None
    """Records of a subject in a step, where the unit is a subject."""
    replace_epsilon: float | None = None
    """The cost for one unit replaced by another; `epsilon` is for one unit more or less."""
    group_epsilon: dict[int, float] = {}
    """By number of records: the cost for somebody with so many. Only where the unit is a record."""
    budget: float | None = None
    """The configured ε; None if only the noise was configured."""
    clip_norm: float | None = None
    accountant: str | None = None
    site_that_spent_most: str | None = None
    epsilon_of_sites: dict[str, float] = {}
    lines: list[LedgerLine] = []
    rehearsed: list[str] = []
    """Real sites whose noise comes from a seed in their file, so that it can be taken off."""
    at_most: bool = False
    """Real sites: `epsilon` is the agreed bound; each site's cost is in its own ledger."""

    @property
    def guarantee(self) -> str:
        """Returns the guarantee in one phrase."""
        return guarantee(self.model_dump())


class ClientQueries(FrozenModel):
    forward: int
    gradient: int


class Queries(FrozenModel):
    """The clients' queries: one candidate prompt on one record counts one."""

    forward: int
    gradient: int
    per_client: dict[str, ClientQueries]
    per_client_most: int
    per_client_round: float
    budget_per_client: int | None
    """`federation.max_queries` of the experiment."""


class RunResult(FrozenModel):
    """`result.json` of a run directory. Real sites leave the fields of simulations None or empty."""

    method: str
    label: str
    """The method's name in tables."""
    backbone: BackboneInfo
    task: str
    num_clients: int
    num_records: NumRecords | None = None
    num_rounds: int
    """Completed rounds."""
    seed: int
    metrics: Metrics | None = None
    shared_scores: dict[str, dict[str, Scores]] = {}
    """Real sites: by site and prompt, the scores that its policy shares."""
    bytes: Bytes
    seconds: Seconds
    dropped_updates: int
    """Updates that failed the checks."""
    excluded_updates: dict[str, int] = {}
    """By client, the rounds in which a robust rule excluded or clipped its update."""
    underfilled_means: dict[str, int] = {}
    """By mean, the rounds in which it had fewer updates than the robust rule needs."""
    compression: dict[str, JSON]
    settings: dict[str, JSON] = {}
    """All settings of the method, its defaults too."""
    clusters: Clusters | None = None
    personalization: dict[str, LevelScores] | None = None
    """By level: `personal`, `cluster`, `global`."""
    unseen_clients: UnseenClients | None = None
    fairness: Fairness | None = None
    distillation: Distillation | None = None
    privacy: PrivacyReport
    queries: Queries | None = None
    stopped: str | None = None
    """Why the run ended before its last round."""
    machine: dict[str, JSON]
    versions: dict[str, str]

    @property
    def main(self) -> Metric:
        """Returns the metric that tables show. Only for results with `metrics`."""
        return main_metric(self.scores.per_client_mean)

    @property
    def scores(self) -> Metrics:
        """Returns the scores of a simulation. Raises `RunError` for real sites, which keep their scores."""
        if self.metrics is None:
            raise RunError(f"the run of {self.method} has no scores: real sites keep theirs")
        return self.metrics

    @classmethod
    def load(cls, run_directory: Path) -> Self:
        """Reads a finished run. Raises `RunError` if there is none, or if it is of another version."""
        file = Path(run_directory) / FILE
        if not file.exists():
            begun = (file.parent / "experiment.toml").exists()
            what = "has not finished; go on with it (--resume)" if begun else "holds no run"
            raise RunError(f"{run_directory} {what}. Give the directory of a finished run (--out of `ficpd run`)")
        return cls.read(file)

    def save(self, run_directory: Path) -> Path:
        return self.write(Path(run_directory) / FILE)
