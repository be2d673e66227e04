"""Attacks a prompt, as a user of its library could, and a run, for its worst record (`ficpd audit`)."""

import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine
from ficpd.data import loading
from ficpd.data.subjects import count_units, group_by_subject
from ficpd.errors import PrivacyError
from ficpd.evaluation.audit import canaries
from ficpd.evaluation.audit.attack_metrics import attack_metrics, best_advantage
from ficpd.evaluation.audit.canary_injection import has_labels, inject_canaries, make_mislabelled_canaries
from ficpd.evaluation.audit.epsilon_bounds import one_run_bound
from ficpd.evaluation.audit.member_split import Split, split_records
from ficpd.evaluation.audit.membership import ATTACKS, AttackData
from ficpd.evaluation.audit.report import Audit, LowerBound
from ficpd.evaluation.audit.shadow_prompts import losses, shadow_prompts
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import parse
from ficpd.experiments.results import PrivacyReport, RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import Progress, no_progress, run_method
from ficpd.experiments.setup import build_schedule
from ficpd.federation.client import Client
from ficpd.federation.compression import none
from ficpd.federation.method import Method
from ficpd.federation.privacy_plan import (
    SERVER,
    build_mechanism,
    client_workloads,
    privacy_config_for,
    with_least_records,
)
from ficpd.interfaces import Compression, Task
from ficpd.library.library import PromptLibrary
from ficpd.library.session import DEFAULT_PROMPTS, get_prompt, load_library, local_training_config
from ficpd.optimizers import LocalTrainingConfig
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.registry import build_config
from ficpd.storage import require_writable
from ficpd.types import ClientCard, Prompt, Readout, Record, State

SHADOW_BATCH = 32
SHADOWS, PLANTED, MECHANISM = "shadow prompts", "rounds with canaries", "runs of the mechanism"
"""The parts of an audit that progress counts."""
NO_PRIVACY = {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None}
DELTA = 1e-5
"""At which a bound is given for a run that states no δ."""


@dataclass(frozen=True)
class Finished:
    """A finished run, with the parts to train it again. `state`: the server's after the last round."""

    directory: RunDir
    context: ExperimentContext
    method: Method
    state: State
    library: PromptLibrary
    result: RunResult


@dataclass(frozen=True)
class Target:
    """A prompt under attack, with the settings and the number of `steps` to tune shadows.

    readout: the library's learned readout of the task; None: it has none.
    """

    model: QueryEngine
    task: Task
    start: Prompt
    compression: Compression
    training: LocalTrainingConfig
    steps: int
    vectors_PD: Tensor
    readout: Readout | None


def audit_run(
    folder: Path, prompt: str | None = None, shadows: int = 4, members: int = 1000, canaries: int = 100, seed: int = 0,
    device: str = "cpu", progress: Progress = no_progress,
) -> Audit:  # fmt: skip
    """Attacks a run's prompt (default: the global one), and writes `audit.json` to its directory.

    `members` bounds the records attacked. With `canaries`, the federation is trained a second time, in a temporary
    directory with a ledger of its own. `progress` hears of shadow prompts, rounds and runs. Raises `RunError` for what is
    no finished run, `PrivacyError` where nothing was left to attack.
    """
    run = open_run(Path(folder), device, prompt)
    require_writable(run.directory.path)
    name = _named(run.library, prompt)
    experiment, shards, task = run.context.experiment, run.context.shards.values(), run.context.task
    (party,) = experiment.all_groups.values()
    train = [record for shard in shards for record in shard.train]
    spare = [record for shard in shards for record in shard.test] + loading.unsampled(
        party.data_and_partition[0], experiment.seed
    )
    target, split = _target(run, name), split_records(task, train, spare, members, seed)
    shadow_SPD = _shadows(target, split, shadows, seed, progress)
    planted = planted_bound(run, name, shadow_SPD, [*split.pool, *split.population], canaries, seed, progress)
    found = _audit(run.directory.path.name, name, run.method.name, run.result.privacy, target, split, shadow_SPD, seed)
    found = replace(found, mechanism=mechanism_bound(run, seed, progress=progress), planted=planted)
    _leave(found, run.directory)
    return found


def audit_library(
    folder: Path, members: Sequence[Record], others: Sequence[Record], out: Path, prompt: str | None = None,
    shadows: int = 4, limit: int = 1000, seed: int = 0, device: str = "cpu",
    progress: Progress = no_progress,
) -> Audit:  # fmt: skip
    """Attacks a library's prompt, given `members` that it was tuned on and `others`.

    Writes `audit.json` to `out`. Without the run there are no canaries, and so no bound on ε.

    Raises `LibraryError` if the folder holds no library or lacks the prompt, `PrivacyError` if records are too few.
    """
    opened = load_library(folder, device=device, weights=False)
    require_writable(Path(out))
    library, card = opened.library, opened.library.card
    name = _named(library, prompt)
    training = local_training_config(library)
    steps = max(int(card.get("num_rounds", 1)) * training.local_steps, 1)
    whole = none.build(none.Config(), library.start, 0)
    vectors_PD = library.prompts[name].vectors_PD
    split = split_records(opened.task, members, others, limit, seed)
    readout = library.learned_readout(opened.task)
    target = Target(opened.model, opened.task, library.start, whole, training, steps, vectors_PD, readout)
    shadow_SPD = _shadows(target, split, shadows, seed, progress)
    privacy = PrivacyReport.model_validate(NO_PRIVACY | card.get("privacy", {}))
    found = _audit(Path(folder).name, name, str(card.get("method", "?")), privacy, target, split, shadow_SPD, seed)
    _leave(found, RunDir(Path(out)))
    return found


