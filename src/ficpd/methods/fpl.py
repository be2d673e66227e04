"""FPL: each client's prompt has a shared part, a cluster part and a private residual.

    p_c = global + cluster_k + residual_c

Clusters come from the clients' public cards before training. Each round

    shared    δ_c = the client's private update of prompt s_k = global + cluster_k                   (released)
    personal  residual_c, tuned on the client's records from s_k + residual_c                        (never sent);
              the client selects its share, or the cluster's, on held-out records
    cluster   s_k <- s_k + mean of δ_c over its clients in the cohort
    global    <- global + mean of those means, by clients; shrinkage by noise pulls small clusters to it

The shared gradient is taken at s_k, never at p_c. The residual depends on records without noise, so a gradient at p_c
would leak it. Clusters are disjoint and public, so their noise is charged once (parallel composition). The global
prompt is post-processing.

`contrast` pulls a personal prompt to its cluster's prototype and the frozen start, and away from other clusters
(InfoNCE, van den Oord et al., 2018, arXiv 1807.03748). It uses released prototypes only. The split into a shared and
a low-rank private part is that of DP-FPL (Tran et al., ICLR 2025, arXiv 2501.13904).
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ficpd.federation.aggregation.mean import weighted_mean_of
from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig
from ficpd.federation.aggregation.server_optimizer import ServerOptimizer
from ficpd.federation.client import LABELS
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import RATE, validate_facts, validate_prompts
from ficpd.interfaces import ClientContext, Model
from ficpd.methods.shared.clustering import Clusters, cosine_kmeans, shrinkage
from ficpd.methods.shared.metadata_clustering import cluster_by_metadata, nearest_client
from ficpd.methods.shared.readouts import reading, with_reading
from ficpd.methods.shared.residual import (
    ContrastiveConfig,
    personal_prompt,
    tune_residual,
)
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.registry import FrozenConfig
from ficpd.types import Answer, Assignment, ClientCard, ClientUpdate, FederationInfo, Predictor, Prompt, Query, State

SIGNATURE, SUM = "signature/", "delta/"


class Config(FrozenConfig):
    """clusters: "metadata" (see `cluster_by_metadata`), "given" (one per distinct card in the fields `by`), "signatures"
        (of the first updates, as in `ficpd`), or "none".
    by: fields of the clients' cards for the clustering; (): all of them.
    num_clusters: "auto": by the silhouette.
    residual: "full" [P, D] or "low_rank" of `rank`.
    rank: of a low-rank residual.
    held_back: share of records held out in the first two thirds of the rounds. They select the residual's share (0: all).
    label_prior: adds the client's label shares to the logits (classification only). `privacy.statistics` gives the
        statistic `labels` a share of a record-level budget.
    contrast: the alignment within a cluster.
    proximal_weight: weight of the proximal term to the prompt of the round (FedProx).
    shrinkage: share of the global prompt in a cluster's prompt; "auto": from the scatter of a cluster's clients.
    server: the optimizer of the global prompt.
    robust: the rule that combines updates."""

    clusters: Literal["metadata", "given", "signatures", "none"] = "metadata"
    by: tuple[str, ...] = ()
    num_clusters: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    residual: Literal["full", "low_rank", "none"] = "full"
    rank: int = Field(default=4, ge=1)
    held_back: float = Field(default=0.25, ge=0, lt=1)
    label_prior: bool = False
    contrast: ContrastiveConfig = ContrastiveConfig()
    proximal_weight: float = Field(default=0.0, ge=0)
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    server: ServerOptimizer = ServerOptimizer()
    robust: RobustConfig = RobustConfig()

    @model_validator(mode="after")
    def _lengths_count(self) -> "Config":
        self.server.check(self.robust)
        return self


def build(config: Config, training: LocalTrainingConfig) -> "Fpl":
    return Fpl(config, training)


class Fpl(Method):
    name = "fpl"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config
        drawn_first = config.clusters == "signatures"
        self.capabilities = Capabilities(
            private_units=("record", "client"), linear=config.robust.sums and config.server.sums and not drawn_first,
            full_first_round=drawn_first, statistics_once={LABELS: None} if config.label_prior else {},
        )  # fmt: skip

    def init(self, setup: FederationInfo) -> State:
        start = setup.start.vectors_PD
        cards = {card.name: dict(card.metadata) for card in setup.clients}
        drawn = self._clusters_of(cards)
        facts = {
            "num_rounds": setup.num_rounds,
            "seed": setup.seed,
            "cards": cards,
            "clusters": drawn.member,
            "cohort_rate": min(setup.cohort / max(len(cards), 1), 1.0),
        }
        arrays = {"start": start, "global": start, "prototypes_KPD": start.repeat(drawn.number, 1, 1)}
        return State(arrays, facts)

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        number, facts = state.facts["num_rounds"], {}
        facts["rate"] = self.training.rate(round, number)
        facts["choosing"] = 3 * round <= 2 * number
        facts["contrast"] = self.config.contrast.weight * max(0.0, 1 - (round - 1) / max(number, 1))
        own = self._cluster(state, client)
        arrays = {"prompt": state.arrays["global"] if own is None else state.arrays["prototypes_KPD"][own]}
        if self.config.residual != "none":
            if len(state.arrays["prototypes_KPD"]) > 1:
                arrays["global"] = state.arrays["global"]
            if facts["contrast"] > 0 and own is not None:
                others = [k for k in range(len(state.arrays["prototypes_KPD"])) if k != own]
                arrays["others_KPD"] = state.arrays["prototypes_KPD"][others]
        return Assignment(self.name, round, arrays, facts)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        """Tunes the update from the released prompt first, then the residual."""
        prompt, weight = assignment.arrays["prompt"], self.config.proximal_weight
        tuned = yield from with_reading(
            tune(self.training, client, assignment, prompt, proximal_weight=weight), None, self._prior(client)
        )
        update = ClientUpdate(client.id, {"delta": tuned - prompt}, client.weight)
        if self.config.residual != "none":
            choosing = assignment.facts["choosing"] or "share" not in client.client_state
            local = client.local_context(self.config.held_back if choosing else 0.0)
            yield from with_reading(
                tune_residual(self.config, self.training, local, assignment), None, self._prior(local)
            )
        return update

    def _prior(self, client: ClientContext) -> Tensor | None:
        return client.label_prior if self.config.label_prior else None

    def local_model(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, list[Predictor]]:
        yield from ()
        read = reading(None, self._prior(client.local_context()))
        return [Predictor(self.personal_prompt(client, assignment), read)]

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        return {"delta": tuple(state.arrays["start"].shape)}

    def cluster_sums(self, state: State) -> Mapping[str, tuple[int, ...]]:
        shape = tuple(state.arrays["start"].shape)
        return {f"{SUM}{k}": shape for k in range(len(state.arrays["prototypes_KPD"]))}

    def in_cluster_sum(self, state: State, update: ClientUpdate) -> ClientUpdate:
        own, delta = state.facts["clusters"][update.client], update.arrays["delta"]
        arrays = {name: torch.zeros_like(delta) for name in self.cluster_sums(state)} | {f"{SUM}{own}": delta}
        return ClientUpdate(update.client, arrays, update.weight)

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        """Makes the next state. A cluster without an update keeps its prototype. A robust rule aggregates all updates for
        the global prompt, not the clusters, because malicious updates may be the majority of a cluster."""
        means = RobustAggregator(self.config.robust, updates)
        updates = means.updates
        clusters, signatures = self._redrawn(state, updates)
        before = state.arrays["prototypes_KPD"]
        if len(before) != clusters.number:  # a new clustering starts at the global prompt
            before = state.arrays["global"].repeat(clusters.number, 1, 1)
        more = self.config.server.per_client_extrapolation(means, clusters.member, state.facts.get("noise", 0.0))
        reached = {u.client: u.arrays["delta"] + more.get(u.client, 0.0) for u in updates if "delta" in u.arrays}
        moved = self._moves(means, clusters, reached)
        sizes = {k: float(sum(own == k for own in clusters.member.values())) for k in range(clusters.number)}
        weights = {str(k): sizes[k] for k in moved}
        of_clusters = {str(k): delta for k, (delta, _) in moved.items()}
        whole = (
            weighted_mean_of(of_clusters, weights)
            if self.config.robust.sums
            else means.mean_of("global", reached, means.weights)
        )
        step, moments = self.config.server.step(whole, state.arrays)
        shared = state.arrays["global"] + step
        offsets = {k: before[k] + delta - shared for k, (delta, _) in moved.items()}
        shrunk = self._shrinkage(state, offsets, {k: count for k, (_, count) in moved.items()}, sizes)
        prototypes = [
            shared + (1 - shrunk[k]) * offsets[k] if k in offsets else before[k] for k in range(clusters.number)
        ]
        arrays = {"start": state.arrays["start"], "global": shared, **moments, **signatures}
        facts = {**state.facts, "clusters": clusters.member, **means.facts}
        return State(arrays | {"prototypes_KPD": torch.stack(prototypes)}, facts)

    def global_prompt(self, state: State) -> Tensor:
        return state.arrays["global"]

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        """Returns the client's prompt (`residual.personal_prompt`)."""
        return personal_prompt(client.client_state, assignment)

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        validate_facts(assignment, {**RATE, "contrast": (float, int), "choosing": (bool,)})
        validate_prompts(assignment, start, ("prompt", "global"), ("others_KPD",))

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        prototypes = {f"prototype-{k}": vectors for k, vectors in enumerate(state.arrays["prototypes_KPD"])}
        return {"global": state.arrays["global"], **prototypes}

    def _clusters_of(self, cards: Mapping[str, Mapping]) -> Clusters:
        kind, by = self.config.clusters, self.config.by
        if kind in ("none", "signatures"):
            return Clusters(dict.fromkeys(cards, 0), 1)
        number = len(cards) if kind == "given" else self.config.num_clusters
        return cluster_by_metadata(cards, by, number)

    def _cluster(self, state: State, client: ClientCard) -> int | None:
        """Returns the client's cluster. A new client joins that of the nearest card; None if clusters ignore cards."""
        member = state.facts["clusters"]
        if client.name in member:
            return member[client.name]
        if self.config.clusters not in ("metadata", "given") or len(state.arrays["prototypes_KPD"]) == 1:
            return None
        return member[nearest_client(state.facts["cards"], client.metadata, self.config.by)]

    def _redrawn(self, state: State, updates: Sequence[ClientUpdate]) -> tuple[Clusters, dict[str, Tensor]]:
        """Returns the clusters and their signatures, if any."""
        member = state.facts["clusters"]
        if self.config.clusters != "signatures":
            return Clusters(member, len(state.arrays["prototypes_KPD"])), {}
        known = {n: array for n, array in state.arrays.items() if n.startswith(SIGNATURE)}
        new = {SIGNATURE + u.client: u.arrays["delta"] for u in updates if SIGNATURE + u.client not in known}
        if known:  # there is one clustering; later clients join the nearest cluster
            number = len(state.arrays["prototypes_KPD"])
            centres = {k: _direction([known[SIGNATURE + n] for n in names]) for k, names in _by_cluster(member, known)}
            placed = {n: max(centres, key=lambda k: float(centres[k] @ _direction([x]))) for n, x in new.items()}
            joined = {name.removeprefix(SIGNATURE): k for name, k in placed.items()}
            return Clusters(member | joined, number), known | new
        by_client = {name.removeprefix(SIGNATURE): array for name, array in new.items()}
        drawn = cosine_kmeans(by_client, self.config.num_clusters, state.facts["seed"])
        return Clusters(dict.fromkeys(member, 0) | drawn.member, drawn.number), new

    def _moves(
        self, means: RobustAggregator, clusters: Clusters, reached: Mapping[str, Tensor]
    ) -> dict[int, tuple[Tensor, float]]:
        """Returns each cluster's step and its number of updates (0: the step comes from one noised sum)."""
        updates = means.updates
        if len(updates) == 1 and f"{SUM}0" in updates[0].arrays:
            sizes = {k: sum(own == k for own in clusters.member.values()) for k in range(clusters.number)}
            total = sum(sizes.values())
            return {k: (updates[0].arrays[f"{SUM}{k}"] * total / size, 0.0) for k, size in sizes.items()}
        of = {k: [u for u in updates if clusters.member.get(u.client) == k] for k in range(clusters.number)}
        return {
            k: (means.mean_of(f"prototype-{k}", {u.client: reached[u.client] for u in came}, means.weights),
                len(came))
            for k, came in of.items()
            if came
        }  # fmt: skip

    def _shrinkage(
        self, state: State, offsets: Mapping[int, Tensor], came: Mapping[int, float], sizes: Mapping[int, float]
    ) -> dict[int, float]:
        """Returns each cluster's shrinkage λ in 0..1, from the noise that the server may know."""
        if self.config.shrinkage != "auto":
            return dict.fromkeys(offsets, self.config.shrinkage)
        found = {}
        for k, offset in offsets.items():
            noise = state.facts.get("noise") or 0.0
            if not came[k]:  # one noised sum: its noise is divided by the expected members
                noise = state.facts.get("noise_of_sum", 0.0) / max(sizes[k] * state.facts["cohort_rate"], 1e-9) ** 2
            found |= {k: shrinkage({0: [offset] * max(int(came[k]), 1)}, noise)[0]}
        return found


def _by_cluster(member: Mapping[str, int], known: Mapping[str, Tensor]) -> list[tuple[int, list[str]]]:
    """Returns the clients with a signature by cluster, without empty clusters."""
    heard = [name.removeprefix(SIGNATURE) for name in known]
    return [(k, [name for name in heard if member[name] == k]) for k in sorted({member[name] for name in heard})]


def _direction(signatures: Sequence[Tensor]) -> Tensor:
    """Returns the mean direction [N]."""
    return F.normalize(torch.stack([F.normalize(x.flatten(), dim=0) for x in signatures]).mean(0), dim=0)
