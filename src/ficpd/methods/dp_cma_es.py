"""DP-CMA-ES: the server searches, and a client sends one noised vector of candidate losses.

Our own specification, after FedBPT (Sun et al., ICML 2024, arXiv 2310.01467). FedBPT's clients upload means, losses
and step sizes, which have no bounded sensitivity, and download a covariance of d² numbers. Here

    server  candidates y_1..λ ~ m + σ N(0, C)                  one generation a round; m, σ, C and the paths stay here
    client  f_k = mean_b clip(l_b(y_k) - mean_k l_b) + noise   uploads λ numbers; a record's λ losses are clipped together
    server  (m, σ, C) <- CMA-ES updated by the mean of f       post-processing (Hansen, 2016, arXiv 1604.00772; pycma)

CMA-ES uses ranks only, so centring a record's losses changes no result and saves clip norm. In units of the
candidates' spread the vector is about as long as the record's gradient. The gradients' clip norm fits it
(`cma_es.spread`).

A round queries `training.local_steps` times `training.batch_size` records at once. Candidates lie in the configured
subspace, else in `training.search_dimension` random dimensions. The server sends the candidates themselves:
another machine's factorisation of C would give other candidates for the same seed.
"""

from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from ficpd import rng
from ficpd.federation.aggregation.robust import MEAN, RobustAggregator, RobustConfig
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import validate_arrays, validate_facts, validate_norm
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig
from ficpd.optimizers.cma_es import CMAES, center_losses, init_state, spread
from ficpd.optimizers.search_space import SearchSpace
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Prompt, Query, State

SEARCH = "search/"


class Config(FrozenConfig):
    robust: RobustConfig = MEAN


def build(config: Config, training: LocalTrainingConfig) -> "DpCmaEs":
    return DpCmaEs(config, training)


class DpCmaEs(Method):
    name = "dp_cma_es"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.robust = config.robust
        self.capabilities = Capabilities(
            private_units=("record", "client"), linear=config.robust.sums, candidates=training.population,
            means_per_update=1, subspace=False,
        )  # fmt: skip

    def init(self, setup: FederationInfo) -> State:
        start, space = setup.start.vectors_PD, self._space(setup.start.vectors_PD)
        sigma = self.training.perturbation or self.training.rate(1, setup.num_rounds)
        return self._state(start, init_state(space.size, sigma * space.unit), {})

    def local_workload(self, state: State) -> tuple[int, int]:
        return 1, self.training.local_steps * self.training.batch_size

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        arrays = {"candidates_KN": state.arrays["candidates_KN"], "mean": state.arrays[SEARCH + "mean"].float()}
        return Assignment(self.name, round, arrays)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        candidates_KN, sent = assignment.arrays["candidates_KN"], []
        scale = spread(candidates_KN) * len(candidates_KN) ** 0.5
        for batch in client.batches(*self.local_workload(State({}))):
            answer = yield Query(client.start + self._space(client.start).lift(candidates_KN), batch)
            sent.append(client.private_mean(center_losses(answer.loss_KB) / scale))
        return ClientUpdate(client.id, {"losses_1K": torch.stack(sent)}, client.weight)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"losses_1K": (1, self.training.population)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means = RobustAggregator(self.robust, updates)
        losses_K = means.mean_of("global", {u.client: u.arrays["losses_1K"] for u in means.updates}, means.weights)[0]
        search = {n.removeprefix(SEARCH): array for n, array in state.arrays.items() if n.startswith(SEARCH)}
        updated = CMAES(search, self.training.population).tell(state.arrays["candidates_KN"], losses_K)
        return self._state(state.arrays["start"], updated.state, {**state.facts, **means.facts})

    def global_prompt(self, state: State) -> Tensor:
        start = state.arrays["start"]
        return start + self._space(start).lift(state.arrays[SEARCH + "mean"].float())

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.start + self._space(client.start).lift(assignment.arrays["mean"])

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless the arrays are a population and its mean, both within the maximum norm."""
        space, K = self._space(start.vectors_PD), self.training.population
        validate_facts(assignment, {})
        validate_arrays(assignment, {"candidates_KN": (K, space.size), "mean": (space.size,)})
        for name, array in assignment.arrays.items():
            validate_norm(start.vectors_PD + space.lift(array), start, name)

    def _space(self, start_PD: Tensor) -> SearchSpace:
        return SearchSpace(
            tuple(start_PD.shape), self.subspace, self.training.search_dimension, self.training.public_seed
        )

    def _state(self, start_PD: Tensor, search: Mapping[str, Tensor], facts: Mapping) -> State:
        """Returns the state with the candidates of the next generation."""
        random = rng.make_generator("candidates", self.training.public_seed, self.name, int(search["generation"]))
        candidates_KN = CMAES(search, self.training.population).ask(random)
        arrays = {"start": start_PD, "candidates_KN": candidates_KN}
        return State(arrays | {SEARCH + name: array for name, array in search.items()}, dict(facts))
