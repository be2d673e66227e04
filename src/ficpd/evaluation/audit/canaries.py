"""Attacks a mechanism directly with the worst record or client over a whole run, without a backbone.

Nasr et al., USENIX Security 2023, arXiv 2302.07956: the canary's contribution is huge in one coordinate (a Dirac
gradient), and the adversary sees every release. The audit covers clipping, sampling, the divisor and the standard
deviation. Its noise comes from seeded streams, whatever source the run used.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.epsilon_bounds import two_world_bound
from ficpd.interfaces import Mechanism, NoiseSource, ReleaseKind
from ficpd.privacy.central_gaussian import CentralGaussian
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.privacy.noise import SeededNoise
from ficpd.types import ClientUpdate, ClientWorkload, PrivacyCost

HUGE, SMALL = 1e6, 1e-6
"""A canary's contribution, far above any clip norm, and the others', of alternating sign."""
CANARY = "canary"
MOST_RECORDS = 64
"""Of a canary that is a subject."""
AFFORDED = {ReleaseKind.STEP: 48_000, ReleaseKind.UPDATE: 80_000, ReleaseKind.SUM: 16_000}
"""The maximum number of releases of a kind in all trials, which limits an audit to seconds."""
Scores = tuple[list[float], list[float]]
Streams = Callable[[int], NoiseSource]


def lower_bound(
    mechanism: Mechanism, plan: ClientWorkload, delta: float, trials: int = 2000, confidence: float = 0.95, seed: int = 0
) -> float:  # fmt: skip
    """Returns a lower bound on the mechanism's epsilon at `delta` for a run of this plan; 0 if none can be given.

    `num_trials` sets the number of runs. Raises `PrivacyError` for a mechanism without a guarantee.

    Guarantees: for a correct mechanism, the bound is above its epsilon with probability at most 1 - `confidence` over the
        streams (`tests/evaluation/audit/test_canaries.py`).
    """
    play = record_scores if release_kind(mechanism) == ReleaseKind.STEP else client_scores
    trials = num_trials(mechanism, plan, trials)
    without, with_ = play(mechanism, plan, trials, lambda trial: SeededNoise(seed, CANARY, trial))
    return two_world_bound(without, with_, delta, confidence)


def num_trials(mechanism: Mechanism, plan: ClientWorkload, trials: int) -> int:
    """Returns the number of runs for `trials` requested ones: at least 200, at most `AFFORDED` allows."""
    kind = release_kind(mechanism)
    releases = {
        ReleaseKind.STEP: plan.steps * plan.participations,
        ReleaseKind.UPDATE: plan.participations,
        ReleaseKind.SUM: plan.num_rounds,
    }
    return min(trials, max(200, AFFORDED[kind] // max(releases[kind], 1)))


def release_kind(mechanism: Mechanism) -> ReleaseKind:
    """Returns the kind of release that carries the unit's contribution: STEP, UPDATE or SUM."""
    if mechanism.unit == "none":
        raise PrivacyError("unit = 'none': expected a mechanism with a guarantee")
    if mechanism.unit == "record":
        return ReleaseKind.STEP
    return ReleaseKind.UPDATE if mechanism.cost(ReleaseKind.SUM) is None else ReleaseKind.SUM


def record_scores(mechanism: Mechanism, plan: ClientWorkload, trials: int, stream: Streams) -> Scores:
    """Returns each run's scores without and with a canary record, which is sampled like the others.

    Where the unit is a subject, the canary is one: it has all records that the others, with one each, leave it, but
    `MOST_RECORDS` at most. The other contributions cancel, so a mechanism that clips the mean instead of each record is
    detected. A trial is one run in both settings. They share the steps without the canary, so runs are independent
    within a setting only.
    """
    canary, expected = plan.num_units - 1, max(1, round(plan.sampling_rate * plan.num_units))
    own = 1 if plan.num_subjects is None else min(plan.num_records - canary, MOST_RECORDS)
    contribution_N = torch.cat([_alternating(canary), torch.full((own,), HUGE)])
    subject_N = torch.cat([torch.arange(canary), torch.full((own,), canary)])

    def of(rows: Tensor | slice) -> dict[str, Tensor]:
        return {} if plan.num_subjects is None else {"subject_B": subject_N[rows]}

    def released(rows: Tensor, noise: NoiseSource) -> float:
        return float(mechanism.noisy_mean(contribution_N[rows].view(1, -1, 1), expected, noise, **of(rows))) * expected

    def run(noise: NoiseSource) -> tuple[float, float]:
        sums = []
        for _ in range(plan.participations):
            for rows in mechanism.sample(canary + own, expected, plan.steps, noise, **of(slice(None))):
                others = rows[rows < canary]
                without = released(others, noise)
                sums.append((without, released(rows, noise) if len(others) < len(rows) else without))
        return _log_ratios(sums, mechanism, ReleaseKind.STEP)

    return _run_trials(run, trials, stream)


