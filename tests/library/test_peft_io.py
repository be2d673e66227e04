"""Out to PEFT and back: the same numbers in its hands as in ours, on small random models; the slow ones on SmolLM2."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F

import decoders
import families
import small
from disk import to_the_disk
from ficpd import load_library
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.lora import prompt_or_lora
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError, LibraryError
from ficpd.library.library import PromptLibrary
from ficpd.library.peft_io import KINDS, export, imported, own_base, page, read_folder
from ficpd.tasks import classification
from ficpd.types import LORA, Prompt, Query, Readout, Record

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]
TEXTS = ["the film was very good", "bad", "the story was long and dull but not bad"]
LABELS = {"good": "good", "bad": "bad"}
TASK = {"name": "classification", "labels": LABELS, "instruction": "the sentiment is", "tuned_head": False}
PRIVACY = {"unit": "record", "epsilon": 1.98, "delta": 1e-5, "noise": "simulated"}


def write_bert(folder: Path) -> Path:
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=5 + len(decoders.WORDS), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *decoders.WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def library(folder: Path | str, vectors_PD: torch.Tensor | None = None, enters_at: int = 0, **more: Any):
    """A library of a model's folder, its prompt `global` from these vectors or drawn at random."""
    config = BackboneConfig(name=str(folder), dtype="float32", attention="eager")
    backbone, config = load_backbone(config, EngineConfig())
    drawn = torch.randn(4, backbone.width, generator=torch.Generator().manual_seed(1)) / 2
    prompt = Prompt(drawn if vectors_PD is None else vectors_PD, backbone.fingerprint, enters_at, **more)
    card = {
        "backbone": {"name": config.name, "kind": config.kind, "options": {}, "enters_at": enters_at},
        "tasks": {"polarity": TASK}, "privacy": PRIVACY, "method": "fedavg", "num_clients": 5,
    }  # fmt: skip
    return PromptLibrary(prompt.with_vectors(prompt.vectors_PD / 2), {"global": prompt}, card)


def backbone_of(folder: Path | str) -> Any:
    return load_backbone(BackboneConfig(name=str(folder), dtype="float32", attention="eager"), EngineConfig())[0]


def in_peft(kind: Any, base: Path | str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(kind.from_pretrained(base, dtype="float32"), str(folder)).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def same_as_ours(backbone: Any, prompt: Prompt, model: Any, texts: list[str], tokens: int) -> None:
    """Logits of the next token to 1e-4, and the same greedy text."""
    for text in texts:
        item = backbone._opening(text, len(prompt.vectors_PD), tokens)
        outputs = backbone.forward(prompt.vectors_PD[None], backbone.encode_prefix([item], 0), [item], 0)
        ours_V = backbone.model.lm_head(outputs.features_RD)[0]
        ids = item.content[None]
        with torch.no_grad():
            theirs_V = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                pad_token_id=0,
            )  # fmt: skip
        assert torch.allclose(ours_V, theirs_V, atol=1e-4)
        told = backbone.tokenizer.decode(written[0, len(item.content) :], skip_special_tokens=True)
        assert told == backbone.generate(prompt, [text], tokens)[0]


def test_peft_gives_our_logits_and_writes_our_texts(llama, tmp_path):
    made, backbone = library(llama), backbone_of(llama)
    export(made, "global", tmp_path / "out", str(llama))
    model = in_peft(transformers.AutoModelForCausalLM, llama, tmp_path / "out")
    assert type(model) is peft.PeftModelForCausalLM
    same_as_ours(backbone, made.prompts["global"], model, TEXTS, 8)
    other = made.prompts["global"].with_vectors(made.prompts["global"].vectors_PD.flip(0))
    with pytest.raises(AssertionError):
        same_as_ours(backbone, other, model, TEXTS, 8)


