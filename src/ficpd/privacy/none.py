"""No privacy: every record counts as it is, and what a method returns leaves as it is."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.interfaces import NoiseSource
from ficpd.types import JSON, ClientUpdate, ClientWorkload, PrivacyCost


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config, plan: ClientWorkload) -> "NoPrivacy":
    return NoPrivacy()


class NoPrivacy:
    """Guarantees: none. Batches go through the records epoch by epoch in a new random order each."""

    unit: Literal["none"] = "none"
    noise: Literal["simulated"] = "simulated"

    def cost(self, door: str) -> PrivacyCost | None:
        return None

    def planned_costs(self) -> Sequence[PrivacyCost]:
        return []

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource) -> list[Tensor]:
        return shuffled_epochs(num_records, expected_batch, steps, noise)

    def noisy_mean(self, values_KB: Tensor, expected_batch: int, noise: NoiseSource) -> Tensor:
        return values_KB.sum(1) / expected_batch

    def noisy_sum(self, name: str, values_BN: Tensor, noise: NoiseSource) -> Tensor:
        return values_BN.sum(0)

    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        return update

    def expected_noise_norm_sq(self, size: int) -> float:
        return 0.0

    def guarantee(self) -> Mapping[str, JSON]:
        return {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None}


def shuffled_epochs(num_records: int, expected_batch: int, steps: int, noise: NoiseSource) -> list[Tensor]:
    """Batches of `expected_batch` that go through all records before any comes again."""
    wanted = steps * expected_batch
    epochs = [noise.permutation(num_records) for _ in range(-(-wanted // num_records))]
    return list(torch.cat(epochs)[:wanted].split(expected_batch))
