"""Computes the ε of all releases together, with `dp-accounting`'s privacy loss distributions.

All releases are Gaussian on a Poisson sample (`PrivacyCost`), composed adaptively. PLD: Koskela, Jälkö and Honkela,
AISTATS 2020, arXiv 1906.03049; Doroshenko et al., PoPETs 2022, arXiv 2207.04380. Its discretisation is pessimistic: a
coarse grid overestimates, never underestimates.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata

from scipy.optimize import brentq
from scipy.stats import binom

from ficpd.errors import PrivacyError
from ficpd.types import JSON, PrivacyCost

FINE, COARSE = 1e-3, 1e-2
"""Steps of the discretised privacy loss."""
FINER = (FINE, FINE / 8, FINE / 64)
"""The steps that `epsilon` tries. n releases overestimate ε by up to n steps, which matters for a small ε."""
STEPS = 500
"""An ε of at least this many steps needs no finer ones."""
FEW = 100
"""The cost of a group, or of a replaced unit, is computed with finer steps if it has fewer."""
GROUP_SIZES = (2, 5, 10)
"""Numbers of records of one person, for which a report states the cost."""
EPSILONS, DELTAS = (0.01, 100.0), (1e-12, 0.2)
"""The range of budgets. Noise for others would need too much time or memory."""
LEAST_MULTIPLIER = 0.05
"""Smallest noise multiplier. One release with less noise costs an ε above 200."""
MULTIPLIERS = LEAST_MULTIPLIER, 1e6
"""The range of noise multipliers."""
ENOUGH, LEAST_SHARE = 0.998, 0.995
"""Shares of a budget. The search for the noise ends at the first, and uses finer steps below the second."""
MOST_POINTS = 50_000, 100_000, 10_000_000
"""Maximum points of the privacy loss: of a release with noise below 0.25, of any other, of all releases."""
Key = tuple[tuple[float, float, int], ...]


def describe() -> str:
    """Returns the name and version of the accountant, for results."""
    return f"dp-accounting {metadata.version('dp-accounting')} PLD"


def epsilon(costs: Iterable[PrivacyCost], delta: float, grid: float | None = None) -> float:
    """Computes the ε of all these releases together at `delta`, for adding or removing one unit.

    Raises `PrivacyError` beyond `DELTAS` and below `LEAST_MULTIPLIER`.

    >>> round(epsilon([PrivacyCost("prompt", 0.01, 1.1, 1000)], 1e-5), 2)
    1.52
    """
    key = _key(costs)
    check_range("delta", delta, DELTAS)
    if least := [multiplier for _, multiplier, _ in key if 0 < multiplier < LEAST_MULTIPLIER]:
        raise PrivacyError(
            f"privacy.noise_multiplier = {min(least):g}: below {LEAST_MULTIPLIER:g} no cost can be computed, and no "
            "protection is left. Set it higher, or use privacy.name = 'none'"
        )
    if grid is not None:
        return _pld(key, delta, grid)
    found = math.inf
    for step in FINER:  # somewhat finer than `calibrate` needs, which solves for this cost
        before, found = found, min(found, _pld(key, delta, step))
        if not 0 < found < 1.25 * STEPS * step or found > 0.999 * before or _bounded(step, key) > step:
            break
    return found


def check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    """Raises `PrivacyError` for a setting outside its limits."""
    least, most = limits
    if not least <= value <= most:
        raise PrivacyError(
            f"privacy.{name} = {value:g} is beyond what can be computed, {least:g} to {most:g}. Set it within this range; "
            "for no guarantee use privacy.name = 'none'"
        )


def epsilon_replaced(costs: Iterable[PrivacyCost], delta: float) -> float:
    """Computes the ε of the same releases for one unit that is replaced by another."""
    key = _key(costs)
    return _refined(lambda step: _pld(key, delta, step, replaced=True), FINE, key)


def group_epsilon(costs: Iterable[PrivacyCost], delta: float, size: int) -> float:
    """Computes the ε of all these releases at `delta` for adding or removing `size` units of one person together.

    A Poisson sample has 0 to `size` of them, with binomial probabilities: a mixture of Gaussians (Choquette-Choo et al.,
    ICLR 2024, arXiv 2310.15526). It is usually more than `size` times the ε of one unit.

    >>> round(group_epsilon([PrivacyCost("prompt", 0.01, 1.1, 1000)], 1e-5, 2), 1)
    3.3
    """
    key = _key(costs)
    coarser = max(1.0, _pld(key, delta, COARSE) / 20)  # a very large loss needs no fine grid
    # A person's loss is about `size` times as large as a record's, and so may be the step.
    step = coarser * size * min(5e-3, 0.05 / math.sqrt(max(_count(key), 1)))
    return _refined(lambda step: _group_pld(key, delta, size, step), step, key)


def _refined(cost_at: Callable[[float], float], step: float, key: Key) -> float:
    """Computes a cost with finer steps while it is few steps, also for the releases, and they save a tenth."""
    before = found = cost_at(step)
    for _ in range(2):
        enough = FEW * step * max(1.0, _count(key) * step / 2)
        if found == 0 or (found >= enough and found >= 0.9 * before):
            break
        step /= 8
        before, found = found, min(found, cost_at(step))
    return found


def _count(key: Key) -> int:
    return sum(count for *_, count in key)


def group_costs(costs: Sequence[PrivacyCost], delta: float) -> dict[int, float]:
    """Returns `group_epsilon` for each of `GROUP_SIZES`."""
    return {size: group_epsilon(costs, delta, size) for size in GROUP_SIZES}


def calibrate(target: float, delta: float, costs_at: Callable[[float], Sequence[PrivacyCost]]) -> float:
    """Finds a noise multiplier at which `costs_at(multiplier)` costs about 99 to 100 % of `target`, and never more.

    Returns `LEAST_MULTIPLIER` if the plan costs less than the target even then. Raises `PrivacyError` beyond
    `EPSILONS` and `DELTAS`, if no multiplier up to a million is enough, and for a plan without a release.
    """
    check_range("epsilon", target, EPSILONS)
    check_range("delta", delta, DELTAS)
    if not any(cost.count for cost in costs_at(1.0)):
        raise PrivacyError("this plan releases nothing, so no noise follows from a budget; plan at least one round")
    return _calibrated(target, delta, _Plan(costs_at))


class _Plan:
    """A plan's costs by multiplier. The hash uses those at 1 and 2, so equal plans are calibrated once."""

    def __init__(self, costs_at: Callable[[float], Sequence[PrivacyCost]]):
        self.costs_at, self.key = costs_at, (_key(costs_at(1.0)), _key(costs_at(2.0)))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Plan) and self.key == other.key


