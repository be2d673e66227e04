"""In-context learning without tuning (Brown et al., NeurIPS 2020, arXiv 2005.14165).

A client shows its own records to the model before each text.

    decoder, masked_lm             x_1, instruction y_1; ...; x_n, instruction y_n; x, instruction _
    sentence or image encoder      readout row of each label  <-  mixed with its examples' mean feature

The second is a nearest-mean classifier (Tip-Adapter, Zhang et al., ECCV 2022, arXiv 2111.03930; see `demonstrations`).
Examples take turns by label, in the records' order, as many as fit. Clients send nothing, but answers reveal the shown
records, so there is no guarantee.
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
from ficpd.types import Answer, Batch, Prompt, Query, Record, State


class Config(FrozenConfig):
    """examples: maximum number in a context (the paper: 10 to 100). A readout uses all."""

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
                f"icl: {', '.join(unfit)} has no labels, or a head that is tuned. Use a classification with "
                "task.tuned_head = false, or another method"
            )

    def demonstrate(
        self, task: Task, records: Sequence[Record], encoded: Callable[[], Batch], prompt: Prompt, backbone: Backbone
    ) -> Generator[Query, Answer, Demonstrations]:
        found = yield from demonstrate(task, records, encoded(), prompt, backbone)
        shown = found.get("") or found[f"{MIXES[-1]:g}"]
        return replace(shown, texts=shown.texts[: self.config.examples])

    def global_prompt(self, state: State) -> None:
        """Returns None: there is no shared prompt."""
