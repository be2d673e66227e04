"""Every mechanism: what one record, or one client, can do is bounded; the noise is as stated; the price tells it."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ficpd.errors import PrivacyError, PrivacyWarning
from ficpd.interfaces import ReleaseKind
from ficpd.privacy import accountant, client_gaussian, none, record_gaussian, shared_gaussian
from ficpd.privacy.clipping import MARGIN, clip_scale
from ficpd.privacy.noise import SeededNoise
from ficpd.registry import load, names
from ficpd.types import ClientUpdate, ClientWorkload

PLAN = ClientWorkload(
    100, sampling_rate=0.1, steps=2, participations=5, num_clients=40, cohort_rate=0.25, num_rounds=20
)
CLIP, MULTIPLIER = 0.5, 1.3
GIVEN = {"clip_norm": CLIP, "noise_multiplier": MULTIPLIER, "delta": 1e-3}


class Silent:
    """Adds no noise, and notes the deviation that was asked for."""

    kind = "simulated"

    def __init__(self):
        self.deviations: list[float] = []

    def add_gaussian(self, values, deviation):
        self.deviations.append(deviation)
        return values.detach().cpu().float()

    def add_discrete_gaussian(self, whole, deviation):
        self.deviations.append(deviation)
        return whole

    def poisson_sample(self, number, rate):
        return torch.arange(number)

    permutation = staticmethod(torch.randperm)


def record(**more):
    return record_gaussian.build(record_gaussian.Config(**{**GIVEN, **more}), PLAN)


def client(**more):
    return client_gaussian.build(client_gaussian.Config(**{**GIVEN, **more}), PLAN)


BUILT: dict[str, Callable] = {
    "none": lambda: none.build(none.Config(), PLAN),
    "record_gaussian": record,
    "shared_gaussian": lambda: shared_gaussian.build(shared_gaussian.Config(**GIVEN), PLAN),
    "client_gaussian": client,
    "client_gaussian, central": lambda: client(placement="central"),
}


def test_every_mechanism_of_the_registry_is_here():
    assert {name.partition(",")[0] for name in BUILT} == set(names("privacy"))
    assert all(load("privacy", name).Config for name in names("privacy"))


@pytest.fixture(params=BUILT)
def mechanism(request):
    return BUILT[request.param]()


numbers = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 3e38, 1e-38]))


@st.composite
def batches(draw) -> torch.Tensor:
    """[K, B, N]"""
    K, B, N = (draw(st.integers(1, 4)) for _ in range(3))
    return torch.tensor(draw(st.lists(numbers, min_size=K * B * N, max_size=K * B * N))).view(K, B, N)


@settings(max_examples=150, deadline=None)
@example(torch.tensor([[[3.0], [-1.0]]]))  # without the first record a clipped mean moves by two norms
@given(batches())
def test_one_record_moves_the_sum_by_at_most_the_clip_norm_over_all_candidates(values):
    K, _, N = values.shape
    without = torch.cat([values[:, :0], values[:, 1:]], dim=1)
    zeroed = torch.cat([torch.zeros(K, 1, N), values[:, 1:]], dim=1)
    mechanism, expected = record(), 7
    sums = [mechanism.noisy_mean(v, expected, Silent()).double() * expected for v in (values, without, zeroed)]
    for other in sums[1:]:
        assert torch.isfinite(sums[0]).all()
        assert float((sums[0] - other).norm()) <= CLIP * (1 + 1e-5)


def test_the_losses_of_all_candidates_of_a_record_are_clipped_together():
    """[K, B] of a zeroth-order or CMA-ES query: the whole vector, not each loss by itself."""
    loss_KB = torch.tensor([[3.0], [4.0]])
    mean_K = record().noisy_mean(loss_KB, 1, Silent())
    assert torch.allclose(mean_K, torch.tensor([0.6, 0.8]) * MARGIN * CLIP, rtol=1e-5)


def test_records_below_the_norm_count_as_they_are():
    values = torch.tensor([[[0.1, 0.2], [0.3, -0.1]]])
    assert torch.allclose(record().noisy_mean(values, 2, Silent()), torch.tensor([[0.2, 0.05]]), atol=1e-6)


@pytest.mark.parametrize("came", [0, 1, 9])
def test_the_mean_divides_by_the_expected_batch_whatever_came(came):
    mean = record().noisy_mean(torch.full((1, came, 2), 0.01), 4, Silent())
    assert torch.allclose(mean, torch.full((1, 2), 0.01 * came / 4), atol=1e-7)


def test_the_noise_on_records_is_what_the_price_states():
    silent, mechanism = Silent(), record()
    mechanism.noisy_mean(torch.ones(2, 3, 4), 4, silent)
    price = mechanism.cost(ReleaseKind.STEP)
    assert price is not None
    assert silent.deviations == [price.noise_multiplier * CLIP] == [MULTIPLIER * CLIP]
    assert (price.sampling_rate, price.count) == (PLAN.sampling_rate, 1)


def test_the_measured_noise_on_a_mean_has_the_stated_deviation():
    mechanism, expected = record(), 5
    drawn = mechanism.noisy_mean(torch.zeros(1, 6, 40_000), expected, SeededNoise("a test"))
    assert float(drawn.std()) == pytest.approx(MULTIPLIER * CLIP / expected, rel=0.02)
    assert abs(float(drawn.mean())) < 4 * MULTIPLIER * CLIP / expected / 200


def test_a_subspaces_scale_shares_the_noise_and_is_undone_on_the_mean(mechanism):
    """A direction with a large scale gets less noise, and the clip bounds the scaled record."""
    scale = torch.tensor([4.0, 1.0])
    short = torch.tensor([[[0.01, -0.02], [0.03, 0.01]]])
    mean = mechanism.noisy_mean(short, 2, Silent(), scale)  # type: ignore[arg-type]
    if mechanism.summed:  # a term of a sum: the server divides
        summed = mean.double() / shared_gaussian.GRID * CLIP / clip_scale(scale)
        assert summed[0] == pytest.approx(short[0].sum(0), abs=1e-6)
        return
    assert mean[0] == pytest.approx(short[0].mean(0))
    if mechanism.unit == "record":
        drawn = torch.cat([
            mechanism.noisy_mean(torch.zeros(1, 0, 2), 1, SeededNoise("scale", i), scale) for i in range(3000)
        ])  # fmt: skip
        factors = clip_scale(scale)
        assert drawn.std(0) == pytest.approx(MULTIPLIER * CLIP / factors, rel=0.05)
        long = mechanism.noisy_mean(torch.tensor([[[5.0, 7.0]]]), 1, Silent(), scale)  # type: ignore[arg-type]
        assert float((long * factors).norm()) == pytest.approx(MARGIN * CLIP, rel=1e-5)


def test_records_join_each_step_by_themselves():
    samples = record().sample(400, 40, 300, SeededNoise("a test"))
    sizes = torch.tensor([float(len(sample)) for sample in samples])
    assert float(sizes.mean()) == pytest.approx(40, rel=0.05)
    assert float(sizes.var()) == pytest.approx(400 * 0.1 * 0.9, rel=0.3)
    assert all(len(sample.unique()) == len(sample) for sample in samples)


def test_a_larger_batch_than_planned_is_refused():
    with pytest.raises(PrivacyError, match=r"sampling rate of 0\.1"):
        record().sample(100, 11, 1, Silent())


def test_an_empty_poisson_batch_is_noise_like_any_other():
    silent = Silent()
    assert torch.equal(record().noisy_mean(torch.zeros(2, 0, 3, 4), 8, silent), torch.zeros(2, 3, 4))
    assert silent.deviations == [MULTIPLIER * CLIP]


def test_a_total_clips_rows_to_one_and_has_its_own_price():
    mechanism, silent = record(statistics={"weight": 0.1, "counts": 0.2}), Silent()
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    summed = mechanism.noisy_sum("counts", rows.split(1), silent)
    assert torch.allclose(summed, torch.tensor([0.6 * MARGIN, 0.8 * MARGIN + 0.5]), rtol=1e-5)
    assert silent.deviations == [mechanism.cost(ReleaseKind.STATISTIC, "counts").noise_multiplier]
    weight, counts = (mechanism.cost(ReleaseKind.STATISTIC, name) for name in ("weight", "counts"))
    assert weight.noise_multiplier > counts.noise_multiplier
    assert {line.name for line in mechanism.planned_costs()} == {"prompt", "weight", "counts"}
    with pytest.raises(PrivacyError, match="no share of the budget"):
        mechanism.noisy_sum("signature", [rows], silent)


def test_the_shares_of_statistics_are_within_one_budget():
    mechanism = record(noise_multiplier=None, epsilon=2.0, delta=1e-5, statistics={"weight": 0.2, "counts": 0.3})
    assert 1.9 < accountant.epsilon(mechanism.planned_costs(), 1e-5) <= 2.0


arrays = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(arrays, arrays, arrays, arrays)
@pytest.mark.parametrize("placement", ["local", "central"])
def test_two_clients_updates_are_at_most_two_clips_apart(placement, a, b, c, d):
    mechanism, sent = client(placement=placement), []
    for left, right in ((a, b), (c, d)):
        update = ClientUpdate("one", {"x": torch.tensor(left), "y": torch.tensor(right)}, 17.0)
        released = mechanism.privatize_update(update, Silent())
        assert released.weight == 1.0
        flat = torch.cat([array.double() for array in released.arrays.values()])
        assert float(flat.norm()) <= CLIP * (1 + 1e-6)
        sent.append(float(flat.norm()))
    assert sum(sent) <= 2 * CLIP * (1 + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_counts_zero(bad):
    update = ClientUpdate("one", {"x": torch.tensor([1.0, bad]), "y": torch.ones(3)})
    released = client().privatize_update(update, Silent())
    assert all(torch.equal(array, torch.zeros_like(array)) for array in released.arrays.values())


def test_local_noise_is_for_two_clips_and_central_has_none_at_the_client():
    update = ClientUpdate("one", {"x": torch.ones(3)})
    silent = Silent()
    client().privatize_update(update, silent)
    assert silent.deviations == [MULTIPLIER * 2 * CLIP]
    assert client().cost(ReleaseKind.UPDATE)[1:] == (1.0, MULTIPLIER, 1)
    silent = Silent()
    client(placement="central").privatize_update(update, silent)
    assert silent.deviations == []
    assert client(placement="central").cost(ReleaseKind.UPDATE) is None
    assert client(placement="central").cost(ReleaseKind.SUM)[1:] == (PLAN.cohort_rate, MULTIPLIER, 1)


def test_what_is_planned_is_every_participation_or_round():
    assert client().planned_costs()[0].count == PLAN.participations
    assert client(placement="central").planned_costs()[0].count == PLAN.num_rounds
    assert record().planned_costs()[0].count == PLAN.steps * PLAN.participations


def test_only_mechanisms_without_a_guarantee_are_free(mechanism):
    costs = [mechanism.cost(kind) for kind in ReleaseKind]
    assert any(costs) == (mechanism.unit != "none")
    block = mechanism.guarantee()
    assert block["unit"] == mechanism.unit
    if mechanism.unit != "none":
        assert {"neighbouring", "delta", "budget", "accountant", "clip_norm"} <= block.keys()


def test_the_noise_that_the_server_knows_of_is_what_an_update_carries(mechanism):
    """None where it goes by the number of records, and so must not be known."""
    size = 40_000
    released = mechanism.privatize_update(ClientUpdate("one", {"x": torch.zeros(size)}), SeededNoise("a test"))
    known = mechanism.expected_noise_norm_sq(size)
    if mechanism.unit == "record":
        assert known is None
    else:
        assert float(released.arrays["x"].double().square().sum()) == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize("module", [record_gaussian, client_gaussian, shared_gaussian])
@pytest.mark.parametrize(("name", "value"), [
    ("clip_norm", 0), ("clip_norm", math.inf), ("clip_norm", math.nan), ("clip_norm", -1), ("epsilon", 0),
    ("epsilon", math.inf), ("noise_multiplier", 0), ("noise_multiplier", math.nan), ("delta", 0), ("delta", 1),
])  # fmt: skip
def test_settings_that_cannot_be_a_guarantee_are_refused(module, name, value):
    with pytest.raises(ValidationError):
        module.Config(**{**GIVEN, name: value})


@pytest.mark.parametrize("module", [record_gaussian, client_gaussian, shared_gaussian])
def test_a_guarantee_has_to_be_stated(module):
    with pytest.raises(ValidationError, match="state epsilon"):
        module.Config(clip_norm=1.0)


@pytest.mark.parametrize("module", [record_gaussian, client_gaussian, shared_gaussian])
def test_a_large_delta_is_warned_of_with_the_reason(module):
    with pytest.warns(PrivacyWarning, match="publishes one of them whole"):
        module.build(module.Config(noise_multiplier=1.0, delta=0.1, clip_norm=1.0), PLAN)


@pytest.mark.parametrize("module", [record_gaussian, client_gaussian, shared_gaussian])
def test_epsilon_chooses_the_noise_for_the_whole_plan(module):
    built = module.build(module.Config(epsilon=2.0, clip_norm=1.0), PLAN)
    assert 1.95 < accountant.epsilon(built.planned_costs(), 1e-5) <= 2.0
    assert built.guarantee()["budget"] == 2.0


@pytest.mark.parametrize(
    "shares", [{"weight": 0.0}, {"weight": 1.0}, {"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.5}, {"a": -0.1, "b": 0.2}]
)
def test_shares_that_leave_nothing_are_refused(shares):
    with pytest.raises(PrivacyError, match=r"privacy\.statistics.*each share must lie above 0"):
        record(statistics=shares)


@pytest.mark.parametrize("module", [record_gaussian, client_gaussian, shared_gaussian])
def test_a_clip_norm_that_nobody_chose_is_an_error(module):
    with pytest.raises(PrivacyError, match=r"clip_norm is open; state it"):
        module.build(module.Config(epsilon=2.0), PLAN)
