"""Caches the outputs of rows, because evaluations repeat queries of the same prompts and records."""

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

from ficpd.backbones.chunks import BoundedCache
from ficpd.types import ModelOutput, Query

OUTPUT_BYTES = 64 << 20
"""The maximum bytes of kept outputs."""
Place = tuple[int, int, int]
"""The indices of a row's query, candidate and record."""


class OutputCache(BoundedCache[tuple, ModelOutput]):
    """Caches outputs by prompt, layer and record. Outputs depend on nothing else, so a kept one has the same bits."""

    def keys(self, queries: Sequence[Query], rows: Sequence[Place]) -> list[tuple]:
        """Returns the keys of rows of queries of one kind; [] if their outputs are not kept.

        Queries with gradients or texts are not kept, because they are not repeated. A tuned head needs too much memory.
        """
        first = queries[0]
        if not (self.limit and first.outputs) or first.grad or first.max_new_tokens or first.batch.task.head_rows:
            return []
        prompts = [[(_digest(prompt), prompt.shape) for prompt in query.prompts_KPD] for query in queries]
        return [(*prompts[q][k], first.batch.enters_at, queries[q].batch.items[b]) for q, k, b in rows]

    def keep_rows(self, keys: Sequence[tuple], outputs: ModelOutput) -> None:
        for place, key in enumerate(keys):
            row = outputs.select(torch.tensor([place]))
            self.keep(key, row, sum(part.nbytes for part in row.parts() if part is not None))


def _digest(prompt_PD: Tensor) -> bytes:
    return sha256(prompt_PD.detach().cpu().contiguous().numpy().tobytes()).digest()


def join_outputs(parts: Sequence[ModelOutput | None]) -> ModelOutput:
    """Concatenates the outputs of all chunks, with candidates padded to the widest chunk."""
    some = [part for part in parts if part is not None]
    features = torch.cat([part.features_RD for part in some])
    readout = None
    if some[0].readout_RCD is not None:
        readout = torch.cat([part.readout_RCD for part in some if part.readout_RCD is not None])
    wide = max((part.scores_RN.shape[1] for part in some if part.scores_RN is not None), default=0)
    if not wide:
        return ModelOutput(features, None, readout)
    scores, first = features.new_full((len(features), wide), -torch.inf), 0
    for part in some:
        last = first + len(part.features_RD)
        if part.scores_RN is not None:
            scores[first:last, : part.scores_RN.shape[1]] = part.scores_RN
        first = last
    return ModelOutput(features, scores, readout)
