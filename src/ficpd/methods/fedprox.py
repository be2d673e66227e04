"""FedProx on prompts (Li et al., MLSys 2020, arXiv 1812.06127): minimises F_k(w) + μ/2 ‖w - w_t‖² (equation 2)."""

from pydantic import Field

from ficpd.federation.aggregation.robust import MEAN, RobustConfig
from ficpd.methods.fedavg import FedAvg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig


class Config(FrozenConfig):
    """proximal_weight: the paper's μ, 0.001 to 1 there."""

    proximal_weight: float = Field(default=0.01, ge=0)
    robust: RobustConfig = MEAN


def build(config: Config, training: LocalTrainingConfig) -> FedAvg:
    return FedProx(training, config.robust, config.proximal_weight)  # ∇F_k(w) + μ(w - w_t)


class FedProx(FedAvg):
    name = "fedprox"
