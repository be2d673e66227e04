"""Builds the parts of a run: method, schedule, noise scale, cluster report and library."""

from collections.abc import Mapping
from math import ceil, floor, inf, log10
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ficpd.errors import ConfigError
from ficpd.experiments.build import ExperimentContext
from ficpd.experiments.distillation import validate_distillation
from ficpd.experiments.results import Clusters, PrivacyReport, RunResult
from ficpd.federation.build import make_method
from ficpd.federation.client import LABELS
from ficpd.federation.method import Method
from ficpd.federation.privacy_plan import NONE, PrivacyPlan, privacy_config_for, public_seed
from ficpd.federation.rounds import RoundSchedule
from ficpd.interfaces import Backbone
from ficpd.library.card import BEGAN, WORDS
from ficpd.library.library import PromptLibrary, prompt_keys
from ficpd.methods.shared.class_totals import CLASSES
from ficpd.methods.shared.clustering import adjusted_rand
from ficpd.methods.shared.readouts import NOISE_OF_TOTALS, features_readout
from ficpd.tasks import synthetic_records
from ficpd.types import TOKEN_DTYPE, ClientCard, ClientData, FederationInfo, Prompt, Query, State, zero_update

SITE_PRIVATE_FIELDS = {"noise_multiplier", "site_that_spent_most", "epsilon_of_sites", "lines"}
"""Fields of the privacy report that a library leaves out. They reveal a site's record count.

An exact epsilon does too (`_public_privacy`)."""
PUBLIC_RECORDS = 256
"""Synthetic records that the centre and scale of features are measured on."""
VERSIONS = ("ficpd", "torch", "transformers", "scikit-learn", "dp-accounting", "opendp")


def build_method(context: ExperimentContext, part: Mapping[str, Any]) -> Method:
    """Builds a method. Raises `ConfigError` if it cannot use a task or the backbone."""
    method = make_method(part, context.experiment.training)
    unfit = [name or "its task" for name, task in context.tasks.items() if not task.num_labels]
    if LABELS in method.capabilities.statistics_once and unfit:
        raise ConfigError(f"method.label_prior = true needs labels, and {', '.join(unfit)} has none. Set it to false")
    method.check_compatible(list(context.tasks.values()), context.model.backbone)
    method.adapt_to(list(context.tasks.values()), context.model.backbone)
    return method


def check_method(context: ExperimentContext, config: Mapping[str, Any], private: bool = True) -> Method:
    """Builds a method, and raises before the first round the errors of later phases."""
    method = build_method(context, config)
    context.init_prompt_for(method)
    privacy_config_for(method, context.experiment.privacy if private else NONE)
    validate_distillation(context, method)
    return method


def federation_info(
    context: ExperimentContext, method: Method, shards: Mapping[str, ClientData], privacy: Mapping[str, Any]
) -> FederationInfo:
    federation, number = context.experiment.federation, len(context.shards)
    texts, features = public_features(context) if method.capabilities.learns_readout else ({}, None)
    return FederationInfo(
        context.start,
        [ClientCard(name, shard.metadata) for name, shard in shards.items()],
        federation.num_rounds,
        min(federation.clients_per_round or number, number),
        public_seed(context.experiment.seed),
        num_labels_by_group(context),
        texts,
        features,
        unit_of(privacy),
    )


def public_features(context: ExperimentContext) -> tuple[dict[str, Tensor], Tensor | None]:
    """Returns the public inputs of learned readouts: label texts' readouts, and features of synthetic records.

    Readouts are by group, for groups with labels read from features. The features are at the start prompt (None: no such
    group).
    """
    backbone, texts = context.model.backbone, {}
    for group, task in context.tasks.items():
        readout_CD = features_readout(task, backbone)
        if readout_CD is not None:
            texts[group] = readout_CD.float().cpu()
    if not texts:
        return {}, None
    task = context.tasks[next(iter(texts))]
    records = synthetic_records(backbone, PUBLIC_RECORDS, public_seed(context.experiment.seed))
    query = Query(context.start.vectors_PD[None], task.encode(records, backbone, context.start), outputs=True)
    outputs = context.model.answer([query])[0].outputs_KB
    assert outputs is not None
    return texts, outputs.features_RD.float().cpu()


def num_labels_by_group(context: ExperimentContext) -> dict[str, int]:
    """Counts the labels of each group's task; 0 where it has none."""
    return {group: task.num_labels for group, task in context.tasks.items()}


def unit_of(privacy: Mapping[str, Any]) -> Literal["none", "record", "client"]:
    """Returns the unit that privacy settings protect."""
    return "client" if "placement" in privacy else "none" if privacy["name"] == "none" else "record"


def with_noise_scale(
    context: ExperimentContext, method: Method, state: State, plan: PrivacyPlan, privacy: Mapping[str, Any]
) -> State:
    """Adds the facts `noise` and `noise_of_sum`: expected squared norms of the noise on one update and on a round's sum.

    They let a method separate the clients' signal from the mechanism's noise.
    """
    arrays = context.compression.project(zero_update(method.update_spec(state)))
    size = sum(array.numel() for array in arrays.values() if array.dtype != TOKEN_DTYPE)
    of_sum = plan.central.expected_noise_norm_sq(size) if plan.central else 0.0
    # of a run among sites, the plan has no mechanism of theirs
    noise = None if unit_of(privacy) == "record" else plan.expected_noise_norm_sq(size)
    facts = {**state.facts, "noise": noise, "noise_of_sum": of_sum}
    if plan.secure and (totals := method.update_spec(state).get(CLASSES)):
        numbers = zero_update({CLASSES: totals})[CLASSES].numel()
        facts[NOISE_OF_TOTALS] = plan.secure.noise_variance(CLASSES, numbers, len(context.shards))
    return State(state.arrays, facts)


