"""Folders as people have them: sentence-transformers files that are followed or refused, and what cannot be read."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import families
import small
from ficpd.backbones import catalog, causal_lm, masked_lm, sentence_encoder, seq2seq, vision, weights
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.errors import BackboneError, BackboneWarning

TEXTS = ["the film was very good", "bad"]


def write(folder: Path, family: families.Family = families.SENTENCES["BERT"], **files: Any) -> Path:
    """A folder with further JSON files; `__` in a name is a slash."""
    families.build(family).save_pretrained(folder)
    families.tokenizer(family.kind).save_pretrained(folder)
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


def modules(*kinds: str) -> list[dict[str, str]]:
    parts = [("Transformer", ""), *((kind, f"{place}_{kind}") for place, kind in enumerate(kinds, 1))]
    return [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in parts]


def load(folder: Path, module: Any = sentence_encoder, **options: Any) -> Any:
    found = weights.Weights(folder, "ab" * 32, "here")
    how = {"dtype": torch.float32, "attention": "eager", "device": small.CPU, "name": "small"}
    return module.build(module.Config(**options), found, **how)


def features(backbone: Any, texts: list[str] = TEXTS) -> torch.Tensor:
    items = [backbone.tokenize(text, None, "", None, 0) for text in texts]
    none = torch.zeros(len(items), 0, backbone.width)
    return backbone.forward(none, backbone.encode_prefix(items, 0), items, 0).features_RD


def states(folder: Path, text: str) -> torch.Tensor:
    model = families.transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    ids = families.tokenizer("sentence_encoder")(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0]


POOLS = {
    "cls_token": lambda s: s[0], "mean_tokens": lambda s: s.mean(0), "max_tokens": lambda s: s.amax(0),
    "lasttoken": lambda s: s[-1],
}  # fmt: skip


@pytest.mark.parametrize("mode", POOLS)
def test_pooling_is_the_folders(tmp_path, mode):
    folder = write(tmp_path, modules=modules("Pooling", "Normalize"))
    (tmp_path / "1_Pooling").mkdir()
    chosen = {f"pooling_mode_{name}": name == mode for name in POOLS}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(chosen))
    backbone = load(folder)
    assert catalog.detect_kind(folder) == "sentence_encoder"
    expected = torch.stack([F.normalize(POOLS[mode](states(folder, text)), dim=0) for text in TEXTS])
    torch.testing.assert_close(features(backbone), expected, atol=1e-5, rtol=1e-5)
    assert (backbone.fingerprint == "sentence_encoder:" + "ab" * 8) == (mode == "mean_tokens")


def test_dense_layers_are_followed(tmp_path):
    dense = {"activation_function": "torch.nn.modules.activation.Tanh", "in_features": 32, "out_features": 20}
    folder = write(tmp_path, modules=modules("Pooling", "Dense"), **{"2_Dense__config": dense})
    arrays = {"linear.weight": torch.randn(20, 32), "linear.bias": torch.randn(20)}
    save_file(arrays, folder / "2_Dense" / "model.safetensors")
    pooled = states(folder, TEXTS[0]).mean(0)
    expected = F.normalize(torch.tanh(arrays["linear.weight"] @ pooled + arrays["linear.bias"]), dim=0)
    torch.testing.assert_close(features(load(folder))[0], F.pad(expected, (0, 12)), atol=1e-5, rtol=1e-5)


def test_the_longest_text_and_the_default_prompt_are_the_folders(tmp_path):
    prompts = {"prompts": {"query": "the story ", "passage": "long "}, "default_prompt_name": "query"}
    limits = {"max_seq_length": 6, "do_lower_case": True}
    folder = write(tmp_path, sentence_bert_config=limits, config_sentence_transformers=prompts)
    backbone = load(folder)
    assert backbone.tokenize("the film " * 20, None, "", None, 0).length == 6
    plain = load(folder, prefix="")
    assert torch.equal(features(backbone, ["BAD"]), features(plain, ["the story bad"]))
    assert not torch.equal(features(backbone, ["bad"]), features(plain, ["bad"]))


def test_prompts_without_a_default_are_mentioned(tmp_path):
    folder = write(tmp_path, config_sentence_transformers={"prompts": {"query": "query: "}})
    with pytest.warns(BackboneWarning, match=r"query: .*backbone\.options\.prefix"):
        load(folder)
    load(folder, prefix="")


@pytest.mark.parametrize(("files", "said"), [
    ({"modules": modules("Pooling", "LSTM")}, "modules.json has LSTM"),
    ({"modules": modules("Pooling"), "1_Pooling__config": {"pooling_mode_weightedmean_tokens": True}}, "weightedmean"),
    ({"modules": modules("Pooling"), "1_Pooling__config": {"include_prompt": False}}, "include_prompt = False"),
    ({"modules": modules("Pooling", "Dense")}, "2_Dense has the activation Tanh"),
    ({"modules": {"a": 1}}, "expected a JSON list"),
])  # fmt: skip
def test_files_that_are_not_followed_are_refused(tmp_path, files, said):
    with pytest.raises(BackboneError, match=said):
        load(write(tmp_path, **files))


def test_a_decoder_that_embeds_sentences_is_a_sentence_encoder(tmp_path):
    family = families.Family("sentence_encoder", "Qwen3ForCausalLM", "Qwen3Config", families.GROUPED)
    files = {"modules": modules("Pooling"), "1_Pooling__config": {"pooling_mode_lasttoken": True}}
    folder = write(tmp_path, family, **files)
    assert catalog.detect_kind(folder) == "sentence_encoder"
    expected = F.normalize(states(folder, TEXTS[0])[-1], dim=0)
    torch.testing.assert_close(features(load(folder))[0], expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_in_the_folder_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"holds an adapter .*merge_and_unload"):
        load(write(tmp_path, adapter_config={"peft_type": "LORA"}))


def test_a_folder_of_nothing_but_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BackboneError, match=r"holds an adapter .*merge_and_unload"):
        load_backbone(BackboneConfig(name=str(tmp_path)), EngineConfig())


def test_code_in_the_folder_is_never_run(tmp_path):
    folder = write(tmp_path)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    for attempt in (lambda: catalog.detect_kind(folder), lambda: load(folder)):
        with pytest.raises(BackboneError, match="code"):
            attempt()
    assert not (tmp_path / "ran").exists()
    assert "own" not in sys.modules


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    family = families.DECODERS["Llama"]
    folder = write(tmp_path, family._replace(sizes={**family.sizes, "vocab_size": 12}))
    with pytest.raises(BackboneError, match="its tokenizer has 20 tokens and its embedding 12 rows"):
        load(folder, causal_lm)


@pytest.mark.parametrize("module", [causal_lm, masked_lm])
def test_weights_without_a_language_head_are_refused(tmp_path, module):
    family = families.DECODERS["GPT-NeoX, Pythia"] if module is causal_lm else families.MASKED["ModernBERT"]
    families.build(family).base_model.save_pretrained(tmp_path)
    families.tokenizer(family.kind).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"lacks .* weights of"):
        load(tmp_path, module)


def test_weights_as_pickles_are_refused_with_the_way_out(tmp_path):
    folder = write(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"pytorch_model\.bin.*save_pretrained"):
        weights.resolve(str(folder))


@pytest.mark.parametrize(("method", "packages"), [
    ("gptq", "gptqmodel optimum"),
    ("awq", "gptqmodel"),
    ("aqlm", "aqlm"),
    ("compressed-tensors", "compressed_tensors"),
])  # fmt: skip
def test_a_missing_package_is_one_sentence(tmp_path, method, packages):
    folder = write(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=f"pip install {packages}`"):
        load(folder)


@pytest.mark.parametrize(("entry", "said"), [
    ({"quantization_config": "gptq"}, "quantization_config = 'gptq'"),
    ({"quantization_config": {"quant_method": "own"}}, "own weights are unknown"),
    ({"text_config": "a"}, "cannot be read as a decoder"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"architectures": 5}, r"config\.json"),
    ({"architectures": [5]}, "without a language head"),
    ({"num_hidden_layers": 6}, "lacks 18 weights"),
    ({"hidden_size": 48}, "cannot be read as a decoder"),
])  # fmt: skip
def test_a_configuration_that_does_not_fit_is_one_sentence(tmp_path, entry, said):
    folder = write(tmp_path, families.DECODERS["Llama"])
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | entry))
    with pytest.raises(BackboneError, match=said):
        load_backbone(BackboneConfig(name=str(folder), dtype="float32", attention="eager"), EngineConfig())


@pytest.mark.parametrize(("file", "content"), [
    ("tokenizer_config.json", b"[]"), ("tokenizer.json", b"{"), ("model.safetensors", b""),
    ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"), ("config.json", b"[]"),
])  # fmt: skip
def test_a_broken_file_is_one_sentence(tmp_path, file, content):
    folder = write(tmp_path, families.DECODERS["Llama"])
    (folder / file).write_bytes(content)
    with pytest.raises(BackboneError, match=tmp_path.name):
        load_backbone(BackboneConfig(name=str(folder), dtype="float32", attention="eager"), EngineConfig())


def test_an_image_processor_that_needs_another_package_is_one_sentence(tmp_path):
    """It exists for torchvision's images alone. Nothing is read of the weights."""
    (tmp_path / "config.json").write_text('{"model_type": "dinov3_vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "DINOv3ViTImageProcessor"}')
    with pytest.raises(BackboneError, match=r"its image processor.*torchvision"):
        load(tmp_path, vision)


@pytest.mark.parametrize("module", [causal_lm, masked_lm, sentence_encoder, seq2seq])
def test_no_kind_runs_without_a_tokenizer(tmp_path, module):
    families_of = {causal_lm: families.DECODERS["GPT-2"], masked_lm: families.MASKED["BERT"],
                   sentence_encoder: families.SENTENCES["MPNet"], seq2seq: families.SEQ2SEQ["T5"]}  # fmt: skip
    families.build(families_of[module]).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="its tokenizer"):
        load(tmp_path, module)


def test_a_model_without_a_padding_token_runs_and_a_small_context_is_refused(tmp_path):
    family = families.DECODERS["GPT-2"]
    backbone = load(write(tmp_path, family._replace(sizes={**family.sizes, "n_positions": 10})), causal_lm)
    assert features(backbone).shape == (2, 32)
    assert backbone.max_tokens == 10
    with pytest.raises(BackboneError, match="leave nothing of small's 10 tokens"):
        backbone.tokenize("the film", None, "was very good", None, room=8)
