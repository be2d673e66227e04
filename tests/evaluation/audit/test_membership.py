"""Attacks: members that stand out are found, a record's difficulty is not taken for membership, odd losses are borne."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ficpd.errors import PrivacyError
from ficpd.evaluation.audit.membership import ATTACKS, AttackData, lira, rmia, yeom


def evidence(effect: float, difficulty: float, seed: int = 0, records: int = 600, shadows: int = 4) -> AttackData:
    """Losses of a made-up classifier. Being a member adds `effect` to a record's log odds, which else differ between
    records by `difficulty` and between prompts by 0.5."""
    random = np.random.default_rng(seed)
    member_N = np.arange(records) % 2 == 0

    def loss(odds: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -(odds + 0.5 * random.standard_normal(odds.shape)))

    odds_N, odds_Z = (1 + difficulty * random.standard_normal(records) for _ in range(2))
    every_SN, every_SZ = np.tile(odds_N, (shadows, 1)), np.tile(odds_Z, (shadows, 1))
    return AttackData(loss(odds_N + effect * member_N), loss(every_SN), member_N, loss(odds_Z), loss(every_SZ))


def auc(name: str, given: AttackData) -> float:
    return float(roc_auc_score(given.member_N, ATTACKS[name](given)))


@pytest.mark.parametrize("name", ATTACKS)
def test_members_that_stand_out_are_found(name):
    assert auc(name, evidence(effect=3.0, difficulty=0.1)) > 0.95


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_found_where_there_is_nothing(name):
    aucs = [auc(name, evidence(effect=0.0, difficulty=2.0, seed=seed)) for seed in range(20)]
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ["lira", "rmia"])
@pytest.mark.parametrize("seed", range(3))
def test_shadows_tell_difficulty_from_membership(name, seed):
    given = evidence(effect=1.0, difficulty=2.0, seed=seed)
    assert auc(name, given) > auc("yeom", given) + 0.1


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_reads_the_truth(name):
    given = evidence(effect=1.0, difficulty=2.0)
    turned = dataclasses.replace(given, member_N=~given.member_N)
    assert np.array_equal(ATTACKS[name](given), ATTACKS[name](turned))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_lower_loss_never_scores_less(name):
    given = evidence(effect=1.0, difficulty=2.0)
    lower = dataclasses.replace(given, target_N=given.target_N * 0.9)
    assert (ATTACKS[name](lower) > ATTACKS[name](given)).all()


def test_lira_is_the_papers_z_score():
    p_N, p_SN = np.array([0.7, 0.4, 0.99]), np.array([[0.5, 0.3, 0.9], [0.6, 0.5, 0.95], [0.2, 0.4, 0.8]])
    given = AttackData(-np.log(p_N), -np.log(p_SN), np.array([True, False, True]), np.ones(1), np.ones((3, 1)))
    phi_N, phi_SN = np.log(p_N / (1 - p_N)), np.log(p_SN / (1 - p_SN))
    deviation = np.sqrt(np.mean([phi_SN[:, i].var(ddof=1) for i in range(3)]))
    assert lira(given) == pytest.approx((phi_N - phi_SN.mean(axis=0)) / deviation)


def test_sure_and_hopeless_predictions_are_borne():
    loss_N = np.array([0.0, -1e-9, 1e-12, 1e-7, 1e-3, 1.0, 50.0, 5000.0])
    given = AttackData(loss_N, np.ones((1, 8)), np.zeros(8, bool), loss_N, np.ones((1, 8)))
    for attack in ATTACKS.values():
        assert np.isfinite(attack(given)).all()
    assert (np.diff(lira(given)) <= 0).all()
    assert (np.diff(lira(given))[2:] < 0).all()
    assert lira(given)[0] - lira(given)[3] < 2  # no loss at all is no outlier beside the least that float32 can tell


def test_one_shadow_is_enough():
    given = evidence(effect=2.0, difficulty=2.0, shadows=1)
    assert min(auc("lira", given), auc("rmia", given)) > auc("yeom", given) + 0.05


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_rmia_is_the_share_of_the_population_that_is_beaten(gamma):
    given, a = evidence(effect=1.0, difficulty=2.0, records=80), 0.3
    ratio_N = np.exp(-given.target_N) / (((1 + a) * np.exp(-given.shadow_SN).mean(axis=0) + 1 - a) / 2)
    ratio_Z = np.exp(-given.population_Z) / (((1 + a) * np.exp(-given.shadow_SZ).mean(axis=0) + 1 - a) / 2)
    beaten_N = (ratio_N[:, None] / ratio_Z[None] >= gamma).sum(axis=1)
    assert np.array_equal(np.floor(rmia(given, gamma) * 81), beaten_N)
    assert len(np.unique(rmia(given, gamma))) == 80 > len(np.unique(beaten_N))  # ties are broken
    assert np.array_equal(np.argsort(rmia(given, gamma)), np.argsort(ratio_N))  # by the ratio


def test_rmia_counts_an_equal_as_beaten():
    given = evidence(effect=0.0, difficulty=2.0, records=80)
    same = dataclasses.replace(given, population_Z=given.target_N, shadow_SZ=given.shadow_SN)
    assert np.array_equal(np.sort(np.floor(rmia(same) * 81)), np.arange(1, 81))


def test_rmia_takes_the_whole_scale():
    given = evidence(effect=1.0, difficulty=2.0)
    assert np.isfinite(rmia(given, offline_scale=1.0)).all()
    assert not np.array_equal(np.argsort(rmia(given, offline_scale=1.0)), np.argsort(rmia(given)))


@pytest.mark.parametrize("name", ATTACKS)
def test_other_losses_may_be_of_any_size(name):
    """A regression's: where its zero lies tells nothing."""
    given = dataclasses.replace(evidence(effect=1.0, difficulty=1.0), likelihood=False)
    arrays = {f: getattr(given, f) for f in ("target_N", "shadow_SN", "population_Z", "shadow_SZ")}
    shifted = dataclasses.replace(given, **{f: losses - 100 for f, losses in arrays.items()})
    assert np.array_equal(np.argsort(ATTACKS[name](given)), np.argsort(ATTACKS[name](shifted)))
    assert auc(name, given) > 0.6


