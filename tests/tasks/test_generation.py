"""Generation: its loss and its texts are those of the plain model, its scores sacrebleu's, its records anybody's."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from sacrebleu import corpus_bleu
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import decoders
import small
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.cli import app
from ficpd.data import loading
from ficpd.errors import BackboneError, DataError
from ficpd.evaluation.evaluate import predictions, score_prompt
from ficpd.experiments.config import parse
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.runner import run
from ficpd.library.session import load_library
from ficpd.tasks import generation
from ficpd.tasks.build import build_task
from ficpd.types import Answer, Prompt, Query, Record

PAIRS = {
    "the film was good": "the story was fine and good",
    "bad": "dull",
    "the story is long and dull but not bad": "a very long story",
    "very good": "not bad",
}
RECORDS = [Record(f"row {i}", {"text": text, "target": target}) for i, (text, target) in enumerate(PAIRS.items(), 1)]
BARE = [Record(record.key, {"text": record.fields["text"]}) for record in RECORDS]
END = 2


def build(**config) -> generation.Generation:
    return generation.build(generation.Config(**{"instruction": "the sentiment is", "max_new_tokens": 8, **config}))


@pytest.fixture(scope="module")
def model(decoder) -> QueryEngine:
    return decoder


@pytest.fixture(scope="module")
def plain(llama):
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)


def prompt_of(model: QueryEngine, length: int = 4, enters_at: int = 0, seed: int = 0) -> Prompt:
    vectors = torch.randn(length, model.backbone.width, generator=torch.Generator().manual_seed(seed))
    return Prompt(vectors, model.backbone.fingerprint, enters_at)


def asked(model: QueryEngine, records=RECORDS, length: int = 4, enters_at: int = 0, task=None, **query) -> Answer:
    prompt = prompt_of(model, length, enters_at)
    batch = (task or build()).encode(records, model.backbone, prompt)
    return model.answer([Query(prompt.vectors_PD[None], batch, **query)])[0]


def opening(plain, item, prompt_PD) -> torch.Tensor:
    """[1, T, D]: the prompt and all of the item that is not scored."""
    return torch.cat([prompt_PD, plain.get_input_embeddings()(item.content[: item.length - item.scored])])[None]


@pytest.mark.parametrize("length", [0, 4])
def test_the_loss_is_the_plain_models_own_on_the_targets_tokens(model, plain, length):
    prompt = prompt_of(model, length)
    batch = build().encode(RECORDS, model.backbone, prompt)
    losses = model.answer([Query(prompt.vectors_PD[None], batch)])[0].loss_KB[0]
    for (item,), loss in zip(batch.items, losses, strict=True):
        tail = item.content[-item.scored :]
        whole = torch.cat([opening(plain, item, prompt.vectors_PD), plain.get_input_embeddings()(tail)[None]], dim=1)
        labels = torch.full(whole.shape[:2], -100)
        labels[0, -len(tail) :] = tail
        torch.testing.assert_close(loss, plain(inputs_embeds=whole, labels=labels).loss, atol=1e-5, rtol=1e-5)
        assert tail[-1] == END


@pytest.mark.parametrize("length", [0, 4])
def test_what_is_written_is_what_the_plain_model_generates(model, plain, length):
    prompt = prompt_of(model, length)
    task = build()
    batch = task.encode(RECORDS, model.backbone, prompt)
    found = run_queries(model, predictions(task, prompt.vectors_PD, batch))
    lengths = set()
    for (item,), text in zip(batch.items, found, strict=True):
        front = opening(plain, item, prompt.vectors_PD)
        mask = torch.ones(front.shape[:2], dtype=torch.long)
        ids = plain.generate(inputs_embeds=front, attention_mask=mask, max_new_tokens=8, do_sample=False)[0]
        lengths.add(len(ids))
        assert text == model.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert found == [text.strip() for text in found]
    assert len(set(found)) > 1
    assert max(lengths) == 8


@pytest.mark.parametrize("layer", [1, 2])
def test_at_a_later_layer_writing_is_a_plain_loop(model, layer):
    prompt = prompt_of(model, 4, layer)
    batch = build().encode(BARE, model.backbone, prompt)
    for (item,), text in zip(batch.items, asked(model, enters_at=layer, max_new_tokens=8).texts_KB[0], strict=True):
        ids = item.content.tolist()
        for _ in range(8):
            longer = type(item)(torch.tensor(ids), len(ids))
            hidden = model.backbone.encode_prefix([longer], layer)
            outputs = model.backbone.forward(prompt.vectors_PD[None], hidden, [longer], layer)
            ids.append(int(model.backbone.model.lm_head(outputs.features_RD).argmax()))
            if ids[-1] == END:
                break
        assert text == model.backbone.tokenizer.decode(ids[item.length :], skip_special_tokens=True)


def tokens(model: QueryEngine, item) -> str:
    return " ".join(model.backbone.tokenizer.convert_ids_to_tokens(item.content.tolist()))


def test_a_record_is_one_sequence_and_its_target_ends_with_the_end_token(model):
    batch = build().encode(RECORDS[:1], model.backbone, prompt_of(model))
    ((item,),) = batch.items
    assert tokens(model, item) == "the film was good \n the sentiment is the story was fine and good </s>"
    assert (item.scored, batch.targets.tolist(), batch.readout_CD) == (7, [7], None)
    ((item,),) = build(instruction="").encode(BARE[:1], model.backbone, prompt_of(model)).items
    assert (tokens(model, item), item.scored) == ("the film was good", 0)
    pair = Record("row", {"text": "bad", "text_pair": "dull", "target": "fine"})
    ((item,),) = build().encode([pair], model.backbone, prompt_of(model)).items
    assert tokens(model, item) == "bad \n dull \n the sentiment is fine </s>"


def test_a_tokeniser_without_an_end_token_ends_with_the_target(llama):
    backbone = decoders.load(llama)
    backbone.tokenizer.eos_token = None
    ((item,),) = build().encode(RECORDS[:1], backbone, prompt_of(QueryEngine(backbone))).items
    assert (item.scored, item.content[-1].item()) == (6, backbone.tokenizer.convert_tokens_to_ids("good"))


def test_of_a_long_target_as_much_is_learned_as_is_written(model):
    long = Record("row", {"text": "bad", "target": "the film was very long " * 9})
    ((item,),) = build(max_new_tokens=3).encode([long], model.backbone, prompt_of(model)).items
    assert tokens(model, item) == "bad \n the sentiment is the film was"
    exact = Record("row", {"text": "bad", "target": "the film was"})
    ((item,),) = build(max_new_tokens=4).encode([exact], model.backbone, prompt_of(model)).items
    assert tokens(model, item).endswith("is the film was </s>")


def test_a_source_is_cut_alike_whatever_its_target(llama):
    short = QueryEngine(decoders.load(llama, max_tokens=32))
    text = "the film was very long and dull but not bad " * 5
    records = [Record("a", {"text": text, "target": t}) for t in ("bad", "the story was not bad", None)]
    items = [items[0] for items in build().encode(records, short.backbone, prompt_of(short)).items]
    read = [item.content[: item.length - item.scored].tolist() for item in items]
    assert read[0] == read[1] == read[2]
    assert len(read[0]) == 32 - 4 - 8
    answer = asked(short, records, max_new_tokens=8)
    assert len(set(answer.texts_KB[0])) == 1
    with pytest.raises(BackboneError, match="longer than the context"):
        build(max_new_tokens=28).encode(records, short.backbone, prompt_of(short))


def test_a_record_without_a_target_is_written_and_its_loss_is_not_known(model):
    known, unknown = asked(model, max_new_tokens=8), asked(model, BARE, max_new_tokens=8)
    assert known.texts_KB == unknown.texts_KB
    assert torch.isnan(unknown.loss_KB).all()
    mixed = [RECORDS[0], BARE[1], RECORDS[2], BARE[3]]
    whole = asked(model, grad=True)
    for chunk_tokens in (1, 10_000):
        answer = asked(QueryEngine(model.backbone, chunk_tokens=chunk_tokens), mixed, grad=True)
        assert answer.loss_KB.isnan().tolist() == [[False, True, False, True]]
        assert small.close(answer.loss_KB[0, ::2], known.loss_KB[0, ::2])
        assert small.close(answer.grad_KBPD[0, ::2], whole.grad_KBPD[0, ::2])
        assert not answer.grad_KBPD[0, 1::2].any()


def test_a_record_is_encoded_and_lost_alike_alone(model):
    together = asked(model, max_new_tokens=8)
    for place, record in enumerate(RECORDS):
        alone = asked(model, [record], max_new_tokens=8)
        assert small.close(alone.loss_KB[0], together.loss_KB[0, [place]])
        assert alone.texts_KB[0] == [together.texts_KB[0][place]]
    assert len(set(together.loss_KB[0].tolist())) == len(RECORDS)


def test_a_backbone_that_cannot_write_is_refused_before_anything_is_tuned():
    tiny = QueryEngine(small.backbone())
    for records in (RECORDS, BARE):
        with pytest.raises(BackboneError, match="tiny cannot write; use a causal_lm backbone"):
            build().encode(records, tiny.backbone, small.start(tiny, build()))


def test_records_can_be_made_up(model):
    """`beginning.public_gradients` gives made-up texts every possible target in turn."""
    task = build()
    assert task.label_space[0] == "the sentiment is"
    assert len(build(instruction=" ").label_space) == len(task.label_space) - 1 >= 4
    made_up = [Record("made-up", {"text": "the film", "target": target}) for target in task.label_space]
    answer = asked(model, made_up, task=task, grad=True)
    assert torch.isfinite(answer.grad_KBPD).all()
    assert (answer.grad_KBPD.flatten(2).norm(dim=2) > 0).all()


def test_what_the_task_says_of_itself_builds_it_again():
    told = json.loads(json.dumps(build().to_config()))
    again = build_task(told)
    assert again.to_config() == told == {"name": "generation", "instruction": "the sentiment is", "max_new_tokens": 8}
    assert (again.max_new_tokens, again.head_rows) == (8, 0)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        build(max_new_tokens=0)


def record(**fields) -> Record:
    return Record("mine.jsonl row 17", {"text": "a film", **fields})


def test_the_target_is_the_only_reference_where_there_are_none():
    task = build()
    several = record(target="it is good", references=["it is fine", "a fine one"])
    assert task.targets([record(target=" it is good "), several]) == [("it is good",), ("it is fine", "a fine one")]
    assert task.targets([record(target="it is good", references=None)]) == [("it is good",)]


@pytest.mark.parametrize(("fields", "words"), [
    ({"target": 3}, "column target: 3 is no text"),
    ({"target": None}, "column target: None is no text"),
    ({}, "column target: None is no text"),
    ({"target": " \n"}, "column target: .* is empty"),
    ({"target": "good", "references": "good"}, "column references: 'good' is no list of texts; .*Parquet"),
    ({"target": "good", "references": []}, r"column references: \[\] is no list of texts"),
    ({"target": "good", "references": ["good", 4]}, "column references: 4 is no text"),
    ({"target": "good", "references": ["good", ""]}, "column references: '' is empty"),
])  # fmt: skip
def test_what_is_no_truth_names_the_record(model, fields, words):
    with pytest.raises(DataError, match=r"mine\.jsonl row 17, " + words):
        build().targets([*RECORDS, record(**fields)])
    if fields.get("target") is not None and "references" not in fields:
        with pytest.raises(DataError, match=r"mine\.jsonl row 17, " + words):
            build().encode([record(**fields)], model.backbone, prompt_of(model))


TRUTHS = [("the cat sat on the mat", "a cat was sitting on a mat", "there is a cat on it"), ("dogs bark at night now",)]


def test_scores_are_sacrebleus_over_any_number_of_references():
    said = ["the cat sat on a mat", "dogs bark at the night now"]
    first, every = ([truth[0] for truth in TRUTHS],), [[*t, *[None] * (3 - len(t))] for t in TRUTHS]
    columns = [list(column) for column in zip(*every, strict=True)]
    score = build().score(said, TRUTHS)
    assert score.keys() == {"bleu", "chrf"}
    assert score["bleu"] == pytest.approx(corpus_bleu(said, columns).score)
    alone = build().score(said, [truth[:1] for truth in TRUTHS])
    assert alone["bleu"] == pytest.approx(corpus_bleu(said, list(first)).score)
    assert score["bleu"] > alone["bleu"]
    turned = build().score(said[::-1], TRUTHS[::-1])
    assert turned == pytest.approx(score)
    assert build().score(said, [truth[::-1] for truth in TRUTHS]) == pytest.approx(score)


def test_the_best_is_a_hundred_and_an_empty_text_is_legal():
    task = build()
    perfect = task.score([truth[-1] for truth in TRUTHS], TRUTHS)
    assert perfect == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    assert max(perfect.values()) <= 100
    assert task.score(["", ""], TRUTHS) == {"bleu": 0.0, "chrf": 0.0}
    half = task.score([TRUTHS[0][0], ""], TRUTHS)
    assert all(0 < value < 100 and type(value) is float for value in half.values())
    one = task.score(["good"], [("good",)])
    assert one == pytest.approx({"bleu": 0.0, "chrf": 100.0})
    assert all(math.isfinite(value) for value in one.values())


def test_white_space_around_a_text_is_no_part_of_it_and_a_line_break_is():
    answer = Answer(torch.zeros(1, 3), None, None, [["\n a film\nwas bad \n", "", " good"]])
    assert build().predict(answer, None) == ["a film\nwas bad", "", "good"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_references_are_read_from_a_file(tmp_path, ending):
    lines = [
        {"source": "Aa | is | Bb", "target": "Aa is Bb.", "references": ["Aa is Bb.", "It is Bb."], "split": "train"},
        {"source": "Cc | is | Dd", "target": "Cc is Dd.", "references": ["Cc is Dd."], "split": "test"},
        {"source": "Ee | is | Ff", "target": "Ee is Ff.", "references": None, "split": "test"},
    ]
    file = tmp_path / f"pairs.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), file)
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = {"text": "source", "target": "target", "references": "references"}
    data = loading.load(loading.Config(source=str(file), columns=columns, split_column="split"), 0)
    assert build().targets(data.train) == [("Aa is Bb.", "It is Bb.")]
    assert build().targets(data.test) == [("Cc is Dd.",), ("Ee is Ff.",)]


def toml(backbone: str, data: Path, instruction: str, rounds: int, new: int, training: str) -> str:
    return f"""
