"""Multiple choice: likelihoods are the plain model's, options vary in number, targets mean one option or are refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import berts
import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.cli import app
from ficpd.data import loading
from ficpd.errors import BackboneError, DataError
from ficpd.evaluation.audit.canary_injection import make_mislabelled_canaries
from ficpd.evaluation.evaluate import score_prompt
from ficpd.experiments.config import Experiment, parse
from ficpd.experiments.initialization import public_gradients
from ficpd.experiments.runner import run
from ficpd.library.session import load_library
from ficpd.tasks import multiple_choice
from ficpd.types import ClientData, Prompt, Query, Record

TWO = {"text": "the film was", "options": ["good", "very long and dull"], "target": 1}
FIVE = {"text": "a story", "options": ["bad", "not bad", "fine and good", "the film", "dull"], "target": 4}
RECORDS = [Record("row 1", TWO), Record("row 2", FIVE), Record("row 3", {**TWO, "target": 0})]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def prompt_of(model: QueryEngine, length: int = 3) -> Prompt:
    vectors = torch.randn(length, model.backbone.width, generator=torch.Generator().manual_seed(0))
    return Prompt(vectors, model.backbone.fingerprint, 0)


def asked(model: QueryEngine, records, task=None, **more):
    prompt = prompt_of(model)
    batch = (task or small.choices()).encode(records, model.backbone, prompt)
    return batch, model.answer([Query(prompt.vectors_PD[None], batch, outputs=True, **more)])[0]


def plain_scores(llama: Path, model: QueryEngine, batch) -> list[list[torch.Tensor]]:
    """The log-likelihoods of each option's tokens, by the plain model: one forward per option."""
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    front_PD = prompt_of(model).vectors_PD

    def one(item) -> torch.Tensor:
        embedded = torch.cat([front_PD, plain.get_input_embeddings()(item.content)])
        logs = plain(inputs_embeds=embedded[None]).logits[0, -item.scored - 1 : -1].log_softmax(-1)
        return logs.gather(1, item.content[-item.scored :, None])[:, 0].detach()

    return [[one(item) for item in items] for items in batch.items]


def test_a_decoders_scores_are_the_plain_models_likelihoods(llama, decoder):
    task = small.choices()
    batch, answer = asked(decoder, RECORDS, task)
    assert [len(items) for items in batch.items] == [2, 5, 2]
    told = [[float(t.mean()) for t in of] for of in plain_scores(llama, decoder, batch)]
    logits = task.logits(answer.outputs_KB, batch)
    for row, of in enumerate(told):
        assert small.close(logits[row, : len(of)], torch.tensor(of))
        assert (logits[row, len(of) :] == -torch.inf).all()
        right = batch.targets[row]
        assert float(answer.loss_KB[0, row]) == pytest.approx(float(-torch.tensor(of).log_softmax(0)[right]), abs=1e-5)
    assert task.predict(answer, batch) == [max(range(len(of)), key=of.__getitem__) for of in told]


def test_the_question_and_its_context_stand_before_every_option(decoder):
    task, records = small.choices(), [Record("row 1", {**TWO, "text_pair": "a long story"})]
    items = task.encode(records, decoder.backbone, prompt_of(decoder)).items[0]
    words = decoder.backbone.tokenizer.batch_decode([item.content for item in items])
    assert all(said.startswith("the film was \n a long story \n") for said in words)
    assert [said.split()[-1] for said in words] == ["good", "dull"]
    assert [item.scored for item in items] == [1, 4]


def test_a_masked_model_reads_every_option_too(tmp_path):
    model, task = QueryEngine(berts.load(berts.bert(tmp_path))), small.choices()
    records = [Record("row 1", {"text": "the film was", "options": ["good", "a dull story", "awful"], "target": 0})]
    batch, answer = asked(model, records, task)
    assert [item.scored for item in batch.items[0]] == [1, 3, 1]
    assert torch.isfinite(task.logits(answer.outputs_KB, batch)).all()
    assert task.predict(answer, batch)[0].of == 3


def test_an_encoders_scores_are_cosines_to_the_embedded_options(model):
    task = small.choices()
    batch, answer = asked(model, RECORDS, task)
    assert [len(items) for items in batch.items] == [1, 1, 1]
    logits = task.logits(answer.outputs_KB, batch)
    for row, record in enumerate(RECORDS):
        options = record.fields["options"]
        readout = model.backbone.readout("it was", options)
        assert small.close(logits[row, : len(options)], answer.outputs_KB.features_RD[row] @ readout.T)
        assert (logits[row, len(options) :] == -torch.inf).all()
        assert float(logits[row, : len(options)].abs().max()) <= 20.001


