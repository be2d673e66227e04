"""Classification, scored by accuracy and macro F1. Answers are label texts, so new labels need no new head."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional as F

from ficpd.data.untyped import label_spellings
from ficpd.errors import DataError, did_you_mean
from ficpd.interfaces import Backbone, Task
from ficpd.registry import FrozenConfig
from ficpd.tasks import LabelTask, has_targets
from ficpd.types import JSON, LABEL_PRIOR, Answer, Batch, ModelOutput, Prompt, Record, Score

LISTED = 20
"""The maximum number of unknown labels in an error."""


class Config(FrozenConfig):
    """Sets the labels.

    labels: the text of each label of the data.
    instruction: a text that a causal backbone reads after the record, and an encoder before each label text.
    tuned_head: tunes the label texts' embeddings as the prompt's last rows, for this label set only."""

    labels: dict[str, str] = Field(min_length=2)
    instruction: str = ""
    tuned_head: bool = False


def build(config: Config) -> "Classification":
    return Classification(config)


class Classification(Task):
    def __init__(self, config: Config):
        self.config, self.names = config, list(config.labels)
        self.num_labels = len(self.names)
        self.head_rows = self.num_labels if config.tuned_head else 0
        self.answers = LabelTask(config.instruction, list(config.labels.values()))

    @property
    def label_space(self) -> Sequence[str]:
        return self.names

    def readout(self, backbone: Backbone) -> Tensor | None:
        return self.answers.readout(backbone)

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch:
        targets = None
        if has_targets(records):
            targets = torch.tensor([self.names.index(label) for label in self.targets(records)], dtype=torch.long)
        return self.answers.encode(self, records, targets, backbone, prompt)

    def logits(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns the scores [R, C], plus the batch's label prior, if any."""
        scores_RC = self.answers.scores(outputs, batch)
        return scores_RC + batch.extra[LABEL_PRIOR].to(scores_RC.device) if LABEL_PRIOR in batch.extra else scores_RC

    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return F.cross_entropy(self.logits(outputs, batch), batch.targets, reduction="none")

    def predict(self, answer: Answer, batch: Batch) -> list[str]:
        assert answer.outputs_KB is not None
        return [self.names[i] for i in self.logits(answer.outputs_KB, batch).argmax(-1).tolist()]

    def targets(self, records: Sequence[Record]) -> list[str]:
        """Returns the records' labels. Raises `DataError`, naming up to `LISTED` unknown labels at once."""
        found = [self._label(record) for record in records]
        strangers = [record for record, label in zip(records, found, strict=True) if label is None]
        if strangers:
            unknown = Counter(label_spellings(record.fields["target"])[0] for record in strangers)
            raise DataError(_unknown_labels(strangers[0], unknown, self.names))
        return [label for label in found if label is not None]

    def score(self, predictions: Sequence[str], targets: Sequence[str]) -> Score:
        options = {"labels": self.names, "average": "macro", "zero_division": 0.0}
        f1 = f1_score(targets, predictions, **options)  # type: ignore[arg-type]
        return {"accuracy": float(accuracy_score(targets, predictions)), "f1": float(f1)}

    def to_config(self) -> Mapping[str, JSON]:
        return {"name": "classification", **self.config.model_dump()}

    def _label(self, record: Record) -> str | None:
        """Returns the label of a record's target; None for an unknown one."""
        spellings = label_spellings(record.fields["target"])
        return next((spelling for spelling in spellings if spelling in self.config.labels), None)


def _unknown_labels(first: Record, unknown: Counter[str], known: Sequence[str]) -> str:
    """Returns the error text for unknown labels. `first`: the first record with one."""
    if len(unknown) == 1:
        said = did_you_mean("label", next(iter(unknown)), known)
        return f"{first.key}, column target: {said}. Add it and its text to task.labels, or correct the record"
    said = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common(LISTED))
    more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
    return (
        f"column target: {len(unknown)} unknown labels in {unknown.total()} records: {said}{more}; the first in {first.key}."
        f" Known: {', '.join(known)}. Add them and their texts to task.labels, or correct the records"
    )
