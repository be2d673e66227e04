"""Embeds prompts by their effect on public probes. It reads released updates only, so it costs no privacy."""

from dataclasses import replace

import torch
from torch import Tensor

from ficpd import rng
from ficpd.interfaces import Model
from ficpd.tasks import classification, encode_record, synthetic_records
from ficpd.types import Batch, Prompt, Query

NUM_PROBES, SIZE = 24, 64
READING = classification.build(classification.Config(labels={"yes": "yes", "no": "no"}))  # probes are never scored


class FunctionSpaceEmbedding:
    """Measures the shift of `NUM_PROBES` synthetic records' features against the initial prompt.

    A random orthogonal projection maps the shift [probes, D] to `SIZE` numbers (Johnson and Lindenstrauss, 1984). Probes
    and projection come from a public seed. Head rows do not change features.
    """

    def __init__(self, model: Model, start: Prompt, seed: int):
        tokens = len(start.vectors_PD) - start.head_rows
        bare = replace(start, vectors_PD=start.vectors_PD[:tokens], head_rows=0)
        probes = synthetic_records(model.backbone, NUM_PROBES, seed, "probe")
        items = tuple((encode_record(probe, model.backbone, bare.num_virtual_tokens),) for probe in probes)
        self.model, self.tokens, self.batch = model, tokens, Batch(READING, items, None, None, start.enters_at)
        random = torch.randn(NUM_PROBES * start.vectors_PD.shape[1], SIZE, generator=rng.make_generator(seed, "probes"))
        self.projection = torch.linalg.qr(random).Q
        self.still = self._features(start.vectors_PD[None])

    def signatures(self, prompts_KPD: Tensor) -> Tensor:
        """Maps [K, P, D] to [K, SIZE]."""
        return (self._features(prompts_KPD) - self.still) @ self.projection

    def _features(self, prompts_KPD: Tensor) -> Tensor:
        answer = self.model.answer([Query(prompts_KPD[:, : self.tokens], self.batch, outputs=True)])[0]
        assert answer.outputs_KB is not None
        return answer.outputs_KB.features_RD.cpu().reshape(len(prompts_KPD), -1)
