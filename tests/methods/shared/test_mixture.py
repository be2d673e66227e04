"""A client's own mixture: the nearest of its records serve where label texts do not tell its labels apart."""

import pytest
import torch
from torch.nn import functional as F

from ficpd.methods.shared.heads import STRENGTHS
from ficpd.methods.shared.mixture import AS_RECEIVED, HEAD_TEMPERATURES, TEMPERATURES, Candidate, weigh_members
from ficpd.tasks import classification
from ficpd.types import Answer, Batch, EncodedInput, ModelOutput, Readout

LABELS, WIDTH, EACH = 12, 16, 6
NEAREST = len(STRENGTHS) * len(HEAD_TEMPERATURES)
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
    task = classification.build(classification.Config(labels=texts))
    return Batch(task, items, targets_B, rows_CD, 0), ModelOutput(features_BD)


def mixed(neighbours: bool, features_BD: torch.Tensor, targets_B: torch.Tensor, *readouts: Readout | None):
    """readouts: the candidate's, and the one that scores it."""
    batch, outputs = encoded(features_BD, targets_B)
    given, scoring = (*readouts, None, None)[:2]
    work = weigh_members([Candidate(torch.zeros(1, WIDTH), given, neighbours=neighbours, scoring=scoring)], batch)
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


def fitted(seed: int, scale: float = 8.0) -> tuple[tuple[torch.Tensor, torch.Tensor], Readout]:
    """Draws features and labels that have nothing to do with each other, and fits a readout to them."""
    random = torch.Generator().manual_seed(seed)
    features_BD = F.normalize(torch.randn(LABELS * EACH, WIDTH, generator=random), dim=1)
    targets_B = torch.arange(LABELS).repeat(EACH)
    wanted_BC = F.one_hot(targets_B, LABELS).float() - 1 / LABELS
    rows_CD = torch.linalg.lstsq(features_BD, wanted_BC).solution.T
    return (features_BD, targets_B), Readout(scale * rows_CD, torch.zeros(LABELS), torch.full((LABELS,), 1 / LABELS))


def test_a_readout_is_not_trusted_for_how_it_fits_the_records_that_it_was_learned_from():
    own, readout = fitted(6)
    new, elsewhere = fitted(7)

    def loss(*readouts):
        members, weight_M = mixed(False, *own, *readouts)
        batch, outputs = encoded(*new)
        shares = sum(w * m.read(outputs, batch).softmax(1) for m, w in zip(members, weight_M, strict=True))
        return float(F.nll_loss(shares.log(), new[1]))

    chance = torch.tensor(float(LABELS)).log()
    assert loss(readout) > chance + 0.05
    assert loss(readout, elsewhere) < chance + 0.02


def test_records_that_decide_nothing_leave_most_weight_to_the_readout_as_received():
    targets_B = torch.arange(LABELS).repeat(EACH)
    even = Readout(torch.zeros(LABELS, WIDTH), torch.zeros(LABELS), torch.full((LABELS,), 1 / LABELS))
    members, weight_M = mixed(True, torch.ones(len(targets_B), WIDTH) / WIDTH**0.5, targets_B, even)
    received = len(STRENGTHS) * len(TEMPERATURES)
    assert sum(m.share for m in members) == pytest.approx(1)
    assert sum(m.share for m in members[:received]) == pytest.approx(AS_RECEIVED)
    assert float(weight_M[:received].sum()) > 0.5
