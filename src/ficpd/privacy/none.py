"""No privacy: sums records and sends updates without clip and noise."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ficpd.interfaces import Mechanism, NoiseSource, ReleaseKind
from ficpd.privacy.clipping import rescale
from ficpd.registry import FrozenConfig
from ficpd.types import JSON, ClientUpdate, ClientWorkload, PrivacyCost, Prompt, Query


class Config(FrozenConfig):
    exact: ClassVar[bool] = False


def build(config: Config, plan: ClientWorkload) -> "NoPrivacy":
    return NoPrivacy()


class NoiselessRecords(Mechanism):
    """Samples and averages records without clip and noise, for mechanisms whose unit is not the record."""

    def sample(
        self, num_records: int, expected_batch: int, steps: int, noise: NoiseSource, subject_B: Tensor | None = None
    ) -> list[Tensor]:
        """Draws batches of `expected_batch`. All records are drawn before any is drawn again."""
        wanted = steps * expected_batch
        epochs = [noise.permutation(num_records) for _ in range(-(-wanted // num_records))]
        return list(torch.cat(epochs)[:wanted].split(expected_batch))

    def bound_query(self, query: Query, start: Prompt) -> Query:
        return query

    def noisy_mean(
        self, values_KB: Tensor, expected_batch: int, noise: NoiseSource, grad_scale: Tensor | None = None,
        subject_B: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Averages with the scaling of the noisy means, so that both round alike."""
        scaled_KB, scale = rescale(values_KB, grad_scale)
        return (scaled_KB.sum(1) / expected_batch).cpu() / scale


class NoPrivacy(NoiselessRecords):
    """Guarantees: none. Each epoch goes through all records, in a new random order."""

    unit = "none"
    noise = "simulated"

    def cost(self, kind: ReleaseKind, name: str = "") -> PrivacyCost | None:
        return None

    def planned_costs(self) -> Sequence[PrivacyCost]:
        return []

    def noisy_sum(
        self, name: str, chunks: Iterable[Tensor], noise: NoiseSource, subject_B: Tensor | None = None
    ) -> Tensor:
        return torch.stack([chunk.sum(0) for chunk in chunks]).sum(0)

    def privatize_update(self, update: ClientUpdate, noise: NoiseSource) -> ClientUpdate:
        return update

    def expected_noise_norm_sq(self, size: int) -> float:
        return 0.0

    def guarantee(self) -> Mapping[str, JSON]:
        return {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None}
