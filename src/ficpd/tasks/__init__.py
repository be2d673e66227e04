"""Tasks: what a record means. Those whose answers are texts share how they are asked and scored: `Answers`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ficpd.seams import Backbone, Task
from ficpd.types import Batch, Outputs, Prompt, Record


class Answers:
    """A fixed list of answer texts behind an instruction, scored by the backbone's readout or by likelihood."""

    def __init__(self, instruction: str, texts: Sequence[str]):
        self.instruction, self.texts = instruction, list(texts)
        self._readouts: dict[str, Tensor | None] = {}

    def readout(self, backbone: Backbone) -> Tensor | None:
        """[C, D] of the answers, computed once per backbone; None if they need likelihoods."""
        if backbone.fingerprint not in self._readouts:
            self._readouts[backbone.fingerprint] = backbone.readout(self.instruction, self.texts)
        return self._readouts[backbone.fingerprint]

    def encode(
        self, task: Task, records: Sequence[Record], targets: Tensor | None, backbone: Backbone, prompt: Prompt
    ) -> Batch:
        """One item per record, or one per record and answer where likelihoods are needed."""
        readout, room = self.readout(backbone), len(prompt.vectors_PD) - prompt.head_rows
        asked: list[str | None] = [None] if readout is not None else [*self.texts]
        items = tuple(
            tuple(
                backbone.read(r.fields["text"], r.fields.get("text_pair"), self.instruction, answer, room)
                for answer in asked
            )
            for r in records
        )
        return Batch(task, items, targets, readout, prompt.enters_at)

    def scores(self, outputs: Outputs, batch: Batch) -> Tensor:
        """[R, C]: features against the readout that travelled or the batch's own, else mean log-likelihoods."""
        if outputs.readout_RCD is not None:
            return torch.einsum("rd,rcd->rc", outputs.features_RD, outputs.readout_RCD)
        if batch.readout_CD is not None:
            return outputs.features_RD @ batch.readout_CD.T
        assert outputs.scores_RN is not None
        return outputs.scores_RN[:, : len(self.texts)]


def known(records: Sequence[Record]) -> bool:
    """Whether every record has a target."""
    return all(record.fields.get("target") is not None for record in records)
