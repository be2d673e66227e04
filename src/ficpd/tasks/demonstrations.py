"""Demonstrations beside a prompt: somebody's own records, shown to the frozen model together with every new text.

A backbone that reads a context (a decoder) is shown them in it: text, instruction and answer of as many as fit, before
the text that is asked about (Brown et al., NeurIPS 2020, arXiv 2005.14165). An encoder cannot read a context. What
in-context examples mean there: the examples' own features join the readout, so that a text is compared with them as well
as with the answers' texts (the cache of Tip-Adapter, Zhang et al., ECCV 2022, arXiv 2111.03930; the nearest class mean of
Snell et al., NeurIPS 2017, arXiv 1703.05175). Both are somebody's records, or made of them: where they go, those go.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd.errors import LibraryError
from ficpd.interfaces import Backbone, Task
from ficpd.types import Answer, Batch, Prompt, Query, Record

MIXES = (0.4, 0.8)
"""How much of a readout row is the examples', if there were many; of one example it is half of that."""


@dataclass(frozen=True)
class Demonstrations:
    """`texts`: whole examples, for a backbone that reads a context, those shown first first. `readout_CD`: what answers
    are scored by instead of the task's own, for one that does not."""

    texts: tuple[str, ...] = ()
    readout_CD: Tensor | None = None

    def encode(
        self, task: Task, records: Sequence[Record], backbone: Backbone, prompt: Prompt, encoded: Batch | None = None
    ) -> Batch:
        """Records as the task encodes them (`encoded`, if that was done before), with the demonstrations beside each. Where
        only some fit into the context, the later ones are left out; a text is never cut for them."""
        if self.readout_CD is not None:
            batch = encoded or task.encode(records, backbone, prompt)
            return replace(batch, readout_CD=self.readout_CD.to(backbone.device))
        own = task.encode(records, backbone, prompt)  # `encoded` may have been cut for another prompt
        lengths = [backbone.tokenize(f"{text}\n\n", None, "", None, 0).length + 1 for text in self.texts]
        shown = []
        for record, items in zip(records, own.items, strict=True):
            space = backbone.max_tokens - prompt.num_virtual_tokens - max(item.length for item in items)
            shown.append(self._before(record, lengths, space))
        return task.encode(shown, backbone, prompt)

    def _before(self, record: Record, lengths: Sequence[int], space: int) -> Record:
        """The record with as many examples before its text as `space` tokens hold."""
        fit = []
        for text, length in zip(self.texts, lengths, strict=True):
            if length > space:
                break
            fit.append(text)
            space -= length
        return Record(record.key, {**record.fields, "text": "\n\n".join([*fit, record.fields["text"]])})


def supports_demonstrations(task: Task) -> bool:
    """Whether examples of the task can be shown: its answers are texts by label, and no head was tuned for them."""
    return bool(task.to_config().get("labels")) and not task.head_rows


def is_in_context(backbone: Backbone) -> bool:
    """Whether what stands before or behind a text is read with it: whether an instruction makes it longer."""
    if backbone.modality == "image":
        return False
    return backbone.tokenize("a", None, "a", None, 0).length > backbone.tokenize("a", None, "", None, 0).length


def demonstrate(
    task: Task, records: Sequence[Record], batch: Batch, prompt: Prompt, backbone: Backbone
) -> Generator[Query, Answer, dict[str, Demonstrations]]:
    """Demonstrations made of these records, by what tells them apart: nothing for a context, the mix for a readout.

    `batch` is the records encoded. Raises `LibraryError` for a task that has no labels, or a head of its own.
    """
    if not supports_demonstrations(task):
        raise LibraryError(
            "only a classification without a tuned head can be shown demonstrations; adapt in another way"
        )
    if is_in_context(backbone):
        return {"": Demonstrations(tuple(_written(task, record) for record in balanced(records)))}
    assert batch.targets is not None
    assert batch.readout_CD is not None
    answer = yield Query(prompt.vectors_PD[None], batch, outputs=True)
    assert answer.outputs_KB is not None
    features_BD, own_CD = answer.outputs_KB.features_RD.cpu(), batch.readout_CD.float().cpu()
    return {
        f"{mix:g}": Demonstrations(readout_CD=mix_readout(own_CD, features_BD, batch.targets, mix)) for mix in MIXES
    }


def mix_readout(own_CD: Tensor, features_BD: Tensor, targets_B: Tensor, mix: float) -> Tensor:
    """[C, D]: of each class (1 - w) of its own row and w of what its examples' mean has beside the mean of all classes',
    in the rows' own length; w = mix · n / (n + 1) for n examples. A class without examples keeps its row.

    Only the difference to all classes' mean is taken, because every text of the task is like every example of it: else
    the classes that have examples would draw what belongs to those that have none. With one class there is no difference.
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
    """One record of each class, then a second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for record in records:
        label = str(record.fields["target"])
        seen[label] = seen.get(label, 0) + 1
        turns.append(seen[label])
    return [records[i] for i in sorted(range(len(records)), key=turns.__getitem__)]


def _written(task: Task, record: Record) -> str:
    """An example as the backbone reads it: text (and pair), then the instruction with the answer behind it."""
    described = task.to_config()
    answer = described["labels"][str(record.fields["target"])]
    lines = [
        record.fields["text"],
        record.fields.get("text_pair"),
        f"{described.get('instruction', '')} {answer}".strip(),
    ]
    return "\n".join(line for line in lines if line)
