"""Checks a run spec against the site's policy. Every objection names the lines in both files."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ficpd.deployment.run_spec import RunSpec, group_of
from ficpd.deployment.site.config import Policy, SiteConfig, location
from ficpd.errors import BackboneError, PolicyError, SiteError
from ficpd.federation.client import LABELS
from ficpd.federation.secure_sum import PHASES
from ficpd.interfaces import Backbone, Task
from ficpd.privacy.shared_gaussian import SHARED
from ficpd.types import ClientData, Prompt


def check(config: SiteConfig, own: str, own_name: str, spec: RunSpec, backbone: Backbone) -> None:
    """Raises `PolicyError` with all objections, if any. `own`, `own_name`: text and name of the site's file."""
    objections = [
        f"{location(spec.recipe_name, spec.recipe, theirs)}: {given}; {location(own_name, own, ours)}: {allowed}"
        for theirs, given, ours, allowed in _objections(config, spec, max_virtual_tokens(config, backbone))
    ]
    if objections:
        raise PolicyError(
            f"{config.name} does not take part, and nothing was spent: "
            + ". ".join(objections)
            + ". Change one of the two"
        )


def check_message(config: SiteConfig, spec: RunSpec, message: str) -> None:
    """Raises `PolicyError` for a secure sum's message in a run without secure sums, or the reverse. Needs no plan."""
    if (summed := spec.experiment.privacy["name"] == SHARED) != (message in PHASES):
        raise PolicyError(
            f"{config.name} sends {'terms of a secure sum' if summed else 'updates'} in this run, as its recipe says, and "
            "was asked for the other. Nothing was spent"
        )


def check_statistics(declared: Mapping[str, float | None], privacy: Mapping[str, Any]) -> None:
    """Raises `PolicyError` for a statistic of the method that has no share of the budget in the recipe."""
    stated = privacy.get("statistics") or {}
    if privacy["name"] != "none" and (
        open_ := sorted(n for n, share in declared.items() if share is None and n not in stated)
    ):
        raise PolicyError(
            f"the method needs the statistic {open_[0]!r}, and the recipe gives it no share of the budget. State "
            f"privacy.statistics = {{ {open_[0]} = 0.1 }}"
        )


