"""Generation of a text from a text, scored by BLEU and chrF (sacrebleu: Post, WMT 2018, arXiv 1804.08771).

The model reads the source and the instruction. The target and an end token are the scored tail of the sequence.
Predictions may have several lines and are stripped of white space.
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from ficpd.errors import DataError
from ficpd.interfaces import Backbone, Task
from ficpd.registry import FrozenConfig
from ficpd.tasks import PUBLIC_SENTENCES, encode_record
from ficpd.types import JSON, Answer, Batch, EncodedInput, ModelOutput, Prompt, Record, Score


class Config(FrozenConfig):
    """Sets the instruction and the length of texts.

    instruction: a line between source and target.
    max_new_tokens: the maximum length of predictions in tokens. Longer targets are cut."""

    instruction: str = ""
    max_new_tokens: int = Field(default=48, ge=1)


def build(config: Config) -> "Generation":
    return Generation(config)


class Generation(Task):
    """Fields: `text`, `text_pair` (optional), `target`, and `references` (optional: a list of texts to score against).

    Needs a backbone that generates."""

    def __init__(self, config: Config):
        self.config, self.max_new_tokens = config, config.max_new_tokens

    @property
    def label_space(self) -> Sequence[str]:
        """Returns the targets of synthetic records: the instruction and `PUBLIC_SENTENCES`."""
        own = self.config.instruction.strip()
        return [*([own] if own else []), *PUBLIC_SENTENCES]

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch:
        """Encodes one sequence per record. The batch's targets are the tails' lengths in tokens (0: no target)."""
        items = [self._item(record, backbone, prompt.num_virtual_tokens) for record in records]
        lengths_B = torch.tensor([item.scored for item in items], dtype=torch.long)
        targets = lengths_B if lengths_B.any() else None
        return Batch(self, tuple((item,) for item in items), targets, None, prompt.enters_at)

    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns minus the mean log-likelihood of the target's tokens, [R]; NaN without a target."""
        assert batch.targets is not None
        unknown_R = outputs.features_RD[:, 0] * 0 + torch.nan
        if outputs.scores_RN is None:
            return unknown_R
        return torch.where(batch.targets > 0, -outputs.scores_RN[:, 0], unknown_R)

    def predict(self, answer: Answer, batch: Batch) -> list[str]:
        assert answer.texts_KB is not None
        return [text.strip() for text in answer.texts_KB[0]]

    def targets(self, records: Sequence[Record]) -> list[tuple[str, ...]]:
        return [self._references(record) for record in records]

    def score(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> Score:
        """Returns `bleu` and `chrf` of the corpus, from 0 to 100, with sacrebleu's defaults (4-grams, 13a tokens).

        BLEU is 0 if all texts are shorter than four tokens."""
        most = max((len(references) for references in targets), default=0)
        by_place = [[r[place] if place < len(r) else None for r in targets] for place in range(most)]
        measured = {
            name: metric.corpus_score(list(predictions), by_place).score  # type: ignore[arg-type]
            for name, metric in (("bleu", BLEU()), ("chrf", CHRF()))
        }
        return {name: min(float(value), 100.0) for name, value in measured.items()}  # rounding may exceed 100

    def to_config(self) -> Mapping[str, JSON]:
        return {"name": "generation", **self.config.model_dump()}

    def _item(self, record: Record, backbone: Backbone, room: int) -> EncodedInput:
        answer = None if record.fields.get("target") is None else self._target(record)
        return encode_record(record, backbone, room, self.config.instruction, answer, self.max_new_tokens)

    def _target(self, record: Record) -> str:
        return _text(record, "target", record.fields.get("target")).strip()

    def _references(self, record: Record) -> tuple[str, ...]:
        target, given = self._target(record), record.fields.get("references")
        if given is None:
            return (target,)
        if not isinstance(given, (list, tuple)) or not given:
            raise DataError(
                f"{record.key}, column references: {given!r} is no list of texts; give one text or more "
                "(in JSON Lines or Parquet), or drop the field to use the target as the reference"
            )
        return tuple(_text(record, "references", text) for text in given)


def _text(record: Record, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{record.key}, column {field}: {value!r} is no text; expected a text")
    if not value.strip():
        raise DataError(f"{record.key}, column {field}: {value!r} is empty; add a text, or remove the record")
    return value
