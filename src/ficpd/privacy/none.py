"""No privacy: every record counts as it is, and what a method returns leaves as it is."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ficpd.types import JSON, ClientUpdate


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def build(config: Config) -> "NoPrivacy":
    return NoPrivacy()


class NoPrivacy:
    """Guarantees: none. Batches go through the records epoch by epoch in a new random order each."""

    unit: Literal["none"] = "none"

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: torch.Generator) -> list[Tensor]:
        wanted = steps * expected_batch
        epochs = [torch.randperm(num_records, generator=noise) for _ in range(-(-wanted // num_records))]
        return list(torch.cat(epochs)[:wanted].split(expected_batch))

    def mean(self, values_KB: Tensor, expected_batch: int, noise: torch.Generator) -> Tensor:
        return values_KB.sum(1) / expected_batch

    def release(self, update: ClientUpdate, noise: torch.Generator) -> ClientUpdate:
        return update

    def guarantee(self) -> Mapping[str, JSON]:
        return {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None}