def _audit(
    of: str, prompt: str, method: str, privacy: PrivacyReport, target: Target, split: Split, shadow_SPD: Tensor,
    seed: int,
) -> Audit:  # fmt: skip
    """Runs the attacks on one prompt, without canaries."""
    evidence = _evidence(target, shadow_SPD, split)
    scores = {name: attack(evidence) for name, attack in ATTACKS.items()} | _readout_scores(target, split)
    advantage, interval = best_advantage(scores, evidence.member_N, seed)
    return Audit(
        run=of,
        method=method,
        prompt=prompt,
        guarantee=privacy.guarantee,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        num_members=len(split.members),
        num_nonmembers=len(split.outside),
        num_shadows=len(shadow_SPD),
        shadow_records=split.shadow_size,
        attacks={name: attack_metrics(score, evidence.member_N, seed) for name, score in scores.items()},
        advantage=advantage,
        advantage_interval=interval,
        mechanism=None,
        planted=None,
        seed=seed,
    )


def _leave(found: Audit, directory: RunDir) -> None:
    directory.write("audit.json", json.dumps({**asdict(found), "alarm": found.alarm}, indent=2) + "\n")


def open_run(folder: Path, device: str, prompt: str | None = None) -> Finished:
    """Opens a finished run. Raises `RunError` if there is none, `PrivacyError` if no prompt of it depends on records,
    `LibraryError` if it lacks the prompt."""
    directory, resolved, result = RunDir(folder), folder / "resolved.toml", RunResult.load(folder)
    experiment = parse(resolved.read_text(encoding="utf-8"), str(resolved), [f"engine.device={json.dumps(device)}"])
    module, config = build_config("methods", experiment.method)
    method, library = module.build(config, experiment.training), PromptLibrary.load(folder)
    saved = directory.load()
    if not method.capabilities.releases or not library.prompts or saved is None:
        raise PrivacyError(
            f"{method.name} left no prompt that depends on records in {folder}: nothing was left to attack. Audit a run "
            "of a method that shares one (fedavg, ficpd, ...)"
        )
    _named(library, prompt)
    context = build_context(experiment).with_method(method)
    library.check(context.model.backbone)
    return Finished(directory, context, method, saved[0], library, result)


def _named(library: PromptLibrary, name: str | None) -> str:
    """Returns the attacked prompt. Raises `LibraryError` if the library lacks it."""
    name = name or next((n for n in DEFAULT_PROMPTS if n in library.prompts), next(iter(library.prompts), None))
    get_prompt(library, name)
    return str(name)


# ---------------------------------------------------------------- the attack on one prompt


def _target(run: Finished, name: str) -> Target:
    """Shadows take as many steps as a client in the whole run."""
    context, steps = run.context, max(run.method.local_workload(run.state)[0] * run.result.num_rounds, 1)
    training, vectors_PD = context.experiment.training, run.library.prompts[name].vectors_PD
    readout = run.library.learned_readout(context.task)
    return Target(context.model, context.task, context.start, context.compression, training, steps, vectors_PD, readout)


def _shadows(target: Target, split: Split, number: int, seed: int, progress: Progress) -> Tensor:
    """Tunes shadow prompts in batches as large as a cohort's together."""
    progress(SHADOWS, 0, number, {})
    found = shadow_prompts(
        target.model, target.task, target.start, target.compression, target.training, split.pool, split.shadow_size,
        target.steps, SHADOW_BATCH, number, seed,
    )  # fmt: skip
    progress(SHADOWS, number, number, {})
    return found


def _evidence(target: Target, shadow_SPD: Tensor, split: Split) -> AttackData:
    every_SPD = torch.cat([target.vectors_PD[None], shadow_SPD])
    loss_SN = _losses(target, every_SPD, [*split.members, *split.outside])
    loss_SZ = _losses(target, every_SPD, split.population)
    member_N = np.arange(loss_SN.shape[1]) < len(split.members)
    likelihood = has_labels(target.task, split.members)
    return AttackData(loss_SN[0], loss_SN[1:], member_N, loss_SZ[0], loss_SZ[1:], likelihood)


