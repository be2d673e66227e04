"""Record-level privacy: DP-SGD on the prompt (Abadi et al., CCS 2016, arXiv 1607.00133, algorithm 1).

Each step sees a Poisson sample of a client's records; every record's whole contribution (its gradient, or the vector of
its losses under all K candidates of a zeroth-order query) is clipped to one norm, summed, noised, and divided by the
*expected* batch. All that follows (Adam, projection, averaging, clustering) is post-processing and costs nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from ficpd.errors import PrivacyError
from ficpd.interfaces import TOTAL, NoiseSource
from ficpd.privacy import accountant
from ficpd.privacy import config as settings
from ficpd.privacy.clipping import clipped_sum
from ficpd.types import JSON, ClientUpdate, ClientWorkload, PrivacyCost

RELATION = "one record more or less at one site; how many records a site has is taken as known"


class Config(settings.DPConfig):
    """`statistics`: named totals over a client's records (such as `weight`, its record count) that leave once, each
    with the share of the budget that it may take; the prompt gets the rest. Those that a method releases in every order
    have a share of its own making, unless one is stated here. `clip_norms`: by group, in the place of one `clip_norm` for
    all; found like that where it is open in a federation of several tasks."""

    clip_norms: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default={})
    statistics: dict[str, float] = Field(default={}, description="name to share, each above 0, together below 1")


def build(config: Config, plan: ClientWorkload) -> "RecordGaussian":
    """Raises `PrivacyError` if the shares do not leave the prompt any, or no noise keeps the plan in the budget."""
    shares = {**plan.totals, **config.statistics}
    taken = sum(shares.values())
    if any(not 0 < share < 1 for share in shares.values()) or taken >= 1:
        raise PrivacyError(f"privacy.statistics = {shares}: each share must lie above 0, and together below 1")
    settings.warn_of_delta(config.delta, plan.num_records, "records of a site")

    def statistics(multiplier: float) -> dict[str, PrivacyCost]:
        """A share s of the budget: noise larger by √((1-s_all)/s) than one full-batch prompt release would need, and by √n
        where it leaves n times."""
        whole = multiplier / max(plan.sampling_rate, 1e-6) / max(plan.steps * plan.participations, 1) ** 0.5
        times = {name: max(plan.participations, 1) if name in plan.totals else 1 for name in shares}
        return {
            n: PrivacyCost(n, 1.0, whole * ((1 - taken) / s * times[n]) ** 0.5, times[n]) for n, s in shares.items()
        }

    def priced(multiplier: float) -> list[PrivacyCost]:
        steps = PrivacyCost("prompt", plan.sampling_rate, multiplier, plan.steps * plan.participations)
        return [steps, *statistics(multiplier).values()]

    multiplier = settings.calibrate_noise(config, priced)
    return RecordGaussian(config, plan, multiplier, statistics(multiplier), priced(multiplier))


class RecordGaussian:
    """Guarantees:

    - one record more or less moves what `mean` sums by at most `clip_norm`, jointly over all K candidates, also if its
      values are not finite (`tests/contracts/test_mechanism.py`);
    - the noise on that sum has deviation `noise_multiplier · clip_norm`, and `price("step")` states that multiplier;
    - records join a step independently with probability `sampling_rate`; an empty sample is an ordinary one;
    - the mean divides by the expected batch, never by the number of records that came;
    - the noise on a total has the multiplier that its price states, for rows clipped to norm 1.
    """

    unit: Literal["record"] = "record"

    def __init__(
        self,
        config: Config,
        plan: ClientWorkload,
        multiplier: float,
        totals: Mapping[str, PrivacyCost],
        whole: list[PrivacyCost],
    ):
        self.config, self.plan, self.noise = config, plan, config.noise
        self.noise_multiplier, self.clip_norm = multiplier, settings.clip_norm(config)
        self._totals, self._whole = totals, whole

    def cost(self, door: str) -> PrivacyCost | None:
        if door == "step":
            return PrivacyCost("prompt", self.plan.sampling_rate, self.noise_multiplier)
        total = self._totals.get(door.removeprefix(TOTAL)) if door.startswith(TOTAL) else None
        return total and total._replace(count=1)

    def planned_costs(self) -> Sequence[PrivacyCost]:
        return self._whole

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource) -> list[Tensor]:
        """Raises `PrivacyError` for a rate above the one the noise was chosen for; a lower one costs as much."""
        if expected_batch > self.plan.sampling_rate * num_records * (1 + 1e-9):
            raise PrivacyError(
                f"a batch of {expected_batch} of {num_records} records was asked for; the noise was chosen for a sampling "
                f"rate of {self.plan.sampling_rate:.4g}. A method states its batches in `work`; draw no larger ones"
            )
        return [noise.poisson_sample(num_records, expected_batch / num_records) for _ in range(steps)]

    def noisy_mean(self, values_KB: Tensor, expected_batch: int, noise: NoiseSource) -> Tensor:
        K, B, *rest = values_KB.shape
        rows_BN = values_KB.transpose(0, 1).reshape(B, K * math.prod(rest))
        summed = noise.add_gaussian(clipped_sum(rows_BN, self.clip_norm), self.noise_multiplier * self.clip_norm)
        return summed.view(K, *rest) / expected_batch

    def noisy_sum(self, name: str, values_BN: Tensor, noise: NoiseSource) -> Tensor:
        price = self.cost(TOTAL + name)
        if price is None:
            raise PrivacyError(
                f"the total {name!r} has no share of the budget; give it one: privacy.statistics = {{ {name} = 0.1 }}"
            )
        return noise.add_gaussian(clipped_sum(values_BN, 1.0), price.noise_multiplier)

    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        return update

    def expected_noise_norm_sq(self, size: int) -> None:
        """The multiplier goes by the sampling rate, and that tells how many records there are."""

    def guarantee(self) -> Mapping[str, JSON]:
        return {
            "mechanism": "record_gaussian",
            "unit": "record",
            "neighbouring": RELATION,
            "delta": self.config.delta,
            "budget": self.config.epsilon,
            "clip_norm": self.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "accountant": accountant.describe(),
        }
