"""Attacks a client with the worst record, subject or client over a whole run, without a forward pass.

Nasr et al., USENIX Security 2023, arXiv 2302.07956: the canary's contribution is huge in one coordinate (a Dirac
gradient), and the adversary sees every release. Every trial is a separate run: `federation.execution.execute_assignment`
executes its assignments, and a ledger account charges them. So the audit covers the mechanism and the client's use of it:
its noise streams, its charges, the end of its budget, and the release of its update. The contribution changes its sign
from step to step and from round to round, so that repeated noise cancels.

For a secure sum, the adversary is the server with `max_colluding` sites. Once a round it sees the sum of the attacked
client's term and the other honest sites' noise. The attacked client has the minimum number of records of any site.

Noise comes from seeds, also for a run with cryptographic noise.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import binom
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.errors import BudgetError, PrivacyError
from ficpd.evaluation.audit.epsilon_bounds import two_world_bound
from ficpd.evaluation.audit.report import LowerBound
from ficpd.federation.client import Client, ClientSession
from ficpd.federation.compression import none
from ficpd.federation.execution import execute_assignment
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.secure_sum import MASKED, terms
from ficpd.interfaces import ClientContext, Mechanism, Model, ReleaseKind
from ficpd.privacy import accountant
from ficpd.privacy.central_gaussian import CentralGaussian
from ficpd.privacy.ledger import Account, Budget, Ledger
from ficpd.privacy.noise import SeededNoise
from ficpd.privacy.shared_gaussian import GRADIENT, GRID, SharedGaussian
from ficpd.types import Answer, Assignment, Batch, ClientUpdate, ClientWorkload, PrivacyCost, Query, Record, State

HUGE, SMALL = 1e6, 1e-6
"""The contribution of a canary, far above any clip norm, and that of the others, of alternating sign."""
CANARY, SUM = "canary", "sum/"
MOST_RECORDS = 64
"""The maximum number of records of a canary that is a subject."""
AFFORDED = {ReleaseKind.STEP: 24_000, ReleaseKind.UPDATE: 24_000, ReleaseKind.SUM: 16_000}
"""The releases of a kind in all trials of one setting. They bound the time of an audit (`num_trials`)."""
Run = Callable[[int, bool], tuple[float, list[PrivacyCost]]]
"""Runs a trial, with or without the canary. Returns its score and the costs in its ledger."""
Counter = Callable[[int, int], None]
"""Receives the number of finished runs and of planned runs."""
REPORTS = 20
"""The approximate number of calls of a `Counter` in one audit."""
Release = Callable[[Assignment], Callable[[ClientSession], ClientUpdate] | None]
"""Turns an assignment's terms into the adversary's view; None: its update is sent unchanged."""


def no_count(done: int, planned: int) -> None:
    """Ignores the progress."""


def lower_bound(
    client: Client, plan: ClientWorkload, trials: int = 2000, confidence: float = 0.95, seed: int = 0,
    count: Counter = no_count,
) -> LowerBound:  # fmt: skip
    """Returns a lower bound on the epsilon of a client's planned run, and the ledger's epsilon.

    client: its mechanism is attacked; its records, account, seed and state are replaced.
    trials: the maximum number of runs with and without the canary (`num_trials`).
    Raises `PrivacyError` for a mechanism without a guarantee.

    Guarantees: for a correct client, the bound is above its epsilon with probability at most 1 - `confidence` over the
        streams (`tests/evaluation/audit/test_canaries.py`).
    """
    trials, delta = num_trials(client.mechanism, plan, trials), client.mechanism.guarantee()["delta"]
    without, with_, stated = play(client, plan, trials, seed, count)
    reach = two_world_bound([0.0] * trials, [1.0] * trials, delta, confidence)
    return LowerBound(two_world_bound(without, with_, delta, confidence), stated, delta, reach, trials)


def num_trials(mechanism: Mechanism, plan: ClientWorkload, trials: int) -> int:
    """Returns the number of runs: `trials`, or as many as `AFFORDED` allows, but not reduced below 200."""
    kind = release_kind(mechanism)
    releases = {
        ReleaseKind.STEP: plan.steps * plan.participations,
        ReleaseKind.UPDATE: plan.participations,
        ReleaseKind.SUM: plan.num_rounds,
    }
    return min(trials, max(200, AFFORDED[kind] // max(releases[kind], 1)))


def release_kind(mechanism: Mechanism) -> ReleaseKind:
    """Returns the kind of release that has the unit's contribution: STEP, UPDATE or SUM."""
    if mechanism.unit == "none":
        raise PrivacyError("unit = 'none': expected a mechanism with a guarantee")
    if mechanism.unit == "record":
        return ReleaseKind.STEP
    return ReleaseKind.UPDATE if mechanism.cost(ReleaseKind.SUM) is None else ReleaseKind.SUM