@lru_cache(maxsize=4096)
def _calibrated(target: float, delta: float, plan: _Plan) -> float:
    # Overestimates the noise: the classical bound for one Gaussian release as sensitive as the whole plan.
    sensitivity = math.sqrt(sum(s.count * (s.sampling_rate / s.noise_multiplier) ** 2 for s in plan.costs_at(1.0)))
    guess, found = max(0.3, sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / target), math.inf
    for step in _steps(target):
        begin, apart = (guess, 1.5) if math.isinf(found) else (found, 1.1)  # a finer step needs a little less noise
        found = _solved(target, plan, lambda costs, step=step: epsilon(costs, delta, step), begin, apart)
        if not math.isinf(found) and _suffices(found, step, target, delta, plan):
            break
    if math.isinf(found):
        raise PrivacyError(
            f"no noise multiplier up to a million gives epsilon = {target} for this plan; plan fewer rounds or "
            "steps, or allow a larger epsilon or delta"
        )
    while epsilon(plan.costs_at(found), delta) > target:
        found *= 1.001
    return found


def _steps(target: float) -> list[float]:
    """Returns the steps for a budget, the coarsest first."""
    fine = [step for before, step in zip((math.inf, *FINER), FINER, strict=False) if target < STEPS * before]
    first = min(COARSE, target / STEPS)
    return [first, *fine] if first > FINE else fine


def _suffices(multiplier: float, step: float, target: float, delta: float, plan: _Plan) -> bool:
    """Returns whether a finer step would save little noise, or cannot be computed."""
    costs = plan.costs_at(multiplier)
    least = min((cost.noise_multiplier for cost in costs), default=0.0)
    coarsened = _bounded(step, _key(costs)) > step
    return least < 1.5 * LEAST_MULTIPLIER or coarsened or epsilon(costs, delta) >= LEAST_SHARE * target


def _solved(
    target: float, plan: _Plan, epsilon_of: Callable[[Sequence[PrivacyCost]], float], high: float, apart: float
) -> float:
    """Finds a multiplier that costs about the target. Starts at a guess, with steps of the factor `apart`.

    Returns infinity if no multiplier up to a million is enough.
    """
    while epsilon_of(plan.costs_at(high)) > target:
        high *= apart
        if high > MULTIPLIERS[1]:
            return math.inf
    low = high / apart  # starts with much noise: the distribution of too little noise needs too much memory

    def computed(multiplier: float) -> bool:
        return all(cost.noise_multiplier >= LEAST_MULTIPLIER for cost in plan.costs_at(multiplier))

    while computed(low) and epsilon_of(plan.costs_at(low)) <= target:
        low, high = low / apart, low

    def excess(log_multiplier: float) -> float:
        share = epsilon_of(plan.costs_at(math.exp(log_multiplier))) / target
        return 0.0 if ENOUGH <= share <= 1 else math.log(max(share, 0.1))

    if not computed(low):
        return high
    return math.exp(brentq(excess, math.log(low), math.log(high), xtol=2e-5))  # type: ignore[arg-type]


