"""The codec: what it writes it reads again exactly, and anything else is a `CodecError`."""

import ast
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ficpd import codec
from ficpd.errors import CodecError
from ficpd.types import Assignment, ClientUpdate, State

BACKBONE = "tiny:16x2"
LAYOUT = {"delta": (3, 4), "gain": (2,)}
EXPECTED = codec.Expected("site-1", 4, BACKBONE, LAYOUT)
HEADER = {"c": "site-1", "r": 4, "b": BACKBONE, "w": 7.0}


def arrays(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in LAYOUT.items()}


def update(weight: Any = 7.0, client: str = "site-1", **changed: torch.Tensor) -> ClientUpdate:
    return ClientUpdate(client, {**arrays(), **changed}, weight)


def body(**changed: torch.Tensor) -> bytes:
    return codec.encode_update(update(**changed), 4, BACKBONE)


def crafted(header: str, entries: dict | None = None, data: bytes | None = None) -> bytes:
    """A message as an attacker writes it: any header text, any table of arrays."""
    if entries is None:
        entries = {
            "delta": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
            "gain": {"dtype": "F32", "shape": [2], "data_offsets": [48, 56]},
        }
    table = json.dumps({"__metadata__": {"ficpd": header}, **entries}).encode()
    return struct.pack("<Q", len(table)) + table + (bytes(56) if data is None else data)


def refused(message: bytes, expected: codec.Expected = EXPECTED) -> str:
    with pytest.raises(CodecError) as caught:
        codec.decode_update(message, expected)
    return str(caught.value)


# ---------------------------------------------------------------- round trips


def test_an_update_comes_back_exactly():
    tiny = torch.tensor([5e-45, -0.0])
    given_ = update(weight=0.1, gain=tiny)
    back = codec.decode_update(codec.encode_update(given_, 4, BACKBONE), EXPECTED)
    assert (back.client, back.weight) == ("site-1", 0.1)
    assert back.arrays.keys() == LAYOUT.keys()
    assert all(torch.equal(array, given_.arrays[name]) for name, array in back.arrays.items())
    assert back.arrays["gain"].view(torch.int32).tolist() == tiny.view(torch.int32).tolist()


def test_an_update_without_arrays_comes_back():
    sent = codec.encode_update(ClientUpdate("a", {}, 2.0), 1, BACKBONE)
    assert codec.decode_update(sent, codec.Expected("a", 1, BACKBONE, {})) == ClientUpdate("a", {}, 2.0)
    assert len(sent) < 200


def test_an_assignment_comes_back_exactly():
    order = Assignment("fedavg", 3, arrays(), {"rate": 0.1, "steps": 4, "words": ["ä", None, True]})
    back = codec.decode_assignment(codec.encode_assignment(order, BACKBONE), BACKBONE)
    assert (back.method, back.round, back.facts) == (order.method, order.round, order.facts)
    assert all(torch.equal(back.arrays[name], array) for name, array in order.arrays.items())


def test_a_state_comes_back_exactly_with_arrays_of_any_type():
    state = State({**arrays(), "adam_step": torch.tensor(7), "none": torch.zeros(0, 4)}, {"nearest": {"a": 1}})
    back, extra = codec.decode_state(codec.encode_state(state, {"rounds": [{"round": 1, "dropped": {}}]}))
    assert (back.facts, extra) == (state.facts, {"rounds": [{"round": 1, "dropped": {}}]})
    assert back.arrays.keys() == state.arrays.keys()
    for name, array in back.arrays.items():
        assert (array.dtype, array.shape) == (state.arrays[name].dtype, state.arrays[name].shape)
        assert torch.equal(array, state.arrays[name])


@pytest.mark.parametrize("view", [lambda a: a.T.contiguous().T, lambda a: a.clone().requires_grad_()])
def test_views_and_gradients_do_not_change_the_bytes(view):
    assert body(delta=view(arrays()["delta"])) == body()


def test_views_of_one_tensor_are_sent_each_on_its_own():
    whole = torch.arange(12.0).view(3, 4)
    back, _ = codec.decode_state(codec.encode_state(State({"start": whole, "all": whole, "one": whole[None]}), {}))
    assert torch.equal(back.arrays["start"], whole)
    assert torch.equal(back.arrays["all"], whole)
    assert torch.equal(back.arrays["one"], whole[None])


def test_the_same_value_is_the_same_bytes():
    turned = ClientUpdate("site-1", dict(reversed(list(arrays().items()))), 7.0)
    assert codec.encode_update(turned, 4, BACKBONE) == body()


def test_nothing_that_is_not_finite_is_written_into_a_header():
    with pytest.raises(ValueError, match="JSON compliant"):
        codec.encode_update(update(weight=float("nan")), 4, BACKBONE)


# ---------------------------------------------------------------- what is refused


def test_a_message_cut_anywhere_is_refused():
    whole = body()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        refused(whole[:length])
    order = codec.encode_assignment(Assignment("fedavg", 1, arrays(), {}), BACKBONE)
    for length in range(0, len(order), 37):
        with pytest.raises(CodecError):
            codec.decode_assignment(order[:length], BACKBONE)
    state = codec.encode_state(State(arrays()), {})
    for length in range(0, len(state), 37):
        with pytest.raises(CodecError):
            codec.decode_state(state[:length])


def test_a_message_with_something_behind_it_is_refused():
    refused(body() + b"\0")
    refused(body() + body())