def test_peft_gives_our_features_once_they_are_pooled(bert, tmp_path):
    """PEFT does not pool: `last_hidden_state` begins with the virtual tokens, and the mean over the rest is ours."""
    made, backbone = library(bert), backbone_of(bert)
    export(made, "global", tmp_path / "out", str(bert))
    model = in_peft(transformers.AutoModel, bert, tmp_path / "out")
    assert type(model) is peft.PeftModelForFeatureExtraction
    prompt_PD = made.prompts["global"].vectors_PD
    for text in TEXTS:
        item = backbone.tokenize(text, None, "", None, 4)
        ours_D = backbone.forward(prompt_PD[None], backbone.encode_prefix([item], 0), [item], 0).features_RD[0]
        ids = item.content[None]
        with torch.no_grad():
            states_TD = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        assert len(states_TD) == 4 + item.length
        assert torch.allclose(ours_D, F.normalize(states_TD[4:].mean(0), dim=0), atol=1e-4)


def test_the_learned_readout_lies_beside_the_prompt_and_gives_our_answers(bert, tmp_path):
    drawn = torch.Generator().manual_seed(3)
    learned = Readout(torch.randn(2, 32, generator=drawn), torch.randn(2, generator=drawn), torch.tensor([0.3, 0.7]))
    made, backbone = replace(library(bert), learned={"polarity": learned}), backbone_of(bert)
    export(made, "global", tmp_path / "out", str(bert))
    arrays = load_file(tmp_path / "out" / "readouts.safetensors")
    assert arrays.keys() == {"polarity/rows", "polarity/bias"}
    assert "features @ rows.T + bias" in (tmp_path / "out" / "README.md").read_text()
    made.save(tmp_path / "library")
    ours = load_library(tmp_path / "library").predict(TEXTS, scores=True)
    model = in_peft(transformers.AutoModel, bert, tmp_path / "out")
    for place, text in enumerate(TEXTS):
        ids = backbone.tokenize(text, None, "", None, 4).content[None]
        with torch.no_grad():
            states_TD = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        features_D = F.normalize(states_TD[4:].mean(0), dim=0)
        theirs_C = (arrays["polarity/rows"] @ features_D + arrays["polarity/bias"]).softmax(0)
        assert ours[list(LABELS)].iloc[place].tolist() == pytest.approx(theirs_C.tolist(), abs=1e-4)


def padded(model: Any, tokenizer: Any, side: str, **options: Any) -> Any:
    """A batch of all texts, padded on one side: their logits, or (with options) the ids that are written."""
    tokenizer.padding_side = side
    given = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        if not options:
            return model(**given).logits, given["attention_mask"]
        return model.generate(**given, **options)[:, given["input_ids"].shape[1] :]


