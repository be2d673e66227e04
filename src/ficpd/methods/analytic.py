"""Analytic federated learning: one round of summed statistics, and the centralised ridge regression from them. A baseline.

Each client sends counts, sums of features by label and the Gram matrix. The server's head is exactly that of all records
together, whatever their partition (AFL, He et al., CVPR 2025, arXiv 2405.16240; Fed3R, Fanì et al., ICML 2024, arXiv
2406.01116). At the record level the noise on the Gram matrix raises the penalty, as in AdaSSP (Wang, UAI 2018, arXiv
1803.02596). The noise is estimated from the scatter of the clients' matrices.
"""

from collections.abc import Generator, Mapping, Sequence

from torch import Tensor

from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import validate_arrays
from ficpd.interfaces import Backbone, ClientContext, Model, Task
from ficpd.methods.shared.class_totals import CLASSES
from ficpd.methods.shared.readouts import (
    assigned_readout,
    check_features_readout,
    client_totals,
    init_readouts,
    learn_readouts,
    reading,
    readout_assignment,
    state_readout,
    totals_spec,
    validate_readout,
)
from ficpd.optimizers import LocalTrainingConfig
from ficpd.registry import FrozenConfig
from ficpd.types import (
    Answer,
    Assignment,
    ClientCard,
    ClientUpdate,
    FederationInfo,
    Predictor,
    Prompt,
    Query,
    Readout,
    State,
)

ALL_RECORDS = 1 << 40


class Config(FrozenConfig):
    """The method has no settings."""


def build(config: Config, training: LocalTrainingConfig) -> "Analytic":
    return Analytic(training)


class Analytic(Method):
    """Guarantees: those of `readouts.client_totals`; nothing else is released."""

    name = "analytic"
    capabilities = Capabilities(
        private_units=("record",), statistics_once={CLASSES: 0.5}, learns_readout=True, rounds=1, candidates=1,
        not_private="its clients release sums over their records; use privacy.name = 'record_gaussian'",
        subspace=False,
    )  # fmt: skip
    gram = True

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        check_features_readout(self.name, tasks, backbone)

    def init(self, setup: FederationInfo) -> State:
        readouts = init_readouts(setup, gram=self.gram, texts=False)
        return State({"prompt": setup.start.vectors_PD, **readouts.arrays}, readouts.facts)

    def local_workload(self, state: State) -> tuple[int, int]:
        return 0, ALL_RECORDS

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, *readout_assignment(state, client))

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        totals = yield from client_totals(client, assignment)
        return ClientUpdate(client.id, totals)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return totals_spec(state)

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return learn_readouts(state, updates)

    def local_model(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, list[Predictor]]:
        yield from ()
        return [Predictor(client.start, reading(assigned_readout(assignment), None))]

    def readout(self, state: State, client: ClientCard) -> Readout | None:
        return state_readout(state, client)

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.start

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        validate_arrays(validate_readout(assignment, start.vectors_PD.shape[1], {}), {})
