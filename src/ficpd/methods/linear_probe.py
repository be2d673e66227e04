"""Linear probe: each client fits a head on frozen features of its own records and sends nothing. A baseline.

The candidates are the label texts, ridge regressions (shrunk towards zero or towards the label texts) and nearest
neighbours, each with the client's label prior. The one of least leave-one-out log loss predicts (`shared/heads.py`). The
backbone has no prompt. Clients with few records or a single label have the label texts and the prior.
"""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from ficpd.interfaces import Backbone, ClientContext, Task
from ficpd.methods.shared.heads import MIN_RECORDS, OwnHead, calibrate, fit_heads, nearest_neighbours
from ficpd.methods.shared.readouts import check_features_readout
from ficpd.methods.zero_shot import ZeroShot
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, Batch, ModelOutput, Predictor, Query, State

Reading = Callable[[ModelOutput, Batch], Tensor]
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)


class Config(FrozenConfig):
    """The method has no settings."""


def build(config: Config, training: LocalTrainingConfig) -> "LinearProbe":
    return LinearProbe(training)


class LinearProbe(ZeroShot):
    name = "linear_probe"

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        check_features_readout(self.name, tasks, backbone)

    def global_prompt(self, state: State) -> None:
        """Returns None: there is no shared prompt."""

    def local_model(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, list[Predictor]]:
        prompt, local = assignment.arrays["prompt"], client.local_context()
        batch, subject_B = local.full_batch(), local.subject_B
        if not len(batch) or batch.targets is None or not batch.task.num_labels:
            return [Predictor(prompt)]
        answer = yield Query(prompt[None], batch, outputs=True)
        assert answer.outputs_KB is not None
        readings = _readings(answer.outputs_KB, batch, batch.targets.cpu(), subject_B)
        found = [(calibrate(loo_BC, batch.targets.cpu(), subject_B), read) for loo_BC, read in readings]
        chosen, read = min(found, key=lambda one: one[0].loss)

        def logits(outputs: ModelOutput, batch: Batch) -> Tensor:
            return chosen.temperature * read(outputs, batch) + chosen.prior_C

        return [Predictor(prompt, logits)]


def _readings(
    outputs: ModelOutput, batch: Batch, targets_B: Tensor, subject_B: Tensor | None = None
) -> list[tuple[Tensor, Reading]]:
    """Returns for each candidate the leave-one-out logits of the client's records, and its logits of any records."""
    found: list[tuple[Tensor, Reading]] = [(_by_texts(outputs, batch), _by_texts)]
    if len(batch) < MIN_RECORDS or len(targets_B.unique()) < 2:
        return found
    features_BD, labels = outputs.features_RD, batch.task.num_labels
    heads = [nearest_neighbours(features_BD, targets_B, labels, subject_B)]
    texts = [] if batch.readout_CD is None else [(batch.readout_CD, torch.zeros(labels))]
    for prior in [None, *texts]:
        heads += fit_heads(features_BD, targets_B, labels, prior, PENALTIES, subject_B)
    return found + [(head.loo_BC, _by_head(head)) for head in heads]


def _by_texts(outputs: ModelOutput, batch: Batch) -> Tensor:
    logits_RC = batch.task.logits(outputs, batch)
    assert logits_RC is not None, "a task with labels"
    return logits_RC.float().cpu()


def _by_head(head: OwnHead) -> Reading:
    return lambda outputs, batch: head.logits(outputs.features_RD)
