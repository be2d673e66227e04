"""A mechanism as `record_gaussian` that keeps its price and breaks its promise: what an audit has to find."""

import math
from typing import Literal

from torch import Tensor

from ficpd.privacy import record_gaussian
from ficpd.privacy.clipping import clipped_sum
from ficpd.privacy.record_gaussian import RecordGaussian
from ficpd.rng import NoiseSource
from ficpd.types import ClientWorkload


class Config(record_gaussian.Config):
    how: Literal["clips_the_mean", "noise_off_by_the_batch"] = "clips_the_mean"


class ClipsTheMean(RecordGaussian):
    """The batch's mean is clipped and not each record, and the noise is that of a clipped record."""

    def noisy_mean(self, values_KB: Tensor, expected_batch: int, noise: NoiseSource, grad_scale=None) -> Tensor:
        mean = values_KB.sum(1) / expected_batch
        clipped = clipped_sum(mean.reshape(1, -1), self.clip_norm)
        return noise.add_gaussian(clipped, self.noise_multiplier * self.clip_norm / expected_batch).view(mean.shape)


class NoiseOffByTheBatch(RecordGaussian):
    """The noise is divided by the batch once for itself and once with the sum."""

    def noisy_mean(self, values_KB: Tensor, expected_batch: int, noise: NoiseSource, grad_scale=None) -> Tensor:
        K, B, *rest = values_KB.shape
        summed = clipped_sum(values_KB.transpose(0, 1).reshape(B, K * math.prod(rest)), self.clip_norm)
        noised = noise.add_gaussian(summed, self.noise_multiplier * self.clip_norm / expected_batch)
        return noised.view(K, *rest) / expected_batch


MECHANISMS = {"clips_the_mean": ClipsTheMean, "noise_off_by_the_batch": NoiseOffByTheBatch}


def build(config: Config, plan: ClientWorkload) -> RecordGaussian:
    sound = record_gaussian.build(config, plan)
    return MECHANISMS[config.how](config, plan, sound.noise_multiplier, sound._statistics, sound._planned)
