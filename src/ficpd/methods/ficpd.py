"""FICPD: clusters the clients' prompts into prototypes, and each client continues from its cluster's prototype.

A client tunes the received prompt and returns the difference (with L2 and proximal terms). The server computes

    global      <- global + server step on Σ w_c δ_c             the weighted mean of the updates, as in FedAvg
    clusters    <- cosine K-means of the clients' signatures     at first, and when a new client takes part
    prototype_k =  global + (1 - λ_k) · mean over k of (sent_c + δ_c - global)     over the cohort; else unchanged

`space` defines signatures. `gather` samples every client in the first round. All then start from one prompt, so their
updates compare best. Synthesis and distillation follow after the rounds (`distillation.*`).
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig
from ficpd.federation.aggregation.server_optimizer import ServerOptimizer, fedexp_factor
from ficpd.federation.client import LABELS
from ficpd.federation.method import Capabilities, Method, group_card, group_of
from ficpd.federation.validation import RATE, validate_prompts
from ficpd.interfaces import Backbone, ClientContext, Model, Task
from ficpd.methods.shared.class_totals import CLASSES
from ficpd.methods.shared.clustering import Clusters, cluster_within_keys, relabel_clusters, shrinkage
from ficpd.methods.shared.mixture import Candidate, weigh_candidates
from ficpd.methods.shared.readouts import (
    assigned_readout,
    client_key,
    client_totals,
    features_readout,
    init_readouts,
    learn_readouts,
    read_as,
    reading,
    readout_arrays,
    readout_assignment,
    scoring_readout,
    state_readout,
    totals_spec,
    tuning_prior,
    validate_readout,
    with_reading,
    without_totals,
)
from ficpd.optimizers import LocalTrainingConfig, tune
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

SIGNATURE = "signature/"
FACTS = {"closes": (bool,), "at_start": (bool,), "priors": (bool,)}
"""The facts of an assignment. priors: the client's label counts are exact, so gradients may use its label prior."""


class Config(FrozenConfig):
    """num_prototypes: maximum number of clusters, or "auto" (see `cosine_kmeans`). Clients of different task keys (lists of
        label texts) are never in one cluster.
    space: signatures. "delta": the client's first update; "offset": its last prompt less the initial one; "metadata": the
        public field `by`, no signature.
    by: the field of the clients' cards for "metadata".
    gather: all clients take part in the first round.
    redraw_every: rounds between clusterings (0: one clustering).
    stay: the minimum gain in cosine for which a client moves.
    shrinkage: λ of all clusters. "auto": from the updates' noise, or from the scatter of a cluster's clients if the noise
        would reveal record counts.
    class_totals: round one gathers sums over records by label, from which the server learns a readout for each task key.
        Without noise, prompts are tuned in the label texts' readout, with `rate_multiple` times
        `training.learning_rate`. The last round tunes nothing. It gathers totals under the tuned prompts, for a
        readout that fits them. With noise, totals are gathered once and take `totals_share` of a record-level budget.
        Prompts are then tuned in their readout.
    totals_share: share of a record-level budget for class totals.
    rate_multiple: factor of the learning rate in the label texts' readout.
    local_model: the client's model. "prototype": the received prompt. "heads": a mixture of that prompt, the start, and
        heads of its own records (also nearest neighbours, if there is no readout that was learned without them).
    label_prior: adds the client's label shares to the logits (classification only). "auto": from the counts in the
        client's class totals, if a readout was learned without noise. True: from the statistic `labels`, which takes a
        share of a record-level budget.
    proximal_weight: weight of the proximal term to the prompt of the round (FedProx)."""

    num_prototypes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    space: Literal["delta", "offset", "metadata"] = "delta"
    by: str = "group"
    gather: bool = True
    redraw_every: int = Field(default=0, ge=0)
    stay: float = Field(default=0.05, ge=0, le=2)
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    class_totals: bool = True
    totals_share: float = Field(default=0.15, gt=0, lt=1)
    rate_multiple: float = Field(default=3.0, gt=0)
    local_model: Literal["prototype", "heads"] = "heads"
    label_prior: bool | Literal["auto"] = "auto"
    proximal_weight: float = Field(default=0.0, ge=0)
    server: ServerOptimizer = ServerOptimizer()
    robust: RobustConfig = RobustConfig()

    @model_validator(mode="after")
    def _lengths_count(self) -> "Config":
        self.server.check(self.robust)
        return self


