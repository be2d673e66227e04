"""Settings of all mechanisms with a guarantee, and the choice of noise from them."""

import warnings
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ficpd.errors import PrivacyError, PrivacyWarning
from ficpd.privacy import accountant
from ficpd.registry import FrozenConfig
from ficpd.types import PrivacyCost


class DPConfig(FrozenConfig):
    """epsilon: the budget. Without `noise_multiplier`, the least noise is used that keeps the planned run within it.
    delta: the probability without guarantee; less than 1/n for n records (subjects, clients).
    noise_multiplier: alone it sets no budget, and the result states the cost. With both, the run ends with the budget.
    clip_norm: the L2 norm that one unit's contribution is clipped to. None: calibrated without private records, from
        gradients on synthetic texts at the record level, from the learning rate at the client level.
    noise: "simulated" reproduces from the experiment's seed; real sites use "cryptographic".
    exact: at real sites no record may change another record's values by rounding (`QueryEngine`).
    """

    exact: ClassVar[bool] = True
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

    @model_validator(mode="after")
    def _computable(self) -> "DPConfig":
        """Refuses budgets that the accountant cannot compute, before data or weights load."""
        accountant.check_range("delta", self.delta, accountant.DELTAS)
        if self.noise_multiplier is not None and self.noise_multiplier > accountant.MULTIPLIERS[1]:
            accountant.check_range("noise_multiplier", self.noise_multiplier, accountant.MULTIPLIERS)
        if self.epsilon is not None and self.noise_multiplier is None:
            accountant.check_range("epsilon", self.epsilon, accountant.EPSILONS)
        return self


def calibrate_noise(config: DPConfig, costs: Callable[[float], Sequence[PrivacyCost]]) -> float:
    """Returns the configured noise multiplier, or the least that keeps `costs(multiplier)` within the budget."""
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    assert config.epsilon is not None, "one of both is given"
    return accountant.calibrate(config.epsilon, config.delta, costs)


def warn_of_delta(delta: float, units: int, what: str) -> None:
    """Warns of a δ so large that publishing one whole record at random would satisfy it."""
    if units and delta > 1 / units:
        warnings.warn(
            f"privacy.delta = {delta:g} is larger than 1/{units} {what}: a mechanism that publishes one of them "
            f"whole would satisfy it; set delta below {0.1 / units:.0e}",
            PrivacyWarning,
            stacklevel=2,
        )


def clip_norm(config: DPConfig) -> float:
    """Returns the clip norm, which initialization has set. Raises `PrivacyError` if it is still open."""
    if config.clip_norm is None:
        raise PrivacyError("privacy.clip_norm is open; state it (the norm that a record's gradient is clipped to)")
    return config.clip_norm
