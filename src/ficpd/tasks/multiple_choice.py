"""Multiple choice among the options of each record. The number of options may differ between records.

A language model reads one sequence per option, the question first. Its score is the mean log-likelihood per token. A
sentence encoder reads the question. Its score is the scaled cosine to the option's embedding. The accuracy has an
interval and a chance level.
"""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from ficpd.errors import BackboneError, DataError
from ficpd.interfaces import Backbone, Task
from ficpd.registry import FrozenConfig
from ficpd.tasks import PUBLIC_SENTENCES, encode_record, has_targets
from ficpd.types import JSON, Answer, Batch, EncodedInput, ModelOutput, Prompt, Record, Score

USUAL, MOST = 4, len(ascii_uppercase)
"""The number of options of a synthetic record, and the maximum of any record."""


class Config(FrozenConfig):
    """instruction: a line between question and option (language model), or before the option (encoder)."""

    instruction: str = ""


def build(config: Config) -> "MultipleChoice":
    return MultipleChoice(config)


class Option(int):
    """An option's index from 0, with the number of options (`of`)."""

    of: int

    def __new__(cls, place: int, of: int = USUAL) -> "Option":
        self = super().__new__(cls, place)
        self.of = of
        return self


class MultipleChoice(Task):
    """Fields: `text`, `text_pair` (optional), `options` and `target`.

    options: a list of texts, named A, B, C, ..., or a mapping of names to texts.
    target: an option's index from 0, name or text."""

    def __init__(self, config: Config):
        self.config = config
        self._rows: dict[int, Tensor] = {}  # by width: [M, D], the embedded options of all records so far
        self._places: dict[tuple[str, str], int] = {}  # by backbone and text

    @property
    def label_space(self) -> Sequence[int]:
        return range(USUAL)

    def synthetic_fields(self, place: int) -> Mapping[str, Any]:
        """Returns the options of a synthetic record: one of eight sets."""
        return {"options": [PUBLIC_SENTENCES[(place + i) % len(PUBLIC_SENTENCES)] for i in range(USUAL)]}

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch:
        """Encodes one sequence per option for a backbone that scores answers, else one per record.

        Extra fields: `count` [B], the number of options; `options` [B, 26], their embedding rows (-1: none)."""
        options, room = [[*named_options(record).values()] for record in records], prompt.num_virtual_tokens
        targets = torch.tensor(self.targets(records), dtype=torch.long) if has_targets(records) else None
        scored = bool(records) and self._item(records[0], backbone, options[0][0], room).scored > 0
        items = tuple(
            tuple(self._item(record, backbone, option, room) for option in (own if scored else [None]))
            for record, own in zip(records, options, strict=True)
        )
        extra = {"count": torch.tensor([len(own) for own in options], dtype=torch.long)}
        if records and not scored:
            extra["options"] = self._embedded(options, backbone)
        return Batch(self, items, targets, None, prompt.enters_at, extra)

    def logits(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns the scores [R, N], `-inf` for missing options."""
        features_RD = outputs.features_RD
        if "options" in batch.extra:
            places_RN = batch.extra["options"][:, : int(batch.extra["count"].max())].to(features_RD.device)
            rows_MD = self._rows[features_RD.shape[1]].to(features_RD.device)
            scores_RN = torch.einsum("rd,rnd->rn", features_RD, rows_MD[places_RN.clamp(min=0)])
            return scores_RN.masked_fill(places_RN < 0, -torch.inf)
        assert outputs.scores_RN is not None
        return outputs.scores_RN

    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return F.cross_entropy(self.logits(outputs, batch), batch.targets, reduction="none")

    def predict(self, answer: Answer, batch: Batch) -> list[Option]:
        assert answer.outputs_KB is not None
        best = self.logits(answer.outputs_KB, batch).argmax(-1).tolist() if len(batch) else []
        return [Option(place, of) for place, of in zip(best, batch.extra["count"].tolist(), strict=True)]

    def targets(self, records: Sequence[Record]) -> list[Option]:
        return [_right(record, named_options(record)) for record in records]

    def score(self, predictions: Sequence[int], targets: Sequence[Option]) -> Score:
        """Returns `accuracy`, its 95 % interval (Wilson, 1927), and `chance`, the expected accuracy of guessing."""
        right, number = sum(p == t for p, t in zip(predictions, targets, strict=True)), len(targets)
        low, high = binomtest(right, number).proportion_ci(method="wilson")
        chance = sum(1 / target.of for target in targets) / number
        return {"accuracy": right / number, "accuracy_low": float(low), "accuracy_high": float(high), "chance": chance}

    def to_config(self) -> Mapping[str, JSON]:
        return {"name": "multiple_choice", **self.config.model_dump()}

    def _item(self, record: Record, backbone: Backbone, option: str | None, room: int) -> EncodedInput:
        try:
            return encode_record(record, backbone, room, self.config.instruction, option)
        except BackboneError as error:  # name the record
            raise BackboneError(f"{record.key}: {error}") from error

    def _embedded(self, options: Sequence[Sequence[str]], backbone: Backbone) -> Tensor:
        """Returns each option's embedding row, [B, 26]. Embeds each text once and alone: rounding depends on the batch."""
        name, rows = backbone.fingerprint, [self._rows.get(backbone.width, torch.zeros(0, backbone.width))]
        new = {text for own in options for text in own if (name, text) not in self._places}
        texts = sorted(new, key=lambda text: (len(text), text))
        for text in texts:
            readout_CD = backbone.readout(self.config.instruction, [text])
            assert readout_CD is not None
            rows.append(readout_CD.float())
        self._places |= {(name, text): len(rows[0]) + place for place, text in enumerate(texts)}
        self._rows[backbone.width] = torch.cat([some.to(backbone.device) for some in rows])
        places = [[self._places[name, text] for text in own] for own in options]
        return torch.tensor([own + [-1] * (MOST - len(own)) for own in places], dtype=torch.long)


def named_options(record: Record) -> dict[str, str]:
    """Returns a record's options by name, without empty ones at the end. A list's names are A, B, C, ...

    Raises `DataError` unless they are a list or a mapping of 2 to 26 texts.
    """
    given = record.fields.get("options")
    if not isinstance(given, (Mapping, list, tuple)) or len(given) > MOST:
        raise DataError(
            f"{record.key}, column options: {given!r} is no list of texts or mapping to texts (26 at most); name its "
            "column in data.columns, or the columns of one option each in data.options"
        )
    found = dict(given if isinstance(given, Mapping) else zip(ascii_uppercase, given, strict=False))
    while found and not str(next(reversed(found.values())) or "").strip():
        found.popitem()
    for name, text in found.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{record.key}, column options: option {name} is {text!r}; expected a text")
    if len(found) < 2:
        raise DataError(f"{record.key}, column options: {len(found)} given; a choice needs two or more")
    return {str(name): text.strip() for name, text in found.items()}


def _right(record: Record, options: Mapping[str, str]) -> Option:
    """Returns the target's option. Raises `DataError` unless exactly one option matches."""
    target, number = record.fields.get("target"), len(options)
    target = (
        int(target) if isinstance(target, float) and target.is_integer() else target
    )  # pandas has floats in a column with gaps
    given = str(target).strip() if isinstance(target, (str, int)) and not isinstance(target, bool) else ""
    meant = {i for i, (name, text) in enumerate(options.items())
             if given.upper() in (str(i), name.upper()) or (isinstance(target, str) and given == text)}  # fmt: skip
    if len(meant) != 1:
        which = "may mean several" if meant else "is none"
        raise DataError(
            f"{record.key}, column target: {target!r} {which} of the options {dict(options)}; give the index "
            f"(0 to {number - 1}), the name ({', '.join(options)}) or the text of one option"
        )
    return Option(meant.pop(), number)
