"""Where the data name subjects, a subject with all its records moves every released sum by one clip norm at most.

The mechanism alone, then every method and optimizer with a record level through `execute_assignment`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import small
from ficpd.backbones.query_engine import run_queries
from ficpd.data.subjects import count_units
from ficpd.errors import ConfigError, PrivacyError
from ficpd.federation.client import ClientSession
from ficpd.federation.execution import execute_assignment
from ficpd.federation.privacy_plan import build_mechanism, client_workloads
from ficpd.federation.rounds import RoundSchedule
from ficpd.interfaces import ReleaseKind
from ficpd.privacy import record_gaussian
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.privacy.noise import SeededNoise
from ficpd.privacy.record_gaussian import RecordGaussian
from ficpd.registry import load, names, validated_section
from ficpd.types import ClientWorkload, Record

CLIP, MULTIPLIER, MOST = 0.5, 2.0, 3
LITTLE = 0.01
"""A clip norm below the gradient of each record of the large subject."""
PLAN = ClientWorkload(40, 0.5, 2, 1, 1, 1.0, 1, once={"sizes": 0.2}, num_subjects=8)
OF_40 = torch.arange(40) % 8


def built(plan: ClientWorkload = PLAN, **more: Any) -> RecordGaussian:
    given = {"clip_norm": CLIP, "noise_multiplier": MULTIPLIER, "delta": 1e-3, "max_records_per_subject": MOST}
    return record_gaussian.build(record_gaussian.Config(**given | more), plan)


@dataclass
class Deaf:
    """Every unit joins every step; released sums are kept with their deviation, and all answers are zeros."""

    kind = "simulated"
    sums: list[tuple[Tensor, float]] = field(default_factory=list)

    def add_gaussian(self, values: Tensor, deviation: float) -> Tensor:
        self.sums.append((values.detach().cpu().double().flatten(), deviation))
        return torch.zeros(values.shape)

    def poisson_sample(self, number: int, rate: float) -> Tensor:
        return torch.arange(number)

    permutation = staticmethod(torch.arange)


ODD = st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38, 1e-38])
NUMBERS = st.one_of(st.floats(-3, 3, width=32), ODD)


@st.composite
def subjects(draw) -> tuple[Tensor, Tensor, int]:
    """[K, B, N] values, [B] subjects, and one of these."""
    K, B, N = (draw(st.integers(1, most)) for most in (3, 8, 3))
    values = draw(st.lists(NUMBERS, min_size=K * B * N, max_size=K * B * N))
    subject = draw(st.lists(st.integers(0, 3), min_size=B, max_size=B))
    return torch.tensor(values).view(K, B, N), torch.tensor(subject), draw(st.sampled_from(subject))


@settings(max_examples=150, deadline=None)
@given(subjects())
def test_one_subject_moves_the_sum_by_at_most_the_clip_norm_over_all_candidates(drawn):
    values_KBN, subject_B, gone = drawn
    silent, rest = Deaf(), subject_B != gone
    zeroed = torch.where(rest[None, :, None], values_KBN, torch.zeros(()))
    built().noisy_mean(values_KBN, 7, silent, subject_B=subject_B)
    built().noisy_mean(values_KBN[:, rest], 7, silent, subject_B=subject_B[rest])
    built().noisy_mean(zeroed, 7, silent, subject_B=subject_B)
    (whole, _), *others = silent.sums
    assert torch.isfinite(whole).all()
    for other, _ in others:
        assert float((whole - other).norm()) <= CLIP


@settings(max_examples=150, deadline=None)
@given(subjects(), st.integers(1, 4))
def test_one_subject_moves_a_statistic_by_at_most_one_however_it_comes_in_chunks(drawn, size):
    values_KBN, subject_B, gone = drawn
    rows_BN, rest, silent = values_KBN[0], subject_B != gone, Deaf()
    for rows, of in ((rows_BN, subject_B), (rows_BN[rest], subject_B[rest])):
        if len(rows):
            built().noisy_sum("sizes", iter(rows.split(size)), silent, of)
    built().noisy_sum("sizes", [rows_BN], silent, subject_B)
    whole, *_, once = [values for values, _ in silent.sums]
    assert torch.isfinite(whole).all()
    assert torch.allclose(whole, once, rtol=1e-12, atol=1e-12)
    less = silent.sums[1][0] if len(silent.sums) == 3 else torch.zeros_like(whole)
    assert float((whole - less).norm()) <= 1.0


def test_a_subject_below_the_norm_counts_as_the_sum_of_its_records():
    silent = Deaf()
    values = torch.tensor([[[0.1, 0.0], [0.0, 0.1], [0.05, 0.0]]])
    built().noisy_mean(values, 1, silent, subject_B=torch.tensor([4, 4, 7]))
    assert torch.allclose(silent.sums[0][0], torch.tensor([0.15, 0.1], dtype=torch.double))


def test_subjects_join_a_step_with_all_their_records_and_by_themselves():
    mechanism = built(max_records_per_subject=100)
    samples = mechanism.sample(40, 4, 400, SeededNoise("a test"), OF_40)
    counts = torch.stack([OF_40[rows].bincount(minlength=8) for rows in samples]).double()
    assert set(counts.unique().tolist()) == {0.0, 5.0}
    joined = counts / 5
    assert float(joined.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(joined.sum(1).var()) == pytest.approx(8 * 0.5 * 0.5, rel=0.3)
    assert all(len(rows.unique()) == len(rows) for rows in samples)


def test_of_a_large_subject_some_records_are_drawn_anew_in_each_step():
    samples = built().sample(40, 4, 300, SeededNoise("a test"), OF_40)
    counts = torch.stack([OF_40[rows].bincount(minlength=8) for rows in samples])
    assert set(counts.unique().tolist()) == {0, MOST}
    used = torch.stack([rows.bincount(minlength=40) for rows in samples]).double()
    assert float(used.mean(0).min()) == pytest.approx(0.5 * MOST / 5, abs=0.1)
    assert float(used.mean(0).max()) == pytest.approx(0.5 * MOST / 5, abs=0.1)


def test_of_a_large_subject_a_statistic_has_so_many_records_too():
    rows_BN = torch.full((40, 1), 0.01)
    silent = Deaf()
    built().noisy_sum("sizes", [rows_BN], silent, OF_40)
    assert silent.sums[0][0].item() == pytest.approx(8 * MOST * 0.01)


def test_the_divisor_is_the_expected_number_of_subjects():
    silent = SeededNoise("a test")
    values = torch.full((1, 40, 1), 0.01)
    mechanism = built()
    mechanism.noise_multiplier = 1e-9
    assert float(mechanism.noisy_mean(values, 4, silent, subject_B=OF_40)) == pytest.approx(40 * 0.01 / 4, rel=1e-4)


def test_the_rate_is_of_subjects():
    with pytest.raises(PrivacyError, match=r"a batch of 5 of 8 subjects exceeds the planned sampling rate of 0\.5"):
        built().sample(40, 5, 1, SeededNoise("a test"), OF_40)
    assert built().guarantee()["unit"] == "subject"
    assert "all records of one subject" in built().guarantee()["neighbouring"]
    step = built().cost(ReleaseKind.STEP)
    assert step is not None
    assert step.sampling_rate == 0.5


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, num_subjects=None)], ids=["subjects", "records"])
def test_values_whose_units_are_others_than_planned_are_refused(plan):
    mechanism, wrong = built(plan), None if plan.num_subjects else OF_40
    with pytest.raises(PrivacyError, match="state both or none"):
        mechanism.sample(40, 4, 1, Deaf(), wrong)
    with pytest.raises(PrivacyError, match="state both or none"):
        mechanism.noisy_mean(torch.ones(1, 40, 1), 4, Deaf(), subject_B=wrong)
    with pytest.raises(PrivacyError, match="state both or none"):
        mechanism.noisy_sum("sizes", [torch.ones(40, 1)], Deaf(), wrong)


def test_subjects_of_another_number_of_records_are_refused():
    with pytest.raises(PrivacyError, match="40 subjects were stated of 39 records"):
        built().noisy_mean(torch.ones(1, 39, 1), 4, Deaf(), subject_B=OF_40)


@pytest.mark.parametrize("most", [0, -1, 1.5])
def test_no_records_of_a_subject_are_an_error_that_names_the_setting(most):
    given = {"name": "record_gaussian", "epsilon": 2.0, "max_records_per_subject": most}
    with pytest.raises(ConfigError, match=rf"privacy: max_records_per_subject = {most}"):
        validated_section("privacy", given, "privacy")


BIG = "the one with many"


def people() -> list[Record]:
    """Seven subjects of one or two records, and one with eight that say the same."""
    records = small.records(20)
    of = [f"patient {i % 7}" for i in range(12)] + [BIG] * 8
    same = records[12]
    return [replace(r if i < 12 else same, key=str(i), subject=of[i]) for i, r in enumerate(records)]


class EachByItself(RecordGaussian):
    """Clips a subject's records one by one: what the tests below have to find."""

    def noisy_mean(self, values_KB, expected_batch, noise, grad_scale=None, subject_B=None):
        alone = torch.arange(values_KB.shape[1])
        return super().noisy_mean(values_KB, expected_batch, noise, grad_scale, alone)

    def noisy_sum(self, name, chunks, noise, subject_B=None):
        return super().noisy_sum(name, chunks, noise, torch.arange(len(subject_B)))  # type: ignore[arg-type]


