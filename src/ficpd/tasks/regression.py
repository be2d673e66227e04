"""Regression by anchor texts with known values, scored by RMSE and Pearson's r.

prediction = Σ_m softmax(scores)_m · value_m. Two anchors define one direction in feature space, from the low text to
the high one. The anchors' values calibrate the prediction without records.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field, field_validator
from scipy.stats import DegenerateDataWarning, pearsonr
from sklearn.metrics import root_mean_squared_error
from torch import Tensor

from ficpd.data.untyped import parse_number
from ficpd.errors import DataError
from ficpd.interfaces import Backbone, Task
from ficpd.registry import FrozenConfig
from ficpd.tasks import LabelTask, has_targets
from ficpd.types import JSON, Answer, Batch, ModelOutput, Prompt, Record, Score


class Config(FrozenConfig):
    """Sets the anchors.

    anchors: texts with at least two different values. Predictions are between the extremes.
    instruction: a text before each anchor.
    tuned_head: tunes the anchors' embeddings as the prompt's last rows."""

    anchors: dict[str, float] = Field(min_length=2)
    instruction: str = ""
    tuned_head: bool = False

    @field_validator("anchors")
    @classmethod
    def _spread(cls, anchors: dict[str, float]) -> dict[str, float]:
        if len(set(anchors.values())) < 2:
            raise ValueError("anchors need at least two different values")
        return anchors


def build(config: Config) -> "Regression":
    return Regression(config)


class Regression(Task):
    def __init__(self, config: Config):
        self.config = config
        self.values_C = torch.tensor(list(config.anchors.values()))
        self.half_range = float(self.values_C.max() - self.values_C.min()) / 2
        self.head_rows = len(self.values_C) if config.tuned_head else 0
        self.answers = LabelTask(config.instruction, list(config.anchors))

    @property
    def label_space(self) -> Sequence[float]:
        return self.values_C.tolist()

    def readout(self, backbone: Backbone) -> Tensor | None:
        return self.answers.readout(backbone)

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch:
        targets = torch.tensor(self.targets(records), dtype=torch.float32) if has_targets(records) else None
        return self.answers.encode(self, records, targets, backbone, prompt)

    def values(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns the predictions [R] in the target's unit."""
        scores_RC = self.answers.scores(outputs, batch)
        return scores_RC.softmax(-1) @ self.values_C.to(scores_RC.device)

    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns the squared error [R] in units of half the anchors' range, so learning rates fit every scale."""
        assert batch.targets is not None
        return ((self.values(outputs, batch) - batch.targets) / self.half_range) ** 2

    def predict(self, answer: Answer, batch: Batch) -> list[float]:
        """Returns the predicted values. If a prompt diverged and scores are NaN, this is the anchors' mean."""
        assert answer.outputs_KB is not None
        return self.values(answer.outputs_KB, batch).nan_to_num(nan=float(self.values_C.mean())).tolist()

    def targets(self, records: Sequence[Record]) -> list[float]:
        return [self._number(record) for record in records]

    def score(self, predictions: Sequence[float], targets: Sequence[float]) -> Score:
        """Returns `rmse`, and `pearson` for two records or more without (nearly) constant targets or predictions."""
        rmse = float(root_mean_squared_error(targets, predictions))
        if len(targets) < 2:
            return {"rmse": rmse}
        with warnings.catch_warnings():
            warnings.simplefilter("error", DegenerateDataWarning)
            try:
                return {"rmse": rmse, "pearson": float(pearsonr(targets, predictions).statistic)}  # type: ignore[attr-defined]
            except DegenerateDataWarning:
                return {"rmse": rmse}

    def to_config(self) -> Mapping[str, JSON]:
        return {"name": "regression", **self.config.model_dump()}

    def _number(self, record: Record) -> float:
        target = parse_number(record.fields["target"])
        if isinstance(target, bool) or not isinstance(target, (int, float)):
            raise DataError(f"{record.key}, column target: {target!r} is no number; expected one, such as 2.5")
        return float(target)
