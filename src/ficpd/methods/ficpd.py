"""FICPD, first form: clients' prompts are clustered into prototypes, and each client goes on from its own.

Per round a client tunes from the prompt it was sent and returns the difference (with L2 and proximal terms). On the server

    global     <- global + Σ w_c δ_c                          the weighted mean of what came, as in FedAvg
    clusters   <- cosine K-means of (sent_c + δ_c - start)    the way each client has come from the shared start
    prototype_k = global + (1 - shrinkage) · mean over k of (sent_c + δ_c - global)

so that clients of one kind share what sets them apart from the rest, and a small cluster is drawn towards the global
prompt. Synthetic examples and meta-learning come with the prompt library.
"""

from collections.abc import Generator, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.seams import ClientSide, Model
from ficpd.server.averaging import mean_of, weighted_mean
from ficpd.server.prototypes import cosine_kmeans
from ficpd.tuners import Training, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, Query, Setup, State


class Config(BaseModel):
    """`num_prototypes`: clusters at most. `shrinkage`: 0 keeps each prototype its cluster's mean, 1 makes all of them
    the global prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_prototypes: int = Field(default=5, ge=1)
    shrinkage: float = Field(default=0.5, ge=0, le=1)
    proximal_weight: float = Field(default=0.0, ge=0)


def build(config: Config, training: Training) -> "Ficpd":
    return Ficpd(config, training)


class Ficpd:
    name, pools_data, trains, releases, sums = "ficpd", False, True, True, False

    def __init__(self, config: Config, training: Training):
        self.config, self.training = config, training

    def init(self, setup: Setup) -> State:
        start = setup.start.vectors_PD
        facts = {"num_rounds": setup.num_rounds, "seed": setup.seed, "nearest": {}, "weights": {}}
        return State({"start": start, "global": start, "prototypes_KPD": start[None]}, facts)

    def work(self, state: State) -> tuple[int, int]:
        return self.training.local_steps, self.training.batch_size

    def assign(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        return Assignment(self.name, round, {"prompt": self._sent(state, client.name)}, {"rate": rate})

    def train(self, client: ClientSide, order: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt, weight = order.arrays["prompt"], self.config.proximal_weight
        tuned = yield from tune(self.training, client, order, prompt, proximal_weight=weight)
        return ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)

    def layout(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["start"].shape)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        """A client that did not take part keeps the way it had come and how it stood off the global prompt then."""
        start, shared = state.arrays["start"], state.arrays["global"] + weighted_mean(updates, "delta")
        reached = {u.client: self._sent(state, u.client) + u.arrays["delta"] for u in updates}
        ways = _of_clients(state, "way/") | {name: prompt - start for name, prompt in reached.items()}
        offsets = _of_clients(state, "offset/") | {name: prompt - shared for name, prompt in reached.items()}
        weights = state.facts["weights"] | {u.client: u.weight for u in updates}
        clusters = cosine_kmeans(ways, self.config.num_prototypes, state.facts["seed"])
        prototypes = [
            shared
            + (1 - self.config.shrinkage)
            * mean_of({n: offsets[n] for n in offsets if clusters.member[n] == k}, weights)
            for k in range(clusters.number)
        ]
        arrays = {"start": start, "global": shared, "prototypes_KPD": torch.stack(prototypes)}
        arrays |= {f"way/{name}": way for name, way in ways.items()}
        arrays |= {f"offset/{name}": offset for name, offset in offsets.items()}
        return State(arrays, {**state.facts, "nearest": clusters.member, "weights": weights})

    def prompt(self, state: State) -> Tensor:
        return state.arrays["global"]

    def personal(self, client: ClientSide, order: Assignment) -> Tensor:
        return order.arrays["prompt"]

    def basis(self, state: State) -> Mapping[str, Tensor]:
        prototypes = {f"prototype-{k}": vectors for k, vectors in enumerate(state.arrays["prototypes_KPD"])}
        return {"global": state.arrays["global"], **prototypes}

    def _sent(self, state: State, name: str) -> Tensor:
        """The prompt a client starts its round from: its prototype, or the global prompt for a client not yet heard."""
        nearest = state.facts["nearest"].get(name)
        return state.arrays["global"] if nearest is None else state.arrays["prototypes_KPD"][nearest]


def _of_clients(state: State, prefix: str) -> dict[str, Tensor]:
    """The state's arrays that belong to one client each, by client."""
    return {name.removeprefix(prefix): array for name, array in state.arrays.items() if name.startswith(prefix)}
