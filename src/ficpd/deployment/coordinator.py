"""The coordinator's half of a run among real sites: the same rounds as a simulation's, without a single record.

What a run leaves: the library, `rounds.jsonl`, `sites.json` (names and cards), `result.json` and `report.md`; and a
checkpoint after every round, from which `--resume` goes on. What each site spent stands in its own ledger alone.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ficpd.backbones.autotune import machine_info
from ficpd.deployment import run_spec
from ficpd.deployment.run_spec import RunSpec, group_of
from ficpd.errors import BudgetError, ConfigError, FicpdError, SiteError
from ficpd.evaluation.evaluate import client_mean
from ficpd.experiments.build import ExperimentContext, build_context_without_records
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.experiments.distillation import DISTILLED, validate_distillation
from ficpd.experiments.run_directory import SITES, RunDir
from ficpd.experiments.setup import (
    VERSIONS,
    build_library,
    build_method,
    build_schedule,
    cluster_report,
    distill_if_configured,
    method_config,
    num_labels_by_group,
    with_noise_scale,
)
from ficpd.federation import codec
from ficpd.federation.method import Method
from ficpd.federation.privacy_plan import NONE, PrivacyPlan, plan_privacy, privacy_config_for, public_seed
from ficpd.federation.rounds import Round, run_rounds
from ficpd.library.card import guarantee
from ficpd.registry import validate
from ficpd.types import ClientCard, ClientData, FederationInfo, State

if TYPE_CHECKING:  # a site's process, which shares this package, needs no Flower
    from flwr.app import Context
    from flwr.serverapp import Grid

    from ficpd.deployment.flower_engine import Flower

Say = Callable[[str], None]


def server_main(grid: "Grid", context: "Context") -> None:
    """What Flower's server process runs. Settings: `recipe` (TOML text), `recipe-name`, `out`, `resume`."""
    from ficpd.deployment.flower_engine import Config, Flower

    given = context.run_config
    say = _to_the_log
    try:
        recipe, name = str(given["recipe"]), str(given.get("recipe-name", "recipe.toml"))
        experiment = parse(recipe, name, records=False)
        engine = Flower(validate(Config, experiment.engine.options, f"{name}: engine.options"), grid, "", say)
        run_coordinator(recipe, name, Path(str(given["out"])), engine, bool(given.get("resume", False)), say)
    except FicpdError as error:
        say(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _to_the_log(line: str) -> None:
    print(line, flush=True)


def run_coordinator(
    recipe: str, recipe_name: str, out: Path, engine: "Flower", resume: bool = False, say: Say = _to_the_log
) -> dict[str, Any]:
    """Run a recipe's method among the sites that come. Raises `RunError` if `out` is taken, `ConfigError` or `PrivacyError`,
    before any site is waited for, if the method is not for sites or not private in this way, what `validate_distillation` raises,
    `SiteError` for sites that do not come or have another backbone; nothing is asked of anybody before all of that is known.
    """
    directory, experiment = RunDir(out), parse(recipe, recipe_name, records=False)
    with directory.lock():
        directory.check(to_toml(experiment), resume)
        return _serve(experiment, directory, engine, (recipe, recipe_name), say)


def _serve(
    experiment: Experiment, directory: RunDir, engine: "Flower", recipe: tuple[str, str], say: Say
) -> dict[str, Any]:
    out = directory.path
    if done := directory.result():
        say(f"this run is finished: {out / 'report.md'}")
        return done
    resolved = out / "resolved.toml"
    world = build_context_without_records(
        parse(resolved.read_text(), resolved.name, records=False) if resolved.exists() else experiment
    )
    method = build_method(world, world.experiment.method)
    if method.capabilities.centralized or not method.capabilities.trains:
        raise ConfigError(f"method {method.name!r} is for simulations; among sites run one that trains at them")
    privacy_config_for(method, world.experiment.privacy)  # no site is waited for where there is no such private form
    validate_distillation(world, method)
    say(f"{experiment.name}: {method.name} on {world.experiment.backbone.name}, waiting for sites")
    engine.wait_for_sites(_sites_of(out))
    world = _with_sites(world, {card.name: card for card in engine.clients()}, engine.told)
    world = world.with_method(method)
    directory.write("experiment.toml", to_toml(experiment))
    directory.write("resolved.toml", to_toml(world.experiment))
    directory.write(SITES, json.dumps({card.name: dict(card.metadata) for card in engine.clients()}, indent=2) + "\n")
    return _rounds(world, method, directory, engine, recipe, say)


def _rounds(
    world: ExperimentContext, method: Method, directory: RunDir, engine: "Flower", recipe: tuple[str, str], say: Say
) -> dict[str, Any]:
    experiment, schedule = world.experiment, build_schedule(world, method)
    state, _, rounds, totals = directory.load() or _beginning(world, method, engine)
    directory.check_rounds_file(len(rounds))
    plan = _guard(world, method, state, directory, rounds)
    directory.check_ledgers([plan.central.account] if plan.central else [], method.name, len(rounds))
    state = with_noise_scale(world, method, state, plan)
    engine.run = directory.run_id()
    names = [card.name for card in engine.clients()]
    coordinates = world.compression.subspace
    body = run_spec.encode(RunSpec(experiment, *recipe, names, schedule, world.start, coordinates))
    engine.spec_for = lambda site: body
    promise = guarantee(_agreed(experiment.privacy, plan))
    say(f"{len(names)} sites: {', '.join(names)}; terms of {len(body):,} bytes to each, once; privacy: {promise}")
    going = run_rounds(
        method, engine, world.model, state, schedule, world.compression, len(rounds) + 1, plan.central
    )  # fmt: skip
    stopped = None
    try:
        for after, done in going:
            state = after
            rounds.append(done)
            totals["train"] += done.seconds_train
            totals["aggregate"] += done.seconds_aggregate
            directory.save(state, {}, rounds, totals)
            say(_line(done, schedule.num_rounds, plan))
    except BudgetError as error:
        stopped = str(error)
        say(f"stopped: {stopped}")
    scores = engine.evaluate(
        {
            card.name: codec.encode_assignment(
                method.make_assignment(state, card, schedule.num_rounds + 1), world.model.backbone.fingerprint
            )
            for card in engine.clients()
        }
    )
    return _left(world, method, state, directory, rounds, totals, plan, scores, stopped, len(body), say)


def _left(
    world, method, state, directory, rounds, totals, plan, scores, stopped, terms_bytes: int, say: Say
) -> dict[str, Any]:
    """The library, the result and the report."""
    experiment = world.experiment
    up, down = sum(done.bytes_up for done in rounds), sum(done.bytes_down for done in rounds)
    asked = max(sum(done.clients for done in rounds), 1)
    result: dict[str, Any] = {
        "method": method.name,
        "label": method.name,
        "backbone": {"name": experiment.backbone.name, "fingerprint": world.start.backbone},
        "task": ", ".join(f"{g}: {p.task['name']}" if g else p.task["name"] for g, p in experiment.all_groups.items()),
        "num_clients": len(world.shards),
        "num_rounds": len(rounds),
        "seed": experiment.seed,
        "shared_scores": {name: score for name, score in scores.items() if score},
        "bytes": {
            "up_per_client_round": up / asked,
            "down_per_client_round": down / asked,
            "up_total": up,
            "down_total": down,
            "terms_per_client": terms_bytes,
        },
        "seconds": dict(totals),
        "dropped_updates": sum(len(done.dropped) for done in rounds),
        "compression": experiment.compression,
        "clusters": cluster_report(world, state),
        "settings": method_config(experiment.method),
        "privacy": _agreed(experiment.privacy, plan),
        "stopped": stopped,
        "machine": {**machine_info(world.model.backbone.device), "system": platform.system()},
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }
    plan.close()
    distilled = {}
    if result["clusters"] and (refined := distill_if_configured(world, method, state, directory)):
        result["distillation"], distilled = refined.facts, {DISTILLED: refined.prompt}
    build_library(world, method, state, result, distilled).save(directory.path / "library")
    directory.write("report.md", coordinator_report(result, rounds))
    directory.write("result.json", json.dumps(result, indent=2) + "\n")
    say(f"library: {directory.path / 'library'}")
    say(f"report:  {directory.path / 'report.md'}")
    return result


def _sites_of(out: Path) -> dict[str, ClientCard] | None:
    """Those that a run which goes on began with."""
    file = out / SITES
    if not file.exists():
        return None
    return {name: ClientCard(name, facts) for name, facts in json.loads(file.read_text()).items()}


def _with_sites(
    world: ExperimentContext, cards: Mapping[str, ClientCard], told: Mapping[str, Mapping[str, Any]]
) -> ExperimentContext:
    """The sites as clients without records. Raises `SiteError` for one that has another backbone or no task here."""
    fingerprint, groups = world.model.backbone.fingerprint, world.experiment.groups
    others = {
        name: facts["backbone"] for name, facts in told.items() if name in cards and facts["backbone"] != fingerprint
    }
    if others:
        raise SiteError(
            f"the recipe's backbone is {fingerprint}, and these sites have another: "
            + ", ".join(f"{name} has {own}" for name, own in sorted(others.items()))
            + ". Prompts of different backbones mean nothing to each other; set the same backbone and options"
        )
    group = {name: group_of(name, groups) for name in cards}
    if groups and (lost := sorted(name for name in cards if group[name] not in groups)):
        raise SiteError(
            f"sites {', '.join(lost)}: a name begins with its task's group and a dot, and the recipe has {', '.join(groups)}"
        )
    shards = {name: ClientData([], [], dict(cards[name].metadata)) for name in sorted(cards)}
    return replace(world, shards=shards, group_of=group)


def _beginning(
    world: ExperimentContext, method: Method, engine: "Flower"
) -> tuple[State, dict[str, Any], list[Round], dict[str, Any]]:
    federation, number = world.experiment.federation, len(world.shards)
    cohort = min(federation.clients_per_round or number, number)
    cards = sorted(engine.clients(), key=lambda card: card.name)
    seed = public_seed(world.experiment.seed)
    setup = FederationInfo(world.start, cards, federation.num_rounds, cohort, seed, num_labels_by_group(world))
    return method.init(setup), {}, [], {"train": 0.0, "aggregate": 0.0}


def _guard(
    world: ExperimentContext, method: Method, state: State, directory: RunDir, rounds: list[Round]
) -> PrivacyPlan:
    """What the server itself has to pay for: the noise on a sum, and the noise on an update that it may know of. That of a
    sum is the operating system's: every site has the experiment's seed and could take away what comes from it. What is
    noised per record, each site plans and pays by itself, for only it knows how many it has."""
    part = privacy_config_for(method, world.experiment.privacy)
    part = {**part, "noise": "cryptographic"} if "placement" in part else NONE
    batch_size = 1 if part is NONE else method.local_workload(state)[1]
    nobody = {name: ClientData([None] * batch_size, [], {}) for name in world.shards}  # type: ignore[list-item]
    paid = max((done.round for done in rounds if done.updates), default=0) if part.get("placement") == "central" else 0
    return plan_privacy(
        part, method, state, nobody, build_schedule(world, method), world.experiment.seed, directory.path,
        directory.run_id(), paid,
    )  # fmt: skip


def _agreed(privacy: Mapping[str, Any], plan: PrivacyPlan) -> dict[str, Any]:
    """The guarantee that every site's own noise has to keep; what a site has spent of it, its own ledger says."""
    if plan.central:
        return plan.to_report()
    if privacy["name"] == "none":
        return {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None, "noise": None}
    return {
        "mechanism": privacy["name"],
        "unit": "client" if "placement" in privacy else "record",
        "epsilon": privacy.get("epsilon"),
        "delta": privacy["delta"],
        "noise_multiplier": privacy.get("noise_multiplier"),
        "noise": "each site's own",
        "at_most": True,
    }


def _line(done: Round, planned: int, plan: PrivacyPlan) -> str:
    """A round as its operator sees it."""
    words = f"round {done.round}/{planned}: {done.updates} of {done.clients} sites, {done.seconds_train:.1f} s, "
    words += f"{done.bytes_up:,} bytes up, {done.bytes_down:,} down"
    if plan.central:
        words += f", epsilon {plan.central.account.epsilon():.3g}"
    for kind, named in (("dropped", done.dropped), ("set aside", done.set_aside)):
        words += "".join(f"; {kind} {name}: {why}" for name, why in sorted(named.items()))
    return words


def coordinator_report(result: Mapping[str, Any], rounds: list[Round]) -> str:
    """A page for the coordinator."""
    privacy = result["privacy"]
    lines = [
        f"# {result['method']} among {result['num_clients']} sites\n",
        f"{result['num_rounds']} rounds on {result['backbone']['name']}, {result['task']}. Privacy: "
        + (f"at most {guarantee(privacy)}, delta {privacy['delta']:g}" if privacy["epsilon"] else guarantee(privacy))
        + "; what each site has spent, its own ledger says (`ficpd site status`).",
        f"Bytes a site and round: {result['bytes']['up_per_client_round']:,.0f} up, "
        f"{result['bytes']['down_per_client_round']:,.0f} down; terms, once: {result['bytes']['terms_per_client']:,}.\n",
    ]
    if result["stopped"]:
        lines.append(f"**Stopped before its last round.** {result['stopped']}\n")
    if scores := result["shared_scores"]:
        kinds = sorted({kind for score in scores.values() for kind in score})
        lines.append("Scores that sites chose to share, the mean over them:\n")
        lines += [
            f"- {kind}: "
            + ", ".join(
                f"{metric} {value:.3f}"
                for metric, value in client_mean({n: s[kind] for n, s in scores.items() if kind in s}).items()
            )
            for kind in kinds
        ] + [""]
    lines += ["| round | sites | seconds | bytes up | bytes down | dropped |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.round} | {r.updates} of {r.clients} | {r.seconds_train:.1f} | {r.bytes_up:,} | {r.bytes_down:,} | "
        f"{'; '.join(f'{n}: {why}' for n, why in sorted(r.dropped.items()))} |"
        for r in rounds
    ]
    return "\n".join(lines) + "\n"
