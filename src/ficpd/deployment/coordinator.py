"""The coordinator of a run among real sites: the rounds of a simulation, without records.

A run writes the library, `rounds.jsonl`, `sites.json` (names and cards), `result.json`, `report.html`, and after every round
a checkpoint for `--resume`. The privacy costs of a site are only in the site's ledger.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ficpd.data.subjects import UnitCounts
from ficpd.deployment import run_spec
from ficpd.deployment.run_spec import RunSpec, group_of
from ficpd.deployment.site.config import rehearsal_warning
from ficpd.errors import ConfigError, FicpdError, PrivacyError, RunError, SiteError
from ficpd.experiments.build import ExperimentContext, build_context_without_records
from ficpd.experiments.config import Experiment, parse, to_toml
from ficpd.experiments.report.page import end_with_page
from ficpd.experiments.results import PrivacyReport, RunResult
from ficpd.experiments.run_directory import SITES, RunDir
from ficpd.experiments.runner import Clients, Runner
from ficpd.experiments.setup import check_method
from ficpd.federation import codec
from ficpd.federation.privacy_plan import (
    NONE,
    PrivacyPlan,
    build_mechanism,
    client_workloads,
    plan_privacy,
    privacy_config_for,
    secure_sum,
)
from ficpd.federation.rounds import Round, require_updates
from ficpd.privacy.none import NoPrivacy
from ficpd.privacy.shared_gaussian import SHARED
from ficpd.registry import validate
from ficpd.types import ClientCard, ClientData, Record, State

if TYPE_CHECKING:  # a site's process imports this package without Flower
    from flwr.app import Context
    from flwr.serverapp import Grid

    from ficpd.deployment.flower_engine import Flower

Say = Callable[[str], None]
UNSAVED = "No library was saved. Change the recipe or the sites, and resume, or begin in a new directory"


def server_main(grid: "Grid", context: "Context") -> None:
    """Runs a federation in Flower's server process. Settings: `recipe` (TOML), `recipe-name`, `out`, `resume`."""
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
) -> RunResult:
    """Runs a recipe's method among the sites that connect.

    Before it waits for sites, it raises `RunError` if `out` is taken, and the errors of `validate_distillation`. It then
    also raises `ConfigError` or `PrivacyError` if the method cannot run among sites or with this privacy. Later it raises
    `SiteError` for sites that do not connect or have another backbone, and `RunError` if no round took place.
    """
    directory, experiment = RunDir(out), parse(recipe, recipe_name, records=False)
    with directory.lock():
        directory.check(to_toml(experiment), resume)
        return _run(experiment, directory, engine, (recipe, recipe_name), say)


def _run(experiment: Experiment, directory: RunDir, engine: "Flower", recipe: tuple[str, str], say: Say) -> RunResult:
    if done := directory.result():
        say(f"this run is finished: {end_with_page(directory.path)}")
        return done
    context = build_context_without_records(directory.resolved(experiment, records=False))
    config = context.experiment.method
    method = check_method(context, config)
    if method.capabilities.centralized or not method.capabilities.trains:
        raise ConfigError(f"method {method.name!r} is for simulations; among sites run one that trains at them")
    say(f"{experiment.name}: {method.name} on {context.experiment.backbone.name}, waiting for sites")
    engine.wait_for_sites(_sites_of(directory.path))
    cards = {card.name: card for card in engine.clients()}
    if known := engine.rehearsed():
        say(rehearsal_warning(known))
    runner = Runner(_with_sites(context, cards, engine.told), config, directory, Sites(engine, recipe, say))
    directory.begin(experiment, runner.context.experiment)
    directory.write(SITES, json.dumps({name: dict(card.metadata) for name, card in cards.items()}, indent=2) + "\n")
    runner.prepare()
    for _, done in runner.train():
        say(_line(done, runner.schedule.num_rounds, runner.plan))
    if runner.stopped and not runner.rounds:
        raise RunError(f"no round took place: {runner.stopped}. {UNSAVED}")
    if runner.stopped:
        say(f"stopped: {runner.stopped}")
    result = runner.finish()
    say(f"library: {directory.path / 'library'}")
    say(f"page:    {end_with_page(directory.path)}")
    return result


