"""A backbone that answers a record right only if its prompt has the word for that kind of record: what prompts of words can
learn is planted, so that a test knows it."""

from collections.abc import Sequence

import torch
from torch import Tensor

import small
from ficpd.backbones import tiny
from ficpd.types import EncodedInput, ModelOutput, Record

KINDS = ("alpha", "beta", "gamma", "delta")
SIZE = 32


class FewWords(tiny.HashTokenizer):
    """A vocabulary of 32 words, number i the key to the i-th kind of record."""

    size = SIZE

    def proposals(self, ids: Sequence[int], place: int, number: int, seed: int) -> list[int]:
        random = torch.Generator().manual_seed(seed % (1 << 62))
        return [i for i in torch.randperm(SIZE, generator=random).tolist() if i != ids[place]][:number]


class Planted(tiny.Tiny):
    def __init__(self, width: int = 16):
        super().__init__(tiny.Config(width=width), torch.float32, small.CPU, "planted")
        self.vocabulary = FewWords(self.table)
        self.kinds = [self.vocabulary.ids(kind)[0] for kind in KINDS]
        self.good = self.vocabulary.ids("good")[0]
        self.told_CD = small.classes().readout(self) / tiny.SCALE

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """The feature of the answer that the text names (`good` or `bad`), or of the other one."""
        if not prompts_SPD.shape[1]:  # the answers' own texts
            return super().forward(prompts_SPD, hidden, items, layer)
        texts = [item.content.tolist() for item in items]
        keys_SD = self.table[[self.kinds.index(ids[0]) for ids in texts]]
        knows_S = (prompts_SPD == keys_SD[:, None]).all(-1).any(-1)
        bad_S = torch.tensor([self.good not in ids for ids in texts])
        return ModelOutput(self.told_CD[(bad_S == knows_S).long()])


def records(kind: str, count: int, seed: int = 0) -> list[Record]:
    """Of one kind, half good and half bad."""
    labels = ["good", "bad"] * count
    told = [f"{kind} was {label}" for label in labels[:count]]
    return [Record(f"{kind} {i} {seed}", {"text": text, "target": labels[i]}) for i, text in enumerate(told)]
