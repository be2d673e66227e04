"""`ficpd audit`: attack a finished run, as somebody could who has its library, and as the worst record could."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ficpd import seeds
from ficpd.audit import canaries as mechanism_canaries
from ficpd.audit.attacks import ATTACKS, Evidence
from ficpd.audit.bounds import one_run, two_worlds
from ficpd.audit.outcome import best_advantage, label_matched, outcome
from ficpd.audit.planting import has_labels, mislabelled, plant
from ficpd.audit.report import FEW, Audit, LowerBound, markdown
from ficpd.audit.shadows import losses, shadow_prompts
from ficpd.data import sources
from ficpd.errors import PrivacyError, RunError
from ficpd.experiment import parse, settings
from ficpd.guard import SERVER, part_for, planned
from ficpd.library import PromptLibrary, guarantee
from ficpd.run import one_method, schedule_of, silent
from ficpd.rundir import RunDir
from ficpd.seams import Method, Task
from ficpd.types import Plan, Record, State
from ficpd.use import PREFERRED, pick
from ficpd.world import World, build_world

POPULATION = 500
SHADOW_BATCH = 32
DELTA = 1e-5
"""At which a bound is given for a run that states no δ."""


@dataclass(frozen=True)
class Finished:
    """A finished run, opened again. `state` is the server's after its last round."""

    directory: RunDir
    world: World
    method: Method
    state: State
    library: PromptLibrary
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """`members` were trained on; nobody trained on the others. `outside` are scored beside the members, `population` and
    `pool` are the attacker's own: the pool trains the shadows."""

    members: Sequence[Record]
    outside: Sequence[Record]
    population: Sequence[Record]
    pool: Sequence[Record]


def audit_run(
    folder: Path, prompt: str | None = None, shadows: int = 4, members: int = 1000, canaries: int = 100, seed: int = 0,
    device: str = "cpu",
) -> Audit:  # fmt: skip
    """Attack a run's prompt (none named: the global one); leaves `audit.json` and `audit.md` in the run's directory.

    `members` bounds the records attacked. With `canaries`, the federation is trained a second time, in a temporary
    directory with a ledger of its own. Raises `RunError` for what is no finished run, `PrivacyError` where nothing was
    left to attack.
    """
    run = open_run(Path(folder), device)
    target = _target(run, prompt)
    split = split_records(run, members, seed)
    shadow_SPD = _shadows(run, split.pool, shadows, seed)
    evidence = _evidence(run, run.library.prompts[target].vectors_PD, shadow_SPD, split)
    scores = {name: attack(evidence) for name, attack in ATTACKS.items()}
    advantage, interval = best_advantage(scores, evidence.member_N, seed)
    block = run.result["privacy"]
    found = Audit(
        run=run.directory.path.name,
        method=run.method.name,
        prompt=target,
        guarantee=guarantee(block),
        epsilon=block["epsilon"],
        delta=block["delta"],
        num_members=len(split.members),
        num_nonmembers=len(split.outside),
        num_shadows=len(shadow_SPD),
        shadow_records=_shadow_size(run, split.pool),
        attacks={name: outcome(score, evidence.member_N, seed) for name, score in scores.items()},
        advantage=advantage,
        advantage_interval=interval,
        mechanism=mechanism_bound(run, seed),
        planted=planted_bound(run, target, shadow_SPD, [*split.pool, *split.population], canaries, seed),
        seed=seed,
    )
    run.directory.write("audit.json", json.dumps({**asdict(found), "alarm": found.alarm}, indent=2) + "\n")
    run.directory.write("audit.md", markdown(found))
    return found


def open_run(folder: Path, device: str) -> Finished:
    """Raises `RunError` if the folder holds no run, or one that has not finished or never began a round."""
    directory, resolved = RunDir(folder), folder / "resolved.toml"
    if not resolved.exists():
        raise RunError(f"{folder} holds no run (no resolved.toml); give the directory that `ficpd run` wrote (--out)")
    result = directory.result()
    if result is None:
        raise RunError(f"the run in {folder} has not finished (no result.json); go on with it first (--resume)")
    experiment = parse(resolved.read_text(encoding="utf-8"), str(resolved), [f"engine.device={json.dumps(device)}"])
    module, config = settings("methods", experiment.method)
    method, library = module.build(config, experiment.training), PromptLibrary.load(folder)
    saved = directory.load()
    if not method.releases or not library.prompts or saved is None:
        raise PrivacyError(
            f"{method.name} left no prompt that depends on records in {folder}: nothing was left to attack. Audit a run "
            "of a method that shares one (fedavg, ficpd, ...)"
        )
    world = build_world(experiment)
    library.check(world.model.backbone)
    return Finished(directory, world, method, saved[0], library, result)


