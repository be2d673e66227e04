"""Linear probe: each client fits a head on frozen features of its own records and sends nothing. A baseline.

Ridge regressions and nearest neighbours are tried, and the one of least leave-one-out log loss predicts (`shared/heads.py`).
No prompt stands before the text.
"""

from collections.abc import Generator, Sequence

from ficpd.errors import ConfigError
from ficpd.interfaces import Backbone, ClientContext, Task
from ficpd.methods.shared.heads import MIN_RECORDS, fit_heads, nearest_neighbours
from ficpd.methods.shared.readouts import features_readout
from ficpd.methods.zero_shot import ZeroShot
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, Predictor, Query, State


class Config(FrozenConfig):
    """The method has no settings."""


def build(config: Config, training: LocalTrainingConfig) -> "LinearProbe":
    return LinearProbe(training)


class LinearProbe(ZeroShot):
    name = "linear_probe"

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        unfit = [str(task.to_config()["name"]) for task in tasks if features_readout(task, backbone) is None]
        if unfit:
            raise ConfigError(
                f"linear_probe: {', '.join(unfit)} on {backbone.name} has no labels that are read from features. Use a "
                "classification with task.tuned_head = false on an encoder, or another method"
            )

    def global_prompt(self, state: State) -> None:
        """There is no shared prompt."""

    def local_model(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, list[Predictor]]:
        prompt, batch = assignment.arrays["prompt"], client.local_context().full_batch()
        if len(batch) < MIN_RECORDS:
            return [Predictor(prompt)]
        answer = yield Query(prompt[None], batch, outputs=True)
        assert answer.outputs_KB is not None
        assert batch.targets is not None
        features_BD, targets_B, labels = answer.outputs_KB.features_RD, batch.targets.cpu(), batch.task.num_labels
        heads = [*fit_heads(features_BD, targets_B, labels), nearest_neighbours(features_BD, targets_B, labels)]
        best = min(heads, key=lambda head: head.loss(targets_B))
        return [Predictor(prompt, lambda outputs, batch: best.logits(outputs.features_RD))]
