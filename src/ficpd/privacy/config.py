"""What all mechanisms with a guarantee have in common: the settings that state it, and how noise is chosen from them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ficpd.errors import PrivacyError, PrivacyWarning
from ficpd.privacy import accountant
from ficpd.types import PrivacyCost


class DPConfig(BaseModel):
    """`epsilon`: the budget; without `noise_multiplier` the noise is the least that keeps the planned run within it.
    `noise_multiplier` alone: the run costs what it costs, and says so; with both, the run ends where the budget does.
    `clip_norm`: the L2 norm that one unit's contribution is clipped to. None: found without any record, for the record
    level from gradients on made-up texts, for the client level from the learning rate.
    `noise`: "simulated" reproduces from the experiment's seed; "cryptographic" is what a real site uses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    noise_multiplier: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    noise: Literal["simulated", "cryptographic"] = "simulated"

    @model_validator(mode="after")
    def _stated(self) -> "DPConfig":
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("state epsilon (the budget, such as 2) or noise_multiplier, or both")
        return self


def calibrate_noise(config: DPConfig, priced: Callable[[float], Sequence[PrivacyCost]]) -> float:
    """The noise multiplier that was given, or the least that keeps `priced(multiplier)` within the budget."""
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    assert config.epsilon is not None, "one of both is given"
    return accountant.calibrate(config.epsilon, config.delta, priced)


def warn_of_delta(delta: float, units: int, what: str) -> None:
    """Warns with the reason where δ is so large that publishing one whole record at random would satisfy it."""
    if units and delta > 1 / units:
        warnings.warn(
            f"privacy.delta = {delta:g} is larger than 1/{units} {what}: a mechanism that publishes one of them "
            f"whole would satisfy it; set delta below {0.1 / units:.0e}",
            PrivacyWarning,
            stacklevel=2,
        )


def clip_norm(config: DPConfig) -> float:
    """The clip norm, which whoever built the world has filled in by now. Raises `PrivacyError` if nobody did."""
    if config.clip_norm is None:
        raise PrivacyError("privacy.clip_norm is open; state it (the norm that a record's gradient is clipped to)")
    return config.clip_norm
