"""Lower bounds on epsilon from attacks on canaries: if one exceeds the stated epsilon, the mechanism does less than it
says. A low bound proves nothing: a better attack may exist."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtrc, betaincinv
from scipy.stats import binom

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.membership import as_bool_vector, as_float_vector

CAUTION = 50
"""A threshold is chosen at this many times less error than it is counted at: else the most promising of many thresholds
is often one that a few runs in the tail made look good."""


def two_world_bound(scores_without: ArrayLike, scores_with: ArrayLike, delta: float, confidence: float = 0.95) -> float:
    """Epsilon's lower bound from many runs without and with one canary; the higher a score, the likelier it was in.

    Jagielski et al., NeurIPS 2020, arXiv 2006.07709 (algorithm 2); Nasr et al., S&P 2021, arXiv 2101.04535. The first half
    of each world's runs chooses the threshold at which the bound is highest, the second is counted there.

    Guarantees:
        If the runs are independent, with probability `confidence` over them the true epsilon at `delta` of the mechanism,
        for neighbours that differ as the worlds do, is at least the number returned. It is 0 when nothing can be said.

    >>> round(two_world_bound([0.0] * 200, [1.0] * 200, delta=0.0), 2)
    3.28
    """
    _check(delta, confidence)
    all_out, all_in = as_float_vector("scores_without", scores_without), as_float_vector("scores_with", scores_with)
    if min(len(all_out), len(all_in)) < 2:
        raise PrivacyError(f"{len(all_out)} and {len(all_in)} runs were given, expected at least 2 in each world.")
    (choose_out, out), (choose_in, in_) = _in_half(all_out), _in_half(all_in)
    thresholds_T = np.unique(np.concatenate([choose_out, choose_in]))
    best = np.argmax(_bound(choose_out, choose_in, thresholds_T, delta, 1 - (1 - confidence) / CAUTION))
    return float(_bound(out, in_, thresholds_T[best, None], delta, confidence)[0])


def one_run_bound(
    scores: ArrayLike, included: ArrayLike, delta: float, confidence: float = 0.95, guesses: int | None = None
) -> float:
    """Epsilon's lower bound from one run, into which each of M canaries went or not by the flip of a fair coin.

    Steinke, Nasr and Jagielski, NeurIPS 2023, arXiv 2305.08846 (algorithm 1). The highest half of `guesses` canaries by
    score are called in, the lowest half out, and the rest passed over. `guesses` has to be fixed before the scores are
    seen; unless given it is a third of M. Ties are broken by lot, never by the canaries' order. No bound is above
    log(guesses / -log(1 - confidence)), 4.7 for M = 1000: larger epsilons are out of reach.

    Guarantees:
        If the coins were fair and independent and nothing else in the run depends on them, with probability `confidence`
        over coins and run the mechanism's true epsilon at `delta`, for adding or removing one canary's unit, is at least
        the number returned. It is 0 when nothing can be said.

    >>> round(one_run_bound([0.0] * 500 + [1.0] * 500, [False] * 500 + [True] * 500, delta=0.0), 2)
    4.71
    """
    _check(delta, confidence)
    score = as_float_vector("scores", scores)
    inside, m = as_bool_vector("included", included, len(score)), len(score)
    r = m // 3 if guesses is None else guesses
    if not 2 <= r <= m:
        raise PrivacyError(f"{r} guesses on {m} canaries, expected 2 to {m}; take more canaries.")
    lots = np.random.default_rng(0).permutation(m)
    assignment = np.lexsort((lots, score))
    correct = int(inside[assignment[m - (r + 1) // 2 :]].sum() + (~inside[assignment[: r // 2]]).sum())
    return _largest_rejected(m, r, correct, delta, 1 - confidence)


def _in_half(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return runs[: len(runs) // 2], runs[len(runs) // 2 :]


def _bound(out: np.ndarray, in_: np.ndarray, thresholds_T: np.ndarray, delta: float, confidence: float) -> np.ndarray:
    """The bound at each threshold. [T] Half of the error goes to each rate's interval, so both hold at `confidence`."""
    error = (1 - confidence) / 2
    false_positives = len(out) - np.searchsorted(np.sort(out), thresholds_T, side="left")
    false_negatives = np.searchsorted(np.sort(in_), thresholds_T, side="left")
    fpr, fnr = _highest(false_positives, len(out), error), _highest(false_negatives, len(in_), error)
    odds = np.maximum((1 - delta - fnr) / fpr, (1 - delta - fpr) / fnr)
    return np.log(np.maximum(odds, 1.0))


def _highest(successes_T: np.ndarray, trials: int, error: float) -> np.ndarray:
    """Clopper-Pearson's upper limit on a rate, exceeded with probability at most `error`. [T]"""
    failures_T = trials - successes_T
    return np.where(failures_T == 0, 1.0, betaincinv(successes_T + 1, np.maximum(failures_T, 1), 1 - error))


def _largest_rejected(m: int, r: int, correct: int, delta: float, error: float, steps: int = 40) -> float:
    """Bisection. A mechanism that is private at epsilon is so at every larger one, so that rejecting any epsilon rejects
    all below it: the error stays the test's even where the p-value is not monotone."""
    low, high = 0.0, 1.0
    while _p_value(m, r, correct, high, delta) < error:
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(m, r, correct, middle, delta) < error else (low, middle)
    return low if low > 1e-9 else 0.0


def _p_value(m: int, r: int, correct: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2: how likely at least so many correct guesses of r are under (epsilon, delta)."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(bdtrc(correct - 1, r, accuracy))
    if not correct or not delta:
        return tail
    below = np.cumsum(binom.pmf(np.arange(correct), r, accuracy)[::-1])  # P[correct > W >= correct - i], i = 1, 2, ...
    return tail + 2 * m * delta * float((below / np.arange(1, correct + 1)).max())


def _check(delta: float, confidence: float) -> None:
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise PrivacyError(f"delta {delta} and confidence {confidence} were given, expected [0, 1) and (0, 1).")
