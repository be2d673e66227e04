"""Demonstrations: shows labelled records to the frozen model together with a new text.

A decoder reads the examples before the text: as many as fit, each with instruction and answer (Brown et al., NeurIPS
2020, arXiv 2005.14165). An encoder has no such context: the examples' mean features are mixed into its readout
(Tip-Adapter, Zhang et al., ECCV 2022, arXiv 2111.03930; Snell et al., NeurIPS 2017, arXiv 1703.05175). Both
reveal the records.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd.data.untyped import label_spellings
from ficpd.errors import LibraryError
from ficpd.interfaces import Backbone, Task
from ficpd.types import LABEL_PRIOR, Answer, Batch, Prompt, Query, Readout, Record

MIXES = (0.4, 0.8)
"""The limit weights of many examples in a readout row. One example has half of that weight."""


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations of an adapted prompt.

    texts: the examples for a backbone with a context, in their order.
    readout: replaces the task's readout, for other backbones.
    """

    texts: tuple[str, ...] = ()
    readout: Readout | None = None

    def encode(
        self, task: Task, records: Sequence[Record], backbone: Backbone, prompt: Prompt, encoded: Batch | None = None
    ) -> Batch:
        """Encodes records with the demonstrations. Drops later examples that do not fit, and never cuts a text for them.

        encoded: the records' encoding, if known. Only encoders reuse it."""
        if self.readout is not None:
            batch = encoded or task.encode(records, backbone, prompt)
            without = {name: value for name, value in batch.extra.items() if name != LABEL_PRIOR}
            return replace(batch, extra=without).with_readout(self.readout)
        own = task.encode(records, backbone, prompt)  # `encoded` may be cut for another prompt
        lengths = [backbone.tokenize(f"{text}\n\n", None, "", None, 0).length + 1 for text in self.texts]
        shown = []
        for record, items in zip(records, own.items, strict=True):
            space = backbone.max_tokens - prompt.num_virtual_tokens - max(item.length for item in items)
            shown.append(self._before(record, lengths, space))
        return task.encode(shown, backbone, prompt)

    def _before(self, record: Record, lengths: Sequence[int], space: int) -> Record:
        """Puts as many examples before the text as fit into `space` tokens."""
        fit = []
        for text, length in zip(self.texts, lengths, strict=True):
            if length > space:
                break
            fit.append(text)
            space -= length
        return replace(record, fields={**record.fields, "text": "\n\n".join([*fit, record.fields["text"]])})


def supports_demonstrations(task: Task) -> bool:
    """Returns whether the task has label texts and no tuned head."""
    return bool(task.to_config().get("labels")) and not task.head_rows


def is_in_context(backbone: Backbone) -> bool:
    """Returns whether the backbone reads the instruction in the text's sequence."""
    if backbone.modality == "image":
        return False
    return backbone.tokenize("a", None, "a", None, 0).length > backbone.tokenize("a", None, "", None, 0).length


def demonstrate(
    task: Task, records: Sequence[Record], batch: Batch, prompt: Prompt, backbone: Backbone
) -> Generator[Query, Answer, dict[str, Demonstrations]]:
    """Makes demonstrations of records and their encoded `batch`, by mix ("" for a backbone with a context).

    Raises `LibraryError` for a task without labels or with a tuned head.
    """
    if not supports_demonstrations(task):
        raise LibraryError("demonstrations need a classification without a tuned head; use another adaptation")
    if is_in_context(backbone):
        return {"": Demonstrations(tuple(_written(task, record) for record in balanced(records)))}
    assert batch.targets is not None
    answer = yield Query(prompt.vectors_PD[None], batch, outputs=True)
    assert answer.outputs_KB is not None
    features_BD, own = answer.outputs_KB.features_RD.cpu(), readout_of(batch)
    return {
        f"{mix:g}": Demonstrations(
            readout=replace(own, rows_CD=mix_readout(own.rows_CD, features_BD, batch.targets, mix))
        )
        for mix in MIXES
    }


def readout_of(batch: Batch) -> Readout:
    """Returns a batch's readout on the CPU: that of the label texts, or a learned readout."""
    assert batch.readout_CD is not None
    labels = len(batch.readout_CD)
    prior_BC = batch.extra.get(LABEL_PRIOR)
    bias_C = torch.zeros(labels) if prior_BC is None else prior_BC[0].float().cpu()
    return Readout(batch.readout_CD.float().cpu(), bias_C, torch.full((labels,), 1 / labels))


def mix_readout(own_CD: Tensor, features_BD: Tensor, targets_B: Tensor, mix: float) -> Tensor:
    """Mixes each class's row with the mean of its n examples, by the weight mix·n/(n+1). Returns [C, D].

    The examples' mean is relative to the mean over classes, and scaled to the rows' length. Otherwise classes with
    examples would win against those without. A class without examples keeps its row, and so does a single class.
    """
    rows_CD, classes = own_CD.clone(), targets_B.unique().tolist()
    if len(classes) < 2:
        return rows_CD
    means_CD = F.normalize(torch.stack([features_BD[targets_B == label].mean(0) for label in classes]), dim=-1)
    apart_CD = (means_CD - means_CD.mean(0)) * own_CD.norm(dim=1).mean()
    for label, apart_D in zip(classes, apart_CD, strict=True):
        count = int((targets_B == label).sum())
        weight = mix * count / (count + 1)
        rows_CD[label] = (1 - weight) * own_CD[label] + weight * (own_CD.mean(0) + apart_D)
    return rows_CD


def balanced(records: Sequence[Record]) -> list[Record]:
    """Orders records in turns: one of each class, then a second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for record in records:
        label = label_spellings(record.fields["target"])[-1]
        seen[label] = seen.get(label, 0) + 1
        turns.append(seen[label])
    return [records[i] for i in sorted(range(len(records)), key=turns.__getitem__)]


def _written(task: Task, record: Record) -> str:
    """Returns an example's lines: text (and pair), then the instruction followed by the answer."""
    described = task.to_config()
    answer = described["labels"][task.targets([record])[0]]
    asked = f"{described.get('instruction', '')} {answer}".strip()
    lines = [record.fields["text"], record.fields.get("text_pair"), asked]
    return "\n".join(line for line in lines if line)