def test_the_page_says_how_padded_texts_are_read_and_written(llama, tmp_path):
    """Each text alone is the reference. PEFT counts the positions of padding, and `generate` goes on behind it."""
    made, backbone = library(llama), backbone_of(llama)
    export(made, "global", tmp_path / "out", str(llama))
    page = (tmp_path / "out" / "README.md").read_text()
    model, tokenizer = in_peft(transformers.AutoModelForCausalLM, llama, tmp_path / "out"), backbone.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    found: dict[str, Any] = {"model": model}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1], found)
    alone = list(found["write"](tokenizer, TEXTS, **options))
    assert alone == backbone.generate(made.prompts["global"], TEXTS, 6)
    assert 'padding_side="right"' in page
    logits, mask = padded(model, tokenizer, "right")
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            expected_V = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        last = len(made.prompts["global"].vectors_PD) + int(mask[row].sum()) - 1
        torch.testing.assert_close(logits[row, last], expected_V, atol=1e-4, rtol=1e-4)
        if not mask[row].all():
            left_V = padded(model, tokenizer, "left")[0][row, -1]
            assert not torch.allclose(left_V, expected_V, atol=1e-2)
    for side in ("left", "right"):
        written = padded(model, tokenizer, side, **options)
        assert tokenizer.batch_decode(written, skip_special_tokens=True) != alone
    same = tokenizer(["the film", "was bad"], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        both = tokenizer.batch_decode(model.generate(**same, **options)[:, 2:], skip_special_tokens=True)
    assert both == list(found["write"](tokenizer, ["the film", "was bad"], **options))


def test_with_lora_a_batch_writes_the_same_with_padding_on_the_left(llama, tmp_path):
    backbone = backbone_of(llama)
    rows_PD = backbone.adapters.start(8, 0)
    rows_PD = torch.randn(rows_PD.shape, generator=torch.Generator().manual_seed(1)) / 4
    export(library(llama, rows_PD, LORA), "global", tmp_path / "out", str(llama))
    assert "padding on the left" in (tmp_path / "out" / "README.md").read_text()
    model, tokenizer = in_peft(transformers.AutoModelForCausalLM, llama, tmp_path / "out"), backbone.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    together = tokenizer.batch_decode(padded(model, tokenizer, "left", **options), skip_special_tokens=True)
    for text, written in zip(TEXTS, together, strict=True):
        given = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(**given, **options)[0, given["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == written


def test_an_encoder_decoder_writes_the_same_with_padding_on_the_right(tmp_path):
    base = tmp_path / "t5"
    families.build(families.SEQ2SEQ["T5"]).save_pretrained(base)
    families.tokenizer("seq2seq").save_pretrained(base)
    made, backbone = library(base), backbone_of(base)
    export(made, "global", tmp_path / "out", str(base))
    assert "padding on the right" in (tmp_path / "out" / "README.md").read_text()
    model, tokenizer = in_peft(transformers.AutoModelForSeq2SeqLM, base, tmp_path / "out"), backbone.tokenizer
    given = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=6, do_sample=False)
    told = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert told == backbone.generate(made.prompts["global"], TEXTS, 6)


def test_the_page_of_an_instruct_model_has_its_template(llama, tmp_path):
    made = library(llama)
    options = {"chat_template": True, "system": "very good"}
    card = {**made.card, "backbone": {**made.card["backbone"], "options": options}}
    text = page(replace(made, card=card), "global", KINDS["causal_lm"], str(llama))
    assert '{"role": "system", "content": "very good"}, {"role": "user", "content": lines}' in text
    assert 'return_tensors="pt", add_special_tokens=False)' in text
    assert "apply_chat_template" not in page(made, "global", KINDS["causal_lm"], str(llama))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_lora_weights_become_a_lora_folder(kind, request, tmp_path):
    """The numbers of `library`, in PEFT's own names; loaded by the page's lines, it gives our features."""
    base = request.getfixturevalue(kind)
    backbone = backbone_of(base)
    rows_PD = backbone.adapters.start(8, 0)
    rows_PD = torch.randn(rows_PD.shape, generator=torch.Generator().manual_seed(1)) / 4
    export(library(base, rows_PD, LORA), "global", tmp_path / "out", str(base))
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    arrays = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (config.peft_type, config.r, config.lora_alpha, config.inference_mode) == ("LORA", 8, 16, True)
    assert sum(array.numel() for array in arrays.values()) == backbone.adapters.parameters(8)
    model = in_peft(
        transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModel, base, tmp_path / "out"
    )
    page = (tmp_path / "out" / "README.md").read_text()
    assert "# LoRA weights `global`, for PEFT" in page
    assert "virtual tokens" not in page
    for text in TEXTS:
        item = backbone.tokenize(text, None, "", None, 0)
        with prompt_or_lora(backbone, rows_PD[None], LORA) as (none, layer), torch.no_grad():
            ours_D = backbone.forward(none, backbone.encode_prefix([item], 0), [item], layer).features_RD[0]
            ids = item.content[None]
            said = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        last_TD = said.hidden_states[-1][0]
        theirs_D = last_TD[-1] if kind == "llama" else F.normalize(last_TD.mean(0), dim=0)
        assert torch.allclose(ours_D, theirs_D, atol=1e-4)


def test_lora_weights_of_a_masked_language_model_become_a_lora_folder(tmp_path):
    """PEFT has no prompts for it. Its own logits at the mask are our answers' scores."""
    base = tmp_path / "base"
    families.build(families.MASKED["DistilBERT"]).save_pretrained(base)
    families.tokenizer("masked_lm").save_pretrained(base)
    backbone = backbone_of(base)
    rows_PD = backbone.adapters.start(8, 0)
    rows_PD = torch.randn(rows_PD.shape, generator=torch.Generator().manual_seed(1)) / 4
    with pytest.raises(LibraryError, match="a masked_lm backbone has no prompt tuning in PEFT"):
        export(library(base), "global", tmp_path / "out", str(base))
    export(library(base, rows_PD, LORA), "global", tmp_path / "out", str(base))
    assert "the answers' logits at the mask" in (tmp_path / "out" / "README.md").read_text()
    model = in_peft(transformers.AutoModelForMaskedLM, base, tmp_path / "out")
    answers, tokenizer = backbone.readout("", ["good", "bad"]), backbone.tokenizer
    for text in TEXTS:
        item = backbone.tokenize(text, None, "it was [MASK] fine", None, 0)
        with prompt_or_lora(backbone, rows_PD[None], LORA) as (none, layer), torch.no_grad():
            ours_D = backbone.forward(none, backbone.encode_prefix([item], 0), [item], layer).features_RD[0]
            given = tokenizer(f"{text} it was {tokenizer.mask_token} fine", return_tensors="pt")["input_ids"]
            said_V = model(input_ids=given).logits[given == tokenizer.mask_token_id][0]
        theirs_C = said_V[tokenizer.convert_tokens_to_ids(["good", "bad"])]
        torch.testing.assert_close(answers @ ours_D, theirs_C, atol=1e-4, rtol=1e-4)


def test_what_lies_in_the_folder(llama, tmp_path):
    made = library(llama)
    export(made, "global", tmp_path / "out", str(llama))
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    arrays = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert small.same(arrays, {"prompt_embeddings": made.prompts["global"].vectors_PD})
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    expected = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 32, "num_layers": 3,
                "num_attention_heads": 4, "num_transformer_submodules": 1, "inference_mode": True,
                "base_model_name_or_path": str(llama)}  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_folder_is_on_the_disk_before_it_has_its_name(llama, tmp_path, monkeypatch):
    made, steps = library(llama), to_the_disk(monkeypatch)
    export(made, "global", tmp_path / "out", str(llama))
    assert steps[-7:] == ["file", "file", "file", "-> README.md", "folder", "-> out", "folder"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_page_tells_the_guarantee_and_its_lines_load_the_prompt(kind, request, tmp_path, monkeypatch):
    base = request.getfixturevalue(kind)
    export(library(base), "global", tmp_path / "out", str(base))
    page = (tmp_path / "out" / "README.md").read_text()
    assert "ε = 1.98 per record, simulated noise" in page
    assert "4 virtual tokens of width 32" in page
    assert ("PEFT does not pool" in page) == (kind == "bert")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1].replace("THIS_FOLDER", str(tmp_path / "out")), found)
    assert found["model"].peft_config["default"].num_virtual_tokens == 4


