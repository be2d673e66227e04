"""FedAvg that comes to grief in its second round: by an error, by the end of its process, or by taking very long."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ficpd.interfaces import Model
from ficpd.methods.fedavg import FedAvg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import ClientUpdate, State


class Config(BaseModel):
    """`unless`: a file that, once it is there, lets the method be."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    how: Literal["error", "killed", "slow"] = "error"
    unless: str = ""


def build(config: Config, training: LocalTrainingConfig) -> "Troubled":
    return Troubled(config, training)


class Troubled(FedAvg):
    name = "troubled"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        if round == 2 and not (self.config.unless and Path(self.config.unless).exists()):
            if self.config.how == "error":
                raise ZeroDivisionError("a division by zero, in the second round")
            if self.config.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().aggregate(state, updates, round, model)
