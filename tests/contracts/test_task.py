"""Every task: one loss per row, the row alone loses the same, a head travels with the prompt, errors name the record."""

import json
import math

import pytest
import torch

import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import DataError
from ficpd.interfaces import Task
from ficpd.registry import names
from ficpd.tasks.build import build_task
from ficpd.types import Batch, Query, Record

BUILDERS = {"multiple_choice": small.choices, "classification": small.classes, "regression": small.numbers}
PERFECT = {
    "multiple_choice": {"accuracy": 1.0, "accuracy_low": 7 / (7 + 1.959964**2), "accuracy_high": 1.0,
               "chance": (3 / 2 + 2 / 3 + 2 / 5) / 7},
    "classification": {"accuracy": 1.0, "f1": 1.0},
    "regression": {"rmse": 0.0, "pearson": 1.0},
}  # fmt: skip
UNDECIDED = {"multiple_choice": math.log(5)}
"""The loss of a record that is right and not sure at all; of two answers 0.69."""
HEADLESS = {"multiple_choice"}
"""Tasks without a head to tune."""

WRITE = {"generation"}
"""Tasks that the tiny backbone cannot do: tests/tasks holds them to the same on a small decoder."""


@pytest.fixture(params=sorted({*names("tasks")} - WRITE))
def name(request) -> str:
    if request.param not in BUILDERS:
        pytest.fail(f"task {request.param!r} has no entry in BUILDERS of tests/contracts/test_task.py: add one")
    return request.param


@pytest.fixture(params=[False, True], ids=["fixed head", "tuned head"])
def task(request, name) -> Task:
    if name in HEADLESS:
        return BUILDERS[name]() if not request.param else pytest.skip("has no head")
    return BUILDERS[name](tuned_head=request.param)


def records(task: Task, count: int = 7) -> list[Record]:
    name = task.to_config()["name"]
    return small.questions(count) if name == "multiple_choice" else small.records(count, real=name == "regression")


def batch_of(task: Task, model: QueryEngine, count: int = 7) -> Batch:
    return task.encode(records(task, count), model.backbone, small.start(model, task))


def test_the_loss_is_one_per_row_and_that_of_the_row_alone(task, model):
    batch, prompt = batch_of(task, model), small.start(model, task)
    loss = model.answer([Query(prompt.vectors_PD[None], batch)])[0].loss_KB
    assert loss.shape == (1, 7)
    assert torch.isfinite(loss).all()
    assert (loss >= 0).all()
    assert len(set(loss[0].tolist())) > 1
    for place in range(7):
        alone = model.answer([Query(prompt.vectors_PD[None], batch.select([place]))])[0].loss_KB
        assert small.close(alone[0, 0], loss[0, place])


def test_a_batch_is_encoded_record_by_record(task, model):
    given = records(task)
    prompt = small.start(model, task)
    batch = task.encode(given, model.backbone, prompt)
    assert (len(batch), batch.task, batch.enters_at) == (7, task, prompt.enters_at)
    backwards = task.encode(given[::-1], model.backbone, prompt)
    assert torch.equal(backwards.targets, batch.targets.flip(0))
    pairs = zip(batch.items, backwards.items[::-1], strict=True)
    assert all(torch.equal(ours[0].content, theirs[0].content) for ours, theirs in pairs)


def test_a_loss_is_lower_where_the_prediction_is_right(name, model):
    task = BUILDERS[name]()
    batch, prompt = batch_of(task, model), small.start(model, task)
    asked = model.answer([Query(prompt.vectors_PD[None], batch, outputs=True)])[0]
    predicted = task.predict(asked, batch)
    right = [Record(r.key, {**r.fields, "target": p}) for r, p in zip(records(task), predicted, strict=True)]
    best = model.answer([Query(prompt.vectors_PD[None], task.encode(right, model.backbone, prompt))])[0].loss_KB
    assert (best <= asked.loss_KB + 1e-6).all()
    assert best.mean() < asked.loss_KB.mean()
    assert best.max() < UNDECIDED.get(name, 0.7)


def test_predictions_targets_and_scores_are_of_one_form(task, model):
    given = records(task)
    batch, prompt = batch_of(task, model), small.start(model, task)
    answer = model.answer([Query(prompt.vectors_PD[None], batch, outputs=True)])[0]
    predicted, targets = task.predict(answer, batch), task.targets(given)
    assert len(predicted) == len(targets) == 7
    assert {type(value) for value in predicted} == {type(value) for value in targets}
    json.dumps(predicted)
    score = task.score(predicted, targets)
    assert all(type(value) is float and math.isfinite(value) for value in score.values())
    assert task.score(targets, targets) == pytest.approx(PERFECT[task.to_config()["name"]])
    assert score != task.score(targets, targets)


def test_a_score_does_not_depend_on_the_order_of_records(task):
    targets = task.targets(records(task, 12))
    guesses = small.shuffled(targets, 3)
    pairs = small.shuffled(zip(guesses, targets, strict=True), 5)
    assert task.score(guesses, targets) == pytest.approx(task.score([g for g, _ in pairs], [t for _, t in pairs]))


def test_a_single_record_has_a_score(task):
    targets = task.targets(records(task, 1))
    assert all(math.isfinite(value) for value in task.score(targets, targets).values())