def test_a_hub_id_is_taken_as_it_is_and_no_network_is_asked(llama, tmp_path):
    export(library(llama), "global", tmp_path / "out", "owner/name")
    assert read_folder(tmp_path / "out")[1]["base_model_name_or_path"] == "owner/name"
    assert "base_model: owner/name" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "reason"), [({"enters_at": 2}, "it enters at layer 2"), ({"head_rows": 2}, "it has a tuned readout")]
)
def test_what_peft_cannot_express_is_refused_with_the_way_out(llama, tmp_path, more, reason):
    with pytest.raises(LibraryError, match=f"{reason}.*--reenter.*prompt.enters_at=0"):
        export(library(llama, **more), "global", tmp_path / "out", str(llama))
    assert not list(tmp_path.iterdir())


def test_a_prompt_with_a_readout_of_its_own_is_refused(llama, tmp_path):
    made = replace(library(llama), readouts={"global": Readout(torch.ones(2, 32), torch.zeros(2), torch.ones(2) / 2)})
    with pytest.raises(LibraryError, match="tuned readout"):
        export(made, "global", tmp_path / "out", str(llama))


def test_a_folder_that_exists_is_left_alone(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(LibraryError, match="exists already"):
        export(library(llama), "global", tmp_path / "out", str(llama))
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine"]


def test_another_base_and_another_name_are_refused(llama, bert, tmp_path):
    made = library(llama)
    with pytest.raises(LibraryError, match="model_type = 'bert': expected 'llama' as in causal_lm"):
        export(made, "global", tmp_path / "out", str(bert))
    with pytest.raises(LibraryError, match="expected a folder or a hub id"):
        export(made, "global", tmp_path / "out", "no/such/folder")
    with pytest.raises(BackboneError, match="expected a transformers configuration"):
        export(made, "global", tmp_path / "out", str(tmp_path))
    with pytest.raises(LibraryError, match="no prompt 'globl' in this library; it has global"):
        export(made, "globl", tmp_path / "out", str(llama))


def test_a_backbone_that_transformers_does_not_know_is_refused():
    with pytest.raises(LibraryError, match="tiny: expected a transformers model"):
        own_base(library("tiny", torch.zeros(4, 16)))


def written(folder: Path, vectors_PD: torch.Tensor | None = None, **changes: Any) -> Path:
    """A prompt-tuning folder as PEFT writes it, with some values changed."""
    vectors_PD = torch.ones(4, 32) if vectors_PD is None else vectors_PD
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(vectors_PD), "token_dim": vectors_PD.shape[1],
              "num_transformer_submodules": 1, "base_model_name_or_path": "owner/base"}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    save_file({"prompt_embeddings": vectors_PD}, folder / "adapter_model.safetensors")
    return folder


