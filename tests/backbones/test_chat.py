"""Chat templates, on a small random Llama: the text, the scores and the writing are those of plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import decoders
import families
from ficpd import load_library
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError
from ficpd.library.library import PromptLibrary
from ficpd.tasks.build import build_task
from ficpd.types import Prompt, Query, Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system here') }}{% else %}"
    " {{ m.content }}</s>{% endif %}{% endfor %}"
)
TEXTS = ["the film was very good", "bad", "the story was long and dull but not bad"]
ASK = "the sentiment is"


def write(folder: Path, template: str = CHATML, end: str = "<|im_end|>") -> Path:
    """A decoder whose tokenizer has a template. end: the token that its texts end with."""
    decoders.write(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]})
    tokenizer.add_tokens(["user", "assistant", "system"])
    tokenizer.chat_template = template
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids([end])
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=ids, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    config = BackboneConfig(name=str(folder), dtype="float32", attention="eager", options=options)
    return load_backbone(config, EngineConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("chat"))


def plain(folder: Path, text: str, system: str | None = None) -> tuple[Any, list[int], torch.Tensor]:
    """Tokenizer, ids and next-token logits of plain transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": f"{text}\n{ASK}"})
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return tokenizer, ids, model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("system", [None, "very long story"])
@pytest.mark.parametrize("template", [CHATML, MISTRAL])
def test_zero_shot_scores_are_those_of_plain_transformers(tmp_path, template, system):
    folder = write(tmp_path, template, "</s>" if template == MISTRAL else "<|im_end|>")
    options = {} if system is None else {"system": system}
    if template == MISTRAL and system:
        with pytest.raises(BackboneError, match="no system here"):
            load(folder, **options)
        return
    backbone, config = load(folder, **options)
    assert config.options == {**options, "chat_template": True}
    labels = {"good": "positive", "bad": "negative"}
    task = build_task({"name": "classification", "labels": labels, "instruction": ASK})
    empty = Prompt(torch.zeros(0, 32), backbone.fingerprint)
    batch = task.encode([Record(text, {"text": text}) for text in TEXTS], backbone, empty)
    answer = QueryEngine(backbone).answer([Query(empty.vectors_PD[None], batch, outputs=True)])[0]
    for text, item, ours_C in zip(TEXTS, batch.items, task.logits(answer.outputs_KB, batch), strict=True):
        tokenizer, ids, logits_V = plain(folder, text, system)
        assert item[0].content.tolist() == ids
        expected_C = logits_V[tokenizer.convert_tokens_to_ids(["positive", "negative"])]
        torch.testing.assert_close(ours_C, expected_C, atol=1e-5, rtol=1e-5)


def test_the_prompt_stands_before_the_template_and_the_answer_in_the_assistants_turn(folder):
    backbone, _ = load(folder)
    prompt_PD = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    items = [backbone.tokenize(text, None, ASK, "very good", 4, writes=8) for text in TEXTS]
    hidden = backbone.encode_prefix(items, 0)
    scores_S = backbone.forward(prompt_PD.expand(3, -1, -1), hidden, items, 0).scores_RN[:, 0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    for text, item, score in zip(TEXTS, items, scores_S, strict=True):
        tokenizer, ids, _ = plain(folder, text)
        tail = tokenizer.convert_tokens_to_ids(["very", "good", "<|im_end|>"])
        assert item.content.tolist() == ids + tail
        whole = torch.cat([prompt_PD, model.get_input_embeddings()(torch.tensor(ids + tail))])[None]
        said = model(inputs_embeds=whole).logits[0, -4:-1].log_softmax(-1)
        torch.testing.assert_close(score, said.gather(1, torch.tensor(tail)[:, None]).mean(), atol=1e-5, rtol=1e-5)


def test_texts_are_cut_and_the_template_is_not(folder):
    backbone, _ = load(folder, max_tokens=24)
    words = backbone.tokenizer.convert_ids_to_tokens
    item = backbone.tokenize("the film " * 30, None, ASK, None, 3)
    said = " ".join(words(item.content.tolist()))
    assert item.length == 21
    assert said.startswith("<|im_start|> user \n the film")
    assert said.endswith("\n the sentiment is <|im_end|> \n <|im_start|> assistant \n")
    pair = " ".join(words(backbone.tokenize("good " * 30, "bad " * 30, ASK, None, 3).content.tolist()))
    assert (pair.count("good"), pair.count("bad")) == (4, 4)
    with pytest.raises(BackboneError, match="leave nothing"):
        backbone.tokenize("good", None, ASK, None, 14)


def test_what_is_written_is_the_assistants_turn(folder):
    backbone, _ = load(folder)
    items = [backbone.tokenize(text, None, ASK, None, 0, writes=6) for text in TEXTS]
    written = backbone.generate_greedy(torch.zeros(3, 0, 32), items, 0, 6)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for text, said in zip(TEXTS, written, strict=True):
        tokenizer, ids, _ = plain(folder, text)
        given = torch.tensor([ids])
        found = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=6)
        assert tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True) == said


def test_auto_uses_the_template_of_an_instruct_model_alone(tmp_path, folder):
    assert load(folder)[1].options == {"chat_template": True}
    base = write(tmp_path / "base", end="</s>")
    assert load(base)[1].options == {"chat_template": False}
    assert load(base, chat_template=True)[0].chat.end == load(base)[0].tokenizer.convert_tokens_to_ids("<|im_end|>")
    bare = decoders.write(tmp_path / "bare")
    assert load(bare)[1].options == {"chat_template": False}
    with pytest.raises(BackboneError, match=r"chat_template: .* has no chat template"):
        load(bare, chat_template=True)
    with pytest.raises(BackboneError, match=r"backbone\.options\.system"):
        load(folder, chat_template=False, system="very good")


def test_template_and_system_text_are_part_of_the_fingerprint(folder):
    names = {load(folder, **more)[0].fingerprint for more in ({}, {"chat_template": False}, {"system": "very good"})}
    assert len(names) == 3


def test_a_text_is_the_same_on_every_day(tmp_path):
    """Llama 3 and others write today's date into the system text; theirs is fixed."""
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    backbone, _ = load(write(tmp_path, dated + CHATML))
    assert backbone.chat.render("good").startswith("26 Jul 2024<|im_start|>user")


def test_a_library_remembers_the_template(folder, tmp_path):
    for wanted in (True, False):
        backbone, config = load(folder, chat_template=wanted)
        prompt = Prompt(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), backbone.fingerprint)
        task = {"name": "classification", "labels": {"good": "positive", "bad": "negative"}, "instruction": ASK}
        about = {"name": config.name, "kind": config.kind, "options": config.options, "enters_at": 0}
        card = {"backbone": about, "tasks": {"polarity": task}, "privacy": {}, "method": "fedavg"}
        PromptLibrary(prompt, {"global": prompt}, card).save(tmp_path / str(wanted))
        opened: Any = load_library(tmp_path / str(wanted))
        assert (opened.model.backbone.chat is not None) == wanted
        read = opened.encode([Record("a", {"text": "good"})]).items[0][0].content
        assert ("<|im_start|>" in opened.model.backbone.tokenizer.decode(read)) == wanted


def test_an_encoder_decoder_has_no_templates(tmp_path):
    family = families.SEQ2SEQ["T5"]
    families.build(family).save_pretrained(tmp_path)
    families.tokenizer(family.kind).save_pretrained(tmp_path)
    assert load(tmp_path)[1].options == {}