def play(
    client: Client, plan: ClientWorkload, trials: int, seed: int, count: Counter = no_count
) -> tuple[list[float], list[float], float]:
    """Returns the scores of all runs without and with the canary, and the epsilon of a run's ledger.

    A score increases with the likelihood ratio (with to without the canary) of the run's releases at their stated costs.
    """
    runs = {ReleaseKind.STEP: _record_run, ReleaseKind.UPDATE: _client_run, ReleaseKind.SUM: _central_run}
    with closing(Ledger(":memory:", "audit")) as ledger:  # an account for each trial
        run = runs[release_kind(client.mechanism)](client, plan, seed, ledger)
        (without, _), (with_, costs) = (
            zip(*(_counted(run, t, there, trials, count) for t in range(trials)), strict=True)
            for there in (False, True)
        )
    return list(without), list(with_), accountant.epsilon(costs[0], client.mechanism.guarantee()["delta"])


def _counted(run: Run, trial: int, there: bool, trials: int, count: Counter) -> tuple[float, list[PrivacyCost]]:
    found, done = run(trial, there), trials * there + trial + 1
    if done % max(2 * trials // REPORTS, 1) == 0 or done == 2 * trials:
        count(done, 2 * trials)
    return found


class CanaryMethod(Method):
    """Releases the mean of each step, or the contribution itself.

    contribution: that of each record [N], or of the client [1].
    expected: the expected batch size; None: the contribution is the update.
    summed: the adversary sees the sum of an assignment's steps, so they have one sign.
    once, totals: names of sums over all records, released in the first assignment or in each.
    """

    name = CANARY

    def __init__(
        self, contribution: Tensor, steps: int = 0, expected: int | None = None, summed: bool = False,
        once: Sequence[str] = (), totals: Sequence[str] = (),
    ):  # fmt: skip
        super().__init__(None)
        self.contribution, self.steps, self.expected, self.summed = contribution, steps, expected, summed
        self.once, self.totals = tuple(once), tuple(totals)
        declared = dict.fromkeys((*once, *totals))
        self.capabilities = Capabilities(private_units=("record", "client"), statistics_once=declared)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        yield from ()
        if self.expected is None:
            return ClientUpdate(client.id, {"released": sign(assignment.round) * self.contribution}, client.weight)
        means = [
            client.private_mean((self._sign(assignment, step) * self.contribution[batch.targets]).view(1, -1, 1))[0]
            for step, batch in enumerate(client.batches(self.steps, self.expected) if self.steps else ())
        ]
        released = {"released": torch.cat([*means, torch.zeros(0)]) * self.expected}
        for name in (*(self.once if assignment.round == 1 else ()), *self.totals):
            row_N1 = (sign(assignment.round) * self.contribution)[client.full_batch().targets].view(-1, 1)
            released[SUM + name] = client.private_sum(name, row_N1)
        return ClientUpdate(client.id, released, client.weight)

    def _sign(self, assignment: Assignment, step: int) -> int:
        return sign(assignment.round + (0 if self.summed else step))

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        return state


def sign(place: int) -> int:
    return 1 - 2 * (place % 2)


def _record_run(client: Client, plan: ClientWorkload, seed: int, ledger: Ledger) -> Run:
    """Returns a trial with a canary record, which is sampled like the others and may contribute nothing.

    Without a secure sum, it also attacks sums over all records, such as class totals.

    If the unit is a subject, so is the canary. The other subjects have one record each, and the canary has the rest, at
    most `MOST_RECORDS`. The other contributions cancel, so a mechanism that clips the mean instead of each record is
    detected.
    """
    mechanism = client.mechanism
    if shared := isinstance(mechanism, SharedGaussian):
        plan = _worst_site(mechanism, plan)
    others, expected = plan.num_units - 1, max(1, round(plan.sampling_rate * plan.num_units))
    own = 1 if plan.num_subjects is None else min(plan.num_records - others, MOST_RECORDS)
    names = [str(place) for place in range(others)] + [CANARY] * own
    records = [Record(str(i), {}, None if plan.num_subjects is None else name) for i, name in enumerate(names)]
    client = _trial_client(client, records)
    once, totals = ((), ()) if shared else (tuple(plan.once), tuple(plan.totals))
    methods = [
        CanaryMethod(
            torch.cat([_alternating(others), torch.full((own,), value)]), plan.steps, expected, shared, once, totals
        )
        for value in (0.0, HUGE)
    ]
    cost, clip_norm, budget = _terms(mechanism, ReleaseKind.STEP)

    def run(trial: int, there: bool) -> tuple[float, list[PrivacyCost]]:
        release = _as_it_is
        if isinstance(mechanism, SharedGaussian):
            release = _sum_of_honest(client, mechanism, (seed, trial, there))
        account = _renew(client, ledger, budget, seed, trial, there)
        rounds = list(_rounds(methods[there], client, plan.participations, release))
        sums = [
            sign(round + step) * value
            for round, update in rounds
            for step, value in enumerate(update.arrays["released"].tolist())
        ]
        ratio = _log_ratio(sums, cost, clip_norm, plan.steps if shared else 1)
        return ratio + sum(_of_sum(name, mechanism, rounds) for name in (*once, *totals)), account.spent()

    return run


def _of_sum(name: str, mechanism: Mechanism, rounds: Sequence[tuple[int, ClientUpdate]]) -> float:
    """Returns the log likelihood ratio of a named sum's releases. Its rows are clipped to norm 1."""
    cost, found = mechanism.cost(ReleaseKind.STATISTIC, name), [(r, u.arrays.get(SUM + name)) for r, u in rounds]
    if cost is None:
        raise PrivacyError(f"the mechanism states no cost for the sum {name!r}")
    return _log_ratio([sign(round) * float(value) for round, value in found if value is not None], cost, 1.0)


def _worst_site(mechanism: SharedGaussian, plan: ClientWorkload) -> ClientWorkload:
    """Returns the plan of a site with the fewest records (subjects), which has the highest sampling rate."""
    least, rate = mechanism.public_units or plan.num_units, mechanism.plan.sampling_rate
    units = {"num_records": least} if plan.num_subjects is None else {"num_subjects": least}
    return replace(plan, sampling_rate=rate, **units)


def _as_it_is(assignment: Assignment) -> None:
    return None


def _sum_of_honest(client: Client, mechanism: SharedGaussian, trial: tuple) -> Release:
    """Releases the sum of the client's term of a secure sum and the other honest sites' noise."""

    def of(assignment: Assignment) -> Callable[[ClientSession], ClientUpdate]:
        release = terms.releasing(client, terms.VectorOrder(assignment, ("",), {GRADIENT: 1}, {}))

        def seen(session: ClientSession) -> ClientUpdate:
            summed = release(session).arrays[MASKED]
            for site in range(1, mechanism.tolerance.honest):
                noise = SeededNoise(*trial, "another site", assignment.round, site)
                summed = summed + mechanism.noise_share(GRADIENT, 1, noise)
            return ClientUpdate(client.name, {"released": summed.double() / GRID * mechanism.clip_norm})

        return seen

    return of


def _client_run(client: Client, plan: ClientWorkload, seed: int, ledger: Ledger) -> Run:
    """Returns a trial with a client of huge updates, negated without the canary, under local noise."""
    client = _trial_client(client, [Record(CANARY, {})])
    methods = [CanaryMethod(torch.tensor([value])) for value in (-HUGE, HUGE)]
    *_, budget = _terms(client.mechanism, ReleaseKind.UPDATE)

    def run(trial: int, there: bool) -> tuple[float, list[PrivacyCost]]:
        account = _renew(client, ledger, budget, seed, trial, there)
        rounds = _rounds(methods[there], client, plan.participations)
        return sum(sign(round) * float(update.arrays["released"]) for round, update in rounds), account.spent()

    return run


def _central_run(client: Client, plan: ClientWorkload, seed: int, ledger: Ledger) -> Run:
    """Returns a trial with a new server and central noise. Without the canary, its client is absent."""
    cost, clip_norm, budget = _terms(client.mechanism, ReleaseKind.SUM)
    expected = cost.sampling_rate * plan.num_clients
    values = {f"client-{i}": value for i, value in enumerate(_alternating(plan.num_clients).tolist())} | {CANARY: HUGE}
    client, names = _trial_client(client, [Record(CANARY, {})]), sorted(values)
    updates: dict[tuple[str, int], ClientUpdate] = {}
    for name, value in values.items():
        _renew(client, ledger, budget, seed, name)
        for round, update in _rounds(CanaryMethod(torch.tensor([value])), client, 2):
            updates[name, round % 2] = replace(update, client=name)

    def run(trial: int, there: bool) -> tuple[float, list[PrivacyCost]]:
        def stream(round: int) -> SeededNoise:
            return SeededNoise(seed, CANARY, trial, there, round)

        sums, account = [], ledger.account(f"{trial} {there}", budget)
        server = CentralGaussian(cost, clip_norm, expected, stream, account)
        with suppress(BudgetError):
            for round in range(1, plan.num_rounds + 1):
                cohort = server.sample_cohort(names, round)
                came = [updates[name, round % 2] for name in cohort if there or name != CANARY]
                mean = server.noisy_mean(came, {"released": (1,)}, round, CANARY)
                sums.append(sign(round) * float(mean.arrays["released"]) * expected)
        return _log_ratio(sums, cost, clip_norm), account.spent()

    return run


def _trial_client(client: Client, records: Sequence[Record]) -> Client:
    """Returns the client without compression, with these records, encoded as their indices only."""
    whole = none.build(none.Config(), client.start, 0)
    client = replace(client, train=records, compression=whole, encodings={}, pending_costs=())
    places = torch.arange(len(records))
    client.set_encoding("train", Batch(client.task, ((),) * len(records), places, None, client.start.enters_at))
    return client


def _renew(client: Client, ledger: Ledger, budget: Budget, seed: int, *trial: Any) -> Account:
    """Gives the client a new private seed, state and account for a trial. Returns the account."""
    client.private_seed, client.client_state = rng.derive_seed(seed, CANARY, *trial), {}
    client.account = ledger.account(" ".join(map(str, trial)), budget)
    return client.account


def _rounds(
    method: Method, client: Client, number: int, release: Release = _as_it_is
) -> Iterator[tuple[int, ClientUpdate]]:
    """Executes `number` assignments, or fewer if the budget ends; yields each round and its update."""
    model = QueryEngine(client.backbone)
    with suppress(BudgetError):
        for round in range(1, number + 1):
            assignment = Assignment(CANARY, round, {}, {})
            yield round, run_queries(model, execute_assignment(method, client, assignment, release(assignment)))


def _terms(mechanism: Mechanism, kind: ReleaseKind) -> tuple[PrivacyCost, float, Budget]:
    """Returns the cost of a release, the clip norm, and the budget of a run."""
    cost, block = mechanism.cost(kind), mechanism.guarantee()
    if cost is None:
        raise PrivacyError(f"a mechanism of unit {mechanism.unit!r} has no cost for {kind.name}")
    return cost, block["clip_norm"], Budget.of(block["budget"], block["delta"], mechanism.planned_costs())


def _log_ratio(sums: Sequence[float], cost: PrivacyCost, clip_norm: float, steps: int = 1) -> float:
    """Returns the log likelihood ratio (with to without the canary) at the stated cost.

    The sum x of s steps, in clip norms, is N(0, sz²) without the canary. With it, x is N(k, sz²), with k from
    Binomial(s, q).
    """
    if not sums:
        return 0.0
    variance, x_T1 = steps * max(cost.noise_multiplier, 1e-3) ** 2, np.array(sums)[:, None] / clip_norm
    times_K = np.arange(steps + 1)
    weight_K = binom.logpmf(times_K, steps, cost.sampling_rate)
    ratios_T = logsumexp(weight_K + times_K * (2 * x_T1 - times_K) / (2 * variance), axis=1)
    return float(np.sum(ratios_T))


def _alternating(number: int) -> Tensor:
    """Returns small values of alternating sign, [number]."""
    return SMALL * (1.0 - 2.0 * (torch.arange(number) % 2))