class Sites(Clients):
    """The clients of a real run: sites with a run spec, which keep records and state.

    They share scores if their policy allows it.
    """

    def __init__(self, engine: "Flower", recipe: tuple[str, str], say: Say):
        self.engine, self.recipe, self.say = engine, recipe, say

    def plan_privacy(self, run: Runner, state: State) -> PrivacyPlan:
        """Plans the noise of the server or of a secure sum.

        The noise on a sum comes from the operating system: every site has the experiment's seed and could remove noise
        that comes from it. Each site plans its noise per record, because only the site knows its number of records.
        """
        run.directory.check_rounds_file(len(run.rounds))
        method, experiment = run.method, run.context.experiment
        part = privacy_config_for(method, experiment.privacy)
        if part["name"] == SHARED:
            return _plan_secure_sum(run, part, state)
        part = {**part, "noise": "cryptographic"} if "placement" in part else NONE
        batch_size = 1 if part is NONE else method.local_workload(state)[1]
        stand_ins = {name: ClientData([Record("a record of the site", {})] * batch_size, [], {}) for name in run.shards}
        released = run.last_release if part.get("placement") == "central" else 0
        return plan_privacy(
            part, method, state, stand_ins, run.schedule, experiment.seed, run.directory.path, run.directory.run_id(),
            released,
        )  # fmt: skip

    def build_engine(self, run: Runner, states: int) -> "Flower":
        context, names = run.context, [card.name for card in self.engine.clients()]
        coordinates = context.compression.subspace
        spec = RunSpec(context.experiment, *self.recipe, names, run.schedule, context.start, coordinates)
        body = run_spec.encode(spec)
        self.run_spec_bytes = len(body)
        self.engine.run, self.engine.spec_for = run.directory.run_id(), lambda site: body
        self.say(
            f"{len(names)} sites: {', '.join(names)}; run spec of {len(body):,} bytes to each, once; privacy: "
            f"{_agreed(context.experiment.privacy, run.plan).guarantee}"
        )
        return self.engine

    def after_round(self, run: Runner, done: Round) -> None:
        """Raises `RunError` if every site answered the first round with an error. A resumed run repeats the round.

        A site that was not reached does not count as an error, nor does a secure sum that lost too many sites.
        """
        if done.round == 1 and all(re.match(r"\w+Error\b", reason) for reason in done.dropped.values()):
            require_updates(run.method.name, done, UNSAVED)

    def evaluate(self, run: Runner) -> dict[str, Any]:
        round, fingerprint = run.schedule.num_rounds + 1, run.context.model.backbone.fingerprint
        assignments = {
            card.name: codec.encode_assignment(run.method.make_assignment(run.state, card, round), fingerprint)
            for card in self.engine.clients()
        }
        scores = self.engine.evaluate(assignments)
        return {
            "shared_scores": {name: score for name, score in scores.items() if score},
            "privacy": _agreed(run.context.experiment.privacy, run.plan).model_copy(
                update={"rehearsed": self.engine.rehearsed()}
            ),
        }


def _plan_secure_sum(run: Runner, part: Mapping[str, Any], state: State) -> PrivacyPlan:
    """Plans the secure sums from public settings. Raises `PrivacyError` without `least_records`."""
    if (least := part["least_records"]) is None:
        raise PrivacyError(
            "privacy.least_records is open: expected the records that every site has at least, because all of them "
            "plan their noise by it. State it"
        )
    counts = dict.fromkeys(run.shards, UnitCounts(least))
    plans = client_workloads(run.method, state, counts, run.schedule)
    mechanisms = {name: build_mechanism(part, name, plan) for name, plan in plans.items()}
    secure = secure_sum(mechanisms, run.schedule, list(run.context.tasks), run.directory.run_id(), masked=True)
    return PrivacyPlan({name: NoPrivacy() for name in run.shards}, {}, None, None, True, secure)


def _sites_of(out: Path) -> dict[str, ClientCard] | None:
    """Returns the sites of a resumed run; None for a new run."""
    file = out / SITES
    if not file.exists():
        return None
    return {name: ClientCard(name, facts) for name, facts in json.loads(file.read_text(encoding="utf-8")).items()}


def _with_sites(
    context: ExperimentContext, cards: Mapping[str, ClientCard], told: Mapping[str, Mapping[str, Any]]
) -> ExperimentContext:
    """Adds the sites as clients without records. Raises `SiteError` for another backbone or an unknown group."""
    fingerprint, groups = context.model.backbone.fingerprint, context.experiment.groups
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
    return replace(context, shards=shards, group_of=group)


def _agreed(privacy: Mapping[str, Any], plan: PrivacyPlan) -> PrivacyReport:
    """Returns the guarantee that every site must keep. The spent budget is in the site's ledger."""
    if plan.central:
        return PrivacyReport.model_validate(plan.to_report())
    if privacy["name"] == "none":
        return PrivacyReport(mechanism="none", unit="none", epsilon=None, delta=None)
    multiplier, summed = privacy.get("noise_multiplier"), plan.secure and next(iter(plan.secure.mechanisms.values()))
    return PrivacyReport(
        mechanism=summed.guarantee()["mechanism"] if summed else privacy["name"],
        unit="client" if "placement" in privacy else "record",
        epsilon=privacy.get("epsilon"),
        delta=privacy["delta"],
        noise_multiplier=None if multiplier is None else (multiplier, multiplier),
        noise="shared by the sites" if summed else "each site's own",
        at_most=True,
    )


def _line(done: Round, planned: int, plan: PrivacyPlan) -> str:
    """Describes one round in a line of the log."""
    words = f"round {done.round}/{planned}: {done.updates} of {done.clients} sites, {done.seconds_train:.1f} s, "
    words += f"{done.bytes_up:,} bytes up, {done.bytes_down:,} down"
    if plan.central:
        words += f", epsilon {plan.central.account.epsilon():.3g}"
    for kind, named in (("dropped", done.dropped), ("excluded", done.excluded_updates)):
        words += "".join(f"; {kind} {name}: {why}" for name, why in sorted(named.items()))
    return words
