"""Every compression: what it says travels does, what comes back is what its projection keeps, and nothing grows."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from ficpd.errors import ConfigError
from ficpd.federation import codec
from ficpd.federation.compression.projected import TokenProjection, orthonormal_rows
from ficpd.federation.compression.quantization import Bits, QuantizedCompression, dequantise, quantise
from ficpd.federation.compression.subspace import GradientSubspace, SparseRandomSubspace
from ficpd.interfaces import Compression
from ficpd.registry import load, names
from ficpd.types import ArraySpec, ClientUpdate, Prompt

P, D, HEADS = 8, 6, 2
CONFIGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "none": {},
    "projected": {"num_tokens": 3},
    "subspace": {"dimension": 13, "directions": "random"},
    "subspace, gradient": {"dimension": 13, "directions": "gradient"},
}
LAYOUT = {"delta": (P, D), "counts": (4,), "prototypes": (2, P, D)}
BITS = get_args(Bits)
VALUES = st.floats(-1e4, 1e4, width=32)


def build(name: str, bits: int = 32, seed: int = 0, heads: int = HEADS, **changed: Any) -> Compression:
    module = load("compression", name.partition(",")[0])
    start = Prompt(torch.zeros(P, D), "tiny", 0, heads)
    config = module.Config(bits=bits, **{**CONFIGS[name], **changed})
    return module.build(config, start, seed, lambda number: drawn(number, P, D, seed=seed))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: drawn(*shape, seed=seed) for name, shape in LAYOUT.items()}


def there_and_back(compression: Compression, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return compression.unpack(compression.pack(compression.project(arrays)))


def dense(compression: Any) -> torch.Tensor:
    """The projection as a matrix, [numbers that travel, P x D]."""
    units = torch.eye(P * D).unflatten(-1, (P, D))
    return compression.projection.project(units).flatten(1).T


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


def test_every_compression_is_tested_here():
    cases = {case.partition(",")[0] for case in CONFIGS}
    assert set(names("compression")) == cases, "add the new one to CONFIGS, so that this contract covers it"


@pytest.mark.parametrize("bits", BITS)
def test_what_travels_is_what_wire_says(name, bits):
    compression = build(name, bits)
    packed = compression.pack(compression.project(update()))
    assert {n: ArraySpec(tuple(a.shape), a.dtype) for n, a in packed.items()} == compression.encoded_spec(LAYOUT)
    assert {"delta", "counts", "prototypes"} <= packed.keys() <= {*LAYOUT, "delta.scale"}
    assert packed["delta"].dtype == {8: torch.int8, 16: torch.int16, 32: torch.float32}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_what_travels_passes_the_codec(name, bits):
    compression = build(name, bits)
    sent = ClientUpdate("site-1", compression.pack(compression.project(update())), 2.0)
    expected = codec.ExpectedUpdate("site-1", 3, "tiny", compression.encoded_spec(LAYOUT), max_norm=1e3)
    read = codec.decode_update(codec.encode_update(sent, 3, "tiny"), expected)
    back, direct = compression.unpack(read.arrays), compression.unpack(sent.arrays)
    assert back.keys() == direct.keys()
    assert all(torch.equal(array, direct[n]) for n, array in back.items())


@pytest.mark.parametrize("bits", BITS)
def test_what_comes_back_has_the_methods_layout(name, bits):
    back = there_and_back(build(name, bits), update())
    kinds = {n: (tuple(a.shape), a.dtype) for n, a in back.items()}
    assert kinds == {n: (shape, torch.float32) for n, shape in LAYOUT.items()}


@pytest.mark.parametrize("bits", BITS)
def test_what_is_no_prompt_travels_untouched(name, bits):
    sent = update()
    back = there_and_back(build(name, bits), sent)
    assert torch.equal(back["counts"], sent["counts"])
    assert torch.equal(back["prototypes"], sent["prototypes"])
    assert there_and_back(build(name, bits), {}) == {}
    assert build(name, bits).encoded_spec({}) == {}


def test_what_comes_back_is_the_orthogonal_projection(name):
    """Linear, so that the server's sum of what came is what the clients' sum would have given."""
    compression = build(name)
    W, delta = dense(compression), update()["delta"]
    assert torch.allclose(W @ W.T, torch.eye(len(W)), atol=1e-6)
    back = there_and_back(compression, {"delta": delta})["delta"]
    assert torch.allclose(back.flatten(), W.T @ W @ delta.flatten(), atol=1e-5)
    assert torch.allclose(there_and_back(compression, {"delta": back})["delta"], back, atol=1e-5)
    many = drawn(5, P, D)
    summed = torch.stack([there_and_back(compression, {"delta": one})["delta"] for one in many]).sum(0)
    assert torch.allclose(there_and_back(compression, {"delta": many.sum(0)})["delta"], summed, atol=1e-5)


@given(delta=numpy_arrays("float32", (P, D), elements=VALUES), seed=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("named", CONFIGS)
def test_nothing_is_lengthened(named, delta, seed):
    arrays = {"delta": torch.from_numpy(delta), "counts": torch.ones(4)}
    projected = build(named, seed=seed).project(arrays)
    assert float(projected["delta"].norm()) <= float(arrays["delta"].norm()) * (1 + 1e-6) + 1e-30
    assert torch.equal(projected["counts"], arrays["counts"])


def test_gradients_of_many_records_are_projected_each_on_its_own(name):
    projection: Any = build(name).projection  # pyright: ignore[reportAttributeAccessIssue]
    many = drawn(2, 3, P, D)
    down = projection.project(many)
    assert down.shape == (2, 3, *projection.shape)
    assert projection.lift(down).shape == many.shape
    for k in range(2):
        for b in range(3):
            assert torch.allclose(down[k, b], projection.project(many[k, b]), atol=1e-6)
            assert torch.allclose(projection.lift(down)[k, b], projection.lift(down[k, b]), atol=1e-6)


def test_going_up_and_down_again_changes_nothing(name):
    projection: Any = build(name).projection  # pyright: ignore[reportAttributeAccessIssue]
    z = drawn(*projection.shape)
    assert torch.allclose(projection.project(projection.lift(z)), z, atol=1e-6)


@pytest.mark.parametrize("named", [name for name in CONFIGS if name not in ("none", "auto")])
def test_the_seed_is_the_basis(named):
    first, again, other = (dense(build(named, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_what_was_given_is_left_alone(name):
    sent = update()
    there_and_back(build(name, 8), sent)
    assert all(torch.equal(array, update()[n]) for n, array in sent.items())


def test_doubles_become_floats(name):
    projected = build(name).project({n: array.double() for n, array in update().items()})
    assert {array.dtype for array in projected.values()} == {torch.float32}


@pytest.mark.parametrize("changed", [{"bits": 4}, {"bits": 64}, {"rank": 3}])
def test_a_config_that_is_none_is_refused(name, changed):
    with pytest.raises(ValueError, match=r"bits|rank"):
        load("compression", name.partition(",")[0]).Config(**changed)


def test_a_config_is_frozen(name):
    with pytest.raises(ValueError, match="frozen"):
        load("compression", name.partition(",")[0]).Config().bits = 8


@pytest.mark.parametrize(("named", "shape"), [("projected", (5, D)), ("subspace", (13,))])
def test_an_array_that_looks_like_a_projected_one_is_refused(named, shape):
    compression = build(named)
    words = "'counts' is .*expected another shape"
    with pytest.raises(ConfigError, match=words):
        compression.encoded_spec({"delta": (P, D), "counts": shape})
    with pytest.raises(ConfigError, match=words):
        compression.project({"delta": torch.zeros(P, D), "counts": torch.zeros(shape)})


def test_an_array_named_like_a_scale_is_refused_where_there_are_scales(name):
    layout = {"delta": (P, D), "delta.scale": (1,)}
    assert build(name, 32).encoded_spec(layout).keys() == layout.keys()
    with pytest.raises(ConfigError, match=r"'delta\.scale' has the name"):
        build(name, 8).encoded_spec(layout)
    assert build(name, 8).encoded_spec({"counts": (4,), "counts.scale": (1,)}).keys() == {"counts", "counts.scale"}


@pytest.mark.parametrize("bits", [8, 16])
def test_what_comes_back_is_off_by_at_most_half_a_step(name, bits):
    compression = build(name, bits)
    projected = compression.project(update())
    packed = compression.pack(projected)
    step = float(packed["delta.scale"])
    assert step == pytest.approx(float(projected["delta"].abs().max()) / (2 ** (bits - 1) - 1))
    error = dequantise(packed["delta"], packed["delta.scale"]) - projected["delta"]
    assert float(error.abs().max()) <= step / 2 * (1 + 1e-3)
    exact = build(name, 32)
    there = compression.unpack(packed)["delta"] - exact.unpack(exact.pack(exact.project(update())))["delta"]
    assert float(there.norm()) <= step / 2 * math.sqrt(projected["delta"].numel()) * (1 + 1e-3)


@given(
    values=numpy_arrays(
        "float32", st.integers(1, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    bits=st.sampled_from([8, 16]),
)
@settings(max_examples=300, deadline=None)
def test_quantising_is_off_by_at_most_half_a_step_whatever_the_numbers(values, bits):
    given_ = torch.from_numpy(values)
    whole, scale = quantise(given_, bits)
    error = (whole.double() * scale.double() - given_.double()).abs()
    assert bool((error <= scale.double() / 2 + given_.double().abs() * 2**-23).all())
    assert whole.abs().max() <= 2 ** (bits - 1) - 1
    assert (scale.shape, scale.dtype, whole.shape) == ((1,), torch.float32, given_.shape)
    assert bool((dequantise(whole, scale)[given_ == 0] == 0).all())


@pytest.mark.parametrize("bits", BITS)
def test_an_update_of_zeros_comes_back_as_zeros(name, bits):
    back = there_and_back(build(name, bits), {"delta": torch.zeros(P, D)})["delta"]
    assert torch.equal(back, torch.zeros(P, D))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, 1e-37, 3.4e38])
def test_the_smallest_and_largest_numbers_have_a_step(bits, largest):
    values = torch.tensor([largest, -largest / 3])
    whole, scale = quantise(values, bits)
    assert float(scale) >= torch.finfo(torch.float32).tiny
    error = (dequantise(whole, scale).double() - values.double()).abs()
    assert float(error.max()) <= float(scale) / 2 + largest * 2**-23


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_still_seen_by_the_codec(name, value):
    compression = build(name, 8)
    packed = compression.pack(compression.project({"delta": torch.full((P, D), value)}))
    assert not torch.isfinite(packed["delta.scale"]).any()


def test_at_32_bits_without_a_projection_nothing_changes():
    sent = update()
    assert all(torch.equal(array, sent[n]) for n, array in there_and_back(build("none"), sent).items())


def test_head_rows_travel_as_they_are():
    compression, delta = build("projected"), update()["delta"]
    projected = compression.project({"delta": delta})["delta"]
    assert projected.shape == (3 + HEADS, D)
    assert torch.equal(projected[-HEADS:], delta[-HEADS:])
    assert torch.equal(compression.unpack({"delta": projected})["delta"][-HEADS:], delta[-HEADS:])
    assert build("projected", heads=0).encoded_spec({"delta": (P, D)}) == {"delta": ArraySpec((3, D))}


def test_virtual_tokens_are_mixed_by_a_matrix_with_orthonormal_rows():
    W, delta = orthonormal_rows(3, P - HEADS, 0), update()["delta"]
    assert W.dtype == torch.float32
    assert torch.allclose(W @ W.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(build("projected").project({"delta": delta})["delta"][:3], W @ delta[:-HEADS], atol=1e-6)


def test_the_directions_are_uniform_over_the_sphere():
    firsts = torch.stack([orthonormal_rows(2, 4, seed)[0] for seed in range(400)])
    assert firsts.mean(0).abs().max() < 0.1
    assert (firsts.square().mean(0) - 0.25).abs().max() < 0.05


@pytest.mark.parametrize("given_", [6, 7, 0, -1])
def test_projected_needs_fewer_tokens_than_the_prompt_has(given_):
    words = rf"num_tokens = {given_}, expected 1 to 5: the prompt has 6 virtual tokens .* choose"
    with pytest.raises(ConfigError, match=words):
        build("projected", num_tokens=given_)
    assert build("projected", num_tokens=5).encoded_spec({"delta": (P, D)})["delta"].shape == (5 + HEADS, D)


def test_only_a_subspace_has_coordinates():
    assert build("none").subspace is None
    assert build("projected").subspace is None
    coordinates = build("subspace").subspace
    assert coordinates is not None
    assert coordinates.size == 13
    delta = update()["delta"]
    assert torch.equal(build("subspace").project({"delta": delta})["delta"], coordinates.project(delta))


def test_what_lies_in_the_subspace_is_not_changed():
    compression = build("subspace")
    assert compression.subspace is not None
    delta = compression.subspace.lift(drawn(13))
    back = there_and_back(compression, {"delta": delta})["delta"]
    assert float((back - delta).norm()) <= 1e-6 * float(delta.norm())


@pytest.mark.parametrize(("numbers", "size"), [(48, 1), (48, 13), (48, 47), (48, 48), (7680, 256)])
def test_buckets_are_nearly_equal_and_signs_balanced(numbers, size):
    buckets = SparseRandomSubspace(size, (numbers // 6, 6), 0)
    counts = buckets.bucket.bincount(minlength=size)
    assert len(counts) == size
    assert counts.max() - counts.min() <= 1
    assert counts.min() >= 1
    assert abs(float(buckets.entry.sign().mean())) < 4 / math.sqrt(numbers)
    assert torch.allclose(buckets.entry.abs(), 1 / counts.double().sqrt()[buckets.bucket])


def test_one_bucket_of_a_long_prompt_does_not_drift():
    buckets, z = SparseRandomSubspace(1, (200, 1024), 0), torch.tensor([0.1234567])
    assert torch.allclose(buckets.project(buckets.lift(z)), z, rtol=1e-6, atol=0)


def test_the_basis_of_a_seed_is_fixed():
    """Numbers sent in another basis mean nothing: a server and a client of two versions must agree on it."""
    buckets = SparseRandomSubspace(3, (2, 4), 0)
    signed = (buckets.entry.sign() * (buckets.bucket + 1)).int().tolist()
    assert signed == [2, -2, -2, 1, -1, -1, -3, 3]


@pytest.mark.parametrize("given_", [0, -1, P * D + 1])
def test_a_subspace_is_no_larger_than_the_prompt(given_):
    with pytest.raises(ConfigError, match=rf"dimension = {given_}, expected 1 to 48: the prompt is 8 x 6 .* choose"):
        build("subspace", dimension=given_)
    assert build("subspace", dimension=P * D).encoded_spec({"delta": (P, D)})["delta"].shape == (48,)


def test_projections_are_small_in_memory():
    buckets, rows = SparseRandomSubspace(256, (20, 384), 0), TokenProjection(20, 5, (20, 384), 0)
    held = sum(tensor.numel() for tensor in vars(buckets).values() if isinstance(tensor, torch.Tensor))
    assert held == 2 * 20 * 384 + 256  # bucket and entry of each number, and the weights
    assert rows.matrix.shape == (5, 20)
    assert isinstance(build("none"), QuantizedCompression)


def test_the_leading_directions_of_the_gradients_are_the_subspace():
    low_rank = drawn(40, 5, seed=1) @ drawn(5, P * D, seed=2)
    found = GradientSubspace.of(low_rank.unflatten(1, (P, D)), 5)
    inside = (drawn(1, 5, seed=3) @ drawn(5, P * D, seed=2)).unflatten(1, (P, D))
    assert torch.allclose(found.lift(found.project(inside)), inside, atol=1e-4)


def test_fewer_gradients_than_dimensions_are_filled_up_to_orthonormal_rows():
    found = GradientSubspace.of(drawn(4, P, D), 13)
    assert torch.allclose(found.rows @ found.rows.T, torch.eye(13), atol=1e-6)
    assert GradientSubspace.of(drawn(4, P, D), P * D).rows.shape == (P * D, P * D)


def test_gradients_that_cannot_be_had_are_an_error():
    module, start = load("compression", "subspace"), Prompt(torch.zeros(P, D), "tiny", 0, 0)
    with pytest.raises(ConfigError, match="needs a backbone with gradients"):
        module.build(module.Config(dimension=4), start, 0)
