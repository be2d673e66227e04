"""Masked language models: what stands at the mask is what transformers' own model says, bias included."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

import berts
import small
from ficpd.backbones.masked_lm import MaskedLM
from ficpd.errors import BackboneError
from ficpd.experiments.build import build_context
from ficpd.experiments.runner import run
from ficpd.types import EncodedInput, Query

FRAME = "and it was [MASK]."


@pytest.fixture(scope="module", params=berts.FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return berts.FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def backbone(folder) -> MaskedLM:
    return berts.load(folder)


def features(backbone: MaskedLM, items: list[EncodedInput], layer: int = 0):
    none = torch.zeros(len(items), 0, backbone.width)
    return backbone.forward(none, backbone.encode_prefix(items, layer), items, layer)


def masks(backbone: MaskedLM, item: EncodedInput) -> list[int]:
    return (item.content[: item.length] == backbone.tokenizer.mask_token_id).nonzero()[:, 0].tolist()


def pieces(backbone: MaskedLM, item: EncodedInput) -> list[str]:
    return backbone.tokenizer.convert_ids_to_tokens(item.content[: item.length].tolist())


@pytest.mark.parametrize("pair", [None, "a dull story"])
def test_logits_at_the_mask_are_the_models_own(folder, backbone, pair):
    cloze = FRAME.replace("[MASK]", backbone.tokenizer.mask_token)
    texts = ["we saw the film", "bad"]
    items = [backbone.tokenize(text, pair, FRAME, None, 4) for text in texts]
    readout = backbone.readout(FRAME, ["good", "bad", "awful"])
    assert readout.shape == (3, backbone.width)
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    begins = "" if model.config.model_type == "bert" else "▁"
    words = backbone.tokenizer.convert_tokens_to_ids([f"{begins}{word}" for word in ("good", "bad", "awful")])
    for row, (text, item) in enumerate(zip(texts, items, strict=True)):
        whole = (f"{text} {cloze}",) if pair is None else (text, f"{pair} {cloze}")
        encoded = backbone.tokenizer(*whole, return_tensors="pt")
        assert encoded["input_ids"][0].tolist() == item.content.tolist()
        assert backbone.tokenizer.unk_token_id not in item.content
        with torch.no_grad():
            own = model(**encoded).logits[0, masks(backbone, item)[0], words]
        for layer in range(backbone.depth):
            ours = features(backbone, items, layer).features_RD @ readout.T
            assert small.close(ours[row], own, 1e-5)


def test_answers_of_several_tokens_are_scored_at_a_mask_each(folder, backbone):
    answers = ["mending", "good"]
    assert backbone.readout(FRAME, answers) is None
    items = [backbone.tokenize("we saw the film", "a story", FRAME, answer, 4) for answer in answers]
    assert [len(masks(backbone, item)) for item in items] == [item.scored for item in items] == [2, 1]
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    outputs = features(backbone, items)
    for row, item in enumerate(items):
        ids = item.content[None, : item.length]
        first = (ids == backbone.tokenizer.sep_token_id).nonzero()[0, 1]
        segments = (torch.arange(item.length) > first).long()
        kinds = segments if model.config.type_vocab_size > 1 else torch.zeros_like(ids[0])
        with torch.no_grad():
            said = model(input_ids=ids, token_type_ids=kinds[None]).logits[0, masks(backbone, item)].log_softmax(-1)
        own = said.gather(1, item.content[item.length :, None]).mean()
        assert small.close(outputs.scores_RN[row, 0], own, 1e-5)


def test_a_word_of_a_script_without_blanks_is_one_token(tmp_path):
    """The vocabulary has the word, and a blank, and no word with a blank before it."""
    backbone = berts.load(berts.xlm_roberta(tmp_path))
    assert backbone.tokenizer.tokenize(" 电影") == ["▁", "电影"]
    assert backbone.readout("", ["电影", "good"]).shape == (2, backbone.width)


@pytest.mark.parametrize("pair", [None, "a dull story " * 50])
@pytest.mark.parametrize("text", ["bad", "the film was good " * 50])
def test_the_text_is_cut_and_never_the_cloze(backbone, text, pair):
    item = backbone.tokenize(text, pair, FRAME, None, 10)
    assert item.length == len(item.content)
    assert item.length == backbone.max_tokens - 10 or (len(text) < 5 and pair is None)
    end = backbone.tokenizer.tokenize(" " + FRAME.replace("[MASK]", backbone.tokenizer.mask_token))
    assert pieces(backbone, item)[-len(end) - 1 : -1] == end
    assert pieces(backbone, item)[1].strip("▁") == text.split()[0]
    if pair and len(text) > 5:
        ends = (item.content == backbone.tokenizer.sep_token_id).nonzero()[:, 0].tolist()
        assert abs((ends[0] - 1) - (item.length - len(end) - 2 - ends[-2])) <= 1


def test_without_a_mask_the_answer_stands_at_the_end(backbone):
    last = [pieces(backbone, backbone.tokenize("film", None, frame, None, 4))[-2] for frame in ("", "it was")]
    assert last == [backbone.tokenizer.mask_token] * 2
    own = f"it was {backbone.tokenizer.mask_token}."
    given, common = (backbone.tokenize("film", None, text, None, 4).content for text in (own, "it was [MASK]."))
    assert torch.equal(given, common)


def test_a_mask_or_separator_in_a_text_is_not_the_clozes(backbone):
    mask, sep = backbone.tokenizer.mask_token, backbone.tokenizer.sep_token
    plain = backbone.tokenize("the film", "was good", FRAME, None, 4)
    laid = backbone.tokenize(f"the {mask} film {sep}", f"{mask} was good", FRAME, None, 4)
    assert torch.equal(laid.content, plain.content)


@pytest.mark.parametrize(("answers", "said"), [
    (["good", "good"], "'good' and 'good' as the same tokens"),
    (["ፊልም", "good"], "'ፊልም' is .*(UNK|unk).* which cannot stand at a mask; choose a word"),
    (["[MASK]<mask>", "good"], "cannot stand at a mask"),
])  # fmt: skip
def test_a_word_that_cannot_stand_there_is_named(backbone, answers, said):
    with pytest.raises(BackboneError, match=said):
        backbone.readout(FRAME, answers)


def test_two_masks_in_an_instruction_are_refused(backbone):
    with pytest.raises(BackboneError, match="has 2 masks; leave one"):
        backbone.tokenize("film", None, "[MASK] or [MASK]", None, 4)


def test_weights_without_a_language_head_are_refused(folder, tmp_path):
    AutoModelForMaskedLM.from_pretrained(folder).base_model.save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lacks = r"lacks \d+ weights .* among them (cls|lm_head)\.[^ ]+; .*kind = .sentence_encoder"
    with pytest.raises(BackboneError, match=lacks):
        berts.load(tmp_path)


@pytest.mark.parametrize("script", berts.SCRIPTS)
def test_right_to_left_and_unspaced_scripts_are_read_cut_and_paired(backbone, script):
    text = berts.SCRIPTS[script]
    alone, paired = backbone.tokenize(text, None, FRAME, None, 4), backbone.tokenize(text, text, FRAME, None, 4)
    long = backbone.tokenize(f"{text} " * 30, f"{text} " * 30, FRAME, None, 4)
    assert backbone.unk_rate([text]) == 0.0
    assert alone.length < paired.length <= long.length == backbone.max_tokens - 4
    assert [len(masks(backbone, item)) for item in (alone, paired, long)] == [1, 1, 1]
    assert pieces(backbone, long)[:4] == pieces(backbone, alone)[:4]
    told = features(backbone, [alone, paired, long, backbone.tokenize("bad", None, FRAME, None, 4)]).features_RD
    assert torch.isfinite(told).all()
    assert min((told[0] - other).norm() for other in told[1:]) > 0.1


@pytest.mark.parametrize("script", berts.SCRIPTS)
def test_tiny_reads_a_script_without_blanks_as_one_word(script):
    text, tiny = berts.SCRIPTS[script], small.backbone()
    assert tiny.tokenize(text, None, "", None, 4).length == len(text.split())
    assert tiny.tokenize(text, text, "", None, 4).length == 2 * len(text.split()) + 1
    assert tiny.unk_rate([text]) == 0.0


def test_a_run_learns(folder, tmp_path):
    """The kind is told by the folder's configuration; the words are one token each, so the readout is the head's rows."""
    changes = [
        f"backbone.name={folder}", "backbone.options={}", "task.labels.good=good", "task.labels.bad=bad",
        f"task.instruction={FRAME}", "training.local_steps=12", "training.batch_size=12", "training.learning_rate=0.1",
    ]  # fmt: skip
    experiment = small.experiment(tmp_path, "fedavg", *changes, rounds=6)
    context = build_context(experiment)
    assert (context.experiment.backbone.kind, type(context.model.backbone)) == ("masked_lm", MaskedLM)
    run(experiment, tmp_path / "run")
    records = [record for shard in context.shards.values() for record in shard.train]
    batch = context.task.encode(records, context.model.backbone, context.start)
    stacked = torch.stack([context.start.vectors_PD, *small.library(tmp_path).values()])
    before, *after = context.model.answer([Query(stacked, batch)])[0].loss_KB.mean(1).tolist()
    assert before > 0.7 > 0.55 > min(after)  # a coin has 0.69