def test_a_flipped_bit_of_the_header_is_refused_or_changes_nothing():
    whole, good = body(), codec.decode_update(body(), EXPECTED)
    end = 8 + int.from_bytes(whole[:8], "little")
    for place in range(end):
        for bit in (0, 3, 6):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            try:
                read = codec.decode_update(bytes(broken), EXPECTED)
            except CodecError:
                continue
            assert read.arrays.keys() == good.arrays.keys()
            assert read.client == good.client
            assert 0 < read.weight < 1e12


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (3, 3), (0, 4)])
def test_another_shape_is_refused(shape):
    assert "expected torch.float32 (3, 4)" in refused(body(delta=torch.ones(shape)))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.complex64]
)
def test_another_type_is_refused(dtype):
    assert str(dtype) in refused(body(delta=torch.ones(3, 4, dtype=dtype)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", LAYOUT)
def test_a_number_that_is_not_finite_is_refused(value, name):
    array = arrays()[name]
    array.view(-1)[-1] = value
    assert f"array {name!r} has 1 values that are not finite" in refused(body(**{name: array}))
    order = Assignment("fedavg", 4, {name: array})
    with pytest.raises(CodecError, match="not finite"):
        codec.decode_assignment(codec.encode_assignment(order, BACKBONE), BACKBONE)


def test_a_norm_too_large_is_refused_and_counts_all_arrays():
    bound = codec.Expected("site-1", 4, BACKBONE, LAYOUT, max_norm=5.0)
    delta, gain = torch.zeros(3, 4), torch.zeros(2)
    delta[0, 0], gain[1] = 3.0, 3.9
    assert codec.decode_update(body(delta=delta, gain=gain), bound).client == "site-1"
    gain[1] = 4.1
    assert "norm is 5.08, at most 5" in refused(body(delta=delta, gain=gain), bound)
    refused(body(delta=torch.full((3, 4), 3e38)), codec.Expected("site-1", 4, BACKBONE, LAYOUT))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("client", codec.Expected("site-2", 4, BACKBONE, LAYOUT)),
        ("round", codec.Expected("site-1", 5, BACKBONE, LAYOUT)),
        ("backbone", codec.Expected("site-1", 4, "tiny:32x2", LAYOUT)),
    ],
)
def test_another_client_round_or_backbone_is_refused(what, expected):
    assert codec.decode_update(body(), EXPECTED).client == "site-1"
    assert f"the update's {what} is " in refused(body(), expected)


@pytest.mark.parametrize("given_", [{}, {"delta": (3, 4)}, {**LAYOUT, "more": (1,)}, {"delta": (3, 4), "Gain": (2,)}])
def test_missing_and_extra_arrays_are_refused(given_):
    message = codec.encode_update(ClientUpdate("site-1", {n: torch.ones(s) for n, s in given_.items()}), 4, BACKBONE)
    assert "expected ['delta', 'gain']" in refused(message)


@pytest.mark.parametrize(
    "weight", ["-1", "0", "-0.0", "NaN", "Infinity", "1e13", "true", "null", '"1"', "[1]", "9" * 999]
)
def test_a_weight_that_is_no_share_is_refused(weight):
    assert codec.decode_update(crafted(json.dumps(HEADER)), EXPECTED).weight == 7.0
    header = json.dumps({**HEADER, "w": 0}).replace('"w": 0', f'"w": {weight}')
    assert "weight" in refused(crafted(header))


def test_a_body_too_large_is_refused_before_it_is_read(monkeypatch):
    message = body(delta=torch.ones(100, 100))
    monkeypatch.setattr(codec, "load", lambda given_: pytest.fail("it was read"))
    assert f"the update has {len(message)} bytes, at most" in refused(message)


@pytest.mark.parametrize("missing", HEADER)
def test_a_header_that_lacks_a_key_is_refused(missing):
    assert missing in refused(crafted(json.dumps({k: v for k, v in HEADER.items() if k != missing})))


@pytest.mark.parametrize("header", ['"crbw"', '["c", "r", "b", "w"]', "null", "3", "{}", "", "{", "NaN"])
def test_a_header_that_is_no_object_is_refused(header):
    refused(crafted(header))


def test_a_header_nested_too_deeply_is_refused():
    refused(crafted("[" * 3000))


def test_a_message_of_another_kind_is_refused():
    order = codec.encode_assignment(Assignment("fedavg", 4, arrays(), {}), BACKBONE)
    assert "of another kind" in refused(order)
    with pytest.raises(CodecError, match="of another kind"):
        codec.decode_assignment(body(), BACKBONE)
    with pytest.raises(CodecError, match="of another kind"):
        codec.decode_state(body())


def test_an_order_for_another_backbone_is_refused():
    order = codec.encode_assignment(Assignment("fedavg", 4, arrays(), {}), BACKBONE)
    with pytest.raises(CodecError, match=r"for backbone tiny:16x2, this client has tiny:32x2"):
        codec.decode_assignment(order, "tiny:32x2")


# ---------------------------------------------------------------- bytes that nobody wrote


def only_codec_errors(message: bytes) -> None:
    for read in (
        lambda: codec.decode_update(message, EXPECTED),
        lambda: codec.decode_assignment(message, BACKBONE),
        lambda: codec.decode_state(message),
    ):
        try:
            read()
        except CodecError:
            continue


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_only_ever_raise_codec_errors(message):
    only_codec_errors(message)
    only_codec_errors(struct.pack("<Q", len(message)) + message)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_message_only_ever_raises_codec_errors(data):
    message = bytearray(body())
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    only_codec_errors(bytes(message))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("crbwmfx"), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES, VALUES)
def test_any_json_in_the_header_only_ever_raises_codec_errors(whole, client, weight):
    only_codec_errors(crafted(json.dumps(whole)))
    only_codec_errors(crafted(json.dumps({**HEADER, "c": client, "w": weight})))


def test_reading_runs_no_code():
    tree = ast.parse(Path(codec.__file__).read_text())
    modules = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not modules & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    called = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) if getattr(n.value, "id", "") == "torch"}
    assert not called & {"load", "save"}
