"""FedBPT: clients run CMA-ES, and the server updates CMA-ES with the clients' means as its population.

Sun et al., "FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models", ICML 2024, arXiv
2310.01467.

    client k  from (m, C, σ): `iterations` generations of `population` candidates y, prompt = p0 + A y, fitness
                  F(y) = mean_i L(f(y; x_i), t_i) / mean_i L(f(y; x'_i), t_i)              (equation 7, x' = x masked)
              sends its mean m_k, F(m_k), and the σ_kj of its generations j
    server    σ' = 2 √( Σ_{k in the better half} Σ_j σ_kj² / (|S| population) )            (equation 6)
              (m, C, σ') <- CMA-ES updated by the m_k and their F(m_k)

In a masked record x', random words replace a share of its words. So a prompt that needs only few words gains
nothing. As in the paper's code, F is a ratio of means. Each generation queries all records.

Defaults are the paper's (8 generations of 5, 500 random dimensions, first σ 1); `masked` is its code's (the paper
prefers 0.4 and 0.6). As in the code, the clients' next σ is the last one times the server's change of σ'. (The paper
leaves it open.) (The code also keeps σ above 0.5 and never increases it.)

Ours: each client draws its own candidates. With the code's common seed, similar clients would send equal means. A
configured subspace is A. Fewer than four updates are averaged, because pycma takes no smaller population. Ranks have
no weights, so a late update counts like the others. There are no mirrored candidates, which pycma adds to populations
below six. C is sent as its lower triangle in float32.

Of `training.*` only the seed is used. There is no private form; see `Capabilities.not_private`.
"""

from collections.abc import Generator, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from ficpd import rng
from ficpd.errors import CodecError, ConfigError
from ficpd.federation.aggregation.mean import weighted_mean
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import validate_arrays, validate_facts, validate_norm
from ficpd.interfaces import Backbone, ClientContext, Model, Task
from ficpd.optimizers import LocalTrainingConfig
from ficpd.optimizers.cma_es import CMAES, init_state
from ficpd.optimizers.search_space import SearchSpace
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, Batch, ClientCard, ClientUpdate, FederationInfo, Prompt, Query, State

SEARCH = "search/"
FEWEST = 4
LARGEST_SHAPE = 1e12
"""The largest number in a covariance that a site accepts."""
EVERYTHING = 1 << 30  # a batch of all records


class Config(FrozenConfig):
    """iterations: CMA-ES generations of a client in a round.
    population: candidates of a generation.
    dimension: numbers of the search space.
    spread: the first σ, in units of the initial prompt's RMS (the paper's α).
    ratio: false: the fitness is the plain loss.
    masked: share of words replaced."""

    iterations: int = Field(default=8, ge=1)
    population: int = Field(default=5, ge=4)
    dimension: int = Field(default=500, ge=2)
    spread: float = Field(default=1.0, gt=0)
    ratio: bool = True
    masked: float = Field(default=0.5, gt=0, le=1)


def build(config: Config, training: LocalTrainingConfig) -> "FedBpt":
    return FedBpt(config, training)