@pytest.mark.parametrize("kind", ["tiny", "decoder"])
def test_clients_with_other_numbers_of_options_share_a_forward(kind, model, decoder):
    model = model if kind == "tiny" else decoder
    prompt, task = prompt_of(model), small.choices()
    batches = [task.encode([record], model.backbone, prompt) for record in RECORDS]
    queries = [Query(prompt.vectors_PD.expand(2, -1, -1), batch, grad=True, outputs=True) for batch in batches]
    for query, together in zip(queries, model.answer(queries), strict=True):
        alone = model.answer([query])[0]
        assert small.close(together.loss_KB, alone.loss_KB)
        assert small.close(together.grad_KBPD, alone.grad_KBPD)
        assert torch.isfinite(together.grad_KBPD).all()
    whole = task.encode(RECORDS, model.backbone, prompt)
    answer = model.answer([Query(prompt.vectors_PD[None], whole, outputs=True)])[0]
    parts = model.answer([Query(prompt.vectors_PD[None], batch, outputs=True) for batch in batches])
    assert task.predict(answer, whole) == [task.predict(p, b)[0] for p, b in zip(parts, batches, strict=True)]
    assert [option.of for option in task.predict(answer, whole)] == [2, 5, 2]


def test_a_gradient_is_that_of_the_loss(decoder):
    prompt, task = prompt_of(decoder), small.choices()
    batch = task.encode(RECORDS[:2], decoder.backbone, prompt)
    grad = decoder.answer([Query(prompt.vectors_PD[None], batch, grad=True)])[0].grad_KBPD[0]
    way = torch.randn(prompt.vectors_PD.shape, generator=torch.Generator().manual_seed(1))
    both = torch.stack([prompt.vectors_PD + 1e-3 * way, prompt.vectors_PD - 1e-3 * way])
    loss = decoder.answer([Query(both, batch)])[0].loss_KB
    assert torch.allclose((loss[0] - loss[1]) / 2e-3, (grad * way).sum((1, 2)), rtol=0.02, atol=5e-3)


def test_no_records_are_no_error(model, decoder):
    for one in (model, decoder):
        batch, answer = asked(one, [])
        assert small.choices().predict(answer, batch) == []


def test_an_option_that_leaves_no_room_names_its_record(decoder):
    records = [*RECORDS, Record("exam.jsonl row 9", {**TWO, "options": ["good", "bad " * 70]})]
    with pytest.raises(BackboneError, match=r"exam\.jsonl row 9: a prompt length longer than the context"):
        asked(decoder, records)


def record(options, target=0) -> Record:
    return Record("exam.csv row 3", {"text": "which?", "options": options, "target": target})


@pytest.mark.parametrize(("options", "target", "place"), [
    (["red", "blue", "green"], 2, 2),
    (["red", "blue", "green"], "2", 2),
    (["red", "blue", "green"], "B", 1),
    (["red", "blue", "green"], "b ", 1),
    (["red", "blue", "green"], "green", 2),
    (["red", " blue "], "blue", 1),
    (["4", "3", "2", "1"], 3, 3),
    (["B", "A"], 0, 0),
    (["red", "blue"], 1.0, 1),
    (["A", "B"], "B", 1),
    ({"A": "red", "B": "blue", "C": None}, "B", 1),
    ({"left": "red", "right": "blue"}, "right", 1),
    ({"left": "red", "right": "blue"}, 1, 1),
    (["red", "blue", "", None], "blue", 1),
])  # fmt: skip
def test_what_a_target_means(options, target, place):
    (found,) = small.choices().targets([record(options, target)])
    assert found == place
    assert found.of == len([text for text in (options.values() if isinstance(options, dict) else options) if text])