def brought(folder: Path, base: Path, task: dict[str, Any] = TASK) -> tuple[PromptLibrary, str]:
    return imported(folder, BackboneConfig(name=str(base), dtype="float32", attention="eager"), task)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_out_and_in_again_gives_the_same_bits(kind, request, tmp_path):
    base = request.getfixturevalue(kind)
    made = library(base)
    export(made, "global", tmp_path / "out", str(base))
    found, said = brought(tmp_path / "out", base)
    found.save(tmp_path / "library")
    found = PromptLibrary.load(tmp_path / "library")
    assert said == str(base)
    assert torch.equal(found.prompts["imported"].vectors_PD, made.prompts["global"].vectors_PD)
    assert replace(found.prompts["imported"], vectors_PD=0) == replace(made.prompts["global"], vectors_PD=0)
    found.check(backbone_of(base))
    assert found.start.vectors_PD.shape == (4, 32)
    assert found.card["tasks"] == {"classification": TASK}
    assert found.card["training"]["learning_rate"] > 0


def test_half_precision_is_read_exactly(tmp_path):
    vectors_PD = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found_PD, _ = read_folder(written(tmp_path / "half", vectors_PD.bfloat16()))
    assert found_PD.dtype == torch.float32
    assert torch.equal(found_PD, vectors_PD.bfloat16().float())