def released(
    name: str, model, records: list[Record], how: dict[str, Any], kind: type[RecordGaussian] = RecordGaussian
) -> list[tuple[Tensor, float]]:
    """Sums and deviations of what a client releases in two rounds. All answers are zeros, so that prompts never differ."""
    config = how.get("config", {})
    training = small.LocalTrainingConfig(
        local_steps=2,
        batch_size=4,
        learning_rate=0.1,
        **{k: v for k, v in how.items() if k not in ("config", "statistics")},
    )
    method = small.method(name, training, **config)
    part = validated_section(
        "privacy",
        {"name": "record_gaussian", "noise_multiplier": MULTIPLIER, "clip_norm": LITTLE, "delta": 1e-3,
         "max_records_per_subject": 5, "statistics": {"weight": 0.1} | how.get("statistics", {})},
        "privacy",
    )  # fmt: skip
    (client,) = small.clients(model, method, 1).values()
    state = small.first_state(method, {client.name: client}, readable=model)
    plan = client_workloads(method, state, {client.name: count_units(records)}, RoundSchedule(2, 1, 0))[client.name]
    mechanism = build_mechanism(part, client.name, plan)
    mechanism.__class__ = kind
    account = Ledger(":memory:", "a run").account(client.name, Budget(None, 1e-3))
    client = replace(client, train=records, mechanism=mechanism, account=account)
    deaf = Deaf()
    client.noise_source = lambda method, round: deaf  # type: ignore[method-assign]
    for round in (1, 2):
        order = method.make_assignment(state, client.card, round)
        update = run_queries(model, execute_assignment(method, client, order))
        state = method.aggregate(state, [update], round, model)
    return deaf.sums