def cost_shares(costs: Sequence[PrivacyCost], delta: float) -> list[dict[str, JSON]]:
    """Describes each cost by its ε alone, and by its share of the sum of these ε."""
    lines = merge(costs)
    alone = [epsilon([line], delta) for line in lines]
    return [
        {
            "name": line.name,
            "releases": line.count,
            "sampling_rate": line.sampling_rate,
            "noise_multiplier": line.noise_multiplier,
            "epsilon_alone": cost,
            "share": cost / sum(alone) if sum(alone) else 1 / len(alone),
        }
        for line, cost in zip(lines, alone, strict=True)
    ]


def merge(costs: Iterable[PrivacyCost]) -> list[PrivacyCost]:
    """Adds up equal costs, in a fixed order."""
    counts: Counter[tuple[str, float, float]] = Counter()
    for cost in costs:
        counts[cost.name, cost.sampling_rate, cost.noise_multiplier] += cost.count
    return [PrivacyCost(name, rate, multiplier, count) for (name, rate, multiplier), count in sorted(counts.items())]


def _key(costs: Iterable[PrivacyCost]) -> Key:
    counts: Counter[tuple[float, float]] = Counter()
    for cost in costs:
        if not 0 < cost.sampling_rate <= 1 or math.isnan(cost.noise_multiplier) or cost.count < 0:
            raise PrivacyError(
                f"a release cannot be accounted: {cost}. Its sampling_rate lies above 0 and at most at 1, its "
                "noise_multiplier is a number, and its count is at least 0"
            )
        counts[cost.sampling_rate, cost.noise_multiplier] += cost.count
    return tuple((rate, multiplier, count) for (rate, multiplier), count in sorted(counts.items()) if count)


@lru_cache(maxsize=65536)
def _pld(key: Key, delta: float, grid: float, replaced: bool = False) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    if not key:
        return 0.0
    if any(multiplier <= 0 for _, multiplier, _ in key):
        return float("inf")
    relation = NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(relation, value_discretization_interval=_bounded(grid, key))
    for rate, multiplier, count in key:
        event = GaussianDpEvent(multiplier)
        accountant.compose(event if rate >= 1 else PoissonSampledDpEvent(rate, event), count)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _group_pld(key: Key, delta: float, size: int, grid: float) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
    from dp_accounting.pld import PLDAccountant

    if not key:
        return 0.0
    if any(multiplier <= 0 for _, multiplier, _ in key):
        return float("inf")
    grid = _bounded(grid, tuple((rate, multiplier / size, count) for rate, multiplier, count in key))
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    records = list(range(size + 1))
    for rate, multiplier, count in key:
        sampled = MixtureOfGaussiansDpEvent(multiplier, records, binom.pmf(records, size, rate).tolist())
        accountant.compose(GaussianDpEvent(multiplier / size) if rate >= 1 else sampled, count)
    return float(accountant.get_epsilon(delta))


def check_price(costs: Sequence[PrivacyCost], delta: float) -> None:
    """Raises `PrivacyError` if these releases cost nothing, because releases without noise would cost nothing, too."""
    if any(cost.count for cost in costs) and epsilon(costs, delta) <= 0:
        raise PrivacyError(
            f"a plan with releases costs nothing at delta = {delta:g}: it samples a unit less often than delta, so even "
            "releases without noise would satisfy it. Set delta below the sampling rate, or sample more"
        )


def _bounded(grid: float, key: Key) -> float:
    """Coarsens the grid if little noise or many releases need too many points. A coarser grid overestimates ε."""
    little, one, every = MOST_POINTS
    together = [z / count**0.5 if rate >= 1 else z for rate, z, count in key]  # dp-accounting joins full batches
    longest = max(((1 / (2 * z * z) + 10 / z) / (little if z < 0.25 else one) for z in together), default=0.0)
    mean = sum(
        count * min(1 / (2 * z * z), rate * rate * math.expm1(min(1 / (z * z), 100.0))) for rate, z, count in key
    )
    return max(grid, longest, mean / every)


def is_covered_by(certified: Iterable[PrivacyCost], costs: Iterable[PrivacyCost]) -> bool:
    """Returns whether these costs are part of `certified`, and so cost no more."""
    have: Mapping[tuple[float, float], int] = {(rate, z): count for rate, z, count in _key(certified)}
    return all(count <= have.get((rate, z), 0) for rate, z, count in _key(costs))
