"""Multiple choice: which of a record's own options is right. Records may have two options, five, or as many as they like.

A language model reads one sequence per option, the question first, and scores it by the option's mean log-likelihood per
token. A sentence encoder reads the question alone; an option's score is the cosine to its embedded text, times the
encoder's scale. Chance and an interval stand beside the accuracy: of four options guessing finds a quarter.
"""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from ficpd.errors import BackboneError, DataError
from ficpd.interfaces import Backbone, Task
from ficpd.tasks import encode_record, has_targets
from ficpd.tasks.generation import MADE_UP
from ficpd.types import JSON, Answer, Batch, EncodedInput, ModelOutput, Prompt, Record, Score

USUAL, MOST = 4, len(ascii_uppercase)
"""How many options a record has that is made up, and any record at most."""


class Config(BaseModel):
    """`instruction`: a line between question and option (a language model), or what stands before the option (an encoder).
    `normalise` "none": a language model's score is the sum over an option's tokens, not the mean, so that long ones lose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    instruction: str = ""
    normalise: Literal["tokens", "none"] = "tokens"


def build(config: Config) -> "MultipleChoice":
    return MultipleChoice(config)


class Option(int):
    """An option's place, counted from 0; it knows how many there were (`of`), and so what chance is."""

    of: int

    def __new__(cls, place: int, of: int = USUAL) -> "Option":
        self = super().__new__(cls, place)
        self.of = of
        return self


class MultipleChoice(Task):
    """Fields: `text` (and `text_pair`); `options`, a list of texts or a mapping of names to texts; `target`, a number (the
    option's place, the first is 0) or a text: a name, in a list A, B, C, ...; the option's own words; or its place."""

    def __init__(self, config: Config):
        self.config = config
        self._rows: dict[int, Tensor] = {}  # by width: [M, D], the embedded options of all records so far
        self._places: dict[tuple[str, str], int] = {}  # by backbone and text

    @property
    def label_space(self) -> Sequence[int]:
        return range(USUAL)

    def synthetic_fields(self, place: int) -> Mapping[str, Any]:
        """The options of a record that is made up: plain sentences, in eight changing sets."""
        return {"options": [MADE_UP[(place + i) % len(MADE_UP)] for i in range(USUAL)]}

    def encode(self, records: Sequence[Record], backbone: Backbone, prompt: Prompt) -> Batch:
        """One sequence per option where the backbone reads answers, else one per record, and beside it where its options
        stand among the embedded ones (`options` [B, 26], -1: none). `count` [B]: how many it has."""
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
        """[R, N]; `-inf` where a record has fewer options."""
        features_RD = outputs.features_RD
        if "options" in batch.extra:
            places_RN = batch.extra["options"][:, : int(batch.extra["count"].max())].to(features_RD.device)
            rows_MD = self._rows[features_RD.shape[1]].to(features_RD.device)
            scores_RN = torch.einsum("rd,rnd->rn", features_RD, rows_MD[places_RN.clamp(min=0)])
            return scores_RN.masked_fill(places_RN < 0, -torch.inf)
        assert outputs.scores_RN is not None
        if self.config.normalise == "tokens":
            return outputs.scores_RN
        lengths_RN = torch.ones_like(outputs.scores_RN)
        for row, items in enumerate(batch.items):
            lengths_RN[row, : len(items)] = lengths_RN.new_tensor([item.scored for item in items])
        return outputs.scores_RN * lengths_RN

    def loss(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Cross entropy over each record's own options."""
        assert batch.targets is not None
        return F.cross_entropy(self.logits(outputs, batch), batch.targets, reduction="none")

    def predict(self, answer: Answer, batch: Batch) -> list[Option]:
        assert answer.outputs_KB is not None
        best = self.logits(answer.outputs_KB, batch).argmax(-1).tolist() if len(batch) else []
        return [Option(place, of) for place, of in zip(best, batch.extra["count"].tolist(), strict=True)]

    def targets(self, records: Sequence[Record]) -> list[Option]:
        return [_right(record, named_options(record)) for record in records]

    def score(self, predictions: Sequence[int], targets: Sequence[Option]) -> Score:
        """`accuracy`, the ends of its 95 % interval (Wilson, 1927), and `chance`, what guessing would come to."""
        right, number = sum(p == t for p, t in zip(predictions, targets, strict=True)), len(targets)
        low, high = binomtest(right, number).proportion_ci(method="wilson")
        chance = sum(1 / target.of for target in targets) / number
        return {"accuracy": right / number, "accuracy_low": float(low), "accuracy_high": float(high), "chance": chance}

    def to_config(self) -> Mapping[str, JSON]:
        return {"name": "multiple_choice", **self.config.model_dump()}

    def _item(self, record: Record, backbone: Backbone, option: str | None, room: int) -> EncodedInput:
        try:
            return encode_record(record, backbone, room, self.config.instruction, option)
        except BackboneError as error:  # of thousands of records one may have an option that is too long
            raise BackboneError(f"{record.key}: {error}") from error

    def _embedded(self, options: Sequence[Sequence[str]], backbone: Backbone) -> Tensor:
        """[B, 26]: each option's row among the embedded ones. A text is embedded once, and by itself: beside those of other
        records it would be rounded by what they are."""
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
    """A record's options by name, in order: those of a list are A, B, C, ... Empty ones at the end do not count.

    Raises `DataError` for what is no list or mapping of texts, or fewer than two.
    """
    given = record.fields.get("options")
    if not isinstance(given, (Mapping, list, tuple)) or len(given) > MOST:
        raise DataError(
            f"{record.key}, column options: {given!r} is no list of texts (26 at most), nor a mapping of names to them; say "
            "which column holds it (data.columns), or which columns hold one option each (data.options)"
        )
    found = dict(given if isinstance(given, Mapping) else zip(ascii_uppercase, given, strict=False))
    while found and not str(next(reversed(found.values())) or "").strip():
        found.popitem()
    for name, text in found.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{record.key}, column options: option {name} is {text!r}; each one before the last is a text"
            )
    if len(found) < 2:
        raise DataError(f"{record.key}, column options: {len(found)} given; a choice needs two or more")
    return {str(name): text.strip() for name, text in found.items()}


def _right(record: Record, options: Mapping[str, str]) -> Option:
    """The one option that the target means. Raises `DataError` if it may mean several, or none."""
    target, number = record.fields.get("target"), len(options)
    said = str(target).strip() if isinstance(target, (str, int)) and not isinstance(target, bool) else ""
    meant = {i for i, (name, text) in enumerate(options.items())
             if said.upper() in (str(i), name.upper()) or (isinstance(target, str) and said == text)}  # fmt: skip
    if len(meant) != 1:
        which = "may mean several" if meant else "is none"
        raise DataError(
            f"{record.key}, column target: {target!r} {which} of the options {dict(options)}; write the place as a number "
            f"(0 to {number - 1}), the name ({', '.join(options)}) or the option's own words"
        )
    return Option(meant.pop(), number)