name = "sentences"
baselines = []
[backbone]
name = {json.dumps(backbone)}
attention = "eager"
dtype = "float32"
[prompt]
num_tokens = 8
enters_at = 0
[task]
name = "generation"
instruction = {json.dumps(instruction)}
max_new_tokens = {new}
[data]
source = {json.dumps(str(data))}
[partition]
kind = "iid"
num_clients = 2
min_records = 5
[method]
name = "fedavg"
[training]
{training}
[federation]
num_rounds = {rounds}
"""


def told(*words: str) -> str:
    """What `ficpd` prints when asked so."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_federation_that_writes_leaves_a_library_that_writes(llama, tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [record.fields for record in RECORDS * 6]
    file.write_text("".join(json.dumps(dict(line)) + "\n" for line in lines))
    training = "local_steps = 2\nbatch_size = 4"
    result = run(parse(toml(str(llama), file, "", 1, 5, training), "small.toml"), tmp_path / "run")
    for score in (result.scores.global_prompt, result.scores.per_client_mean, result.scores.zero_shot):
        assert score.keys() == {"bleu", "chrf"}
        assert all(0 <= value <= 100 for value in score.values())
    assert "Bleu. Own test" in small.page(tmp_path)
    texts = ["the film was good", "bad"]
    answers = told("predict", str(tmp_path / "run"), *[part for text in texts for part in ("--text", text)])
    lines = [json.loads(line) for line in answers.splitlines()]
    assert [line["text"] for line in lines] == texts
    opened = load_library(tmp_path / "run")
    prompt = opened.library.prompts["global"]
    for line in lines:
        (expected,) = opened.model.backbone.generate(prompt, [line["text"]], 5)
        assert line["prediction"] == expected.strip()
    found = opened.evaluate_prompts(RECORDS)
    assert found.keys() == {"zero-shot", "global"}