@pytest.mark.parametrize(("changes", "words"), [
    ({"peft_type": "LORA"}, "holds 'LORA'; expected 'PROMPT_TUNING'"),
    ({"num_virtual_tokens": 5}, r"the array is \[4, 32\], adapter_config.json says \[5, 32\]"),
    ({"token_dim": 16}, r"says \[4, 16\]"),
    ({"num_transformer_submodules": 2}, "2 submodules"),
])  # fmt: skip
def test_a_folder_that_does_not_fit_itself_is_refused(tmp_path, changes, words):
    with pytest.raises(LibraryError, match=words):
        read_folder(written(tmp_path / "in", **changes))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(LibraryError, match=r"adapter_config\.json cannot be read"):
        read_folder(tmp_path)
    written(tmp_path / "in", torch.full((4, 32), torch.nan))
    with pytest.raises(LibraryError, match="expected finite numbers"):
        read_folder(tmp_path / "in")
    (tmp_path / "in" / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(LibraryError, match="expected an array 'prompt_embeddings'"):
        read_folder(tmp_path / "in")
    (tmp_path / "in" / "adapter_model.safetensors").unlink()
    (tmp_path / "in" / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(LibraryError, match="is a pickle and not read"):
        read_folder(tmp_path / "in")


def test_a_prompt_that_does_not_fit_the_backbone_is_refused(bert, tmp_path):
    with pytest.raises(LibraryError, match=r"width 8, and .* has width 32; give --backbone 'owner/base'"):
        brought(written(tmp_path / "wide", torch.ones(4, 8)), bert)
    with pytest.raises(BackboneError, match="a prompt of 44 virtual tokens leaves 4"):
        brought(written(tmp_path / "long", torch.ones(44, 32)), bert)
    with pytest.raises(BackboneError, match="cannot write"):
        brought(written(tmp_path / "fits"), bert, {"name": "generation"})


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_dozen_lines_of_transformers_agree_at_any_layer(kind, layer, request, tmp_path, monkeypatch, capsys):
    base = request.getfixturevalue(kind)
    made, backbone = library(base, enters_at=layer), backbone_of(base)
    made.save(tmp_path / "library")
    monkeypatch.setattr(sys, "argv", ["plain", str(tmp_path / "library"), *TEXTS])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "plain_transformers.py"))
    lines = [line.split(" -> ")[1] for line in capsys.readouterr().out.splitlines() if " -> " in line]
    task = classification.build(classification.Config(**{k: v for k, v in TASK.items() if k != "name"}))
    records = [Record(text, {"text": text}) for text in TEXTS]
    batch = task.encode(records, backbone, made.prompts["global"])
    answer = QueryEngine(backbone).answer([Query(made.prompts["global"].vectors_PD[None], batch, outputs=True)])[0]
    for line, logits in zip(lines, task.logits(answer.outputs_KB, batch), strict=True):
        label, said = line.split(" ", 1)
        scores = json.loads(said.replace("'", '"'))
        assert label == max(scores, key=scores.__getitem__)
        assert list(scores.values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)


@pytest.mark.slow
def test_peft_and_we_agree_on_smollm2(tmp_path):
    """Logits to 1e-4, texts to the word, vectors to the bit."""
    backbone = backbone_of("smollm2")
    made = library("smollm2", backbone.init_prompt("the sentiment of this text is", 6, 0, 0))
    base = own_base(made)
    export(made, "global", tmp_path / "out", base)
    model = in_peft(transformers.AutoModelForCausalLM, base, tmp_path / "out")
    same_as_ours(backbone, made.prompts["global"], model, ["The best thing about the sea is", "2 + 2 ="], 12)
    found, _ = brought(tmp_path / "out", Path("smollm2"))
    assert torch.equal(found.prompts["imported"].vectors_PD, made.prompts["global"].vectors_PD)


LABEL_WORDS = ("--label", "good=good", "--label", "bad=bad", "--instruction", "the sentiment is")


def test_export_and_import_from_the_command_line(ficpd, llama, tmp_path):
    made = library(llama)
    made.save(tmp_path / "library")
    call = ("export", tmp_path / "library", "--prompt", "global", "--out", tmp_path / "out")
    status, out, err = ficpd(*call)
    assert (status, err) == (0, "")
    assert f"base:   {llama}" in out
    assert read_folder(tmp_path / "out")[1]["base_model_name_or_path"] == str(llama)
    assert "exists already" in ficpd(*call)[2]
    bring = ("import", tmp_path / "out", "--out", tmp_path / "mine", "--backbone", llama, *LABEL_WORDS)
    status, out, err = ficpd(*bring)
    assert (status, err) == (0, "")
    assert f"the folder names {llama}" in out
    mine = PromptLibrary.load(tmp_path / "mine")
    assert torch.equal(mine.prompts["imported"].vectors_PD, made.prompts["global"].vectors_PD)
    assert mine.card["tasks"]["classification"] == TASK
    assert "exists already" in ficpd(*bring)[2]
    assert ficpd(*bring[:3], tmp_path / "no", *bring[4:6], "--label", "good")[0] == 2
    ficpd("import", tmp_path / "out", "--out", tmp_path / "writes", "--backbone", llama).said()
    assert PromptLibrary.load(tmp_path / "writes").card["tasks"]["generation"]["instruction"] == ""


