"""Generation: a text for a text. BLEU and chrF by sacrebleu (Post, WMT 2018, arXiv 1804.08771).

A record is read as for classification, its source framed by the instruction, and the target is the scored tail of the one
sequence, closed by the end token: a tuned prompt learns what to say and when to stop. What is written is not cut at a
line break, for a target may have several lines; white space around it is taken off.
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from ficpd.errors import DataError
from ficpd.interfaces import Backbone, Task
from ficpd.tasks import encode_record
from ficpd.types import JSON, Answer, Batch, EncodedInput, ModelOutput, Prompt, Record, Score

MADE_UP = (
    "The old bridge crosses the river near the market.",
    "Yes.",
    "It was built in 1921 and is still in use today.",
    "Anna lives in a small town by the sea, where she teaches music to children.",
    "There is no simple answer to this question.",
    "The train to the north leaves at nine and arrives in the late afternoon.",
    "A doctor should be asked if the pain does not go away.",
    "Cheap food, friendly people and a view of the park.",
)
"""Plain sentences of several lengths, nobody's: what stands for a target where a record is made up."""


class Config(BaseModel):
    """`instruction`: a line between the source and what is written; without one the text simply goes on.
    `max_new_tokens`: the longest text that is written; of a longer target only so much is learned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    instruction: str = ""
    max_new_tokens: int = Field(default=48, ge=1)


def build(config: Config) -> "Generation":
    return Generation(config)


class Generation(Task):
    """Fields: `text` (and `text_pair`), `target`, a text, and if wanted `references`, a list of texts to score against in
    the target's place. Needs a backbone that writes."""

    def __init__(self, config: Config):
        self.config, self.max_new_tokens = config, config.max_new_tokens

    @property
    def label_space(self) -> Sequence[str]:
        """Any text is a possible target. Records that are made up take these in turn: the instruction's own words, the
        only public text that speaks of the task, and a few plain sentences."""
        own = self.config.instruction.strip()
        return [*([own] if own else []), *MADE_UP]

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch:
        """One sequence per record; a record without a target has no scored tail, and what is written is the same.

        The batch's targets are the tails' lengths, in tokens.
        """
        items = [self._item(record, backbone, prompt.num_virtual_tokens) for record in records]
        lengths_B = torch.tensor([item.scored for item in items], dtype=torch.long)
        targets = lengths_B if lengths_B.any() else None
        return Batch(self, tuple((item,) for item in items), targets, None, prompt.enters_at)

    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Minus the mean log-likelihood of the target's tokens, each after the true ones before it. NaN, with a gradient
        of zero, where a record of the batch has no target."""
        assert batch.targets is not None
        unknown_R = outputs.features_RD[:, 0] * 0 + torch.nan
        if outputs.scores_RN is None:
            return unknown_R
        return torch.where(batch.targets > 0, -outputs.scores_RN[:, 0], unknown_R)

    def predict(self, answer: Answer, batch: Batch) -> list[str]:
        """What was written, without white space around it; it may be empty."""
        assert answer.texts_KB is not None
        return [text.strip() for text in answer.texts_KB[0]]

    def targets(self, records: Sequence[Record]) -> list[tuple[str, ...]]:
        """Each record's references; its target where it has none."""
        return [self._references(record) for record in records]

    def score(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> Score:
        """`bleu` and `chrf` of the whole corpus, 0 to 100, with sacrebleu's own settings (BLEU of 4-grams, 13a tokens):
        a corpus whose texts are all shorter than four tokens has BLEU 0, however right they are."""
        most = max((len(references) for references in targets), default=0)
        by_place = [[r[place] if place < len(r) else None for r in targets] for place in range(most)]
        measured = {
            name: metric.corpus_score(list(predictions), by_place).score  # type: ignore[arg-type]
            for name, metric in (("bleu", BLEU()), ("chrf", CHRF()))
        }
        return {name: min(float(value), 100.0) for name, value in measured.items()}  # rounding may lead past the best

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
                f"{record.key}, column references: {given!r} is no list of texts; write a list with one text or more "
                "(JSON Lines and Parquet hold lists), or leave it out: then the target is the only reference"
            )
        return tuple(_text(record, "references", text) for text in given)


def _text(record: Record, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{record.key}, column {field}: {value!r} is no text; a generation needs texts")
    if not value.strip():
        raise DataError(f"{record.key}, column {field}: {value!r} is empty; write a text, or leave the record out")
    return value