@pytest.mark.parametrize(("options", "target", "says"), [
    (["red", "blue"], 2, "2 is none of the options"),
    (["red", "blue"], -1, "-1 is none of the options"),
    (["red", "blue"], "C", "'C' is none"),
    (["red", "blue"], "Red", "'Red' is none"),
    (["red", "blue"], True, "True is none"),
    (["red", "blue"], 1.5, "1.5 is none"),
    (["B", "A"], "B", "'B' may mean several"),
    (["3", "2", "1", "0"], "3", "'3' may mean several"),
    (["red", "red"], "red", "'red' may mean several"),
])  # fmt: skip
def test_a_target_that_is_not_one_option_names_its_record(model, options, target, says):
    with pytest.raises(DataError, match=r"exam\.csv row 3, column target: " + says + ".*0 to "):
        asked(model, [record(options, target)])


@pytest.mark.parametrize(("options", "says"), [
    (None, "None is no list of texts"),
    ("red|blue", "no list of texts"),
    (["red"], "1 given; a choice needs two"),
    (["red", None, ""], "1 given; a choice needs two"),
    (["red", "", "blue"], "option B is ''"),
    (["red", 5], "option B is 5"),
    ([str(i) for i in range(27)], "26 at most"),
])  # fmt: skip
def test_what_are_no_options_names_its_record(model, options, says):
    with pytest.raises(DataError, match=r"exam\.csv row 3, column options: .*" + says):
        asked(model, [record(options)])


def test_the_score_has_chance_and_an_interval():
    task = small.choices()
    targets = task.targets([record(["red", "blue"]), record(list("vwxyz")), record(["red", "blue"], 1)] * 20)
    score = task.score([0] * 60, targets)
    assert score["accuracy"] == pytest.approx(2 / 3)
    assert score["chance"] == pytest.approx((1 / 2 + 1 / 5 + 1 / 2) / 3)
    z, p, n = 1.959964, 2 / 3, 60  # Wilson's formula
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    ends = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert [score["accuracy_low"], score["accuracy_high"]] == pytest.approx(ends, abs=1e-5)


def test_made_up_records_have_options_and_different_gradients(model, decoder):
    task = small.choices()
    assert task.synthetic_fields(0)
    assert not small.classes().synthetic_fields(0)
    for one in (model, decoder):
        found = public_gradients(one, [task, small.classes()], prompt_of(one), 0, 10)
        assert found.shape == (10, 3, one.backbone.width)
        assert (found.flatten(1).norm(dim=1) > 0).all()
        assert torch.linalg.matrix_rank(found.flatten(1), rtol=1e-3) > 5


def test_a_canary_has_another_of_its_own_options():
    task, records = small.choices(), small.questions(30)
    wrong = make_mislabelled_canaries(task, records, {"a": ClientData(records, [], {})}, 0)
    pairs = list(zip(task.targets(records), task.targets(wrong), strict=True))
    assert len(pairs) == 30
    assert all(right != other for right, other in pairs)
    assert {int(other) for _, other in pairs} > {0, 1, 2}


