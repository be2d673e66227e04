"""Record-level privacy of a sum over sites that share its noise: the distributed discrete Gaussian mechanism.

Kairouz, Liu and Steinke, ICML 2021, arXiv 2102.06387. A site's clipped sum is rounded to a grid of `GRID` steps a clip norm,
and the site adds its share of the noise. A single term has too little noise, so it may leave the site only under the masks
of `federation/secure_sum`. Of n invited sites, `max_lost` may drop out and `max_colluding` may show the server their terms.
The noise of the others equals that of the whole sum: a site's share is 1/√(n - lost - colluding) of one site's full noise.

All steps of an assignment are taken at the prompt sent, because a step must not be used before it is summed.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ficpd.errors import PrivacyError
from ficpd.privacy import record_gaussian
from ficpd.rng import NoiseSource
from ficpd.types import JSON, ClientWorkload

SHARED = "shared_gaussian"
"""This module's name in the registry."""
GRID = 1 << 20
"""Grid steps in one clip norm."""
MOST = 1 << 62
"""Largest sum in grid steps; the ring of masks has 2^64 elements."""
LARGEST_GAP = 1e-12
"""Largest `sum_gap`, per number of a release."""
GRADIENT = "gradient"
"""Name of the summed gradients in a secure sum."""


class Config(record_gaussian.Config):
    """least_records: the minimum number of records (subjects) of every site, for which batches and noise are planned.
        Public, because all sites must add the same noise. None: the minimum of a simulation's clients.
    max_lost: sites of a round that may drop out. With more, the round is void. None: a tenth.
    max_colluding: sites that may share all they know with the server. None: a third.
    """

    least_records: int | None = Field(default=None, ge=1)
    max_lost: int | None = Field(default=None, ge=0)
    max_colluding: int | None = Field(default=None, ge=0)


class Tolerance(NamedTuple):
    """Numbers of sites in a round: `invited`, at most `lost`, and at most `colluding` with the server."""

    invited: int
    lost: int
    colluding: int

    @property
    def least(self) -> int:
        """Returns the number of sites that must answer, and of shares that restore a site's secret."""
        return self.invited - self.lost

    @property
    def honest(self) -> int:
        """Returns the number of sites whose noise counts."""
        return self.least - self.colluding


def tolerance(config: Config, invited: int) -> Tolerance:
    """Raises `PrivacyError` unless two sites are honest, and only one set of answers can be unmasked.

    Two sets of `least` sites have 2 · least - n sites in common. One of these must be honest, because an honest site
    signs one set only (Bonawitz et al., CCS 2017, theorem 6.5).
    """
    lost = invited // 10 if config.max_lost is None else config.max_lost
    colluding = invited // 3 if config.max_colluding is None else config.max_colluding
    found = Tolerance(invited, lost, colluding)
    if 2 * found.least - invited <= colluding or found.honest < 2:
        raise PrivacyError(
            f"privacy.max_lost = {lost} and privacy.max_colluding = {colluding} of {invited} sites in a round: expected "
            f"2 · max_lost + max_colluding below {invited}, and two sites more than both together. Set them lower, or "
            "invite more sites (federation.clients_per_round)"
        )
    return found


def sum_gap(deviation: float, sites: int) -> float:
    """Bounds the log ratio between the sum of `sites` discrete Gaussians and one discrete Gaussian, per number.

    `deviation`: of one site, in grid steps. arXiv 2102.06387, theorem 1: τ = 10 Σ_k exp(-2π² σ² k/(k+1)), k from 1 to n-1.
    """
    return 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, sites))


def build(config: Config, plan: ClientWorkload) -> "SharedGaussian":
    """Raises `PrivacyError` for a site with fewer than `least_records`, and for statistics that stay at a site."""
    least = config.least_records or plan.num_units
    if plan.num_units < least:
        raise PrivacyError(
            f"privacy.least_records = {least}: expected at most the records of every site, and this one has fewer. Lower it"
        )
    if unknown := sorted(config.statistics.keys() - plan.once.keys()):
        raise PrivacyError(
            f"privacy.statistics.{unknown[0]}: a secure sum adds up gradients and the method's own totals only. Leave it "
            "out, or use privacy.name = 'record_gaussian'"
        )
    batch = min(round(plan.sampling_rate * plan.num_units), least)
    rounds = plan.participations if plan.most_participations is None else plan.most_participations
    public = replace(plan, sampling_rate=batch / least, participations=rounds)
    allowed = tolerance(config, round(plan.cohort_rate * plan.num_clients))
    multiplier, statistics, costs = record_gaussian.planned(config, public)
    found = SharedGaussian(config, public, multiplier, statistics, costs)
    found.tolerance, found.public_units = allowed, least
    found.check_grid()
    return found


