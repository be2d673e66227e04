"""A prompt in function space. Computed on the server from released updates, so it costs no privacy."""

from dataclasses import replace

import torch
from torch import Tensor

from ficpd import rng
from ficpd.interfaces import Model
from ficpd.tasks import classification, encode_record, synthetic_records
from ficpd.types import Batch, Prompt, Query

NUM_PROBES, SIZE = 24, 64
READING = classification.build(classification.Config(labels={"yes": "yes", "no": "no"}))
"""Any task will do: probes are read, and never scored."""


class FunctionSpaceEmbedding:
    """How prompts move the backbone's features of public texts, against the shared start.

    `NUM_PROBES` texts of words drawn from the vocabulary, or images of colours; the movement [probes, D] is brought to
    `SIZE` numbers by a random orthogonal projection (Johnson and Lindenstrauss, 1984), all from a public seed. Head rows
    have no say in features.
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
        """[K, P, D] to [K, SIZE]."""
        return (self._features(prompts_KPD) - self.still) @ self.projection

    def _features(self, prompts_KPD: Tensor) -> Tensor:
        answer = self.model.answer([Query(prompts_KPD[:, : self.tokens], self.batch, outputs=True)])[0]
        assert answer.outputs_KB is not None
        return answer.outputs_KB.features_RD.cpu().reshape(len(prompts_KPD), -1)