class FedBpt(Method):
    name = "fedbpt"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config, self.seed = config, training.public_seed
        passes = config.iterations * config.population + 1
        self.capabilities = Capabilities(
            not_private="its ratio of losses has no bounded sensitivity; use dp_cma_es, or run it without privacy",
            candidates=passes * (2 if config.ratio else 1) / (config.iterations + 1),
        )

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        if self.config.ratio and backbone.modality == "image":
            raise ConfigError(f"method.ratio = true: {backbone.name} takes images, without words; set it to false")

    def init(self, setup: FederationInfo) -> State:
        start, space = setup.start.vectors_PD, self._space(setup.start.vectors_PD)
        sigma = self.config.spread * float(start.square().mean().sqrt()) * space.unit
        return self._state(start, init_state(space.size, sigma, full=True), {"sigma": sigma})

    def local_workload(self, state: State) -> tuple[int, int]:
        return self.config.iterations + 1, EVERYTHING

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        search = _search(state)
        lower = search["shape"][*torch.tril_indices(*search["shape"].shape)]
        arrays = {"mean": search["mean"].float(), "shape_lower": lower.float()}
        return Assignment(self.name, round, arrays, {"sigma": state.facts["sigma"]})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        search, sigmas = CMAES(self._init_search(assignment), self.config.population), []
        batches = client.batches(*self.local_workload(State({})))
        for j in range(self.config.iterations):
            random = rng.make_generator("candidates", self.seed, self.name, client.id, assignment.round, j)
            candidates_KN = search.ask(random)
            fitness_K = yield from self._fitness(client, candidates_KN, next(batches))
            sigmas.append(search.sigma)
            search.tell(candidates_KN, fitness_K)
        mean_1N = search.mean[None]
        fitness_1 = yield from self._fitness(client, mean_1N, next(batches))
        arrays = {"mean_1N": mean_1N, "loss": fitness_1.float(), "sigmas": torch.tensor(sigmas)}
        return ClientUpdate(client.id, arrays, client.weight)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        size = self._space(state.arrays["start"]).size
        return {"mean_1N": (1, size), "loss": (1,), "sigmas": (self.config.iterations,)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        search, sigma, start = _search(state), state.facts["sigma"], state.arrays["start"]
        updates = sorted(updates, key=lambda update: update.client)
        if len(updates) < FEWEST:
            mean = weighted_mean(updates, "mean_1N")[0].double()
            return self._state(start, search | {"mean": mean}, state.facts)
        losses_S = torch.cat([update.arrays["loss"] for update in updates])
        means_SN = torch.cat([update.arrays["mean_1N"] for update in updates])
        squares_S = torch.stack([update.arrays["sigmas"].double().square().sum() for update in updates])
        better = losses_S.argsort(stable=True)[: len(updates) // 2]
        wide = 2 * (squares_S[better].sum() / (len(updates) * self.config.population)).sqrt()  # equation 6
        wide = wide if wide > 0 else torch.tensor(sigma)  # every σ of the better half is 0
        updated = CMAES(search | {"sigma": wide}, len(updates)).tell(means_SN, losses_S)
        return self._state(start, updated.state, {**state.facts, "sigma": sigma * updated.sigma / float(wide)})

    def global_prompt(self, state: State) -> Tensor:
        start = state.arrays["start"]
        return start + self._space(start).lift(_search(state)["mean"].float())

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.start + self._space(client.start).lift(assignment.arrays["mean"])

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless mean, covariance and sigma are valid."""
        size = self._space(start.vectors_PD).size
        validate_facts(assignment, {"sigma": (float,)})
        validate_arrays(assignment, {"mean": (size,), "shape_lower": (size * (size + 1) // 2,)})
        space = self._space(start.vectors_PD)
        validate_norm(start.vectors_PD + space.lift(assignment.arrays["mean"]), start, "mean")
        if not 0 < assignment.facts["sigma"] < 1e6:
            raise CodecError(f"the assignment's 'sigma' is {assignment.facts['sigma']}, expected in 0..1e6, exclusive")
        if not bool((assignment.arrays["shape_lower"].abs() <= LARGEST_SHAPE).all()):
            raise CodecError(f"the assignment's 'shape_lower' has numbers beyond {LARGEST_SHAPE:g}, or none")

    def _fitness(self, client: ClientContext, candidates_KN: Tensor, batch: Batch) -> Generator[Query, Answer, Tensor]:
        """Returns the candidates' fitness [K]: the ratio of the mean losses, or the mean loss."""
        prompts_KPD = client.start + self._space(client.start).lift(candidates_KN)
        answer = yield Query(prompts_KPD, batch)
        if not self.config.ratio:
            return client.private_mean(answer.loss_KB)
        masked = yield Query(prompts_KPD, client.corrupted_batch(self.config.masked))
        loss_K, masked_K = client.private_mean(torch.cat([answer.loss_KB, masked.loss_KB])).chunk(2)
        return loss_K / masked_K.clamp(min=1e-6)

    def _init_search(self, assignment: Assignment) -> dict[str, Tensor]:
        mean = assignment.arrays["mean"].double()
        shape = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        shape[*torch.tril_indices(*shape.shape)] = assignment.arrays["shape_lower"].double()
        whole = shape + shape.tril(-1).T
        return init_state(len(mean), assignment.facts["sigma"], full=True) | {"mean": mean, "shape": whole}

    def _space(self, start_PD: Tensor) -> SearchSpace:
        return SearchSpace(tuple(start_PD.shape), self.subspace, self.config.dimension, self.seed)

    def _state(self, start_PD: Tensor, search: Mapping[str, Tensor], facts: Mapping) -> State:
        return State({"start": start_PD, **{SEARCH + name: array for name, array in search.items()}}, dict(facts))


def _search(state: State) -> dict[str, Tensor]:
    return {n.removeprefix(SEARCH): array for n, array in state.arrays.items() if n.startswith(SEARCH)}