def test_records_without_a_target_are_predicted(task, model):
    bare = [Record(r.key, {role: r.fields[role] for role in r.fields if role != "target"}) for r in records(task)]
    prompt = small.start(model, task)
    batch = task.encode(bare, model.backbone, prompt)
    assert batch.targets is None
    answer = model.answer([Query(prompt.vectors_PD[None], batch, outputs=True)])[0]
    known = model.answer([Query(prompt.vectors_PD[None], batch_of(task, model), outputs=True)])[0]
    assert task.predict(answer, batch) == task.predict(known, batch)


@pytest.mark.parametrize(("name", "wrong", "words"), [
    ("classification", "god", r"unknown label 'god'; did you mean 'good'\? Known: bad, good.*task\.labels"),
    ("regression", "four", r"'four' is no number"),
    ("regression", True, r"True is no number"),
    ("multiple_choice", 2, r"2 is none of the options"),
])  # fmt: skip
def test_a_target_that_is_none_names_the_record(model, name, wrong, words):
    task = BUILDERS[name]()
    fields = {"text": "a film", "target": wrong, "options": ["good", "bad"]}
    given = [*records(task, 2), Record("mine.csv row 17", fields)]
    with pytest.raises(DataError, match=r"mine\.csv row 17, column target: " + words):
        task.targets(given)
    with pytest.raises(DataError, match=r"mine\.csv row 17"):
        task.encode(given, model.backbone, small.start(model, task))


def test_a_number_that_is_a_label_is_one(model):
    config = {"name": "classification", "labels": {"0": "bad dull", "1": "good fine"}}
    task = build_task(config)
    one, other = Record("a", {"text": "x", "target": 1}), Record("b", {"text": "y", "target": "0"})
    assert task.targets([one, other]) == ["1", "0"]


def test_a_tuned_head_travels_with_the_prompt_and_gets_gradients(name, model):
    if name in HEADLESS:
        pytest.skip("has no head")
    task = BUILDERS[name](tuned_head=True)
    assert task.head_rows == 2
    prompt, batch = small.start(model, task), batch_of(task, model)
    assert len(prompt.vectors_PD) == 3 + task.head_rows
    query = Query(prompt.vectors_PD[None], batch, grad=True, outputs=True)
    answer = model.answer([query])[0]
    head = answer.grad_KBPD[0, :, 3:]
    assert answer.outputs_KB.readout_RCD.shape == (7, 2, model.backbone.width)
    assert (head.flatten(1).norm(dim=1) > 1e-6).all()
    turned = prompt.vectors_PD.clone()
    turned[3:] = turned[3:].flip(0)
    swapped = model.answer([Query(turned[None], batch, outputs=True)])[0]
    assert not small.close(swapped.loss_KB, answer.loss_KB, 1e-3)
    assert small.close(swapped.outputs_KB.features_RD, answer.outputs_KB.features_RD)


def test_a_head_that_is_not_tuned_does_not_travel(name, model):
    task = BUILDERS[name]()
    prompt = small.start(model, task)
    answer = model.answer([Query(prompt.vectors_PD[None], batch_of(task, model), outputs=True)])[0]
    assert (task.head_rows, prompt.head_rows, answer.outputs_KB.readout_RCD) == (0, 0, None)


def test_what_a_task_says_of_itself_builds_it_again(task, model):
    told = json.loads(json.dumps(task.to_config()))
    again = build_task(told)
    assert again.to_config() == task.to_config()
    prompt = small.start(model, task)
    batches = (of.encode(records(task), model.backbone, prompt) for of in (task, again))
    query, other = (Query(prompt.vectors_PD[None], batch) for batch in batches)
    ours, theirs = model.answer([query, other])
    assert small.close(ours.loss_KB, theirs.loss_KB)


def test_without_virtual_tokens_it_works_too(task, model):
    prompt = small.start(model, task)
    bare, batch = prompt.vectors_PD[3:], batch_of(task, model)
    assert len(bare) == task.head_rows
    answer = model.answer([Query(bare[None], batch, grad=True, outputs=True)])[0]
    assert torch.isfinite(answer.loss_KB).all()
    assert answer.grad_KBPD.shape == (1, 7, task.head_rows, model.backbone.width)
    assert len(task.predict(answer, batch)) == 7


def test_regression_stays_between_its_anchors_in_their_own_unit(model):
    task = small.numbers()
    batch, prompt = batch_of(task, model, 20), small.start(model, task)
    answer = model.answer([Query(prompt.vectors_PD[None], batch, outputs=True)])[0]
    predicted = task.predict(answer, batch)
    assert all(1.0 <= value <= 5.0 for value in predicted)
    assert max(predicted) - min(predicted) > 0.1
    assert task.score([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == pytest.approx({"rmse": 1.0, "pearson": 1.0})
    assert task.score([1.0, 1.0, 1.0], [2.0, 3.0, 4.0]) == pytest.approx({"rmse": math.sqrt(14 / 3)})
    for targets in ([1.0, 1.0, 1.0 + 1e-15], [1.0]):
        assert task.score([1.0, 2.0, 3.0][: len(targets)], targets).keys() == {"rmse"}


def test_a_prompt_that_diverged_predicts_the_anchors_mean(model):
    task = small.numbers()
    batch, prompt = batch_of(task, model, 4), small.start(model, task)
    answer = model.answer([Query(prompt.vectors_PD[None] * torch.nan, batch, outputs=True)])[0]
    assert task.predict(answer, batch) == [3.0] * 4


def test_anchors_need_two_values():
    with pytest.raises(ValueError, match="at least two different values"):
        build_task({"name": "regression", "anchors": {"low": 1.0, "high": 1.0}})
