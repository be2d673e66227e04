"""No privacy: every record counts as it is, and what a method returns leaves as it is."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.interfaces import Noise
from ficpd.types import JSON, ClientUpdate, Plan, Spend


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config, plan: Plan) -> "NoPrivacy":
    return NoPrivacy()


class NoPrivacy:
    """Guarantees: none. Batches go through the records epoch by epoch in a new random order each."""

    unit: Literal["none"] = "none"
    noise: Literal["simulated"] = "simulated"

    def price(self, door: str) -> Spend | None:
        return None

    def planned(self) -> Sequence[Spend]:
        return []

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: Noise) -> list[Tensor]:
        return in_epochs(num_records, expected_batch, steps, noise)

    def mean(self, values_KB: Tensor, expected_batch: int, noise: Noise) -> Tensor:
        return values_KB.sum(1) / expected_batch

    def total(self, name: str, values_BN: Tensor, noise: Noise) -> Tensor:
        return values_BN.sum(0)

    def release(self, update: ClientUpdate, noise: Noise) -> ClientUpdate:
        return update

    def noise_on(self, size: int) -> float:
        return 0.0

    def guarantee(self) -> Mapping[str, JSON]:
        return {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None}


def in_epochs(num_records: int, expected_batch: int, steps: int, noise: Noise) -> list[Tensor]:
    """Batches of `expected_batch` that go through all records before any comes again."""
    wanted = steps * expected_batch
    epochs = [noise.shuffled(num_records) for _ in range(-(-wanted // num_records))]
    return list(torch.cat(epochs)[:wanted].split(expected_batch))