def _readout_scores(target: Target, split: Split) -> dict[str, np.ndarray]:
    """Scores records by what the library answers with its learned readout, [N]; nothing where it has none.

    A readout is made of the members' features, and no shadow has one: the loss under the initial prompt, read by label
    texts, tells how hard a record is.
    """
    if target.readout is None:
        return {}
    records, how = [*split.members, *split.outside], (target.model, target.task)
    (loss_N,) = losses(*how, target.vectors_PD[None], records, target.start, readout=target.readout)
    (start_N,) = losses(*how, target.start.vectors_PD[None], records, target.start)
    return {"readout": -loss_N, "readout, less the start": start_N - loss_N}


def _losses(target: Target, prompts_SPD: Tensor, records: Sequence[Record]) -> np.ndarray:
    return losses(target.model, target.task, prompts_SPD, records, target.start)


# ---------------------------------------------------------------- the mechanism, and planted records


def mechanism_bound(
    run: Finished, seed: int, trials: int = 2000, progress: Progress = no_progress
) -> LowerBound | None:
    """Attacks the mechanism of the client with the largest cost, by its worst unit; None without noise.

    The client carries out its assignments until its budget ends, as it did in the run.
    """
    privacy, context = run.result.privacy, run.context
    if not privacy.lines or privacy.delta is None:
        return None
    holders = context.shards_for(run.method.capabilities.centralized)
    plans = client_workloads(
        run.method,
        run.state,
        {n: count_units(s.train) for n, s in holders.items()},
        build_schedule(context, run.method),
    )
    name = str(privacy.site_that_spent_most)
    name = name if name in plans else next(iter(plans))  # the server has no plan of its own
    units = [count_units(shard.train).units for shard in holders.values()]
    part = with_least_records(privacy_config_for(run.method, context.experiment.privacy), units)
    mechanism = build_mechanism(part, name, plans[name], noise="simulated")
    task = next(iter(context.tasks.values()))
    with closing(Ledger(":memory:", "audit")) as ledger:
        client = Client(
            ClientCard(name), holders[name].train, (), task, context.model.backbone, mechanism, context.compression,
            context.start, seed, ledger.account(name, Budget(None, privacy.delta)),
        )  # fmt: skip
        count = partial(_show, progress, MECHANISM)
        return canaries.lower_bound(client, plans[name], trials, seed=seed, count=count)


def _show(progress: Progress, part: str, done: int, planned: int) -> None:
    progress(part, done, planned, {})


def planted_bound(
    run: Finished, name: str, shadow_SPD: Tensor, pool: Sequence[Record], number: int, seed: int,
    progress: Progress = no_progress,
) -> LowerBound | None:  # fmt: skip
    """Trains the federation again with random mislabelled records, and guesses which were put in.

    With named subjects a canary is a subject: its records of the pool, all of them put in or none.

    None if fewer than six can be made. A record's change is a client's change too; where the server noises whole clients
    the guarantee is for one client more or less, and a changed client is two steps: (2ε, (1 + e^ε) δ).
    """
    planted = make_mislabelled_canaries(
        run.context.task, list({r.key: r for r in pool}.values())[:number], run.context.shards, seed
    )
    if len(group_by_subject(planted)) < 6:
        return None
    groups = group_by_subject(planted)
    coin_M = np.random.default_rng(rng.derive_seed(seed, "coins")).random(len(groups)) < 0.5
    heads = [planted[place] for group, up in zip(groups, coin_M, strict=True) if up for place in group]
    shards = inject_canaries(run.context.shards, heads, seed)
    with tempfile.TemporaryDirectory(prefix="ficpd-audit-") as folder:
        again = RunDir(Path(folder) / "run")
        result = run_method(
            replace(run.context, shards=shards), run.context.experiment.method, again, None,
            lambda method, done, planned, figures: progress(PLANTED, done, planned, figures),
        )  # fmt: skip
        library = PromptLibrary.load(again.path)
    trained_again = replace(run, library=library)
    name = name if name in library.prompts else _named(library, None)
    loss_SM = _losses(
        _target(trained_again, name), torch.cat([library.prompts[name].vectors_PD[None], shadow_SPD]), planted
    )
    stated, delta = _for_a_record(result.privacy)
    score_N = loss_SM[1:].mean(0) - loss_SM[0]
    score_M = np.array([score_N[group].mean() for group in groups])
    reach = one_run_bound(coin_M.astype(float), coin_M, delta)
    return LowerBound(one_run_bound(score_M, coin_M, delta), stated, delta, reach, len(groups))


def _for_a_record(privacy: PrivacyReport) -> tuple[float | None, float]:
    """Returns the stated guarantee for one record added or removed: ε (None: nothing) and δ."""
    epsilon, delta = privacy.epsilon, privacy.delta
    if epsilon is None or delta is None:
        return None, DELTA
    if (privacy.unit, privacy.site_that_spent_most) == ("client", SERVER):
        delta = (1 + math.exp(epsilon)) * delta
        return (2 * epsilon, delta) if delta < 1 else (None, DELTA)
    return epsilon, delta
