"""Quantised weights on a small random Llama: near the plain scores, with gradients for the prompt and rows apart.

Needs torchao and bitsandbytes (`pip install "ficpd[quantized]"`), which both run on a CPU.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import decoders
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.quantization import prepare_quantized, quantization_config
from ficpd.errors import BackboneError

pytestmark = [  # of the packages themselves
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
TEXTS = ["the film was very good", "bad", "the story was long and dull but not bad"]
WIDTH = 64
NEEDS = {"int8": "torchao", "bnb_8bit": "bitsandbytes", "bnb_4bit": "bitsandbytes"}
"""The package of each option."""


def load(folder: Path, **options: Any) -> Any:
    config = BackboneConfig(name=str(folder), dtype="float32", attention="eager", options=options)
    return load_backbone(config, EngineConfig())[0]


def drawn() -> torch.Tensor:
    return torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0))


def features(backbone: Any, prompts_SPD: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    items = [backbone.tokenize(text, None, "", None, 4) for text in TEXTS[rows]]
    return backbone.forward(prompts_SPD[rows], backbone.encode_prefix(items, 0), items, 0).features_RD


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As wide as bitsandbytes' blocks of 64 weights."""
    folder = decoders.write(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(3)
    sizes: Any = {**decoders.SIZES, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chosen", NEEDS)
def test_a_prompt_is_tuned_through_quantised_weights(folder, chosen):
    """Features and gradients are those of transformers' own quantised model, one row at a time."""
    pytest.importorskip(NEEDS[chosen])
    plain, backbone, prompts_SPD = load(folder), load(folder, quantization=chosen), drawn().requires_grad_()
    ours = features(backbone, prompts_SPD)
    (grad,) = torch.autograd.grad(ours[1].sum(), prompts_SPD)
    asked = quantization_config(chosen, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=asked)
    prepare_quantized(model.requires_grad_(False))
    ids = backbone.tokenize(TEXTS[1], None, "", None, 4).content
    whole = torch.cat([prompts_SPD[1], model.get_input_embeddings()(ids)])[None]
    theirs = model.model(inputs_embeds=whole).last_hidden_state[0, -1]
    torch.testing.assert_close(ours[1], theirs, atol=1e-4, rtol=1e-4)
    (expected,) = torch.autograd.grad(theirs.sum(), prompts_SPD)
    assert [bool(row.any()) for row in grad] == [False, True, False]
    torch.testing.assert_close(grad, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(ours, features(plain, prompts_SPD), atol=1e-3)
    assert backbone.fingerprint == f"{plain.fingerprint}:{chosen}"


@pytest.mark.parametrize("chosen", NEEDS)
def test_rows_of_quantised_weights_never_see_each_other(folder, chosen):
    """Also where one row's numbers are so large that LLM.int8() would treat them apart, for all rows."""
    pytest.importorskip(NEEDS[chosen])
    backbone = load(folder, quantization=chosen)
    prompts_SPD = drawn()
    before = features(backbone, prompts_SPD)
    prompts_SPD[0] *= 1000
    torch.testing.assert_close(features(backbone, prompts_SPD)[1:], before[1:], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_that_is_quantised_is_loaded_as_it_is(folder, tmp_path):
    """With bitsandbytes' default threshold, as on the hub; ours is 0 after loading."""
    pytest.importorskip("bitsandbytes")
    asked = BitsAndBytesConfig(load_in_8bit=True)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=asked)
    saved.save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    backbone = load(tmp_path)
    layer: Any = backbone.model.model.layers[0].self_attn.q_proj
    assert (layer.weight.dtype, layer.state.threshold) == (torch.int8, 0.0)
    prompts_SPD = drawn()
    chosen = features(load(folder, quantization="bnb_8bit"), prompts_SPD)
    torch.testing.assert_close(features(backbone, prompts_SPD), chosen, atol=1e-4, rtol=1e-4)
    with pytest.raises(BackboneError, match=r"backbone\.options\.quantization = 'int8': .* quantised already"):
        load(tmp_path, quantization="int8")


@pytest.mark.parametrize("chosen", NEEDS)
def test_a_missing_package_is_named_with_the_command(folder, chosen, monkeypatch):
    found = importlib.util.find_spec
    missing = lambda name: None if name == NEEDS[chosen] else found(name)  # noqa: E731
    monkeypatch.setattr("ficpd.backbones.quantization.find_spec", missing)
    with pytest.raises(BackboneError, match=f"pip install {NEEDS[chosen]}`"):
        load(folder, quantization=chosen)


def test_layers_are_spread_over_gpus_alone(folder):
    with pytest.raises(BackboneError, match=r"device_map = 'auto': engine\.device is cpu"):
        load(folder, device_map="auto")


def test_float16_is_a_dtype(folder):
    config = BackboneConfig(name=str(folder), dtype="float16", attention="eager")
    backbone, chosen = load_backbone(config, EngineConfig())
    assert (backbone.dtype, chosen.dtype) == (torch.float16, "float16")
    prompts_SPD = drawn().requires_grad_()
    ours, theirs = features(backbone, prompts_SPD), features(load(folder), prompts_SPD)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
    assert torch.autograd.grad(ours.sum(), prompts_SPD)[0].isfinite().all()
