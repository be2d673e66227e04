"""What runs have in common, simulated or among real sites: how they are set up, and what they leave behind."""

from collections import Counter
from collections.abc import Mapping
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from torch import Tensor

from ficpd.errors import ConfigError
from ficpd.experiments.build import ExperimentContext
from ficpd.experiments.distillation import DistillationResult, distill_library
from ficpd.experiments.run_directory import RunDir
from ficpd.federation.client import LABELS
from ficpd.federation.method import Method
from ficpd.federation.privacy_plan import PrivacyPlan, public_seed
from ficpd.federation.rounds import RoundSchedule
from ficpd.interfaces import Backbone
from ficpd.library.card import WORDS
from ficpd.library.library import PromptLibrary, prompt_keys
from ficpd.methods.shared.clustering import adjusted_rand
from ficpd.registry import build_config
from ficpd.types import JSON, TOKEN_DTYPE, Prompt, State, zero_update

SITE_PRIVATE_FIELDS = ("noise_multiplier", "site_that_spent_most", "epsilon_of_sites", "lines")
"""What of the privacy block stays out of a library: a site's sampling rate and noise tell how many records it has, and so
does an exact epsilon (`_told`)."""
VERSIONS = ("ficpd", "torch", "transformers", "scikit-learn", "dp-accounting", "opendp")


def build_method(context: ExperimentContext, part: Mapping[str, Any]) -> Method:
    """Raises `ConfigError` where the method wants of a task or backbone what it does not have."""
    module, config = build_config("methods", part)
    method: Method = module.build(config, context.experiment.training)
    unfit = [name or "its task" for name, task in context.tasks.items() if not task.num_labels]
    if LABELS in method.capabilities.statistics_once and unfit:
        raise ConfigError(
            f"method.label_prior = true goes by how frequent each label is, and {', '.join(unfit)} has none; set it to false"
        )
    method.bind(context.compression.subspace)
    method.check_compatible(list(context.tasks.values()), context.model.backbone)
    return method


def method_config(part: Mapping[str, Any]) -> dict[str, JSON]:
    """All of a method's settings, its defaults too."""
    return build_config("methods", part)[1].model_dump(mode="json")


def num_labels_by_group(context: ExperimentContext) -> dict[str, int]:
    """How many labels the task of each group has; 0 where it has none."""
    return {group: task.num_labels for group, task in context.tasks.items()}


def with_noise_scale(context: ExperimentContext, method: Method, state: State, plan: PrivacyPlan) -> State:
    """With the facts `noise` (on one update) and `noise_of_sum` (on a whole round's), squared lengths, so that a method can
    tell what clients learned from what a mechanism added."""
    arrays = context.compression.project(zero_update(method.update_spec(state)))
    size = sum(array.numel() for array in arrays.values() if array.dtype != TOKEN_DTYPE)
    of_sum = plan.central.expected_noise_norm_sq(size) if plan.central else 0.0
    return State(state.arrays, {**state.facts, "noise": plan.expected_noise_norm_sq(size), "noise_of_sum": of_sum})


def build_schedule(context: ExperimentContext, method: Method) -> RoundSchedule:
    federation, clients = context.experiment.federation, 1 if method.capabilities.centralized else len(context.shards)
    return RoundSchedule(
        federation.num_rounds if method.capabilities.trains else 0,
        min(federation.clients_per_round or clients, clients),
        public_seed(context.experiment.seed),
        federation.max_update_norm,
        method.capabilities.full_first_round,
        federation.accept_late,
    )


def build_library(
    context: ExperimentContext, method: Method, state: State, result: Mapping[str, Any], more: Mapping[str, Prompt]
) -> PromptLibrary:
    backbone, basis = context.model.backbone, method.library_prompts(state)
    start = context.start.with_vectors(_kept_as(context.start.vectors_PD, backbone))
    prompts = {name: start.with_vectors(_kept_as(vectors, backbone)) for name, vectors in basis.items()} | dict(more)
    card = {key: result[key] for key in ("method", "num_clients", "num_rounds", "seed", "privacy", "versions")}
    card["privacy"] = _told(result["privacy"])
    if card["privacy"].get("noise") == "simulated":  # whoever has the seed can take the noise off
        card.pop("seed")
    card["settings"] = result["settings"]
    if result["clusters"]:
        card["prototypes"] = result["clusters"]["number"]
    if "distillation" in result:
        facts = result["distillation"]
        card["distilled"] = {"how": facts["how"], "writer": Path(facts["writer"]).name, "gained": facts["gained"]}
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
    return PromptLibrary(start, prompts, card, keys)


def _told(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """Of the privacy block what a library says: for what was spent the budget that was agreed on, or, where none was, what
    was spent rounded up to two digits."""
    told = {key: value for key, value in privacy.items() if key not in SITE_PRIVATE_FIELDS}
    if spent := told.get("epsilon"):
        unit = 10.0 ** (floor(log10(spent)) - 1)
        rounded = round(ceil(spent / unit * (1 - 1e-12)) * unit, 12)
        told["epsilon"] = max(told.get("budget") or rounded, spent)
    return told


def _kept_as(vectors_PD: Tensor, backbone: Backbone) -> Tensor:
    """A prompt as a library keeps it: of words their vectors, where the backbone takes them, and so like any other."""
    if vectors_PD.is_floating_point() or backbone.vocabulary is None or not backbone.supports_features:
        return vectors_PD
    return backbone.vocabulary.embed_for_prompt(vectors_PD[:, 0][None])[0].cpu()


def cluster_report(context: ExperimentContext, state: State) -> dict[str, Any] | None:
    """Which prototype each client has, and how well that agrees with each thing that is publicly known of clients (the
    adjusted Rand index); None for a method without prototypes."""
    member = state.facts.get("clusters")
    if not member:
        return None
    known = sorted({key for shard in context.shards.values() for key in shard.metadata})
    truths = {key: {n: str(s.metadata[key]) for n, s in context.shards.items() if key in s.metadata} for key in known}
    found = {key: adjusted_rand(member, truth) for key, truth in truths.items()}
    return {"member": member, "number": len(set(member.values())), "agreement": found}


def tasks_of(context: ExperimentContext, state: State, tasks: list[str]) -> dict[str, list[str]]:
    """The tasks of each prototype's members, by the names that the card gives them."""
    named, of_prompt = dict(zip(context.tasks, tasks, strict=True)), {}
    for client, cluster in sorted((state.facts.get("clusters") or {}).items()):
        of_prompt.setdefault(f"prototype-{cluster}", set()).add(named[context.group_of[client]])
    return {prompt: sorted(names) for prompt, names in of_prompt.items()}


def distill_if_configured(
    context: ExperimentContext, method: Method, state: State, directory: RunDir
) -> DistillationResult | None:
    """What the server's last step made of the prototypes, if the experiment asks for it."""
    if context.experiment.distillation.how == "none":
        return None
    basis = {name: context.start.with_vectors(vectors) for name, vectors in method.library_prompts(state).items()}
    sizes = Counter(f"prototype-{cluster}" for cluster in state.facts["clusters"].values())
    return distill_library(context, basis, tasks_of(context, state, list(context.tasks)), sizes, directory)
