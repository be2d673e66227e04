"""Clipping: one row more or less moves the sum by at most the norm, whatever the row holds."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import small
from ficpd.privacy.clipping import MARGIN, clip_query, clipped_subject_sum, clipped_sum, sum_by_subject
from ficpd.types import LORA, TOKEN_DTYPE, Query

EXTREME = [0.0, -0.0, 1e-45, 1e-30, 1e30, -1e30, math.nan, math.inf, -math.inf]
NUMBERS = st.one_of(st.sampled_from(EXTREME), st.floats(-10, 10, width=32), st.floats(-(2.0**100), 2.0**100, width=32))
NORMS = st.sampled_from([1e-3, 0.01, 1.0, 7.5, 1e4])


def length(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.double()))


def moved(rows_BN: Tensor, others_BN: Tensor, norm: float) -> float:
    """How far apart the two sums are."""
    return length(clipped_sum(rows_BN, norm).double() - clipped_sum(others_BN, norm).double())


@st.composite
def tables(draw, dtype: torch.dtype, most: int) -> tuple[Tensor, int]:
    """Rows, and the place of one of them."""
    wide, count = draw(st.integers(1, 4)), draw(st.integers(1, most))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=wide, max_size=wide), min_size=count, max_size=count))
    return torch.tensor(rows, dtype=torch.float64).to(dtype), draw(st.integers(0, count - 1))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 12), (torch.float32, 3)])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), norm=NORMS)
def test_one_row_more_or_less_moves_the_sum_by_at_most_the_norm(dtype, most, data, norm):
    rows_BN, place = data.draw(tables(dtype, most))
    without = torch.cat([rows_BN[:place], rows_BN[place + 1 :]])
    zeroed = rows_BN.clone()
    zeroed[place] = 0.0
    assert torch.isfinite(clipped_sum(rows_BN, norm)).all()
    assert moved(rows_BN, without, norm) <= norm
    assert moved(rows_BN, zeroed, norm) <= norm


@pytest.mark.parametrize("norm", [1e-5, 1e-3, 0.01, 1.0])
@pytest.mark.parametrize("value", [1e20, 1e37, 3e38])
def test_a_huge_row_in_float32_counts_no_more_than_the_norm(value, norm):
    """The factor that scales such a row down may be a number that float32 has few digits for."""
    for wide in (1, 3, 300):
        assert length(clipped_sum(torch.full((1, wide), value), norm)) <= norm


@pytest.mark.parametrize("count", [10, 1000, 10_000])
def test_rounding_of_a_long_sum_in_float32_stays_within_the_norm(count):
    """Rows that add up to a sum so long that its last digit is large beside what rounding leaves of the norm."""
    row = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    rows_BN = row.repeat(count, 1)
    assert max(moved(rows_BN[: count - i], rows_BN[: count - i - 1], 1.0) for i in range(8)) <= 1.0


@pytest.mark.parametrize("seed", range(5))
def test_what_a_model_rounds_otherwise_without_a_record_stays_within_the_norm(seed):
    """All other rows a little off, the same way as the one that is gone."""
    gone = torch.randn(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    others = torch.randn(64, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 9))
    direction = gone / gone.norm()
    small = 0.01 * others / others.norm(dim=1, keepdim=True)
    off = small + direction * (0.99e-4 / len(small))
    assert moved(torch.cat([off, 100 * gone]), small, 1.0) <= 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.sampled_from([2.0, 1e3, 1e30]))
def test_rows_shorter_than_the_norm_stay_as_they_are(numbers, norm):
    row = torch.tensor([numbers], dtype=torch.float64)
    assert torch.equal(clipped_sum(row, norm).double(), row[0])
    assert torch.allclose(clipped_sum(row.repeat(5, 1), norm).double(), 5 * row[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", [1e-12, 1e-3, 1.0, 1e12])
def test_a_longer_row_keeps_its_direction_and_gets_the_norm(norm):
    row = torch.tensor([[3.0, -4.0, 12.0]], dtype=torch.float64)
    clipped = clipped_sum(row * norm, norm).double()
    assert torch.allclose(clipped / norm, MARGIN * row[0] / 13, rtol=2e-6, atol=0)


def test_rows_are_clipped_one_by_one_not_together():
    rows_BN = torch.tensor([[30.0, 0.0], [0.0, 0.5], [0.0, -0.25]])
    assert torch.allclose(clipped_sum(rows_BN, 1.0).double(), torch.tensor([MARGIN, 0.25]).double(), atol=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_value_that_is_not_finite_counts_zero_and_spoils_no_other(bad):
    rows_BN = torch.tensor([[0.1, 0.2], [0.3, bad], [bad, bad], [-0.3, 0.4]])
    assert torch.equal(clipped_sum(rows_BN, 1.0), clipped_sum(rows_BN[[0, 3]], 1.0))
    assert not clipped_sum(rows_BN[1:3], 1.0).any()


def test_no_rows_give_zeros():
    assert torch.equal(clipped_sum(torch.zeros(0, 4), 1.0).double(), torch.zeros(4).double())
    assert not clipped_sum(torch.zeros(3, 4), 1.0).any()
    assert clipped_sum(torch.zeros(3, 0), 1.0).shape == (0,)


def test_the_rows_themselves_are_not_changed():
    rows_BN = torch.tensor([[5.0, math.nan], [3.0, 4.0]])
    before = rows_BN.clone()
    clipped_sum(rows_BN, 0.1)
    assert torch.equal(rows_BN.nan_to_num(7.0), before.nan_to_num(7.0))


def test_rows_of_a_queried_prompt_are_bounded_and_token_ids_and_lora_weights_are_not(model):
    start = small.start(model, small.classes())
    far = start.vectors_PD[None] * 1e3
    batch = small.clients(model, small.method("fedavg"), 1)["site-0"].encoded()
    query = clip_query(Query(far, batch), start)
    assert float(query.prompts_KPD.norm(dim=-1).max()) == pytest.approx(start.max_norm, rel=1e-5)
    assert torch.equal(clip_query(Query(start.vectors_PD[None], batch), start).prompts_KPD[0], start.vectors_PD)
    assert torch.equal(clip_query(Query(far, batch), replace(start, enters_at=LORA)).prompts_KPD, far)
    ids = torch.full((1, 4, 1), 10_000, dtype=TOKEN_DTYPE)
    assert torch.equal(clip_query(Query(ids, batch), start).prompts_KPD, ids)


def test_a_row_changes_the_sum_of_its_own_subject_alone():
    rows_BN = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    subject_B = torch.arange(40) % 7 * 3
    sums = sum_by_subject(rows_BN, subject_B)
    assert sums.dtype == torch.float64
    assert torch.allclose(sums[2], rows_BN[subject_B == 6].double().sum(0))
    changed = rows_BN.clone()
    changed[subject_B == 6] = math.nan
    others = torch.tensor([place for place in range(7) if place != 2])
    assert torch.equal(sum_by_subject(changed, subject_B)[others], sums[others])
    kept = subject_B != 6
    assert torch.equal(sum_by_subject(rows_BN[kept], subject_B[kept]), sums[others])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), norm=NORMS, size=st.integers(1, 5))
def test_one_subject_more_or_less_moves_the_sum_by_at_most_the_norm_in_any_chunks(data, norm, size):
    rows_BN, place = data.draw(tables(torch.float32, 8))
    subject_B = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(rows_BN), max_size=len(rows_BN))))
    kept_B = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rows_BN), max_size=len(rows_BN))))
    rest = subject_B != subject_B[place]
    changed = torch.where(rest[:, None], rows_BN, torch.zeros(()))
    whole = clipped_subject_sum(rows_BN.split(size), subject_B, kept_B, norm)
    assert torch.isfinite(whole).all()
    assert length(whole - clipped_subject_sum([changed], subject_B, kept_B, norm)) <= norm
    if rest.any():
        less = clipped_subject_sum([rows_BN[rest]], subject_B[rest], kept_B[rest], norm)
        assert length(whole - less) <= norm


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_subject_in_several_chunks_is_clipped_once(size):
    rows_BN = torch.tensor([[3.0, 4.0]]).repeat(4, 1)
    summed = clipped_subject_sum(rows_BN.split(size), torch.zeros(4, dtype=torch.long), torch.ones(4).bool(), 1.0)
    assert torch.allclose(summed, MARGIN * torch.tensor([0.6, 0.8], dtype=torch.double))


def test_a_row_that_is_not_kept_counts_nothing_not_even_if_it_is_not_finite():
    rows_BN = torch.tensor([[0.1, 0.2], [math.nan, 1.0], [0.3, 0.0]])
    kept_B = torch.tensor([True, False, True])
    summed = clipped_subject_sum([rows_BN[:2], rows_BN[2:]], torch.tensor([5, 5, 5]), kept_B, 1.0)
    assert torch.allclose(summed, torch.tensor([0.4, 0.2], dtype=torch.double), rtol=1e-6)
