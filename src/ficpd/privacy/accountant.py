"""What releases cost together: `dp-accounting`'s privacy loss distributions, never our own arithmetic.

All our releases are Gaussian on a Poisson sample (`PrivacyCost`), composed adaptively. PLD: Koskela, Jälkö and Honkela,
AISTATS 2020, arXiv 1906.03049; Doroshenko et al., PoPETs 2022, arXiv 2207.04380 (its discretisation is pessimistic, so a
coarse grid reads too high, never too low). RDP (Mironov et al., 2019, arXiv 1908.10530) only to cross-check.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any

from scipy.optimize import brentq

from ficpd.errors import PrivacyError
from ficpd.types import JSON, PrivacyCost

FINE, COARSE = 1e-3, 1e-2
"""Steps of the discretised privacy loss. Over 40 to 100 subsampled steps 1e-3 agrees with 1e-4 to five digits."""
Key = tuple[tuple[float, float, int], ...]


def describe() -> str:
    """The accountant as a result states it."""
    return f"dp-accounting {metadata.version('dp-accounting')} PLD"


def epsilon(spends: Iterable[PrivacyCost], delta: float, grid: float = FINE) -> float:
    """The ε of all these releases together at `delta`, adding or removing one unit.

    >>> round(epsilon([PrivacyCost("prompt", 0.01, 1.1, 1000)], 1e-5), 2)
    1.52
    """
    return _pld(_key(spends), delta, grid)


def epsilon_rdp(spends: Iterable[PrivacyCost], delta: float) -> float:
    """The same by Rényi differential privacy: an upper bound too, and a looser one."""
    from dp_accounting.rdp import RdpAccountant

    return _composed(RdpAccountant(), _key(spends)).get_epsilon(delta)


def calibrate(target: float, delta: float, priced: Callable[[float], Sequence[PrivacyCost]]) -> float:
    """A noise multiplier at which `priced(multiplier)` costs at most `target`, and at least 99 % of it.

    Raises `PrivacyError` if no multiplier up to a million does.
    """
    return _calibrated(target, delta, _Priced(priced))


class _Priced:
    """A price list that hashes by what it asks for at multiplier 1, so that equal plans are calibrated once."""

    def __init__(self, priced: Callable[[float], Sequence[PrivacyCost]]):
        self.priced, self.key = priced, (_key(priced(1.0)), _key(priced(2.0)))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Priced) and self.key == other.key


@lru_cache(maxsize=4096)
def _calibrated(target: float, delta: float, plan: _Priced) -> float:
    high = found = _guess(target, delta, plan.priced(1.0))
    for grid in (min(COARSE, target / 500) / 4**finer for finer in range(5)):
        found = _solved(target, plan, lambda spends, grid=grid: epsilon(spends, delta, grid), high)
        if epsilon(plan.priced(found), delta, min(FINE, grid)) >= 0.99 * target:
            break
        high = found  # a finer grid is less pessimistic: it needs no more noise than this
    return found


def _solved(target: float, plan: _Priced, cost: Callable[[Sequence[PrivacyCost]], float], high: float) -> float:
    """The multiplier that costs the target, from a guess; never one that costs more."""
    while cost(plan.priced(high)) > target:
        high *= 1.5
        if high > 1e6:
            raise PrivacyError(
                f"no noise multiplier up to a million gives epsilon = {target} for this plan; plan fewer rounds or "
                "steps, or allow a larger epsilon or delta"
            )
    low = high / 1.5  # from above: a distribution for far too little noise would fill the memory
    while low > 0.02 and cost(plan.priced(low)) <= target:
        low, high = low / 1.5, low

    def excess(log_multiplier: float) -> float:
        return math.log(cost(plan.priced(math.exp(log_multiplier))) / target)

    if low <= 0.02:
        return high
    found = math.exp(brentq(excess, math.log(low), math.log(high), xtol=2e-4)) * 1.0004  # type: ignore[arg-type]
    while cost(plan.priced(found)) > target:
        found *= 1.001
    return found


def _guess(target: float, delta: float, unit: Sequence[PrivacyCost]) -> float:
    """Rather too much noise: the classical bound for one Gaussian release as sensitive as all of the plan's together."""
    sensitivity = math.sqrt(sum(s.count * (s.sampling_rate / s.noise_multiplier) ** 2 for s in unit))
    return max(0.3, sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / target)


def cost_shares(spends: Sequence[PrivacyCost], delta: float) -> list[dict[str, JSON]]:
    """Each line with what it would cost alone, and its share of the sum of those."""
    lines = merge(spends)
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


def merge(spends: Iterable[PrivacyCost]) -> list[PrivacyCost]:
    """Equal lines added up, in a fixed order."""
    counts: Counter[tuple[str, float, float]] = Counter()
    for spend in spends:
        counts[spend.name, spend.sampling_rate, spend.noise_multiplier] += spend.count
    return [PrivacyCost(name, rate, multiplier, count) for (name, rate, multiplier), count in sorted(counts.items())]


def _key(spends: Iterable[PrivacyCost]) -> Key:
    counts: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        counts[spend.sampling_rate, spend.noise_multiplier] += spend.count
    return tuple((rate, multiplier, count) for (rate, multiplier), count in sorted(counts.items()) if count)


@lru_cache(maxsize=65536)
def _pld(key: Key, delta: float, grid: float) -> float:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    if not key:
        return 0.0
    if any(multiplier <= 0 for _, multiplier, _ in key):
        return float("inf")
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    return float(_composed(accountant, key).get_epsilon(delta))


def _composed(accountant: Any, key: Key) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    for rate, multiplier, count in key:
        event = GaussianDpEvent(multiplier)
        accountant.compose(event if rate >= 1 else PoissonSampledDpEvent(rate, event), count)
    return accountant


def is_covered_by(certified: Iterable[PrivacyCost], spends: Iterable[PrivacyCost]) -> bool:
    """Whether `spends` is part of `certified`: then it costs no more, and nothing has to be computed."""
    have: Mapping[tuple[float, float], int] = {(rate, z): count for rate, z, count in _key(certified)}
    return all(count <= have.get((rate, z), 0) for rate, z, count in _key(spends))
