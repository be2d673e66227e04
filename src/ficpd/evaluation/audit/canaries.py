"""A mechanism attacked directly: the worst record, or the worst client, plays the whole run, and no backbone is needed.

Nasr et al., USENIX Security 2023, arXiv 2302.07956: a canary whose contribution is huge in one coordinate (a Dirac
gradient), seen by an adversary who is given every release. What is audited is clipping, sampling, the divisor and the
deviation asked for; the noise comes from seeded streams, whatever source the run drew from.
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
"""A canary's contribution, far beyond any clip norm; and everybody else's, in turns above and below zero."""
CANARY = "canary"
AFFORDED = {ReleaseKind.STEP: 48_000, ReleaseKind.UPDATE: 80_000, ReleaseKind.SUM: 16_000}
"""Releases of one kind played in all trials together: longer runs are played fewer times, and an audit takes seconds."""
Scores = tuple[list[float], list[float]]
Streams = Callable[[int], NoiseSource]


def lower_bound(
    mechanism: Mechanism,
    plan: ClientWorkload,
    delta: float,
    trials: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> float:
    """What the mechanism's epsilon at `delta` is at least, for a run of this plan; 0 when nothing can be said.

    As many runs are played as `affordable` says. Raises `PrivacyError` for a mechanism without a guarantee.

    Guarantees: if the mechanism does what it says, the number is above its epsilon with probability at most
    1 - `confidence` over the streams (`tests/audit/test_canaries.py`).
    """
    play = record_scores if release_kind(mechanism) == ReleaseKind.STEP else client_scores

    def stream(trial: int) -> NoiseSource:
        return SeededNoise(seed, CANARY, trial)

    without, with_ = play(mechanism, plan, num_trials(mechanism, plan, trials), stream)
    return two_world_bound(without, with_, delta, confidence)


def num_trials(mechanism: Mechanism, plan: ClientWorkload, trials: int) -> int:
    """How many runs of this plan are played when `trials` are asked for; at least 200."""
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
        raise PrivacyError("a mechanism of unit 'none' promises nothing that a canary could contradict")
    if mechanism.unit == "record":
        return ReleaseKind.STEP
    return ReleaseKind.UPDATE if mechanism.cost(ReleaseKind.SUM) is None else ReleaseKind.SUM


def record_scores(mechanism: Mechanism, plan: ClientWorkload, trials: int, stream: Streams) -> Scores:
    """Each run's score on ordinary records, and on these and one canary more, which joins steps as they do.

    The ordinary records' contributions cancel, so that a mechanism that clips the batch's mean and not each record lets
    the canary through. A trial is one run in both worlds: they share the steps that the canary did not join, so within
    a world all runs are independent, and between worlds nothing has to be.
    """
    canary, expected = plan.num_records - 1, max(1, round(plan.sampling_rate * plan.num_records))
    contribution_N = torch.cat([_in_turns(canary), torch.tensor([HUGE])])

    def released(rows: Tensor, noise: NoiseSource) -> float:
        return float(mechanism.noisy_mean(contribution_N[rows].view(1, -1, 1), expected, noise)) * expected

    def run(noise: NoiseSource) -> tuple[float, float]:
        sums = []
        for _ in range(plan.participations):
            for rows in mechanism.sample(plan.num_records, expected, plan.steps, noise):
                others = rows[rows != canary]
                without = released(others, noise)
                sums.append((without, released(rows, noise) if len(others) < len(rows) else without))
        return _scored(sums, mechanism, ReleaseKind.STEP)

    return _in_both_worlds(run, trials, stream)


def client_scores(mechanism: Mechanism, plan: ClientWorkload, trials: int, stream: Streams) -> Scores:
    """Each run's score in two worlds that differ in one client, as the placement's guarantee says.

    Local: the client's huge updates point the one way, or the other. Central: it is not in the federation, or it is and
    joins rounds as all clients do.
    """
    if release_kind(mechanism) == ReleaseKind.SUM:
        return _central_scores(mechanism, plan, trials, stream)
    low, high = (ClientUpdate(CANARY, {"delta": torch.tensor([value])}) for value in (-HUGE, HUGE))

    def sent(update: ClientUpdate, noise: NoiseSource) -> float:
        return sum(float(mechanism.privatize_update(update, noise).arrays["delta"]) for _ in range(plan.participations))

    return _in_both_worlds(lambda noise: (sent(low, noise), sent(high, noise)), trials, stream)


def _central_scores(mechanism: Mechanism, plan: ClientWorkload, trials: int, stream: Streams) -> Scores:
    """What the clients send is the same in every round; trials are kept apart in the ledger by the site's name."""
    cost, ledger = _cost(mechanism, ReleaseKind.SUM), Ledger(":memory:", "audit")
    expected, silent = cost.sampling_rate * plan.num_clients, SeededNoise("audit")
    values = {f"client-{i}": value for i, value in enumerate(_in_turns(plan.num_clients).tolist())} | {CANARY: HUGE}
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
        return _scored(sums, mechanism, ReleaseKind.SUM)

    try:
        return _in_both_worlds(run, trials, stream)
    finally:
        ledger.close()


def _in_both_worlds(run: Callable[[NoiseSource], tuple[float, float]], trials: int, stream: Streams) -> Scores:
    pairs = [run(stream(trial)) for trial in range(trials)]
    return [without for without, _ in pairs], [with_ for _, with_ in pairs]


def _scored(sums_T2: list[tuple[float, float]], mechanism: Mechanism, kind: ReleaseKind) -> tuple[float, float]:
    """Each world's log likelihood ratio, with the canary to without, if the mechanism did as its cost states.

    A release x, in clip norms, is N(0, z²) without, and with it a mixture of that and N(1, z²) in the share q.
    """
    if not sums_T2:
        return 0.0, 0.0
    q, z = _cost(mechanism, kind).sampling_rate, max(_cost(mechanism, kind).noise_multiplier, 1e-3)
    x_T2 = np.array(sums_T2) / mechanism.guarantee()["clip_norm"]
    absent = math.log1p(-q) if q < 1 else -math.inf
    without, with_ = np.logaddexp(absent, math.log(q) + (2 * x_T2 - 1) / (2 * z**2)).sum(0).tolist()
    return without, with_


def _cost(mechanism: Mechanism, kind: ReleaseKind) -> PrivacyCost:
    cost = mechanism.cost(kind)
    if cost is None:
        raise PrivacyError(f"the mechanism has unit {mechanism.unit!r} and states no cost for {kind.name}; state it")
    return cost


def _in_turns(number: int) -> Tensor:
    """[number]: small, above zero and below it in turns."""
    return SMALL * (1.0 - 2.0 * (torch.arange(number) % 2))
