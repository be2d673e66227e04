"""In-context learning: the client's own records stand before each of its texts, and nothing is tuned (Brown et al., NeurIPS
2020, arXiv 2005.14165).

    reads a context (a decoder, a cloze)   x_1, instruction y_1; ...; x_n, instruction y_n; x, instruction _
    reads none (a sentence or image encoder)   readout row of each label  <-  mixed with its examples' mean feature

The second is what untuned examples mean to an encoder (Tip-Adapter, Zhang et al., ECCV 2022, arXiv 2111.03930; see
`demonstrations`). Examples are taken label by label in turn, in the records' order, as many as fit before a text. Nothing
leaves; but whoever is answered with them is told of records, so this has no guarantee to give.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from pydantic import Field

from ficpd.errors import ConfigError
from ficpd.interfaces import Backbone, Task
from ficpd.methods.zero_shot import ZeroShot
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig
from ficpd.tasks.demonstrations import MIXES, Demonstrations, demonstrate, supports_demonstrations
from ficpd.types import (
    Answer,
    Batch,
    Prompt,
    Query,
    Record,
    State,
)


class Config(FrozenConfig):
    """`examples`: how many are shown in a context, at most (the paper: as many as fit, 10 to 100). A readout takes all."""

    examples: int = Field(default=32, ge=1)


def build(config: Config, training: LocalTrainingConfig) -> "Icl":
    return Icl(config, training)


class Icl(ZeroShot):
    name = "icl"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        unfit = [str(task.to_config()["name"]) for task in tasks if not supports_demonstrations(task)]
        if unfit:
            raise ConfigError(
                f"icl shows examples with their labels' texts, and {', '.join(unfit)} has no labels, or a head that is "
                "tuned; take a classification with task.tuned_head = false, or another method"
            )

    def demonstrate(
        self, task: Task, records: Sequence[Record], encoded: Callable[[], Batch], prompt: Prompt, backbone: Backbone
    ) -> Generator[Query, Answer, Demonstrations]:
        found = yield from demonstrate(task, records, encoded(), prompt, backbone)
        shown = found.get("") or found[f"{MIXES[-1]:g}"]
        return replace(shown, texts=shown.texts[: self.config.examples])

    def global_prompt(self, state: State) -> None:
        """Nothing that all share: each has examples of its own."""
