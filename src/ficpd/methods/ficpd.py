"""FICPD, first form: clients' prompts are clustered into prototypes, and each client goes on from its own.

Per round: a client tunes from the prompt it was sent and returns the difference (with L2 and proximal terms). The server
adds it to what it had sent, takes the way each client has come from the shared start, clusters those ways by cosine
K-means, and averages each cluster into a prototype, drawn towards the global prompt by `shrinkage`. Synthetic examples
and meta-learning come with the prompt library.
"""

from collections.abc import Generator, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ficpd.server.averaging import mean_of
from ficpd.server.prototypes import cosine_kmeans
from ficpd.tuners import Training, tune
from ficpd.types import Answer, Assignment, ClientCard, ClientSide, ClientUpdate, Model, Query, Setup, State


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
    name, pools_data, trains = "ficpd", False, True

    def __init__(self, config: Config, training: Training):
        self.config, self.training = config, training

    def init(self, setup: Setup) -> State:
        start = setup.start.vectors_PD
        facts = {"num_rounds": setup.num_rounds, "seed": setup.seed, "nearest": {}, "weights": {}}
        return State({"start": start, "global": start, "prototypes_KPD": start[None]}, facts)

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
        """Clients that did not take part keep the last way they came; every client counts by its weight."""
        start = state.arrays["start"]
        ways = {name.removeprefix("way/"): way for name, way in state.arrays.items() if name.startswith("way/")}
        ways |= {u.client: self._sent(state, u.client) + u.arrays["delta"] - start for u in updates}
        weights = state.facts["weights"] | {u.client: u.weight for u in updates}
        clusters = cosine_kmeans(ways, self.config.num_prototypes, state.facts["seed"])
        overall = mean_of(ways, weights)
        prototypes = []
        for k in range(clusters.number):
            mean = mean_of({name: way for name, way in ways.items() if clusters.member[name] == k}, weights)
            prototypes.append(start + torch.lerp(mean, overall, self.config.shrinkage))
        arrays = {"start": start, "global": start + overall, "prototypes_KPD": torch.stack(prototypes)}
        arrays |= {f"way/{name}": way for name, way in ways.items()}
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
