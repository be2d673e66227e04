"""Tasks define how records are encoded, scored and predicted. Tasks with answer texts share `LabelTask`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ficpd import rng
from ficpd.errors import BackboneError, DataError
from ficpd.interfaces import Backbone, Task
from ficpd.types import Batch, EncodedInput, ModelOutput, Prompt, Record

PUBLIC_SENTENCES = (
    "The old bridge crosses the river near the market.",
    "Yes.",
    "It was built in 1921 and is still in use today.",
    "Anna lives in a small town by the sea, where she teaches music to children.",
    "There is no simple answer to this question.",
    "The train to the north leaves at nine and arrives in the late afternoon.",
    "A doctor should be asked if the pain does not go away.",
    "Cheap food, friendly people and a view of the park.",
)
"""Public sentences of different lengths: the targets of synthetic records."""


class LabelTask:
    """Scores a fixed list of answer texts by the backbone's readout or by likelihood."""

    def __init__(self, instruction: str, texts: Sequence[str]):
        self.instruction, self.texts = instruction, list(texts)
        self._readouts: dict[str, Tensor | None] = {}

    def readout(self, backbone: Backbone) -> Tensor | None:
        """Returns the answers' readout [C, D], cached by backbone; None if they need likelihoods."""
        if backbone.fingerprint not in self._readouts:
            self._readouts[backbone.fingerprint] = backbone.readout(self.instruction, self.texts)
        return self._readouts[backbone.fingerprint]

    def encode(
        self, task: Task, records: Sequence[Record], targets: Tensor | None, backbone: Backbone, prompt: Prompt
    ) -> Batch:
        """Encodes one item per record, or one per record and answer for likelihoods."""
        readout = None if prompt.head_rows and not backbone.has_text_encoder else self.readout(backbone)
        asked: list[str | None] = [None] if readout is not None or prompt.head_rows else [*self.texts]
        items = tuple(
            tuple(
                encode_record(record, backbone, prompt.num_virtual_tokens, self.instruction, answer) for answer in asked
            )
            for record in records
        )
        return Batch(task, items, targets, readout, prompt.enters_at)

    def scores(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        """Returns [R, C]: features times the tuned readout or the batch's, else mean log-likelihoods.

        Each row is a separate product: in one product, a row's last bits would depend on the number of rows.
        """
        readout_RCD = outputs.readout_RCD
        if readout_RCD is None and batch.readout_CD is not None:
            readout_RCD = batch.readout_CD.expand(len(outputs.features_RD), -1, -1)
        if readout_RCD is not None:
            return torch.einsum("rd,rcd->rc", outputs.features_RD, readout_RCD)
        assert outputs.scores_RN is not None
        return outputs.scores_RN[:, : len(self.texts)]


def encode_record(
    record: Record, backbone: Backbone, room: int, instruction: str = "", answer: str | None = None, writes: int = 0
) -> EncodedInput:
    """Encodes a record by `Backbone.preprocess_image` or `Backbone.tokenize`.

    room: the prompt's virtual tokens. writes: the tokens to write after the record.
    Raises `DataError` for a record without the image or the text that the backbone needs.
    """
    text, image = record.fields.get("text"), record.fields.get("image")
    if backbone.modality == "image" and answer is None and not writes:
        if image is None:
            raise DataError(
                f"{record.key}: no image, and {backbone.name} needs one; name the column of images in data.columns "
                "(image), or use a text backbone"
            )
        return backbone.preprocess_image(image, room)
    if text is None and backbone.modality == "text":
        has = "an image and no text" if image is not None else "no text"
        raise DataError(
            f"{record.key}: {has}, and {backbone.name} needs a text; name the column of texts in data.columns (text)"
            + (", or use a vision backbone (DINOv2, ViT, CLIP)" if image is not None else "")
        )
    return backbone.tokenize(text or "", record.fields.get("text_pair"), instruction, answer, room, writes)


def synthetic_records(backbone: Backbone, number: int, seed: int, name: str = "made-up") -> list[Record]:
    """Returns synthetic records without targets. Raises `BackboneError` if the backbone gives another number."""
    role, found = "image" if backbone.modality == "image" else "text", backbone.synthetic_inputs(number, seed)
    if len(found) != number:
        raise BackboneError(f"{backbone.name}: synthetic_inputs gives {len(found)} inputs; expected {number}")
    return [Record(f"{name} {i}", {role: it}) for i, it in enumerate(found)]


def corrupt_words(records: Sequence[Record], share: float, backbone: Backbone, seed: int) -> list[Record]:
    """Replaces each word with probability `share` by a word of synthetic texts. Raises `BackboneError` for images."""
    if backbone.modality == "image":
        raise BackboneError(f"{backbone.name} takes images, and only words can be masked; turn masking off")
    random = rng.make_generator(seed, "which words")
    known = [word for text in backbone.synthetic_inputs(64, seed) for word in str(text).split()]

    def other(word: str) -> str:
        falls = float(torch.rand((), generator=random)) < share
        return known[int(torch.randint(len(known), (1,), generator=random))] if falls else word

    def changed(text: str) -> str:
        return " ".join(other(word) for word in text.split())

    return [
        replace(r, fields={k: changed(v) if k in ("text", "text_pair") and v else v for k, v in r.fields.items()})
        for r in records
    ]


def has_targets(records: Sequence[Record]) -> bool:
    return all(record.fields.get("target") is not None for record in records)