def build(config: Config, training: LocalTrainingConfig) -> "Ficpd":
    return Ficpd(config, training)


class Ficpd(Method):
    name = "ficpd"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config
        self.capabilities = Capabilities(
            private_units=("record", "client"), full_first_round=config.gather, full_last_round=config.class_totals,
            statistics_once=({CLASSES: config.totals_share} if config.class_totals else {})
            | ({LABELS: None} if config.label_prior is True else {}),
            learns_readout=config.class_totals,
            gradient_sum=config.robust.sums and config.server.sums and config.space != "metadata",
        )  # fmt: skip

    def adapt_to(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        if not any(features_readout(task, backbone) is not None for task in tasks):
            once = {name: share for name, share in self.capabilities.statistics_once.items() if name != CLASSES}
            self.capabilities = replace(
                self.capabilities, statistics_once=once, learns_readout=False, full_last_round=False
            )

    def init(self, setup: FederationInfo) -> State:
        start, by = setup.start.vectors_PD, self.config.by
        facts = {
            "num_rounds": setup.num_rounds,
            "seed": setup.seed,
            "clusters": {},
            "drawn": 0,
            "weights": {},
            "group_of": {card.name: group_of(card, setup.num_labels) for card in setup.clients},
            "metadata": {card.name: card.metadata.get(by, "") for card in setup.clients},
        }
        arrays = {"start": start, "global": start, "prototypes_KPD": start[None]}
        readouts = init_readouts(setup) if self.capabilities.learns_readout else State({})
        state = State({**arrays, **readouts.arrays}, {**facts, **readouts.facts, "several": len(setup.num_labels) > 1})
        stand_ins = [group_card(group) for group in setup.num_labels]
        keys = {c.name: self._key(state, c) for c in [*setup.clients, *stand_ins]}
        return _next_round(State(state.arrays, {**state.facts, "keys": keys, "closes": False, "at_start": False}), 1)

    def _key(self, state: State, client: ClientCard) -> str:
        """Returns a client's task key; its group if the key is not known."""
        known = client_key(state, client)
        group = client.metadata.get("group", "") if state.facts["several"] else ""
        return str(group if known is None else known)

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        rate = self.training.rate(round, state.facts["num_rounds"])
        if client_key(state, client) is not None and not state.facts["noisy"]:
            rate *= self.config.rate_multiple
        arrays, facts = readout_assignment(state, client)
        prompt = self._sent(state, client.name, self._key(state, client))
        facts |= {"rate": rate, "closes": state.facts["closes"], "at_start": state.facts["at_start"]}
        facts["priors"] = not state.facts.get("noisy", True)
        return Assignment(self.name, round, {"prompt": prompt, **arrays}, facts)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt, weight = assignment.arrays["prompt"], self.config.proximal_weight
        readout = assigned_readout(assignment)
        read_as(client.full_batch(), readout)  # raises before anything is charged
        totals = yield from client_totals(client, assignment, prompt)
        if assignment.facts["closes"]:
            return ClientUpdate(client.id, totals, client.weight)
        if assignment.facts["at_start"]:
            readout = None
        work = tune(self.training, client, assignment, prompt, proximal_weight=weight)
        tuned = yield from with_reading(work, readout, self._prior(client, assignment, readout))
        return ClientUpdate(client.id, {"delta": tuned - prompt, **totals}, client.weight)

    def _prior(self, client: ClientContext, assignment: Assignment, readout: Readout | None) -> Tensor | None:
        """Returns the client's label prior in shared gradients, [C]."""
        if self.config.label_prior == "auto":
            return tuning_prior(client, readout) if assignment.facts["priors"] else None
        return client.label_prior if self.config.label_prior else None

    def local_model(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, list[Predictor]]:
        readout, prompt = assigned_readout(assignment), assignment.arrays["prompt"]
        scoring = scoring_readout(assignment)
        if self.config.local_model == "prototype":
            fits = None if assignment.facts["at_start"] else readout
            return [Predictor(prompt, reading(fits, self._prior(client.local_context(), assignment, fits)))]
        if readout is None:
            prompts = [prompt] if torch.equal(prompt, client.start) else [prompt, client.start]
            candidates = [Candidate(one, neighbours=True) for one in prompts]
        else:
            learned, other = (client.start, prompt) if assignment.facts["at_start"] else (prompt, client.start)
            candidates = [
                Candidate(learned, readout, scoring=scoring),
                Candidate(other, neighbours=scoring is None),
            ]
        return (yield from weigh_candidates(client, candidates))

    def readout(self, state: State, client: ClientCard) -> Readout | None:
        return None if state.facts["at_start"] else state_readout(state, client)

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        rest = validate_readout(assignment, start.vectors_PD.shape[1], {**RATE, **FACTS})
        validate_prompts(rest, start, ("prompt",))

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        tuned = {} if state.facts["closes"] else {"delta": tuple(state.arrays["start"].shape)}
        return {**tuned, **totals_spec(state)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        """Makes the next state. Clients outside the cohort keep their signature and offset.

        An old offset counts only in a new clustering. A late delta is added to its client's current prompt."""
        if state.facts["closes"]:
            return _next_round(learn_readouts(state, updates, scoring=True), round + 1)
        state = learn_readouts(state, updates, again=not state.facts.get("noisy", True), scoring=True)
        means = RobustAggregator(self.config.robust, [without_totals(update) for update in updates])
        updates = means.updates
        came, noise = {u.client: u.weight for u in updates}, state.facts.get("noise", 0.0)
        reached = {u.client: self._sent(state, u.client) + u.arrays["delta"] for u in updates}
        signatures = _of_clients(state, SIGNATURE) | self._signatures(state, reached)
        clusters, drawn = self._clusters(state, signatures, round)
        whole, more = self._steps(means, clusters, noise)
        move, moments = self.config.server.step(whole, state.arrays)
        shared = state.arrays["global"] + move
        offsets = _of_clients(state, "offset/") | {n: p + more.get(n, 0.0) - shared for n, p in reached.items()}
        weights = state.facts["weights"] | came
        arrays = {"start": state.arrays["start"], "global": shared, **moments, **readout_arrays(state)}
        newly = drawn == round
        counted = offsets if newly else {name: offsets[name] for name in reached}
        before = None if newly else state.arrays["prototypes_KPD"]
        arrays["prototypes_KPD"] = self._prototypes(means, shared, counted, weights, clusters, noise, before)
        arrays |= {SIGNATURE + name: signature for name, signature in signatures.items()}
        arrays |= {f"offset/{name}": offset for name, offset in offsets.items()}
        facts = {"clusters": self._everyone(state, clusters.member), "drawn": drawn, "weights": weights}
        return _next_round(State(arrays, {**state.facts, **facts, **means.facts}), round + 1)

    def global_prompt(self, state: State) -> Tensor:
        return state.arrays["global"]

    def library_prompts(self, state: State) -> Mapping[str, Tensor]:
        prototypes = {f"prototype-{k}": vectors for k, vectors in enumerate(state.arrays["prototypes_KPD"])}
        return {"global": state.arrays["global"], **prototypes}

    def _sent(self, state: State, name: str, key: str | None = None) -> Tensor:
        """Returns the client's prototype. A client without a cluster has its task key's, or the global prompt."""
        member, keys = state.facts["clusters"], state.facts["keys"]
        nearest = member.get(name)
        if nearest is None and len(set(keys.values())) > 1:
            of_key = {k for other, k in member.items() if keys[other] == keys.get(name, key)}
            nearest = of_key.pop() if len(of_key) == 1 else None
        return state.arrays["global"] if nearest is None else state.arrays["prototypes_KPD"][nearest]

    def _signatures(self, state: State, reached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the cohort's signatures. "delta" keeps the first, because later updates start from other prompts."""
        start, known = state.arrays["start"], _of_clients(state, SIGNATURE)
        if self.config.space == "metadata":
            return {}
        if self.config.space == "delta":
            return {n: p - self._sent(state, n) for n, p in reached.items() if n not in known}
        return {n: p - start for n, p in reached.items()}

    def _clusters(self, state: State, signatures: Mapping[str, Tensor], round: int) -> tuple[Clusters, int]:
        """Returns the clusters and the round of their clustering; new clients and `redraw_every` trigger a new one."""
        before, drawn, metadata = state.facts["clusters"], state.facts["drawn"], state.facts["metadata"]
        if self.config.space == "metadata":
            values = sorted(set(metadata.values()))
            member = {name: values.index(value) for name, value in metadata.items()}
            return Clusters(member, len(values)), drawn or round
        every, new = self.config.redraw_every, [name for name in signatures if name not in before]
        if not drawn or new or (every and round - drawn >= every):
            found = cluster_within_keys(
                signatures, state.facts["keys"], self.config.num_prototypes, state.facts["seed"]
            )
            return relabel_clusters(before, found, signatures, self.config.stay, state.facts["keys"]), round
        return Clusters(before, max(before.values()) + 1), drawn

    def _everyone(self, state: State, member: Mapping[str, int]) -> dict[str, int]:
        """Adds the clients hidden in a secure sum, each in the cluster of its group's sum."""
        group_of = state.facts["group_of"]
        return {name: member[group] for name, group in group_of.items() if group in member} | dict(member)

    def _steps(
        self, means: RobustAggregator, clusters: Clusters, noise: float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the global prompt's step before the server's rate, and each client's extrapolation beyond its update.

        Only clients that start from the global prompt can correct a step that is too long. Prototypes follow it
        (1 - λ) / λ rounds later, and never at λ = 0. So the global prompt takes the prototypes' step, plus
        min(1, λ / (1 - λ)) of the rest of its own extrapolated step.
        """
        deltas, weights, whole = {u.client: u.arrays["delta"] for u in means.updates}, means.weights, means.mean_all()
        more = self.config.server.per_client_extrapolation(means, clusters.member, noise)
        if not more:
            return whole, {}
        apart = means.mean_of("global", {name: delta + more[name] for name, delta in deltas.items()}, weights)
        drawn = 0.0 if self.config.shrinkage == "auto" else self.config.shrinkage
        share = min(1.0, drawn / max(1 - drawn, 1e-9))
        return apart + share * (fedexp_factor(whole, deltas, weights, noise) * whole - apart), more

    def _prototypes(
        self, means: RobustAggregator, shared: Tensor, offsets: Mapping[str, Tensor], weights: Mapping[str, float],
        clusters: Clusters, noise: float | None, before_KPD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Returns [K, P, D]. A cluster without an offset keeps its prototype, or takes the global prompt if it is new."""
        of_cluster = {k: [n for n in offsets if clusters.member[n] == k] for k in range(clusters.number)}
        heard = {k: [offsets[n] for n in names] for k, names in of_cluster.items() if names}
        given = self.config.shrinkage
        shrunk = shrinkage(heard, noise) if given == "auto" else dict.fromkeys(heard, given)
        return torch.stack([
            shared + (1 - shrunk[k]) * means.mean_of(f"prototype-{k}", {n: offsets[n] for n in names}, weights) if names
            else shared if before_KPD is None else before_KPD[k]
            for k, names in of_cluster.items()
        ])  # fmt: skip


def _next_round(state: State, round: int) -> State:
    """Sets the facts of the next round.

    closes: it gathers totals and tunes nothing. at_start: the readout was learned under the start, not under the prompts.
    """
    facts = state.facts
    if facts.get("noisy", True):  # nothing to learn from, or totals once
        return state
    closes = round == facts["num_rounds"] and not facts["closes"]
    at_start = round > 1 and not facts["closes"]
    return State(state.arrays, {**facts, "closes": closes, "gathers": closes or round == 1, "at_start": at_start})


def _of_clients(state: State, prefix: str) -> dict[str, Tensor]:
    """Returns the state's arrays with this prefix, by client."""
    return {name.removeprefix(prefix): array for name, array in state.arrays.items() if name.startswith(prefix)}