def client_scores(mechanism: Mechanism, plan: ClientWorkload, trials: int, stream: Streams) -> Scores:
    """Returns each run's scores in two settings that differ in one client.

    Local noise: the client's huge updates have either sign. Central noise: the client is absent, or is sampled like
    the others.
    """
    if release_kind(mechanism) == ReleaseKind.SUM:
        return _central_scores(mechanism, plan, trials, stream)
    low, high = (ClientUpdate(CANARY, {"delta": torch.tensor([value])}) for value in (-HUGE, HUGE))

    def sent(update: ClientUpdate, noise: NoiseSource) -> float:
        return sum(float(mechanism.privatize_update(update, noise).arrays["delta"]) for _ in range(plan.participations))

    return _run_trials(lambda noise: (sent(low, noise), sent(high, noise)), trials, stream)


def _central_scores(mechanism: Mechanism, plan: ClientWorkload, trials: int, stream: Streams) -> Scores:
    """Computes client scores under central noise. Updates are constant; each trial has its own ledger account."""
    cost, ledger = _cost(mechanism, ReleaseKind.SUM), Ledger(":memory:", "audit")
    expected, silent = cost.sampling_rate * plan.num_clients, SeededNoise("audit")
    values = {f"client-{i}": value for i, value in enumerate(_alternating(plan.num_clients).tolist())} | {CANARY: HUGE}
    updates = {
        n: mechanism.privatize_update(ClientUpdate(n, {"delta": torch.tensor([v])}), silent) for n, v in values.items()
    }
    names, clip_norm = sorted(values), mechanism.guarantee()["clip_norm"]
    accounts = (ledger.account(f"run {number}", Budget(None, 0.5)) for number in range(trials))

    def run(noise: NoiseSource) -> tuple[float, float]:
        server, sums = CentralGaussian(cost, clip_norm, expected, lambda round: noise, next(accounts)), []

        def released(cohort: list[str], round: int, context: str) -> float:
            mean = server.noisy_mean([updates[name] for name in cohort], {"delta": (1,)}, round, context)
            return float(mean.arrays["delta"]) * expected

        for round in range(1, plan.num_rounds + 1):
            cohort = server.sample_cohort(names, round)
            others = [name for name in cohort if name != CANARY]
            without = released(others, round, "without")
            sums.append((without, released(cohort, round, "with") if CANARY in cohort else without))
        return _log_ratios(sums, mechanism, ReleaseKind.SUM)

    try:
        return _run_trials(run, trials, stream)
    finally:
        ledger.close()


def _run_trials(run: Callable[[NoiseSource], tuple[float, float]], trials: int, stream: Streams) -> Scores:
    pairs = [run(stream(trial)) for trial in range(trials)]
    return [without for without, _ in pairs], [with_ for _, with_ in pairs]


def _log_ratios(sums_T2: list[tuple[float, float]], mechanism: Mechanism, kind: ReleaseKind) -> tuple[float, float]:
    """Returns each setting's log likelihood ratio of with to without the canary, under the stated cost.

    A release x, in clip norms, is N(0, z²) without it, and with it a mixture of that and N(1, z²) in the share q.
    """
    if not sums_T2:
        return 0.0, 0.0
    cost = _cost(mechanism, kind)
    q, z = cost.sampling_rate, max(cost.noise_multiplier, 1e-3)
    x_T2 = np.array(sums_T2) / mechanism.guarantee()["clip_norm"]
    absent = math.log1p(-q) if q < 1 else -math.inf
    without, with_ = np.logaddexp(absent, math.log(q) + (2 * x_T2 - 1) / (2 * z**2)).sum(0).tolist()
    return without, with_


def _cost(mechanism: Mechanism, kind: ReleaseKind) -> PrivacyCost:
    cost = mechanism.cost(kind)
    if cost is None:
        raise PrivacyError(f"a mechanism of unit {mechanism.unit!r} has no cost for {kind.name}")
    return cost


def _alternating(number: int) -> Tensor:
    """Returns small values of alternating sign, [number]."""
    return SMALL * (1.0 - 2.0 * (torch.arange(number) % 2))
