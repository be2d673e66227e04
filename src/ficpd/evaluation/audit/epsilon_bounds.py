"""Lower bounds on epsilon from attacks on canaries.

A bound above the stated epsilon contradicts it. A low bound proves nothing: a better attack may exist.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtrc, betaincinv
from scipy.stats import binom

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.membership import as_bool_vector, as_floats

CAUTION = 50
"""The threshold is chosen at an error this many times smaller. Otherwise a few extreme runs would decide it."""


def two_world_bound(scores_without: ArrayLike, scores_with: ArrayLike, delta: float, confidence: float = 0.95) -> float:
    """Returns a lower bound on epsilon from the scores of runs without and with one canary (higher: with it).

    Jagielski et al., NeurIPS 2020, arXiv 2006.07709 (algorithm 2); Nasr et al., S&P 2021, arXiv 2101.04535. The first
    half of the runs chooses the threshold, the second half gives the bound.

    Guarantees:
        If the runs are independent, the true epsilon at `delta` is at least the bound with probability `confidence`, for
        neighbours that differ by the canary. The bound is 0 if nothing can be concluded.

    >>> round(two_world_bound([0.0] * 200, [1.0] * 200, delta=0.0), 2)
    3.28
    """
    _check(delta, confidence)
    all_out, all_in = as_floats("scores_without", scores_without), as_floats("scores_with", scores_with)
    if min(len(all_out), len(all_in)) < 2:
        raise PrivacyError(f"{len(all_out)} runs without and {len(all_in)} with the canary: expected at least 2 each")
    (choose_out, out), (choose_in, in_) = (np.split(runs, [len(runs) // 2]) for runs in (all_out, all_in))
    thresholds_T = np.unique(np.concatenate([choose_out, choose_in]))
    best = np.argmax(_bound(choose_out, choose_in, thresholds_T, delta, 1 - (1 - confidence) / CAUTION))
    return float(_bound(out, in_, thresholds_T[best, None], delta, confidence)[0])


def one_run_bound(
    scores: ArrayLike, included: ArrayLike, delta: float, confidence: float = 0.95, guesses: int | None = None
) -> float:
    """Returns a lower bound on epsilon from one run with M canaries, each included with probability 1/2.

    Steinke, Nasr and Jagielski, NeurIPS 2023, arXiv 2305.08846 (algorithm 1). The `guesses` / 2 canaries with the highest
    scores are guessed included, and as many with the lowest excluded. `guesses` must be fixed before the scores are seen;
    the default is M / 3. Ties are broken at random. The bound is at most about log(guesses / -log(1 - confidence)).

    Guarantees:
        Inclusions must be fair, independent, and affect nothing else in the run. Then the mechanism's true epsilon at
        `delta`, for adding or removing one canary's unit, is at least the bound. The probability is `confidence`, over
        inclusions and run. The bound is 0 if nothing can be concluded.

    >>> round(one_run_bound([0.0] * 500 + [1.0] * 500, [False] * 500 + [True] * 500, delta=0.0), 2)
    4.71
    """
    _check(delta, confidence)
    score = as_floats("scores", scores)
    inside, m = as_bool_vector("included", included, len(score)), len(score)
    r = m // 3 if guesses is None else guesses
    if not 2 <= r <= m:
        raise PrivacyError(f"guesses = {r}: expected 2 to {m}; use more canaries")
    lots = np.random.default_rng(0).permutation(m)
    assignment = np.lexsort((lots, score))
    correct = int(inside[assignment[m - (r + 1) // 2 :]].sum() + (~inside[assignment[: r // 2]]).sum())
    return _largest_rejected(m, r, correct, delta, 1 - confidence)


def _bound(out: np.ndarray, in_: np.ndarray, thresholds_T: np.ndarray, delta: float, confidence: float) -> np.ndarray:
    """Returns the bound at each threshold, [T]. Each rate's limit gets half of the error."""
    error = (1 - confidence) / 2
    false_positives = len(out) - np.searchsorted(np.sort(out), thresholds_T, side="left")
    false_negatives = np.searchsorted(np.sort(in_), thresholds_T, side="left")
    fpr, fnr = _highest(false_positives, len(out), error), _highest(false_negatives, len(in_), error)
    odds = np.maximum((1 - delta - fnr) / fpr, (1 - delta - fpr) / fnr)
    return np.log(np.maximum(odds, 1.0))


def _highest(successes_T: np.ndarray, trials: int, error: float) -> np.ndarray:
    """Returns Clopper-Pearson's upper limit of a rate, [T], exceeded with probability at most `error`."""
    failures_T = trials - successes_T
    return np.where(failures_T == 0, 1.0, betaincinv(successes_T + 1, np.maximum(failures_T, 1), 1 - error))


def _largest_rejected(m: int, r: int, correct: int, delta: float, error: float, steps: int = 40) -> float:
    """Returns the largest rejected epsilon, by bisection.

    A mechanism that is private at epsilon is private at every larger one, so a rejected epsilon rejects all smaller
    ones. The error stays the test's even if the p-value is not monotone.
    """
    low, high = 0.0, 1.0
    while _p_value(m, r, correct, high, delta) < error:
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(m, r, correct, middle, delta) < error else (low, middle)
    return low if low > 1e-9 else 0.0


def _p_value(m: int, r: int, correct: int, epsilon: float, delta: float) -> float:
    """Returns the probability of at least `correct` of r correct guesses under (epsilon, delta) (theorem 5.2)."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(bdtrc(correct - 1, r, accuracy))
    if not correct or not delta:
        return tail
    below = np.cumsum(binom.pmf(np.arange(correct), r, accuracy)[::-1])  # P[correct > W >= correct - i], i = 1, 2, ...
    return tail + 2 * m * delta * float((below / np.arange(1, correct + 1)).max())


def _check(delta: float, confidence: float) -> None:
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise PrivacyError(f"delta = {delta}, confidence = {confidence}: expected [0, 1) and (0, 1)")