def build_schedule(context: ExperimentContext, method: Method) -> RoundSchedule:
    federation, clients = context.experiment.federation, 1 if method.capabilities.centralized else len(context.shards)
    return RoundSchedule(
        min(federation.num_rounds, method.capabilities.rounds or federation.num_rounds)
        if method.capabilities.trains
        else 0,
        min(federation.clients_per_round or clients, clients),
        public_seed(context.experiment.seed),
        federation.max_update_norm,
        method.capabilities.full_first_round,
        method.capabilities.full_last_round,
        federation.accept_late,
    )


def build_library(
    context: ExperimentContext, method: Method, state: State, result: RunResult, more: Mapping[str, Prompt]
) -> PromptLibrary:
    backbone, basis = context.model.backbone, method.library_prompts(state)
    start = context.start.with_vectors(_kept_as(context.start.vectors_PD, backbone))
    prompts = {name: start.with_vectors(_kept_as(vectors, backbone)) for name, vectors in basis.items()} | dict(more)
    card: dict[str, Any] = result.model_dump(include={"method", "num_clients", "num_rounds", "versions", "settings"})
    card["privacy"] = _public_privacy(result.privacy)
    if result.privacy.noise != "simulated":  # the seed would let a reader subtract the simulated noise
        card["seed"] = result.seed
    if context.began:
        card[BEGAN] = context.began
    if result.clusters:
        card["prototypes"] = result.clusters.number
    if facts := result.distillation:
        card["distilled"] = {"how": facts.how, "writer": Path(facts.writer).name, "gained": facts.gained}
    tasks = {group or str(task.to_config()["name"]): task for group, task in context.tasks.items()}
    card["tasks"] = {name: dict(task.to_config()) for name, task in tasks.items()}
    card["backbone"] = {
        "enters_at": start.enters_at,
        "name": context.experiment.backbone.name,
        "kind": context.experiment.backbone.kind,
        "options": context.experiment.backbone.options,
        "fingerprint": start.backbone,
    }
    card["data"] = {
        "source": ", ".join(Path(p.data.source).name for p in context.experiment.all_groups.values() if p.data)
    }
    card["training"] = context.experiment.training.model_dump()
    if "seed" not in card:
        card["training"].pop("seed", None)
    if backbone.vocabulary is not None and method.capabilities.prompt_type == "tokens":
        card[WORDS] = {name: backbone.vocabulary.text(ids_P1[:, 0].tolist()) for name, ids_P1 in basis.items()}
    keys = prompt_keys(prompts, tasks, tasks_of(context, state, list(tasks)), backbone)
    of_group = dict(zip(context.tasks, tasks, strict=True))
    found = {name: method.readout(state, ClientCard("", {"group": group})) for group, name in of_group.items()}
    learned = {name: readout for name, readout in found.items() if readout is not None}
    return PromptLibrary(start, prompts, card, keys, learned=learned)


def _public_privacy(privacy: PrivacyReport) -> dict[str, Any]:
    """Returns the privacy block of a library, with the budget as epsilon, or the cost rounded up to two digits."""
    public = privacy.model_dump(exclude_unset=True, exclude=SITE_PRIVATE_FIELDS)
    if spent := privacy.epsilon:
        public["epsilon"] = max(privacy.budget or _rounded_up(spent), spent)
    if privacy.replace_epsilon:
        public["replace_epsilon"] = _rounded_up(privacy.replace_epsilon)
    if privacy.group_epsilon:
        public["group_epsilon"] = {str(size): _rounded_up(cost) for size, cost in privacy.group_epsilon.items()}
    return public


def _rounded_up(epsilon: float) -> float:
    """Rounds up to two digits, because the exact cost tells the number of records."""
    if not 0 < epsilon < inf:  # a run that its budget ended before its first release has spent nothing
        return epsilon
    unit = 10.0 ** (floor(log10(epsilon)) - 1)
    return round(ceil(epsilon / unit * (1 - 1e-12)) * unit, 12)


def _kept_as(vectors_PD: Tensor, backbone: Backbone) -> Tensor:
    """Returns a prompt as a library stores it: tokens as vectors, if the backbone takes vectors."""
    if vectors_PD.is_floating_point() or backbone.vocabulary is None or not backbone.supports_features:
        return vectors_PD
    return backbone.vocabulary.embed_for_prompt(vectors_PD[:, 0][None])[0].cpu()


def cluster_report(context: ExperimentContext, state: State) -> Clusters | None:
    """Compares the clusters with each public column of the clients; None for a method without prototypes."""
    member = {n: k for n, k in (state.facts.get("clusters") or {}).items() if n in context.shards}
    if not member:
        return None
    known = sorted({key for shard in context.shards.values() for key in shard.metadata})
    truths = {key: {n: str(s.metadata[key]) for n, s in context.shards.items() if key in s.metadata} for key in known}
    found = {key: adjusted_rand(member, truth) for key, truth in truths.items()}
    return Clusters(member=member, number=len(set(member.values())), adjusted_rand=found)


def tasks_of(context: ExperimentContext, state: State, tasks: list[str]) -> dict[str, list[str]]:
    """Returns the tasks of each prototype's members, by the names of the library card."""
    named, of_prompt = dict(zip(context.tasks, tasks, strict=True)), {}
    clusters = (state.facts.get("clusters") or {}).items()
    for client, cluster in sorted((client, cluster) for client, cluster in clusters if client in context.group_of):
        of_prompt.setdefault(f"prototype-{cluster}", set()).add(named[context.group_of[client]])
    return {prompt: sorted(names) for prompt, names in of_prompt.items()}
