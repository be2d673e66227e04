"""Outcomes: right on data whose answer is known, and silent where there is nothing to find."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_curve

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.attack_metrics import attack_metrics, best_advantage, label_matched


def scores(shift: float, seed: int, each: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores, the members' higher by `shift` deviations; members and non-members are mixed."""
    random = np.random.default_rng(seed)
    member_N = random.permutation(np.arange(2 * each) < each)
    return random.standard_normal(2 * each) + shift * member_N, member_N


def most_on_the_same_records(score_N: np.ndarray, member_N: np.ndarray) -> float:
    fpr, tpr, _ = roc_curve(member_N, score_N)
    return float((tpr - fpr).max())


def test_separated_members_are_all_found():
    score_N, member_N = scores(shift=20.0, seed=0)
    found = attack_metrics(score_N, member_N, seed=0)
    assert (found.auc, found.auc_interval, found.advantage) == (1.0, (1.0, 1.0), pytest.approx(1.0, abs=0.005))
    assert found.advantage_interval[0] > 0.98
    assert found.tpr == {0.01: 1.0, 0.001: 1.0}
    assert found.tpr_interval[0.01] == (pytest.approx(0.025 ** (1 / 1000)), 1.0)  # Clopper-Pearson, all of 1000
    assert (found.num_members, found.num_nonmembers) == (1000, 1000)


@pytest.mark.slow
def test_known_normal_scores():
    found = attack_metrics(*scores(shift=1.0, seed=1, each=10000), seed=1)
    assert found.auc == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.01)
    assert found.advantage == pytest.approx(2 * norm.cdf(0.5) - 1, abs=0.02)
    assert found.tpr[0.01] == pytest.approx(norm.sf(norm.isf(0.01) - 1), abs=0.02)
    low, high = found.tpr_interval[0.01]
    assert low < found.tpr[0.01] < high


def test_the_intervals_hold_at_about_their_rate():
    truth = {"auc": norm.cdf(0.5 / np.sqrt(2)), "advantage": 2 * norm.cdf(0.25) - 1}
    found = [attack_metrics(*scores(shift=0.5, seed=seed, each=300), seed) for seed in range(30)]
    auc_held = [o.auc_interval[0] <= truth["auc"] <= o.auc_interval[1] for o in found]
    advantage_held = [o.advantage_interval[0] <= truth["advantage"] <= o.advantage_interval[1] for o in found]
    assert sum(auc_held) >= 26
    assert sum(advantage_held) >= 25  # the threshold is the best of one half, a little below the best there is
    assert np.mean([o.auc_interval[1] - o.auc_interval[0] for o in found]) == pytest.approx(4 * 0.0229, rel=0.1)


def test_nothing_is_found_where_there_is_nothing():
    found = [attack_metrics(*scores(shift=0.0, seed=seed, each=200), seed) for seed in range(20)]
    assert sum(o.auc_interval[0] <= 0.5 <= o.auc_interval[1] for o in found) >= 17
    assert sum(o.advantage_interval[0] <= 0 <= o.advantage_interval[1] for o in found) >= 17


def test_advantage_is_unbiased_where_the_most_is_not():
    null = [(*scores(shift=0.0, seed=seed), seed) for seed in range(50)]
    crossed = [best_advantage({"one": score_N}, member_N, seed)[0] for score_N, member_N, seed in null]
    most = [most_on_the_same_records(score_N, member_N) for score_N, member_N, _ in null]
    assert abs(np.mean(crossed)) < 0.01
    assert np.mean(most) > 0.02
    assert min(most) > 0


def test_the_best_of_many_useless_attacks_is_useless():
    crossed, most = [], []
    for seed in range(50):
        random, member_N = np.random.default_rng(seed), np.arange(2000) % 2 == 0
        attacks = {str(i): random.standard_normal(2000) for i in range(5)}
        crossed.append(best_advantage(attacks, member_N, seed)[0])
        most.append(max(most_on_the_same_records(score_N, member_N) for score_N in attacks.values()))
    assert abs(np.mean(crossed)) < 0.01
    assert np.mean(most) > 0.04