def few(file: Path) -> Path:
    said = (("good", "very good"), ("bad", "not bad"))
    lines = [f"{a} {b},{label}" for label, a in said for b in ("film", "was", "long")]
    file.write_text("text,target\n" + "\n".join(lines) + "\n")
    return file


def test_an_adapted_prompt_is_exported_and_answers_the_same(ficpd, llama, tmp_path):
    """With a word on whose records it was fitted to: the guarantee is the federation's."""
    made, data = library(llama), few(tmp_path / "few.csv")
    made.card["training"] = {"learning_rate": 0.1}
    made.save(tmp_path / "library")
    adapt = ("adapt", tmp_path / "library", "--data", data, "--shots", 6, "--how", "tune", "--out", tmp_path / "mine")
    assert ficpd(*adapt)[0] == 0
    assert ficpd("export", tmp_path / "mine", "--prompt", "adapted", "--out", tmp_path / "out")[::2] == (0, "")
    tuned = PromptLibrary.load(tmp_path / "mine").prompts["adapted"]
    assert not torch.equal(tuned.vectors_PD, made.prompts["global"].vectors_PD)
    same_as_ours(
        backbone_of(llama), tuned, in_peft(transformers.AutoModelForCausalLM, llama, tmp_path / "out"), TEXTS, 8
    )
    page = (tmp_path / "out" / "README.md").read_text()
    assert "- adapted: to 6 records by" in page
    assert "no privacy guarantee for those records" in page
    assert ficpd("export", tmp_path / "mine", "--prompt", "global", "--out", tmp_path / "theirs")[0] == 0
    assert "no privacy guarantee" not in (tmp_path / "theirs" / "README.md").read_text()


def test_an_adapted_prompt_that_answers_beside_demonstrations_is_no_prompt_alone(ficpd, llama, tmp_path):
    made, data = library(llama), few(tmp_path / "few.csv")
    made.card["training"] = {"learning_rate": 0.1}
    made.save(tmp_path / "library")
    adapt = ("adapt", tmp_path / "library", "--data", data, "--shots", 6, "--out", tmp_path / "mine")
    assert ficpd(*adapt, "--how", "demonstrations")[0] == 0
    assert PromptLibrary.load(tmp_path / "mine").card["adapted"]["demonstrations"]
    for more in ((), ("--reenter",)):
        err = ficpd("export", tmp_path / "mine", "--prompt", "adapted", "--out", tmp_path / "out", *more).said(1)
        assert "demonstrations, which are not part" in err
        assert "--how tune" in err
    assert not (tmp_path / "out").exists()


def test_reenter_from_the_command_line_states_the_agreement(ficpd, bert, tmp_path):
    library(bert, enters_at=2).save(tmp_path / "library")
    (tmp_path / "texts.csv").write_text("review\n" + "\n".join(["the film was bad", "a fine story", "very dull"] * 4))
    call = ("export", tmp_path / "library", "--prompt", "global", "--out", tmp_path / "out")
    assert "it enters at layer 2" in ficpd(*call).said(1)
    data = ("--data", tmp_path / "texts.csv", "-c", "text=review")
    assert ficpd(*call, *data)[0] == 2
    status, out, err = ficpd(*call, "--reenter", *data, "--steps", 30, "--tokens", 6)
    assert (status, err) == (0, "")
    page = (tmp_path / "out" / "README.md").read_text()
    for line in ("agreement on 3 texts held back", "enters at layer 2; 30 steps on 9 texts (texts.csv)"):
        assert line in out
        assert line in page
    assert "not the texts of the distillation" in page
    assert read_folder(tmp_path / "out")[0].shape == (6, 32)
