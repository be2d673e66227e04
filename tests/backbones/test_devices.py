"""What a GPU needs of the code, seen without one: few copies and no waiting, masks that fused kernels take, meta tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import families
from ficpd.backbones import decoding
from ficpd.backbones.devices import copy_to, find_device
from ficpd.errors import BackboneError, ConfigError
from ficpd.types import EncodedInput


class Calls(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def waits(self) -> int:
        """How often a number was read: a GPU finishes all its work first."""
        return self.names.count("aten::_local_scalar_dense")


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match=r"engine.device = 'gpu' is no device; write cpu, cuda, mps"):
        find_device("gpu")
    for name in ("cuda", "mps"):
        if not getattr(torch, name).is_available():
            with pytest.raises(BackboneError, match=f"'{name}' is not available here"):
                find_device(name)
    with pytest.raises(BackboneError, match="'meta' is not available here"):
        find_device("meta")


def test_copies_keep_values_and_take_a_dtype():
    given = torch.arange(3)
    assert torch.equal(copy_to(given, torch.device("cpu"), torch.float32), given.float())
    assert copy_to(given, torch.device("meta")).device.type == "meta"


def items_of(*lengths: int) -> list[EncodedInput]:
    return [EncodedInput(5 + torch.arange(n) % 9, n) for n in lengths]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("name", "group", "lengths", "masked"), [
    ("Llama", families.DECODERS, (16, 16), False), ("Llama", families.DECODERS, (16, 9), False),
    ("Qwen3", families.DECODERS, (8, 5), False), ("Mistral (window 6)", families.DECODERS, (16, 16), True),
    ("BERT", families.SENTENCES, (16, 16), False), ("BERT", families.SENTENCES, (16, 9), True),
    ("BERT", families.MASKED, (8, 8), False),
])  # fmt: skip
def test_rows_that_need_no_mask_have_none(monkeypatch, name, group, lengths, masked, layer):
    """Flash kernels take none. A causal model needs none for padding on the right; a window does need one."""
    backbone = families.load(group[name])
    backbone.set_attention("sdpa")
    backbone.frozen.check(layer)
    seen, own = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*given, attn_mask=None, **more):
        seen.append(attn_mask is not None)
        return own(*given, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    items = items_of(*lengths)
    hidden = backbone.encode_prefix(items, layer)
    backbone.frozen.run(torch.zeros(2, 3, backbone.width), hidden, layer)
    assert seen
    assert set(seen) == {masked}


def test_a_mask_that_is_left_out_changes_no_bit():
    backbone = families.load(families.SENTENCES["BERT"])
    hidden, prompts_SPD = backbone.encode_prefix(items_of(16, 16), 1), torch.randn(2, 3, backbone.width)
    for attention in ("eager", "sdpa"):
        backbone.set_attention(attention)
        found, mask_ST = backbone.frozen.run(prompts_SPD, hidden, 1)
        states_STD = torch.cat([prompts_SPD, torch.stack(hidden)], dim=1)
        given = {"attention_mask": torch.ones(states_STD.shape[:2], dtype=torch.long)}
        assert mask_ST.all()
        assert torch.equal(found, backbone.frozen.upper(1, states_STD, given))


@pytest.mark.parametrize(("name", "group"), [("Llama", families.DECODERS), ("BERT", families.MASKED)])
def test_the_words_of_all_rows_are_gathered_in_one_call(name, group):
    backbone = families.load(group[name])
    items = items_of(3, 9, 5, 4)
    with Calls() as seen:
        rows = backbone.encode_prefix(items, 0)
    assert seen.names.count("aten::embedding") == 1
    assert all(torch.equal(row, backbone.encode_prefix([item], 0)[0]) for row, item in zip(rows, items, strict=True))


def step_of(rows: int, ends_after: int):
    """Logits whose likeliest token is 1, and 0 (the end) after so many steps."""
    taken = []

    def step(chosen):
        taken.append(chosen)
        logits = torch.zeros(rows, 4)
        logits[:, 0 if len(taken) > ends_after else 1] = 20.0
        return logits

    return step, taken


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_writing_waits_for_the_device_once_in_many_tokens(monkeypatch, temperature):
    streams = decoding.row_generators(["a", "b"], 0)
    pick, ends = decoding.sampler(streams, temperature), torch.tensor([0])
    step, taken = step_of(2, 20)
    found = decoding.decode(step, pick, 2, ends, 64)
    assert found == [[1] * 20] * 2
    assert len(taken) == 21, "a CPU ends with the texts"
    monkeypatch.setitem(decoding.TOKENS_BETWEEN_CHECKS, "cpu", decoding.TOKENS_BETWEEN_CHECKS["cuda"])
    step, taken = step_of(2, 20)
    with Calls() as seen:
        assert decoding.decode(step, pick, 2, ends, 64) == found, "what is written after the end does not count"
    assert len(taken) == 32
    assert seen.waits() == 2


def test_tokens_are_chosen_where_the_logits_are():
    """A meta tensor has no values: a copy of the logits to the CPU would be an error."""
    logits_SV = torch.empty(3, 7, device="meta")
    assert decoding.greedy(logits_SV).device.type == "meta"
    picked = decoding.sampler(decoding.row_generators(["a", "b", "c"], 0), 0.7)(logits_SV)
    assert (picked.device.type, picked.shape, picked.dtype) == ("meta", (3,), torch.int64)
