"""DP-ZO: zeroth-order tuning whose updates are a few noised directional derivatives, for black-box models.

Zhang et al., "DPZero: Private Fine-Tuning of Language Models without Backpropagation", ICML 2024, arXiv 2310.09639
(and Tang et al., "Private Fine-tuning of Large Language Models with Zeroth-order Optimization", 2024, arXiv
2401.04343), federated as in DeComFL (Li et al., "Achieving Dimension-Free Communication in Federated Learning via
Zeroth-Order Optimization", ICLR 2025, arXiv 2405.15861). Directions come from a public seed and are not sent.

    client  s_jk = mean_b clip((l_b(p + c u_jk) - l_b(p - c u_jk)) / 2c) + noise   step j, direction k (DPZero, algorithm 1)
            p <- p - η Σ_k s_jk u_jk                                               sends s alone: steps x K numbers
    server  p <- p - η Σ_jk (mean over clients of s_jk) u_jk                       (DeComFL, algorithm 2)

The server's step is linear in s, so it equals the mean of the clients' steps. `ClientContext.private_mean` clips a
record's K derivatives together. The server sends the smaller one: the averaged derivatives so far, which clients
replay, or the prompt.

Two choices are ours. Directions are random signs (DPZero: the sphere, MeZO: Gaussian), K in a step, in the configured
subspace. And η: a step is as long as Adam's at the same rate, times the share of the gradient that K directions show
(`spsa.step_scale`). The server tracks the RMS of the derivatives for it, so clients do not move in the first round.
The settings are `training.directions` and `training.perturbation`; `training.optimizer` is not used.
"""

from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from ficpd.errors import CodecError
from ficpd.federation.aggregation.robust import MEAN, RobustAggregator, RobustConfig
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import RATE, validate_arrays, validate_facts, validate_norm
from ficpd.interfaces import ClientContext, Model
from ficpd.optimizers import LocalTrainingConfig
from ficpd.optimizers.search_space import SearchSpace
from ficpd.optimizers.spsa import directional_derivatives, step_scale
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Prompt, Query, State

MEMORY = 0.9
"""Share of earlier rounds in the mean squared derivative."""


class Config(FrozenConfig):
    robust: RobustConfig = MEAN


def build(config: Config, training: LocalTrainingConfig) -> "DpZo":
    return DpZo(config, training)


class DpZo(Method):
    name = "dp_zo"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.robust = config.robust
        self.capabilities = Capabilities(
            private_units=("record", "client"), linear=config.robust.sums, candidates=2 * training.directions,
            means_per_update=training.local_steps, subspace=False,
        )  # fmt: skip

    def init(self, setup: FederationInfo) -> State:
        """Returns the state; `moves_TK` holds the prompt's moves along each direction of each step so far."""
        start = setup.start.vectors_PD
        arrays = {"start": start, "y": torch.zeros(self._space(start).size), "moves_TK": self._moves(0)}
        return State(arrays, {"num_rounds": setup.num_rounds, "slope": 0.0})

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        moves, y = state.arrays["moves_TK"], state.arrays["y"]
        arrays = {"moves_TK": moves} if moves.numel() <= y.numel() else {"y": y}
        facts = {"rate": rate, "step": self._step(rate, state.facts["slope"], self._space(state.arrays["start"]))}
        return Assignment(self.name, round, arrays, facts)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        space, sent = self._space(client.start), []
        apart, y = self.training.apart(assignment) * space.unit, self._point(client.start, assignment)
        batches = client.batches(self.training.local_steps, self.training.batch_size)
        for step, batch in enumerate(batches):
            signs_KN = self._signs(space, assignment.round, step)
            both = torch.cat([y + apart * signs_KN, y - apart * signs_KN])
            answer = yield Query(client.start + space.lift(both), batch)
            sent.append(client.private_mean(directional_derivatives(answer.loss_KB, apart)))
            y = y - assignment.facts["step"] * (sent[-1] @ signs_KN)
        return ClientUpdate(client.id, {"slopes_SK": torch.stack(sent)}, client.weight)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"slopes_SK": (self.training.local_steps, self.training.directions)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        means, start = RobustAggregator(self.robust, updates), state.arrays["start"]
        slopes_SK = means.mean_of("global", {u.client: u.arrays["slopes_SK"] for u in means.updates}, means.weights)
        space, before = self._space(start), state.facts["slope"]
        square = float(slopes_SK.square().mean())
        slope = (MEMORY * before**2 + (1 - MEMORY) * square if before else square) ** 0.5
        rate = self.training.rate(round, state.facts["num_rounds"])
        moves_SK = -self._step(rate, before or slope, space) * slopes_SK  # the clients' η, if they moved
        done = (round - 1) * self.training.local_steps  # rounds without an update add zeros
        moves_TK = torch.cat([state.arrays["moves_TK"], self._moves(done - len(state.arrays["moves_TK"])), moves_SK])
        y = self._replay(state.arrays["y"], space, moves_SK, done)
        return State({"start": start, "y": y, "moves_TK": moves_TK}, {**state.facts, "slope": slope, **means.facts})

    def global_prompt(self, state: State) -> Tensor:
        start = state.arrays["start"]
        return start + self._space(start).lift(state.arrays["y"])

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.start + self._space(client.start).lift(self._point(client.start, assignment))

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless there are a rate, a step and either `moves_TK` or `y`."""
        space, K = self._space(start.vectors_PD), self.training.directions
        validate_facts(assignment, {**RATE, "step": (float, int)})
        moves = assignment.arrays.get("moves_TK")
        steps = 0 if moves is None else min(moves.numel(), space.size) // K  # the server sends longer moves as y
        validate_arrays(assignment, {"y": (space.size,)} if moves is None else {"moves_TK": (steps, K)})
        if assignment.facts["rate"] == 0:
            raise CodecError("the assignment's 'rate' is 0, expected more")
        apart = self.training.apart(assignment) * space.unit * self._signs(space, assignment.round, 0)
        y = self._point(start.vectors_PD, assignment)
        validate_norm(start.vectors_PD + space.lift(torch.cat([y + apart, y - apart])), start, "prompts asked about")

    def _space(self, start_PD: Tensor) -> SearchSpace:
        return SearchSpace(tuple(start_PD.shape), self.subspace)

    def _signs(self, space: SearchSpace, round: int, step: int) -> Tensor:
        return space.signs(self.training.directions, self.training.public_seed, self.name, round, step)

    def _step(self, rate: float, slope: float, space: SearchSpace) -> float:
        """Returns η for derivatives of RMS `slope`; 0 if the RMS is unknown."""
        K = self.training.directions
        return rate * space.unit * step_scale(K, space.size) / slope if slope else 0.0

    def _point(self, start_PD: Tensor, assignment: Assignment) -> Tensor:
        """Returns the assigned point [size], as sent or as replayed from the moves."""
        if "y" in assignment.arrays:
            return assignment.arrays["y"]
        space = self._space(start_PD)
        return self._replay(torch.zeros(space.size), space, assignment.arrays["moves_TK"], 0)

    def _replay(self, y: Tensor, space: SearchSpace, moves_TK: Tensor, first: int) -> Tensor:
        """Returns y [size] after these moves. `first`: number of the first move's step, counted over all rounds."""
        steps = self.training.local_steps
        for step, moves_K in enumerate(moves_TK, first):
            y = y + moves_K @ self._signs(space, step // steps + 1, step % steps)
        return y

    def _moves(self, steps: int) -> Tensor:
        return torch.zeros(steps, self.training.directions)