COLOURS = ["red", "green", "blue", "white", "black", "yellow", "grey", "brown"]
THINGS = ["car", "house", "door", "bird", "boat", "shirt", "book", "chair"]


@pytest.mark.slow
def test_smollm2_learns_to_write_in_a_federation(tmp_path):
    file = tmp_path / "things.jsonl"
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    lines = [{"text": f"colour: {c}; thing: {t}", "target": f"The {t} is {c}."} for c, t in pairs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = "local_steps = 4\nbatch_size = 8"
    experiment = parse(toml("smollm2", file, "In one sentence:", 3, 10, training), "things.toml")
    run(experiment, tmp_path / "run")
    bleu = {row.label: row.scores.global_prompt["bleu"] for row in FinishedRun.load(tmp_path / "run").results}
    assert bleu["fedavg"] > bleu["zero_shot"] + 20
    opened = load_library(tmp_path / "run")
    records = [Record(f"row {i}", line) for i, line in enumerate(lines[::8])]
    start, tuned = opened.library.start, opened.library.prompts["global"]
    batch = opened.task.encode(records, opened.model.backbone, start)
    before, after = opened.model.answer([Query(p.vectors_PD[None], batch) for p in (start, tuned)])
    assert after.loss_KB.mean() < 0.5 * before.loss_KB.mean()
    target = opened.task.targets(records)
    assert score_prompt(opened.task, tuned.vectors_PD, batch, target, opened.model)["bleu"] > 50
    said = json.loads(told("predict", str(tmp_path / "run"), "--text", "colour: pink; thing: hat"))
    assert "hat" in said["prediction"]
    assert "pink" in said["prediction"]
