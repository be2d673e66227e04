"""Record-level privacy: DP-SGD on the prompt (Abadi et al., CCS 2016, arXiv 1607.00133, algorithm 1).

If the data name subjects, the unit is a subject with all its records at one site. Subjects are sampled, and a
subject's records are summed and clipped as one contribution (user-level sampling: Chua et al., arXiv 2406.14322).

Each step sees a Poisson sample of a client's records. Every record's contribution is clipped to one norm: its gradient,
or the vector of its losses under all K candidates of a zeroth-order query. The sum is noised and divided by the
*expected* batch. All later steps (Adam, projection, averaging, clustering) are post-processing and cost nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ficpd.errors import PrivacyError
from ficpd.interfaces import Mechanism, NoiseSource, ReleaseKind
from ficpd.privacy import accountant, clipping
from ficpd.privacy import config as settings
from ficpd.types import JSON, ClientUpdate, ClientWorkload, PrivacyCost, Prompt, Query

RELATION = "one record more or less at one site; how many records a site has is taken as known"
OF_SUBJECTS = "all records of one subject more or less at one site; how many subjects a site has is taken as known"


class Config(settings.DPConfig):
    """statistics: named sums over a client's records (such as `weight`, its record count), with shares of the budget. The
        prompt gets the rest. A statistic that the method declares has the method's share unless one is set here.
    clip_norms: one clip norm per group, in place of `clip_norm`; the default with several tasks.
    max_records_per_subject: maximum records of one subject in a step or a statistic. They are drawn at random each
        time. It bounds memory and seconds; the guarantee does not depend on it. Batch sizes are in subjects.
    """

    clip_norms: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default={})
    statistics: dict[str, float] = Field(default={}, description="name to share, each above 0, together below 1")
    max_records_per_subject: int = Field(default=8, ge=1)


def build(config: Config, plan: ClientWorkload) -> "RecordGaussian":
    """Raises `PrivacyError` if the statistics take the whole budget, or no noise keeps the plan within it."""
    return RecordGaussian(config, plan, *planned(config, plan))


def planned(config: Config, plan: ClientWorkload) -> tuple[float, dict[str, PrivacyCost], list[PrivacyCost]]:
    """Returns the noise multiplier of a step, the costs of the statistics by name, and all costs of the plan.

    A client that is never invited is planned as if it took part once.
    """
    shares = {**plan.totals, **plan.once, **config.statistics}
    taken = sum(shares.values())
    if any(not 0 < share < 1 for share in shares.values()) or taken >= 1:
        raise PrivacyError(f"privacy.statistics = {shares}: each share must lie above 0, and together below 1")
    participations = max(plan.participations, 1)
    what = "records of a site" if plan.num_subjects is None else "subjects of a site"
    settings.warn_of_delta(config.delta, plan.num_units, what)

    def statistics(multiplier: float) -> dict[str, PrivacyCost]:
        """Returns the noise of a statistic of share s: √((1-s_all)/s) times that of one full-batch release.

        n releases of it need √n times that noise.
        """
        whole = multiplier / max(plan.sampling_rate, 1e-6) / max(plan.steps * participations, 1) ** 0.5
        times = {name: participations if name in plan.totals else 1 for name in shares}
        return {
            n: PrivacyCost(n, 1.0, whole * ((1 - taken) / s * times[n]) ** 0.5, times[n]) for n, s in shares.items()
        }

    def costs(multiplier: float) -> list[PrivacyCost]:
        count = plan.steps * participations
        steps = [PrivacyCost("prompt", plan.sampling_rate, multiplier, count)] if count else []
        return [*steps, *statistics(multiplier).values()]

    multiplier = settings.calibrate_noise(config, costs)
    return multiplier, statistics(multiplier), costs(multiplier)


class RecordGaussian(Mechanism):
    """Guarantees:

    - one record more or less moves the sum in `noisy_mean` by at most `clip_norm`, jointly over all K candidates; values
      that are not finite do not change this (`tests/contracts/test_mechanism.py`);
    - the noise on that sum has deviation `noise_multiplier · clip_norm`, and `cost(STEP)` states that multiplier;
    - records join a step independently with probability `sampling_rate`; an empty sample is valid;
    - the mean divides by the expected batch, never by the number of records in the sample;
    - the noise on a statistic has the multiplier that its cost states, for rows clipped to norm 1.

    With `subjects` the same holds for a subject instead of a record. In `noisy_mean` and `noisy_sum` all its records join
    together or not at all, at most `max_records_per_subject` of them. Their sum is clipped as one row. Values without
    stated subjects are refused (`tests/contracts/test_subject_unit.py`).
    """

    unit = "record"

    def __init__(
        self, config: Config, plan: ClientWorkload, multiplier: float, statistics: Mapping[str, PrivacyCost],
        planned: list[PrivacyCost],
    ):  # fmt: skip
        self.config, self.plan, self.noise = config, plan, config.noise
        self.noise_multiplier, self.clip_norm = multiplier, settings.clip_norm(config)
        self._statistics, self._planned = statistics, planned
        self.subjects = plan.num_subjects is not None

    def cost(self, kind: ReleaseKind, name: str = "") -> PrivacyCost | None:
        if kind == ReleaseKind.STEP:
            return PrivacyCost("prompt", self.plan.sampling_rate, self.noise_multiplier)
        if kind == ReleaseKind.STATISTIC and name in self._statistics:
            return self._statistics[name]._replace(count=1)
        return None

    def planned_costs(self) -> Sequence[PrivacyCost]:
        return self._planned

    def sample(
        self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource, subject_B: Tensor | None = None
    ) -> list[Tensor]:
        """Draws the records of each step. Raises `PrivacyError` for a rate above the planned one."""
        self._check_subjects(subject_B, num_records)
        units = num_records if subject_B is None else len(subject_B.unique())
        if expected_batch > self.plan.sampling_rate * units * (1 + 1e-9):
            what = "records" if subject_B is None else "subjects"
            raise PrivacyError(
                f"a batch of {expected_batch} of {units} {what} exceeds the planned sampling rate of "
                f"{self.plan.sampling_rate:.4g}. State the batch size in `local_workload`"
            )
        drawn = [noise.poisson_sample(units, expected_batch / units) for _ in range(steps)]
        if subject_B is None:
            return drawn
        groups = _places_by_subject(subject_B)
        return [self._records_of([groups[i] for i in rows.tolist()], noise) for rows in drawn]

    def _records_of(self, groups: Sequence[Tensor], noise: NoiseSource) -> Tensor:
        """Returns the indices [b] of these subjects' records, at most `max_records_per_subject` drawn of each."""
        most = self.config.max_records_per_subject
        kept = [own if len(own) <= most else own[noise.permutation(len(own))[:most]] for own in groups]
        return torch.cat([torch.zeros(0, dtype=torch.long), *kept])

    def _check_subjects(self, subject_B: Tensor | None, num_records: int) -> None:
        if self.subjects != (subject_B is not None):
            stated, planned = ("no", "") if subject_B is None else ("their", "no ")
            raise PrivacyError(
                f"the plan has {planned}subjects, and the records come with {stated} subjects: state both or none"
            )
        if subject_B is not None and len(subject_B) != num_records:
            raise PrivacyError(f"{len(subject_B)} subjects were stated of {num_records} records, one each was expected")

    def bound_query(self, query: Query, start: Prompt) -> Query:
        return clipping.clip_query(query, start)

    def noisy_mean(
        self, values_KB: Tensor, expected_batch: int, noise: NoiseSource, grad_scale: Tensor | None = None,
        subject_B: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        summed, scale = self._clipped_mean_sum(values_KB, grad_scale, subject_B)
        noised = noise.add_gaussian(summed, self.noise_multiplier * self.clip_norm)
        return noised.view(len(values_KB), *values_KB.shape[2:]) / expected_batch / scale

    def _clipped_mean_sum(
        self, values_KB: Tensor, grad_scale: Tensor | None, subject_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the clipped sum over units, float64 [K·N], and the factors of `rescale`."""
        K, B, *rest = values_KB.shape
        self._check_subjects(subject_B, B)
        scaled_KB, scale = clipping.rescale(values_KB, grad_scale)
        rows_BN = scaled_KB.transpose(0, 1).reshape(B, K * math.prod(rest))
        if subject_B is not None:
            rows_BN = clipping.sum_by_subject(rows_BN, subject_B)
        return clipping.clipped_sum(rows_BN, self.clip_norm), scale

    def noisy_sum(
        self, name: str, chunks: Iterable[Tensor], noise: NoiseSource, subject_B: Tensor | None = None
    ) -> Tensor:
        summed = self._clipped_statistic(name, chunks, noise, subject_B)
        return noise.add_gaussian(summed, self._statistic_cost(name).noise_multiplier)

    def _statistic_cost(self, name: str) -> PrivacyCost:
        if (cost := self.cost(ReleaseKind.STATISTIC, name)) is None:
            raise PrivacyError(
                f"the statistic {name!r} has no share of the budget. Give it one: privacy.statistics = {{ {name} = 0.1 }}"
            )
        return cost

    def _clipped_statistic(
        self, name: str, chunks: Iterable[Tensor], noise: NoiseSource, subject_B: Tensor | None
    ) -> Tensor:
        """Returns the sum of a statistic's rows, float64 [N], each unit clipped to norm 1."""
        self._check_subjects(subject_B, 0 if subject_B is None else len(subject_B))
        self._statistic_cost(name)
        if subject_B is None:
            return torch.stack([clipping.clipped_sum(chunk, 1.0) for chunk in chunks]).sum(0)
        kept_B = torch.zeros(len(subject_B), dtype=torch.bool)
        kept_B[self._records_of(_places_by_subject(subject_B), noise)] = True
        return clipping.clipped_subject_sum(chunks, subject_B, kept_B, 1.0)

    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        return update

    def expected_noise_norm_sq(self, size: int) -> None:
        """Returns None: the multiplier depends on the sampling rate, and so on the number of records."""

    def guarantee(self) -> Mapping[str, JSON]:
        return {
            "mechanism": "record_gaussian",
            "unit": "subject" if self.subjects else "record",
            "neighbouring": OF_SUBJECTS if self.subjects else RELATION,
            "delta": self.config.delta,
            "budget": self.config.epsilon,
            "clip_norm": self.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "accountant": accountant.describe(),
            **({"max_records_per_subject": self.config.max_records_per_subject} if self.subjects else {}),
        }


def _places_by_subject(subject_B: Tensor) -> Sequence[Tensor]:
    """Returns the ascending indices of each subject's records, in ascending order of subjects."""
    counts = subject_B.unique(return_counts=True)[1]
    return subject_B.argsort(stable=True).split(counts.tolist())
