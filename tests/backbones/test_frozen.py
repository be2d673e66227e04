"""The generic path: families against plain transformers, and the guarantees of `frozen`, each of them broken once."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import families
from ficpd.backbones import causal_lm, guards
from ficpd.backbones.frozen import FrozenModel
from ficpd.backbones.pretrained import context
from ficpd.errors import BackboneError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA, BERT = families.DECODERS["Llama"], families.SENTENCES["BERT"]
QUICK = {
    "GPT-2": families.DECODERS, "Gemma 2 (caps)": families.DECODERS, "Granite": families.DECODERS,
    "BLOOM": families.DECODERS, "CamemBERT": families.SENTENCES, "DeBERTa-v3": families.MASKED,
    "ALBERT": families.MASKED, "T5": families.SEQ2SEQ, "DINOv3": families.VISION, "SigLIP": families.VISION,
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_a_family_gives_what_plain_transformers_and_peft_give(name):
    line = families.line(name, QUICK[name][name])
    assert line["layer 0"] == "yes"
    assert line["middle"] == ("no" if name in ("T5", "ALBERT") else "yes")
    assert float(line["difference"]) < 2e-5


@pytest.mark.slow
def test_the_table_of_families_is_as_measured():
    page = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
    for group in (families.DECODERS, families.MASKED, families.SENTENCES, families.SEQ2SEQ, families.VISION):
        for name, family in group.items():
            *claims, difference = families.line(name, family).values()
            assert "| " + " | ".join(claims) + " |" in page
            assert difference == "refused" or float(difference) < 2e-5


def test_embeddings_that_give_other_states_than_ids_are_refused():
    model = families.build(LLAMA)
    scaled: Any = lambda module, args, kwargs: (  # noqa: E731
        args, {**kwargs, "inputs_embeds": 2 * kwargs["inputs_embeds"]} if kwargs.get("inputs_embeds") is not None else kwargs
    )  # fmt: skip
    model.model.register_forward_pre_hook(scaled, with_kwargs=True)
    with pytest.raises(BackboneError, match="other states than its ids alone"):
        FrozenModel(model, "small", causal=True)


@pytest.mark.parametrize(
    ("share", "said"), [(0.1, "other states than its ids alone"), (1e-9, "gradient of .* another row's prompt")]
)
@pytest.mark.parametrize(("family", "causal"), [(LLAMA, True), (BERT, False)])
def test_rows_that_see_each_other_are_refused(share, said, family, causal):
    """Even where the influence is too small to be seen in the states."""
    model = families.build(family)
    block = families.blocks(model, family.kind)[1]
    block.register_forward_hook(lambda module, args, output: output + share * output.sum(0, keepdim=True))
    with pytest.raises(BackboneError, match=said):
        FrozenModel(model, "small", causal=causal)


def test_a_middle_that_reads_what_was_below_is_closed():
    model, kept = families.build(LLAMA), {}
    first, *_, last = model.model.layers
    first.register_forward_hook(lambda module, args, output: kept.update(states=output[:, :1]))
    last.register_forward_hook(lambda module, args, output: output + kept["states"])
    changed = FrozenModel(model, "small", causal=True)
    assert changed.depth == 1
    with pytest.raises(BackboneError, match=r"expected 0 to 0\. It gives other states when it is entered at layer"):
        changed.check(2)


def test_a_capped_head_is_scored_by_its_own_logits_and_a_scaled_one_by_rows():
    capped, scaled = families.load(families.DECODERS["Gemma 2 (caps)"]), families.load(families.DECODERS["Granite"])
    assert capped.readout("", ["good", "bad"]) is None
    item = scaled.tokenize("the film", None, "was", None, 0)
    none = torch.zeros(1, 0, scaled.width)
    features = scaled.forward(none, scaled.encode_prefix([item], 2), [item], 2).features_RD
    ids = scaled.tokenizer.convert_tokens_to_ids(["good", "bad"])
    own = families.build(families.DECODERS["Granite"])(input_ids=item.content[None]).logits[0, -1, ids]
    torch.testing.assert_close((features @ scaled.readout("", ["good", "bad"]).T)[0], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotary_scaling_by_the_longest_row_bounds_the_context(kind):
    """Beyond it, one long row would change its neighbours."""
    more = {"longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16},
            "dynamic": {"factor": 4.0}}[kind]  # fmt: skip
    length = 64 if kind == "longrope" else 16
    rope = {"rope_type": kind, "rope_theta": 10000.0, **more}
    backbone = families.load(LLAMA, rope_parameters=rope, max_position_embeddings=length)
    assert backbone.max_tokens == backbone.context == 16
    rows = [torch.randn(n, backbone.width, generator=torch.Generator().manual_seed(n)) for n in (5, 16, 40)]
    none = torch.zeros(2, 0, backbone.width)
    parts = ([rows[0]], rows[:2], [rows[0], rows[2]])
    alone, beside, long = (backbone.frozen.run(none[: len(part)], part, 0)[0][0, :5] for part in parts)
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)
    assert (alone - long).abs().max() > 0.01, "the bound would not be needed"


def test_positions_that_begin_behind_the_padding_index_bound_the_context():
    assert context(families.build(families.SENTENCES["CamemBERT"])) == 64 - 1  # padding index 0
    assert context(families.build(BERT)) == 64
    assert context(families.build(families.DECODERS["BLOOM"], max_position_embeddings=None)) > 10**9


def test_a_slow_check_is_done_once_for_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path))
    monkeypatch.setattr(guards, "SLOW", 0.0)
    first = FrozenModel(families.build(LLAMA), "small", causal=True, identity="one")
    assert len([*(tmp_path / "checked").iterdir()]) == 1
    monkeypatch.setattr(FrozenModel, "_check_all", lambda *_: pytest.fail("checked again"))
    again = FrozenModel(families.build(LLAMA), "small", causal=True, identity="one")
    assert (again.depth, again.closed) == (first.depth, first.closed) == (families.LAYERS, "")
    for identity, family in (("two", LLAMA), (None, LLAMA), ("one", families.DECODERS["Qwen3"])):
        with pytest.raises(pytest.fail.Exception, match="checked again"):
            FrozenModel(families.build(family), "small", causal=True, identity=identity)


def test_a_deep_copy_has_no_guards():
    backbone = families.load(LLAMA)
    other = copy.deepcopy(backbone.model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.zero_()
    ids, row = torch.arange(5, 12)[None], backbone.frozen.embed(torch.arange(5, 12))
    stopped = backbone.frozen.until(1, lambda: backbone.model(input_ids=ids))
    assert stopped.shape == (1, 7, families.WIDTH)
    before = backbone.model(input_ids=ids).logits
    assert not torch.equal(other(input_ids=ids).logits, before)
    assert torch.equal(backbone.model(input_ids=ids).logits, before)
    assert backbone.frozen.encode([row], 3)[0].shape == (7, families.WIDTH)


def test_threads_enter_different_layers_at_once():
    backbone = families.load(BERT)
    items, none = families.read(backbone), torch.zeros(3, 0, families.WIDTH)

    def features(layer: int) -> torch.Tensor:
        return backbone.forward(none, backbone.encode_prefix(items, layer), items, layer).features_RD

    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = features(0)
        for found in pool.map(features, [0, 1, 2, 3] * 10):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_whose_modules_accelerate_moves_is_entered_too():
    """A spread model's modules have a `forward` of their own, which moves their inputs."""
    family, model = families.DECODERS["Llama"], families.build(families.DECODERS["Llama"])
    for part in model.modules():
        add_hook_to_module(part, AlignDevicesHook("cpu", io_same_device=True))
    spread = causal_lm.CausalLM(causal_lm.Config(), model, families.tokenizer("causal_lm"), "ab" * 32, "spread")
    assert spread.depth == families.LAYERS
    plain = families.load(family)
    for layer in (0, 2):
        assert families.off(spread, families.build(family), layer) < 1e-4
    item = plain.tokenize("the film", None, "", None, 0)
    assert torch.equal(spread.encode_prefix([item], 2)[0], plain.encode_prefix([item], 2)[0])