def table(path: Path, count: int = 60) -> Path:
    lines = [{**r.fields, "site": f"site-{i % 3}"} for i, r in enumerate(small.questions(count, 1))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


TASK = [
    'task = { name = "multiple_choice", instruction = "it was" }', "prompt.enters_at=0", "backbone.options={}",
    "training.local_steps=4", "training.batch_size=8",
]  # fmt: skip
OPTIONS = "data.columns={ text = 'text', options = 'options', target = 'target' }"


def experiment(data: Path, *changes: str, rounds: int = 3) -> Experiment:
    return parse(small.toml(data, rounds=rounds), "small.toml", [*TASK, *changes])


def test_a_federation_that_chooses_and_a_library_that_is_adapted(tmp_path):
    result = run(experiment(table(tmp_path / "exam.jsonl"), OPTIONS), tmp_path / "run")
    whole, first = result.scores.global_prompt, result.scores.zero_shot
    assert whole.keys() == {"accuracy", "accuracy_low", "accuracy_high", "chance"}
    assert whole["accuracy_low"] < whole["accuracy"] < whole["accuracy_high"] or whole["accuracy"] in (0, 1)
    assert whole["chance"] == first["chance"] == pytest.approx(0.34, abs=0.1)
    page = small.page(tmp_path)
    assert "everyone's test % [95 %]\n" in page
    assert f"Accuracy; chance {100 * whole['chance']:.1f}. " in page
    for score in (first, whole):
        ends = f"[{100 * score['accuracy_low']:.1f}, {100 * score['accuracy_high']:.1f}]"
        assert f"\n{100 * score['accuracy']:.1f} {ends}\n" in page
    opened = load_library(tmp_path / "run")
    few = small.questions(8, 5)
    batch = opened.encode(few)
    queries = [Query(p.vectors_PD[None], batch) for p in (opened.library.start, opened.library.prompts["global"])]
    before, after = (opened.model.answer([query])[0].loss_KB.mean() for query in queries)
    assert after < before
    assert opened.evaluate_prompts(few).keys() == {"zero-shot", "global"}
    table(tmp_path / "few.jsonl", 8)
    base = [str(tmp_path / "run"), "--data", str(tmp_path / "few.jsonl"), "-c", "options=options"]
    for how in ("leave", "tune", "auto"):
        told = CliRunner().invoke(app, ["adapt", *base, "--how", how, "--out", str(tmp_path / how)])
        assert told.exit_code == 0, told.output
        assert "task multiple_choice" in told.output
    said = CliRunner().invoke(app, ["predict", str(tmp_path / "tune"), *base[1:]])
    answers = [json.loads(line)["prediction"] for line in said.stdout.splitlines()]
    assert len(answers) == 8
    assert set(answers) <= set(range(5))
    refused = CliRunner().invoke(app, ["adapt", *base, "--how", "demonstrations", "--out", str(tmp_path / "shown")])
    assert "expected a classification" in str(refused.exception)


def test_options_in_columns_of_their_own_and_a_decoder(tmp_path, llama):
    lines = ["text,target,site,a,b,c"]
    lines += [f"the film was,{'AB'[i % 2]},site-{i % 3},good,bad,{'dull' if i % 4 else ''}" for i in range(24)]
    (tmp_path / "exam.csv").write_text("\n".join(lines) + "\n")
    columns = 'data.options=["a", "b", "c"]'
    result = run(experiment(tmp_path / "exam.csv", f"backbone.name={llama}", columns, rounds=1), tmp_path / "run")
    assert 1 / 3 < result.scores.global_prompt["chance"] < 1 / 2
    given = ["predict", str(tmp_path / "run"), "--data", str(tmp_path / "exam.csv"), "-c", "options=a,b,c"]
    said = CliRunner().invoke(app, given)
    assert len(said.stdout.splitlines()) == 24
    assert {json.loads(line)["prediction"] for line in said.stdout.splitlines()} <= {0, 1, 2}


@pytest.mark.slow
def test_private_records_and_a_learned_subspace(tmp_path):
    private = ("privacy.name=record_gaussian", "privacy.epsilon=8.0", "compression={name='subspace',dimension=8}")
    result = run(experiment(table(tmp_path / "exam.jsonl"), OPTIONS, *private, rounds=1), tmp_path / "run")
    assert 0 < result.privacy.epsilon <= 8.0
    assert result.scores.global_prompt["chance"] == pytest.approx(0.34, abs=0.1)


@pytest.mark.slow
def test_smollm2_answers_an_exam_and_trains_on_it():
    file = SHARED / "medqa_usmle4.parquet"
    if not file.is_file():
        pytest.skip("there is no medqa_usmle4.parquet beside the repository")
    from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone

    config = loading.Config(
        source=str(file),
        columns={"text": "question", "target": "answer_idx"},
        options=("opt_a", "opt_b", "opt_c", "opt_d"),
        split_column="split",
    )
    backbone, _ = load_backbone(BackboneConfig(name="smollm2"), EngineConfig())
    task, model = multiple_choice.build(multiple_choice.Config(instruction="Answer:")), QueryEngine(backbone)
    prompt = Prompt(backbone.init_prompt("Answer the exam question.", 8, 0, 0), backbone.fingerprint)
    test = sorted(loading.load(config, 0).test, key=lambda record: len(record.fields["text"]))[:40]
    bare = prompt.vectors_PD[:0]
    score = score_prompt(task, bare, task.encode(test, backbone, prompt), task.targets(test), model)
    assert score["chance"] == 0.25
    assert score["accuracy_low"] < 0.5  # a small model is near chance
    batch = task.encode(test[:2], backbone, prompt)
    vectors_PD, losses = prompt.vectors_PD, []
    for _ in range(3):
        answer = model.answer([Query(vectors_PD[None], batch, grad=True)])[0]
        losses.append(float(answer.loss_KB.mean()))
        step = answer.grad_KBPD[0].mean(0).cpu()
        vectors_PD = vectors_PD - 0.05 * step / step.norm() * vectors_PD.norm()
    assert losses[-1] < losses[0]