def test_tensors_are_taken():
    given = evidence(effect=1.0, difficulty=1.0)
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    tensors = {name: torch.tensor(value) for name, value in fields.items() if name != "likelihood"}
    assert np.array_equal(yeom(AttackData(**tensors)), yeom(given))
    assert np.array_equal(lira(AttackData(**tensors)), lira(given))


@pytest.mark.parametrize(("field", "value", "says"), [
    ("shadow_SN", np.ones((3, 5)), r"shadow_SN has shape \(3, 5\), expected .*\(3, 6\)"),
    ("shadow_SN", np.ones(6), r"shadow_SN has shape \(6,\), expected .*\(6, 6\)"),
    ("shadow_SN", np.ones((0, 6)), r"shadow_SN has shape \(0, 6\)"),
    ("shadow_SZ", np.ones((2, 4)), r"shadow_SZ has shape \(2, 4\), expected .*\(3, 4\)"),
    ("population_Z", np.ones(0), r"population_Z has shape \(0,\)"),
    ("member_N", np.ones(5, bool), r"member_N is bool of shape \(5,\)"),
    ("member_N", np.ones(6), "member_N is float64 .*expected bool"),
    ("target_N", np.ones((6, 1)), r"target_N has shape \(6, 1\), expected .*\(6,\)"),
    ("target_N", np.array([1, 2, 3, np.nan, 5, 6]), "target_N .* expected finite"),
    ("population_Z", np.array([1.0, -0.2, 1, 1]), "population_Z holds a loss of -0.2.*likelihood=False"),
])  # fmt: skip
def test_evidence_that_does_not_fit_is_refused(field, value, says):
    good = AttackData(np.ones(6), np.ones((3, 6)), np.ones(6, bool), np.ones(4), np.ones((3, 4)))
    with pytest.raises(PrivacyError, match=says):
        dataclasses.replace(good, **{field: value})
