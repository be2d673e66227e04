"""Shows the owner of a site its outgoing data, the cost of a recipe and the spent budget."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ficpd.backbones.loading import load_backbone
from ficpd.data.subjects import UnitCounts, count_units
from ficpd.deployment.run_spec import RunSpec, group_of
from ficpd.deployment.site import config as settings
from ficpd.deployment.site import policy
from ficpd.deployment.site.load import load_records
from ficpd.deployment.site.site import LEDGER
from ficpd.deployment.site.status import check_data_unit, ledger_status
from ficpd.errors import SiteError
from ficpd.experiments.build import build_context_without_records
from ficpd.experiments.config import parse
from ficpd.experiments.setup import build_method, build_schedule, federation_info
from ficpd.federation import codec
from ficpd.federation.privacy_plan import build_mechanism, privacy_config_for
from ficpd.library.card import ONE_RECORD, describe_group_costs
from ficpd.privacy import accountant
from ficpd.privacy.ledger import Ledger
from ficpd.types import ClientData, ClientUpdate, zero_update


def preflight_lines(file: Path, recipe: Path | None = None, clients: int = 1, rehearsal: bool = False) -> Iterator[str]:
    """Yields the facts for the owner before the first run. Raises the first error in site file, data or recipe."""
    config = settings.read(file)
    settings.check_rehearsal(config, file, rehearsal)
    if config.simulation:
        yield settings.rehearsal_warning([config.name])
    task, shard = load_records(config)
    yield f"records   {len(shard.train)} to learn from, {len(shard.test)} to test on; all labels are the task's"
    counts = count_units(shard.train)
    if counts.subjects is None:
        yield f"unit      {ONE_RECORD}: name whom a record is about (data.columns.subject) if anybody has several"
    else:
        yield (
            f"unit      one subject (column {config.data.subject!r}), all records together: {counts.subjects} to learn "
            f"from, {count_units(shard.test).subjects} to test on. A subject at two sites is covered at each by itself"
        )
    if recipe is None:
        backbone, _ = load_backbone(config.backbone, config.engine)
        yield f"backbone  {config.backbone.name}: {backbone.fingerprint}"
        policy.check_record_lengths(config, shard, task, backbone)
        most = policy.max_virtual_tokens(config, backbone)
        yield f"prompts   of at most {most} virtual tokens; every record fits with them"
    card = ", ".join(f"{key} = {value}" for key, value in config.card.items()) or "the name alone"
    yield f"leaves    the card, to the coordinator: {config.name!r}; {card}"
    allowed = config.policy.mechanisms
    noise = "NOT PROTECTED where a recipe asks for none" if "none" in allowed else f"noised by {' or '.join(allowed)}"
    yield f"leaves    once a round, an update: {noise}"
    scores = "only in runs without a guarantee" if config.policy.share_metrics else "never"
    yield f"leaves    scores on the test records: {scores}"
    yield "stays     records, personal prompts, the ledger, every error that may quote a record"
    yield "roughly   the number of your records becomes known, because fewer records need more noise"
    spent = site_status(file, counts)["epsilon"]
    unit = f" for one {spent['unit']}" if spent["unit"] else ""
    yield f"budget    epsilon {spent['spent']:.4g} of {spent['of']:g} spent{unit} over all runs (delta {spent['delta']:g})"
    if recipe is not None:
        yield from _of_recipe(config, file, recipe, clients, counts)


def _of_recipe(
    config: settings.SiteConfig, file: Path, recipe: Path, clients: int, counts: UnitCounts
) -> Iterator[str]:
    """Checks the recipe against the policy; yields the update's size and the cost of the whole run."""
    text = recipe.read_text(encoding="utf-8")
    context = build_context_without_records(parse(text, recipe.name, records=False))
    method = build_method(context, context.experiment.method)
    context = context.with_method(method)
    names = [config.name, *(f"another {place}" for place in range(1, clients))]
    context = replace(context, shards={name: ClientData([], [], {}) for name in names})
    schedule = build_schedule(context, method)
    spec = RunSpec(context.experiment, text, recipe.name, names, schedule, context.start, context.compression.subspace)
    yield f"backbone  {context.experiment.backbone.name}: {context.start.backbone}"
    policy.check(config, file.read_text(encoding="utf-8"), file.name, spec, context.model.backbone)
    yield f"recipe    {recipe.name}: the policy allows it"
    state = method.init(federation_info(context, method, context.shards, context.experiment.privacy))
    arrays = context.compression.pack(context.compression.project(zero_update(method.update_spec(state))))
    update = ClientUpdate(config.name, arrays)
    body = codec.encode_update(update, 1, context.start.backbone)
    yield f"update    {len(body)} bytes in round one: " + ", ".join(
        f"{n} {tuple(a.shape)}" for n, a in update.arrays.items()
    )
    group = group_of(config.name, context.experiment.groups)
    plan = spec.plan(config.name, counts, method)
    mechanism = build_mechanism(privacy_config_for(method, context.experiment.privacy), group, plan)
    costs, delta = list(mechanism.planned_costs()), config.policy.delta
    if costs:
        whole = accountant.epsilon(costs, delta)
        yield f"cost      epsilon {whole:.4g} for {plan.participations} rounds, with noise multiplier " + ", ".join(
            f"{cost.noise_multiplier:.3g} ({cost.name})" for cost in costs
        )
    if costs and mechanism.unit == "record":
        replaced = accountant.epsilon_replaced(costs, delta)
        what = "record" if counts.subjects is None else "subject"
        yield f"cost      epsilon {replaced:.4g} where one {what} is replaced by another, instead of added or removed"
    if costs and mechanism.unit == "record" and counts.subjects is None:
        yield f"cost      of somebody with several records: {describe_group_costs(accountant.group_costs(costs, delta))}"


def site_status(file: Path, counts: UnitCounts | None = None) -> dict[str, Any]:
    """Reads the state folder, as its owner or root. The key `running`: whether a process uses the folder.

    counts: the counts of the training data. Raises `LedgerError` if the ledger has another unit.
    """
    config = settings.read(file)
    with _as_owner(config.state):
        known = (config.state / LEDGER).exists()
        ledger = Ledger(config.state / LEDGER if known else ":memory:", f"site {config.name}")
        try:
            if counts is not None:
                check_data_unit(ledger, config, counts)
            return {**ledger_status(ledger, config), "running": _is_locked(config.state)}
        finally:
            ledger.close()


@contextmanager
def _as_owner(folder: Path) -> Iterator[None]:
    """Acts as the owner, so that root creates no SQLite files as root. Raises `SiteError` for other users."""
    mine = os.geteuid()
    owner = folder.stat().st_uid if folder.exists() else mine
    if mine not in (0, owner):
        raise SiteError(f"{folder} belongs to user {owner}, this process is user {mine}; run as that user, or as root")
    os.seteuid(owner)
    try:
        yield
    finally:
        os.seteuid(mine)


def _is_locked(state: Path) -> bool:
    """Returns whether a process uses this state folder."""
    if not (state / "lock").exists():
        return False
    with open(state / "lock", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