def _objections(config: SiteConfig, spec: RunSpec, tokens: int) -> Iterator[tuple[str, str, str, str]]:
    """Yields the recipe's key and value, and the site's key and allowed value, of each objection."""
    policy, experiment = config.policy, spec.experiment
    method, mechanism = experiment.method["name"], mechanism_name(experiment.privacy)
    if method not in policy.methods:
        yield "method.name", f"method.name = {method!r}", "policy.methods", f"methods are {_list(policy.methods)}"
    if mechanism not in policy.mechanisms:
        yield "privacy.name", f"privacy is {mechanism!r}", "policy.mechanisms", f"they are {_list(policy.mechanisms)}"
    if experiment.privacy.get("noise_multiplier") is not None:  # its cost, and so a refusal, reveals the record count
        yield "privacy.noise_multiplier", "privacy.noise_multiplier is stated", "policy.epsilon", "sites go by epsilon"
    if set(experiment.privacy.get("statistics") or ()) - {LABELS}:  # labels stay at the site and are charged
        yield (
            "privacy.statistics",
            "privacy.statistics are asked for",
            "policy.mechanisms",
            "sites release updates only",
        )
    # Otherwise the cost, and so a refusal, would depend on the number of records.
    delta, epsilon = experiment.privacy.get("delta"), experiment.privacy.get("epsilon")
    if mechanism != "none" and delta != policy.delta:
        yield "privacy.delta", f"privacy.delta = {delta!r}", "policy.delta", f"policy.delta = {policy.delta:g}"
    if mechanism != "none" and (epsilon is None or epsilon > policy.epsilon):
        yield "privacy.epsilon", f"privacy.epsilon = {epsilon!r}", "policy.epsilon", f"at most {policy.epsilon:g}"
    if mechanism == SHARED:
        yield from _secure_sum_objections(experiment.privacy, policy, spec.schedule.cohort)
    iterations, candidates = (experiment.method.get(name) or 0 for name in ("iterations", "candidates"))
    training, rounds = experiment.training, spec.schedule.num_rounds
    group = group_of(config.name, experiment.groups)
    clip = (experiment.privacy.get("clip_norms") or {}).get(group, experiment.privacy.get("clip_norm")) or 0.0
    most_records = policy.max_records_per_subject if config.data.subject else None
    for theirs, given, ours, most in (
        ("prompt.num_tokens", spec.start.num_virtual_tokens, "policy.max_num_tokens", tokens),
        ("training.local_steps", training.local_steps, "policy.max_local_steps", policy.max_local_steps),
        ("training.batch_size", training.batch_size, "policy.max_batch_size", policy.max_batch_size),
        ("training.directions", training.directions, "policy.max_candidates", policy.max_candidates // 2),  # two each
        ("training.population", training.population, "policy.max_candidates", policy.max_candidates),
        ("method.candidates", candidates, "policy.max_candidates", policy.max_candidates),
        ("federation.num_rounds", rounds, "policy.max_rounds", policy.max_rounds),
        ("method.iterations", iterations, "policy.max_local_steps", policy.max_local_steps),
        (
            "privacy.max_records_per_subject",
            experiment.privacy.get("max_records_per_subject") or 0,
            "policy.max_records_per_subject",
            most_records,
        ),
        ("privacy.clip_norm", clip, "policy.max_clip_norm", policy.max_clip_norm),
    ):
        if most is not None and given > most:
            yield theirs, f"{theirs} = {given:g}", ours, f"at most {most:g}"
    asked = experiment.all_groups[group].task if group in experiment.all_groups else None
    prefix = f"groups.{group}." if group else ""
    if asked is None:
        yield (
            "groups",
            f"groups are {_list(experiment.groups)}",
            "name",
            f"name = {config.name!r} begins with none of them",
        )
    elif differing := [key for key in {**asked, **config.task} if asked.get(key) != config.task.get(key)]:
        key = sorted(differing)[0]
        yield f"{prefix}task.{key}", f"task.{key} = {asked.get(key)!r}", f"task.{key}", f"{config.task.get(key)!r}"


def _secure_sum_objections(
    privacy: Mapping[str, Any], policy: Policy, cohort: int
) -> Iterator[tuple[str, str, str, str]]:  # fmt: skip
    """Objects to noise that depends on this site's records, and to sums that too few colluding sites could reveal."""
    if privacy.get("least_records") is None:
        yield (
            "privacy.least_records",
            "privacy.least_records is open",
            "policy.epsilon",
            "sites share noise by a number",
        )
    given = privacy.get("max_colluding")
    if (colluding := cohort // 3 if given is None else given) < policy.least_colluding:
        allowed = f"at least {policy.least_colluding}"
        yield "privacy.max_colluding", f"privacy.max_colluding = {colluding}", "policy.least_colluding", allowed


def max_virtual_tokens(config: SiteConfig, backbone: Backbone) -> int:
    """Returns the maximum number of virtual tokens of a prompt at this site."""
    return config.policy.max_num_tokens or backbone.max_tokens // 2


def check_record_lengths(config: SiteConfig, shard: ClientData, task: Task, backbone: Backbone) -> None:
    """Raises `SiteError` if a record does not fit with the longest prompt that the policy allows.

    The owner checks this before any run, because a failing assignment would reveal the length of the longest record.
    """
    tokens = max_virtual_tokens(config, backbone)
    rows = torch.zeros(tokens + task.head_rows, backbone.width)
    longest = Prompt(rows, backbone.fingerprint, head_rows=task.head_rows)
    try:
        for records in (shard.train, shard.test):
            task.encode(records, backbone, longest)
    except BackboneError as error:
        raise SiteError(
            f"not every record of {config.name} fits with a prompt of {tokens} virtual tokens: {error} Or lower "
            "policy.max_num_tokens"
        ) from error


def mechanism_name(privacy: dict[str, Any]) -> str:
    """Returns a mechanism's name in policies: with ":central" if the server adds the noise."""
    return privacy["name"] + (":central" if privacy.get("placement") == "central" else "")


def _list(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