def _target(run: Finished, name: str | None) -> str:
    """Which prompt is attacked. Raises `LibraryError` if the library lacks it."""
    target = name or next((n for n in PREFERRED if n in run.library.prompts), next(iter(run.library.prompts)))
    pick(run.library, target)
    return target


# ---------------------------------------------------------------- who is a member


def split_records(run: Finished, limit: int, seed: int) -> Split:
    """At most `limit` members; of the records that nobody trained on, one half to score, the other for the attacker.

    A record that reads like a training record, or like another, is left out of the halves. Raises `PrivacyError` if too
    few are left.
    """
    experiment, shards = run.world.experiment, run.world.shards.values()
    train = [record for shard in shards for record in shard.train]
    spare = [record for shard in shards for record in shard.test] + sources.unused(experiment.data, experiment.seed)
    seen = {_contents(record) for record in train}
    fresh = _shuffled({_contents(r): r for r in spare if _contents(r) not in seen}.values(), seed, "halves")
    mine, outside = fresh[: len(fresh) // 2], fresh[len(fresh) // 2 :]
    members = _shuffled(train, seed, "members")[:limit]
    outside = _alike(run.world.task, members, outside, max(limit, FEW), seed)
    if min(len(members), len(outside), len(mine)) < 2:
        raise PrivacyError(
            f"{len(members)} members and {len(fresh)} records that no client trained on were found, expected at least 2 "
            "and 4 that differ from them; a larger data.test_fraction, or data.max_records, sets more aside"
        )
    rest = mine[POPULATION:]
    return Split(members, outside, mine[:POPULATION], rest if len(rest) >= len(train) else mine)


def _contents(record: Record) -> str:
    """What a record says, whoever holds it."""
    return repr([record.fields.get(role) for role in sources.ROLES if role != "client"])


def _alike(task: Task, members: Sequence[Record], others: Sequence[Record], limit: int, seed: int) -> list[Record]:
    """At most about `limit` of the others, with the members' share of each label. Numbers are not matched."""
    if not has_labels(task, members) or not others:
        return list(others[:limit])
    wanted, labels, room, kept = task.targets(members), task.targets(others), Counter(), []
    for label, count in Counter(wanted).items():
        room[label] = math.ceil(count / len(wanted) * limit)
    for record, label in zip(others, labels, strict=True):
        if room[label] > 0:
            room[label] -= 1
            kept.append(record)
    return [kept[i] for i in label_matched(wanted, task.targets(kept), seed)]


def _shuffled(things: Any, seed: int, what: str) -> list:
    kept = list(things)
    return [kept[i] for i in torch.randperm(len(kept), generator=seeds.generator(seed, "audit", what)).tolist()]


# ---------------------------------------------------------------- the attack on one prompt


def _shadow_size(run: Finished, pool: Sequence[Record]) -> int:
    return min(sum(len(shard.train) for shard in run.world.shards.values()), len(pool))


def _shadows(run: Finished, pool: Sequence[Record], number: int, seed: int) -> Tensor:
    """Prompts tuned for as many steps as a client's in the whole run, in batches as large as a cohort's together."""
    world, steps = run.world, run.method.work(run.state)[0] * run.result["num_rounds"]
    return shadow_prompts(
        world.model, world.task, world.start, world.compression, world.experiment.training, pool,
        _shadow_size(run, pool), max(steps, 1), SHADOW_BATCH, number, seed,
    )  # fmt: skip


def _evidence(run: Finished, target_PD: Tensor, shadow_SPD: Tensor, split: Split) -> Evidence:
    every_SPD = torch.cat([target_PD[None], shadow_SPD])
    loss_SN = _losses(run, every_SPD, [*split.members, *split.outside])
    loss_SZ = _losses(run, every_SPD, split.population)
    member_N = np.arange(loss_SN.shape[1]) < len(split.members)
    likelihood = has_labels(run.world.task, split.members)
    return Evidence(loss_SN[0], loss_SN[1:], member_N, loss_SZ[0], loss_SZ[1:], likelihood)


def _losses(run: Finished, prompts_SPD: Tensor, records: Sequence[Record]) -> np.ndarray:
    return losses(run.world.model, run.world.task, prompts_SPD, records, run.world.start)


# ---------------------------------------------------------------- the mechanism, and planted records


def mechanism_bound(run: Finished, seed: int, trials: int = 2000) -> LowerBound | None:
    """The worst record (or client) against the mechanism of the site that spent most; None where nothing was noised.

    The mechanism is the one that was planned; what it plays is what was released, which is less if the budget ended it.
    """
    block = run.result["privacy"]
    if not block.get("lines"):
        return None
    module, config = settings("privacy", part_for(run.method, run.world.experiment.privacy))
    holders = run.world.holders(run.method.pools_data)
    plans = planned(run.method, run.state, holders, schedule_of(run.world, run.method))
    plan = plans.get(block["site_that_spent_most"], next(iter(plans.values())))  # the server has no plan of its own
    mechanism = module.build(config, plan)
    door = mechanism_canaries.door(mechanism)
    released = sum(line["releases"] for line in block["lines"] if line["name"] == mechanism.price(door).name)
    plan = _played(plan, door, released)
    runs = mechanism_canaries.affordable(mechanism, plan, trials)
    found = mechanism_canaries.lower_bound(mechanism, plan, block["delta"], trials, seed=seed)
    reach = two_worlds([0.0] * runs, [1.0] * runs, block["delta"])
    return LowerBound(found, block["epsilon"], block["delta"], reach, runs)


def _played(plan: Plan, door: str, released: int) -> Plan:
    """The plan of a run that made this many releases."""
    if door == "step":
        return replace(plan, participations=released // plan.steps)
    return replace(plan, participations=released, num_rounds=released)


def planted_bound(
    run: Finished, target: str, shadow_SPD: Tensor, pool: Sequence[Record], number: int, seed: int
) -> LowerBound | None:
    """Train the federation again with mislabelled records, each put in by the flip of a coin, and guess which were.

    None if fewer than six can be made. A record's change is a client's change too; where the server noises whole clients
    the guarantee is for one client more or less, and a changed client is two steps: (2ε, (1 + e^ε) δ).
    """
    planted = mislabelled(run.world.task, list({r.key: r for r in pool}.values())[:number], run.world.shards, seed)
    if len(planted) < 6:
        return None
    coin_M = np.random.default_rng(seeds.derive(seed, "coins")).random(len(planted)) < 0.5
    shards = plant(run.world.shards, [record for record, heads in zip(planted, coin_M, strict=True) if heads], seed)
    with tempfile.TemporaryDirectory(prefix="ficpd-audit-") as folder:
        again = RunDir(Path(folder) / "run")
        result = one_method(replace(run.world, shards=shards), run.world.experiment.method, again, None, silent)
        library = PromptLibrary.load(again.path)
    name = target if target in library.prompts else _target(replace(run, library=library), None)
    loss_SM = _losses(run, torch.cat([library.prompts[name].vectors_PD[None], shadow_SPD]), planted)
    stated, delta = _for_a_record(result["privacy"])
    score_M = loss_SM[1:].mean(0) - loss_SM[0]
    reach = one_run(coin_M.astype(float), coin_M, delta)
    return LowerBound(one_run(score_M, coin_M, delta), stated, delta, reach, len(planted))


def _for_a_record(block: Mapping[str, Any]) -> tuple[float | None, float]:
    """What a run's privacy block promises of one record put in or not: ε (None: nothing) and δ."""
    epsilon, delta = block["epsilon"], block["delta"]
    if epsilon is None:
        return None, DELTA
    if (block["unit"], block["site_that_spent_most"]) == ("client", SERVER):
        delta = (1 + math.exp(epsilon)) * delta
        return (2 * epsilon, delta) if delta < 1 else (None, DELTA)
    return epsilon, delta
