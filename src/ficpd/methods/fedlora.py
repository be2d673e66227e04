"""FedAvg on LoRA weights, a baseline for prompts (Hu et al., ICLR 2022, arXiv 2106.09685).

A and B are averaged separately (as in FedIT, Zhang et al., 2023, arXiv 2305.05644), not the products B A. They
replace the prompt, so they are tuned, clipped, noised and sent as one. `training.learning_rate` and
`privacy.clip_norm` are not used; the clip norm is calibrated anew.
"""

from dataclasses import replace

import torch
from pydantic import Field

from ficpd.backbones import lora
from ficpd.federation.aggregation.robust import RobustConfig
from ficpd.interfaces import Backbone
from ficpd.methods.fedavg import FedAvg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig
from ficpd.types import LORA, Prompt


class Config(FrozenConfig):
    """rank: of the change of each query and value projection. Its scale alpha/rank is `lora.SCALE`.
    learning_rate: Adam's, our choice; it decays by `training.decay`."""

    rank: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    robust: RobustConfig = RobustConfig()


def build(config: Config, training: LocalTrainingConfig) -> "FedLora":
    return FedLora(config, training)


class FedLora(FedAvg):
    name, array = "fedlora", "weights"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training.model_copy(update={"learning_rate": config.learning_rate}), config.robust)
        self.rank = config.rank
        self.capabilities = replace(self.capabilities, prompt_type="lora", learning_rate=config.learning_rate)

    def init_prompt(self, prompt: Prompt, backbone: Backbone, seed: int) -> Prompt:
        """Returns A and B = 0, and head rows scaled to A's size. Raises `BackboneError` for a backbone without LoRA."""
        if prompt.enters_at == LORA:
            return prompt
        rows_PD = lora.lora_of(backbone).start(self.rank, seed)
        head_CD = prompt.vectors_PD[len(prompt.vectors_PD) - prompt.head_rows :]
        head_CD = head_CD / head_CD.square().mean().sqrt() / (3 * backbone.width) ** 0.5
        return replace(prompt, vectors_PD=torch.cat([rows_PD, head_CD]), enters_at=LORA)