def test_the_best_attack_is_the_one_that_works():
    score_N, member_N = scores(shift=1.5, seed=3)
    noise = {str(i): scores(shift=0.0, seed=10 + i)[0] for i in range(4)}
    best, interval = best_advantage({**noise, "works": score_N}, member_N, seed=0)
    assert best == pytest.approx(best_advantage({"works": score_N}, member_N, seed=0)[0])
    assert interval[0] > 0.4


def test_the_seed_fixes_all():
    score_N, member_N = scores(shift=0.5, seed=0, each=100)
    assert attack_metrics(score_N, member_N, seed=1) == attack_metrics(score_N, member_N, seed=1)
    assert attack_metrics(score_N, member_N, seed=1) != attack_metrics(score_N, member_N, seed=2)


def test_equal_scores_tell_nothing():
    found = attack_metrics(np.zeros(400), np.arange(400) < 200, seed=0)
    assert (found.auc, found.auc_interval, found.advantage, found.tpr[0.01]) == (0.5, (0.5, 0.5), 0.0, 0.0)


@pytest.mark.parametrize(("others", "seen"), [(99, []), (100, [0.01]), (999, [0.01]), (1000, [0.01, 0.001])])
def test_a_rate_too_low_to_be_seen_is_not_told(others, seen):
    member_N = np.arange(50 + others) < 50
    found = attack_metrics(np.random.default_rng(0).standard_normal(50 + others) + 3 * member_N, member_N, seed=0)
    assert [rate for rate, value in found.tpr.items() if value is not None] == seen
    assert [rate for rate, value in found.tpr_interval.items() if value is not None] == seen


def test_non_members_are_drawn_with_the_members_labels():
    members, others = np.repeat(["a", "b", "c"], [60, 30, 10]), np.repeat(["c", "b", "a"], [100, 20, 100])
    drawn = label_matched(members, others, seed=0)
    labels, counts = np.unique(others[drawn], return_counts=True)
    assert dict(zip(labels, counts, strict=True)) == {"a": 40, "b": 20, "c": 7}  # b is scarce: 20 of 30, so 2/3 of all
    assert len(set(drawn)) == len(drawn)
    assert np.array_equal(drawn, label_matched(members, others, seed=0))
    assert not np.array_equal(drawn, label_matched(members, others, seed=1))


def test_a_label_that_only_members_have_is_refused():
    with pytest.raises(PrivacyError, match="no non-member has the label 2, 3"):
        label_matched([1, 2, 3], [1, 1, 4], seed=0)


def test_matched_labels_give_a_label_reader_nothing():
    random = np.random.default_rng(0)
    members, others = random.random(2000) < 0.8, random.random(2000) < 0.3
    drawn = others[label_matched(members, others, seed=0)]
    matched = attack_metrics(np.r_[members, drawn].astype(float), np.arange(2000 + len(drawn)) < 2000, seed=0)
    unmatched = attack_metrics(np.r_[members, others].astype(float), np.arange(4000) < 2000, seed=0)
    assert matched.auc == pytest.approx(0.5, abs=0.002)
    assert unmatched.auc > 0.7


@pytest.mark.parametrize(("score_N", "member_N", "says"), [
    ([1.0, 2.0, 3.0], [True, True, False], "2 members and 1 non-members"),
    ([1.0, np.nan], [True, False], "score_N has shape .* finite"),
    ([1.0, 2.0], [True, False, True], r"member_N is bool of shape \(3,\), expected bool of shape \(2,\)"),
    ([1.0, 2.0], [1, 0], "member_N is int64"),
])  # fmt: skip
def test_scores_that_do_not_fit_are_refused(score_N, member_N, says):
    with pytest.raises(PrivacyError, match=says):
        attack_metrics(score_N, member_N, seed=0)
    with pytest.raises(PrivacyError, match="at least one attack"):
        best_advantage({}, member_N, seed=0)