class SharedGaussian(record_gaussian.RecordGaussian):
    """Guarantees (`tests/privacy/test_shared_gaussian.py`):

    - one record more or less moves a term of N rounded numbers by at most GRID + √N grid steps;
    - the noise of any `tolerance.honest` sites together has the multiplier that `cost` states, for that sensitivity;
    - the sum of their noises differs from one discrete Gaussian by at most `LARGEST_GAP` a number, else `build` refuses;
    - the multiplier is the same at all sites, so it does not reveal a site's number of records;
    - a sum over all invited sites cannot exceed the ring's range.
    """

    summed = True
    tolerance: Tolerance

    @property
    def expected_batch(self) -> int:
        """Returns the expected number of records (subjects) in a step, the same at all sites."""
        return round(self.plan.sampling_rate * (self.public_units or 1))

    def tolerance_of(self, invited: int) -> Tolerance:
        """Returns the tolerance of a round with this number of sites. The lost and colluding stay the same."""
        return self.tolerance._replace(invited=invited)

    def check_grid(self) -> None:
        """Raises `PrivacyError` for a grid too coarse for its noise, or sums beyond the ring."""
        allowed, largest = self.tolerance, self.tolerance.invited * self.plan.num_units * max(self.plan.steps, 1)
        deviation = self._deviation(self.noise_multiplier, 1)
        if sum_gap(deviation, allowed.honest) > LARGEST_GAP:
            raise PrivacyError(
                f"privacy.noise_multiplier = {self.noise_multiplier:g} leaves each site a deviation of {deviation:.3g} grid "
                "steps, and the sum of such noises is no Gaussian. Raise it, or lower epsilon"
            )
        if largest * GRID + 10 * deviation * allowed.invited > MOST:
            raise PrivacyError(
                f"{largest} records in one sum may leave the ring's range, at most {MOST // GRID} fit. Invite fewer sites"
            )

    def noisy_mean(
        self, values_KB: Tensor, expected_batch: int, noise: NoiseSource, grad_scale: Tensor | None = None,
        subject_B: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Makes this site's noised term of the sum, in grid steps: [K, B, ...] to int64 [K, ...]."""
        summed, _ = self._clipped_mean_sum(values_KB, grad_scale, subject_B)
        term = self._term(summed / self.clip_norm, self.noise_multiplier, noise)
        return term.view(len(values_KB), *values_KB.shape[2:])

    def noisy_sum(
        self, name: str, chunks: Iterable[Tensor], noise: NoiseSource, subject_B: Tensor | None = None
    ) -> Tensor:
        """Makes this site's term of a statistic, in grid steps: chunks of [b, N] to int64 [N]."""
        summed = self._clipped_statistic(name, chunks, noise, subject_B)
        return self._term(summed, self._statistic_cost(name).noise_multiplier, noise)

    def noise_share(self, name: str, size: int, noise: NoiseSource) -> Tensor:
        """Draws this site's noise in a sum that its records are not part of, int64 [size]."""
        return noise.add_discrete_gaussian(torch.zeros(size, dtype=torch.int64), self.deviation_of(name, size))

    def deviation_of(self, name: str, size: int) -> float:
        """Returns the deviation of one site's share in `GRADIENT`, all steps together, or in a statistic."""
        if name == GRADIENT:
            return self._deviation(self.noise_multiplier, size) * max(self.plan.steps, 1) ** 0.5
        return self._deviation(self._statistic_cost(name).noise_multiplier, size)

    def _term(self, summed: Tensor, multiplier: float, noise: NoiseSource) -> Tensor:
        whole = (summed.cpu() * GRID).round().to(torch.int64)
        return noise.add_discrete_gaussian(whole, self._deviation(multiplier, whole.numel()))

    def _deviation(self, multiplier: float, size: int) -> float:
        """Returns noise multiplier times sensitivity, divided among the honest sites."""
        return multiplier * (GRID + math.sqrt(size)) / math.sqrt(self.tolerance.honest)

    def guarantee(self) -> Mapping[str, JSON]:
        allowed = self.tolerance
        return {
            **super().guarantee(),
            "mechanism": f"shared_gaussian (a secure sum over {allowed.invited} sites; it holds against the server and up "
            f"to {allowed.colluding} of them together, with up to {allowed.lost} lost)",
        }
