"""A mechanism attacked directly: the worst record, or the worst client, plays the whole run, and no backbone is needed.

Nasr et al., USENIX Security 2023, arXiv 2302.07956: a canary whose contribution is huge in one coordinate (a Dirac
gradient), seen by an adversary who is given every release. What is audited is clipping, sampling, the divisor and the
deviation asked for; the noise comes from seeded streams, whatever source the run drew from.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ficpd.audit.bounds import two_worlds
from ficpd.errors import PrivacyError
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.privacy.noise import Simulated
from ficpd.seams import Mechanism, Noise
from ficpd.server.central import NoisedSum
from ficpd.types import ClientUpdate, Plan

HUGE, SMALL = 1e6, 1e-6
"""A canary's contribution, far beyond any clip norm; and everybody else's, in turns above and below zero."""
RELEASES = 80_000
"""Trials times releases in one world: longer runs are played fewer times, so that an audit takes seconds."""
CANARY = "canary"
Scores = tuple[list[float], list[float]]
Streams = Callable[[int], Noise]


def lower_bound(
    mechanism: Mechanism, plan: Plan, delta: float, trials: int = 2000, confidence: float = 0.95, seed: int = 0
) -> float:
    """What the mechanism's epsilon at `delta` is at least, for a run of this plan; 0 when nothing can be said.

    `affordable(mechanism, plan, trials)` runs are played in each world. Raises `PrivacyError` for a mechanism without a
    guarantee.

    Guarantees: if the mechanism does what it says, the number is above its epsilon with probability at most
    1 - `confidence` over the streams (`tests/audit/test_canaries.py`).
    """
    if mechanism.unit == "none":
        raise PrivacyError("a mechanism of unit 'none' promises nothing that a canary could contradict")
    play = record_scores if mechanism.unit == "record" else client_scores

    def stream(trial: int) -> Noise:
        return Simulated(seed, CANARY, trial)

    without, with_ = play(mechanism, plan, affordable(mechanism, plan, trials), stream)
    return two_worlds(without, with_, delta, confidence)


def affordable(mechanism: Mechanism, plan: Plan, trials: int) -> int:
    """How many runs of this plan are played in each world when `trials` are asked for: at least 200."""
    return min(trials, max(200, RELEASES // max(_releases(mechanism, plan), 1)))


def _releases(mechanism: Mechanism, plan: Plan) -> int:
    if mechanism.unit == "record":
        return plan.steps * plan.participations
    return plan.num_rounds if mechanism.price("sum") else plan.participations


def record_scores(mechanism: Mechanism, plan: Plan, trials: int, stream: Streams) -> Scores:
    """The scores of `trials` runs on `num_records` ordinary records, and of as many on these and the canary.

    A run's score is the sum of what it released. The ordinary records' contributions cancel, so that a mechanism that
    clips the batch's mean and not each record lets the canary through. Streams 0, 1, ... are each used once.
    """
    ordinary_N = _in_turns(plan.num_records)
    with_canary_N = torch.cat([ordinary_N, torch.tensor([HUGE])])
    without = [_record_run(mechanism, plan, ordinary_N, stream(trial)) for trial in range(trials)]
    with_ = [_record_run(mechanism, plan, with_canary_N, stream(trials + trial)) for trial in range(trials)]
    return without, with_


def _record_run(mechanism: Mechanism, plan: Plan, contribution_N: Tensor, noise: Noise) -> float:
    expected, released = max(1, round(plan.sampling_rate * plan.num_records)), []
    for _ in range(plan.participations):
        for rows in mechanism.sample(len(contribution_N), expected, plan.steps, noise):
            released.append(mechanism.mean(contribution_N[rows].view(1, -1, 1), expected, noise))
    return float(torch.cat(released).double().sum()) * expected


def client_scores(mechanism: Mechanism, plan: Plan, trials: int, stream: Streams) -> Scores:
    """The scores of `trials` runs in each of two worlds that differ in one client, as the placement's guarantee says.

    Local: the client's huge updates point the one way, or the other. Central: it is not in the federation, or it is, and
    joins rounds as all clients do.
    """
    if mechanism.price("sum") is None:
        without = [_local_run(mechanism, plan, -HUGE, stream(trial)) for trial in range(trials)]
        return without, [_local_run(mechanism, plan, HUGE, stream(trials + trial)) for trial in range(trials)]
    ledger = Ledger(":memory:", "audit")
    try:
        without = [_central_run(mechanism, plan, False, stream, trial, ledger) for trial in range(trials)]
        return without, [_central_run(mechanism, plan, True, stream, trials + t, ledger) for t in range(trials)]
    finally:
        ledger.close()


def _local_run(mechanism: Mechanism, plan: Plan, value: float, noise: Noise) -> float:
    update = ClientUpdate(CANARY, {"delta": torch.tensor([value])})
    return sum(float(mechanism.release(update, noise).arrays["delta"]) for _ in range(plan.participations))


def _central_run(
    mechanism: Mechanism, plan: Plan, canary: bool, stream: Streams, trial: int, ledger: Ledger
) -> float:  # fmt: skip
    noise, price, settings = stream(trial), mechanism.price("sum"), mechanism.guarantee()
    assert price is not None, "the placement is central"
    contributions = {f"client-{i}": value for i, value in enumerate(_in_turns(plan.num_clients).tolist())}
    contributions |= {CANARY: HUGE} if canary else {}
    book, expected = (
        ledger.book(f"run {trial}", Budget(None, settings["delta"])),
        price.sampling_rate * plan.num_clients,
    )
    server, score = NoisedSum(price, settings["clip_norm"], expected, lambda round: noise, book), 0.0
    for round in range(1, plan.num_rounds + 1):
        cohort = server.cohort(sorted(contributions), round)
        sent = [ClientUpdate(name, {"delta": torch.tensor([contributions[name]])}) for name in cohort]
        updates = [mechanism.release(update, noise) for update in sent]
        score += float(server.mean(updates, {"delta": (1,)}, round, "audit").arrays["delta"]) * expected
    return score


def _in_turns(number: int) -> Tensor:
    """[number]: small, above zero and below it in turns."""
    return SMALL * (1.0 - 2.0 * (torch.arange(number) % 2))
