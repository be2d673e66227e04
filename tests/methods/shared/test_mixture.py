"""A client's own mixture: the nearest of its records serve where label texts do not tell its labels apart."""

import pytest
import torch
from torch.nn import functional as F

from ficpd.methods.shared.heads import STRENGTHS
from ficpd.methods.shared.mixture import TEMPERATURES, Candidate, weigh_members
from ficpd.tasks import classification
from ficpd.types import Answer, Batch, EncodedInput, ModelOutput

LABELS, WIDTH, EACH = 12, 16, 6
NEAREST = len(STRENGTHS) * len(TEMPERATURES)
"""Members of one head, and so of the nearest neighbours, which are the last."""


def drawn(seed: int, centres_CKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws unit features around the centres of each label, and their labels."""
    noise = torch.randn(EACH, *centres_CKD.shape, generator=torch.Generator().manual_seed(seed))
    features_BD = F.normalize((centres_CKD + 0.25 * noise).reshape(-1, WIDTH), dim=1)
    places = torch.arange(LABELS)[None, :, None].expand(EACH, LABELS, centres_CKD.shape[1])
    return features_BD, places.reshape(-1)


def encoded(features_BD: torch.Tensor, targets_B: torch.Tensor) -> tuple[Batch, ModelOutput]:
    """A batch whose label texts are read by random rows."""
    texts = {f"label {n}": f"text {n}" for n in range(LABELS)}
    rows_CD = 20 * F.normalize(torch.randn(LABELS, WIDTH, generator=torch.Generator().manual_seed(5)), dim=1)
    items = tuple((EncodedInput(torch.zeros(1), 1),) for _ in targets_B)
    return Batch(classification.build(classification.Config(labels=texts)), items, targets_B, rows_CD, 0), ModelOutput(
        features_BD
    )


def mixed(neighbours: bool, features_BD: torch.Tensor, targets_B: torch.Tensor):
    batch, outputs = encoded(features_BD, targets_B)
    work = weigh_members([Candidate((torch.zeros(1, WIDTH),), neighbours=neighbours)], batch)
    next(work)
    with pytest.raises(StopIteration) as end:
        work.send(Answer(None, None, outputs))
    ((members,), (weight_M,)) = end.value.value
    return members, weight_M


def accuracy(members, weight_M, features_BD: torch.Tensor, targets_B: torch.Tensor) -> float:
    batch, outputs = encoded(features_BD, targets_B)
    shares = sum(w * m.read(outputs, batch).softmax(1) for m, w in zip(members, weight_M, strict=True))
    return float((shares.argmax(1) == targets_B).float().mean())


@pytest.fixture
def two_centres() -> torch.Tensor:
    """Two groups of features for each label, in any direction."""
    drawn = torch.randn(LABELS, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    return F.normalize(drawn, dim=2)


def test_the_nearest_records_serve_where_label_texts_do_not(two_centres):
    own, new = drawn(2, two_centres), drawn(3, two_centres)
    without, weight_M = mixed(False, *own)
    members, weights = mixed(True, *own)
    assert len(members) == len(without) + NEAREST
    assert float(weights[-NEAREST:].sum()) > 0.9
    assert accuracy(members, weights, *new) > accuracy(without, weight_M, *new) + 0.1


def test_the_nearest_records_are_not_scored_by_their_own_labels(two_centres):
    """With labels by chance each record is its own best neighbour; left out, it is no help."""
    features_BD, targets_B = drawn(2, two_centres)
    chance_B = targets_B[torch.randperm(len(targets_B), generator=torch.Generator().manual_seed(4))]
    _, weights = mixed(True, features_BD, chance_B)
    assert float(weights[-NEAREST:].sum()) < 0.2
