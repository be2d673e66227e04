"""Client-level privacy: all of one client's records together are the unit (McMahan et al., ICLR 2018, arXiv 1710.06963).

`local`: each update carries noise enough on its own, so nobody has to be trusted (the seed design's mechanism). With few
clients it drowns what they learned. `central`: clients clip, and the server, which sees the clipped updates and is trusted
to add the noise, adds it once to their sum over a Poisson cohort.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ficpd.errors import PrivacyError
from ficpd.interfaces import NoiseSource
from ficpd.privacy import accountant
from ficpd.privacy import config as settings
from ficpd.privacy.clipping import clipped_sum
from ficpd.privacy.none import shuffled_epochs
from ficpd.types import JSON, ClientUpdate, ClientWorkload, PrivacyCost

RELATION = {
    "local": "all records of one client replaced by any others; who takes part is known",
    "central": "one client more or less; how many there are is taken as known",
}


class Config(settings.DPConfig):
    placement: Literal["local", "central"] = "local"


def build(config: Config, plan: ClientWorkload) -> "ClientGaussian":
    """Raises `PrivacyError` if no noise keeps the plan within the budget, or it has totals: they are of records."""
    if plan.totals:
        raise PrivacyError(
            f"the method's clients release totals over their records ({', '.join(plan.totals)}), which client-level privacy "
            "has no noise for; use privacy.name = 'record_gaussian'"
        )
    settings.warn_of_delta(config.delta, plan.num_clients, "clients")

    def priced(multiplier: float) -> list[PrivacyCost]:
        if config.placement == "central":
            return [PrivacyCost("sum", plan.cohort_rate, multiplier, plan.num_rounds)]
        return [PrivacyCost("update", 1.0, multiplier, plan.participations)]

    multiplier = settings.calibrate_noise(config, priced)
    return ClientGaussian(config, multiplier, priced(multiplier))


class ClientGaussian:
    """Guarantees:

    - what leaves has an L2 norm of at most `clip_norm` over all its arrays, before any noise; an update with a value that
      is not finite counts zero (`tests/contracts/test_mechanism.py`);
    - local: the noise on it has deviation `noise_multiplier · 2 clip_norm`: two clips are the distance between any two
      clients' updates;
    - central: nothing is added here, and `server.central` adds `noise_multiplier · clip_norm` to every sum;
    - the weight that leaves is 1.
    """

    unit: Literal["client"] = "client"

    def __init__(self, config: Config, multiplier: float, whole: list[PrivacyCost]):
        self.config, self.noise, self.clip_norm = config, config.noise, settings.clip_norm(config)
        self.noise_multiplier, self._whole = multiplier, whole

    def cost(self, door: str) -> PrivacyCost | None:
        wanted = "sum" if self.config.placement == "central" else "release"
        return self._whole[0]._replace(count=1) if door == wanted else None

    def planned_costs(self) -> Sequence[PrivacyCost]:
        return self._whole

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource) -> list[Tensor]:
        return shuffled_epochs(num_records, expected_batch, steps, noise)

    def noisy_mean(self, values_KB: Tensor, expected_batch: int, noise: NoiseSource) -> Tensor:
        return values_KB.sum(1) / expected_batch

    def noisy_sum(self, name: str, values_BN: Tensor, noise: NoiseSource) -> Tensor:
        raise PrivacyError(
            f"client-level privacy has no release for the total {name!r}; leave it out, or use record_gaussian"
        )

    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        names = sorted(update.arrays)
        if not names:
            return ClientUpdate(update.client, {})
        flat = clipped_sum(torch.cat([update.arrays[name].flatten() for name in names])[None], self.clip_norm)
        flat = flat.float().cpu()
        if self.config.placement == "local":
            flat = noise.add_gaussian(flat, self.noise_multiplier * 2 * self.clip_norm)
        parts = flat.split([update.arrays[name].numel() for name in names])
        arrays = {name: part.view(update.arrays[name].shape) for name, part in zip(names, parts, strict=True)}
        return ClientUpdate(update.client, arrays)

    def expected_noise_norm_sq(self, size: int) -> float:
        """Participations are public, and so is the multiplier. Central: none on any one update."""
        local = self.config.placement == "local"
        return size * (self.noise_multiplier * 2 * self.clip_norm) ** 2 if local else 0.0

    def guarantee(self) -> Mapping[str, JSON]:
        placement = self.config.placement
        return {
            "mechanism": f"client_gaussian ({placement})",
            "unit": "client",
            "neighbouring": RELATION[placement],
            "delta": self.config.delta,
            "budget": self.config.epsilon,
            "clip_norm": self.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "accountant": accountant.describe(),
        }