def largest_move(name: str, model, how: dict[str, Any], kind: type[RecordGaussian] = RecordGaussian) -> float:
    """How far the large subject moves any released sum, in clip norms."""
    records = people()
    whole = released(name, model, records, how, kind)
    less = released(name, model, [r for r in records if r.subject != BIG], how, kind)
    assert len(whole) == len(less) > 0
    limits = [LITTLE if deviation == MULTIPLIER * LITTLE else 1.0 for _, deviation in whole]
    return max(float((a - b).norm()) / most for (a, _), (b, _), most in zip(whole, less, limits, strict=True))


LABELS = {"statistics": {"labels": 0.1}, "config": {"label_prior": True}}
PRIVATE = [name for name in names("methods") if "record" in small.method(name).capabilities.private_units]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PRIVATE),
    *(("fedavg", {"optimizer": optimizer}) for optimizer in ("sgd", "spsa", "cma_es")),
    *((name, LABELS) for name in ("ficpd", "fpl")),
]


def test_every_optimizer_is_here():
    assert {"adam", *(how["optimizer"] for _, how in CASES if "optimizer" in how)} == set(names("optimizers"))
    assert all(load("methods", name) for name, _ in CASES)


@pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{name} {how}" for name, how in CASES])
def test_one_subject_moves_no_release_of_a_method_by_more_than_the_clip_norm(name, how, model):
    assert 0.0 < largest_move(name, model, how) <= 1.0


@pytest.mark.parametrize("name", ["fedavg", "ficpd", "fedhpl", "analytic"])
def test_a_subject_whose_records_are_clipped_one_by_one_is_found(name, model):
    assert largest_move(name, model, {}, EachByItself) > 1.5


def test_records_that_name_subjects_need_a_mechanism_that_was_planned_for_them(model):
    method = small.method("fedavg")
    (client,) = small.clients(model, method, 1, mechanism=built(replace(PLAN, num_subjects=None))).values()
    with pytest.raises(PrivacyError, match="its records name subjects, and its mechanism was planned for records"):
        replace(client, train=people())
    client.train = people()
    with pytest.raises(PrivacyError, match="planned for records"):
        ClientSession(client, 1)
    with pytest.raises(PrivacyError, match="its records name no subjects, and its mechanism was planned for subjects"):
        replace(client, train=small.records(9), mechanism=built())


def test_a_mechanism_that_knows_no_subjects_is_refused(monkeypatch):
    module = load("privacy", "record_gaussian")
    build = module.build
    monkeypatch.setattr(module, "build", lambda config, plan: build(config, replace(plan, num_subjects=None)))
    part = {"name": "record_gaussian", "noise_multiplier": 1.0, "clip_norm": 1.0}
    single = r"privacy\.name = 'record_gaussian' protects single records, and data\.columns"
    with pytest.raises(ConfigError, match=single):
        build_mechanism(part, "site-0", PLAN)


def test_what_a_client_holds_back_divides_no_subject(model):
    (client,) = small.clients(model, small.method("fedavg"), 1).values()
    client = replace(client, train=people() * 2)
    session = ClientSession(client, 1)
    for share in (0.25, 0.5):
        held = session.local_context(share)._held.tolist()
        apart = {client.train[place].subject for place in held}
        rest = {r.subject for place, r in enumerate(client.train) if place not in held}
        assert held
        assert not apart & rest


def test_a_subject_with_all_records_is_one_unit(model):
    one = [replace(record, subject="p") for record in small.records(20)]
    sums = released("fedavg", model, one, {})
    assert all(float(values.norm()) <= 1.0 for values, _ in sums)
    assert count_units(one) == (20, 1)
