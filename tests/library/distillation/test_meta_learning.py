"""Distillation and meta-learning: what is learned is what was taught, by numbers, on the tiny backbone."""

import pytest
import torch
from torch.nn import functional as F

import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError, ConfigError
from ficpd.library.distillation import distill as kd
from ficpd.library.distillation import meta_learning
from ficpd.library.distillation.distill import TEMPERATURE, TaskExamples, distill
from ficpd.library.distillation.meta_learning import InnerLoop, first_order_maml, reptile
from ficpd.tasks import classification
from ficpd.types import Batch, ModelOutput, Prompt, Query, Record

RATE, TOKENS = 0.2, 8
PLACES = {"sea": "sea beach", "town": "town street"}
WORDS = {"sea": ["waves", "boat", "shore", "salt"], "town": ["tram", "shop", "roof", "crowd"]}
INNER = InnerLoop(steps=4, rate=0.1)


@pytest.fixture(scope="module")
def model() -> QueryEngine:
    """Wide enough for a prompt to teach it something."""
    return QueryEngine(small.backbone(width=64))


def start(model: QueryEngine, task) -> Prompt:
    return small.start(model, task, TOKENS)


def places() -> classification.Classification:
    return classification.build(classification.Config(labels=PLACES, instruction="we saw the"))


def place_records(count: int, seed: int = 0) -> list[Record]:
    """As `small.records`, of another label set and in other words."""
    turned = {"good": "sea", "bad": "town"}
    found = []
    for i, record in enumerate(small.records(count, seed)):
        label = turned[record.fields["target"]]
        words = record.fields["text"].split()
        words[1] = WORDS[label][i % 4]
        found.append(Record(record.key, {"text": " ".join(words), "target": label}))
    return found


def encoded(model: QueryEngine, task, records: list[Record]) -> Batch:
    return task.encode(records, model.backbone, start(model, task))


def flipped(records: list[Record], wrong: str, right: str) -> list[Record]:
    """Every label is the other one: what no start knows."""
    other = {wrong: right, right: wrong}
    return [Record(r.key, {"text": r.fields["text"], "target": other[r.fields["target"]]}) for r in records]


def tuned(model: QueryEngine, batch: Batch, begin: torch.Tensor, steps: int = 80) -> torch.Tensor:
    return InnerLoop(steps, RATE).adapted(model, begin, [batch], 0)[0]


def answers(model: QueryEngine, prompt: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B]: which answer."""
    answer = model.answer([Query(prompt[None], batch, outputs=True)])[0]
    return kd.logits(answer.outputs_KB, batch).argmax(-1)


def agreement(model: QueryEngine, one: torch.Tensor, other: torch.Tensor, batch: Batch) -> float:
    return float((answers(model, one, batch) == answers(model, other, batch)).float().mean())


def loss(model: QueryEngine, prompt: torch.Tensor, batch: Batch) -> float:
    return float(model.answer([Query(prompt[None], batch)])[0].loss_KB.mean())


@pytest.fixture(scope="module")
def two(model):
    """Two tasks with different label sets, a teacher tuned on each, and the start of both."""
    begin = start(model, small.classes()).vectors_PD
    first = encoded(model, small.classes(), small.records(40))
    second = encoded(model, places(), flipped(place_records(40), "sea", "town"))
    return begin, [(first, tuned(model, first, begin)), (second, tuned(model, second, begin))]


@pytest.mark.parametrize("kind", ["squared", "kl"])
def test_one_prompt_learns_what_two_teachers_of_different_label_sets_say(model, two, kind):
    begin, taught = two
    lessons = [TaskExamples(batch, teacher[None]) for batch, teacher in taught]
    learned = distill(model, begin, lessons, steps=100, learning_rate=RATE, seed=0, loss=kind)
    assert learned.gained
    assert learned.after < 0.3 * learned.before
    for batch, teacher in taught:
        assert agreement(model, learned.vectors_PD, teacher, batch) >= 0.8
        assert agreement(model, learned.vectors_PD, teacher, batch) > agreement(model, begin, teacher, batch) + 0.2


def test_teachers_of_weight_nought_are_not_heard(model, two):
    begin, ((batch, teacher), (_, other)) = two
    alone = distill(model, begin, [TaskExamples(batch, teacher[None])], steps=3, learning_rate=RATE, seed=0)
    both = TaskExamples(batch, torch.stack([other, teacher]), weights=[0.0, 3.0])
    assert small.close(distill(model, begin, [both], steps=3, learning_rate=RATE, seed=0).vectors_PD, alone.vectors_PD)


def test_answers_that_an_example_has_not_stay_missing():
    said_KBC = torch.tensor([[[9.0, 9.0, -torch.inf]], [[1.0, 2.0, -torch.inf]]])
    batch = Batch(small.classes(), ((),), None, None, 0)
    assert kd._of_all(said_KBC, TaskExamples(batch, said_KBC, weights=[0, 3])).tolist() == [[1, 2, -torch.inf]]
    assert kd._of_all(said_KBC, TaskExamples(batch, said_KBC)).tolist() == [[5, 5.5, -torch.inf]]


@pytest.mark.parametrize("kind", ["squared", "kl"])
def test_the_teachers_mean_is_of_logits_or_of_probabilities(model, two, kind):
    _, ((batch, teacher), (_, other)) = two
    stacked = torch.stack([teacher, other])
    said = model.answer([Query(stacked, batch, outputs=True)])[0].outputs_KB
    said_KBC = kd.logits(said, batch).view(2, len(batch), -1)
    expected = said_KBC.mean(0) if kind == "squared" else (said_KBC / TEMPERATURE).softmax(-1).mean(0)
    found = kd._taught(model, TaskExamples(batch, stacked), kind)
    assert small.close(found.extra[kd.TEACHER], expected)


@pytest.mark.parametrize("kind", ["squared", "kl"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(model, two, kind):
    _, ((batch, teacher), _) = two
    how = {"steps": 2, "learning_rate": 1e-9, "seed": 0, "loss": kind}
    learned = distill(model, teacher, [TaskExamples(batch, teacher[None])], **how)
    assert learned.before == pytest.approx(0, abs=1e-5)


def test_losses_are_what_they_say_and_missing_answers_do_not_count():
    mine = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 1.0, 3.0]])
    theirs = torch.tensor([[2.0, 0.0, -torch.inf, -torch.inf], [0.0, 1.0, 1.0, -torch.inf]])
    scores = mine.clone().requires_grad_()
    outputs = ModelOutput(torch.zeros(2, 4), scores)

    def batch(teacher: torch.Tensor) -> Batch:
        return Batch(small.classes(), ((), ()), None, None, 0, {kd.TEACHER: teacher})

    squared = kd.squared(outputs, batch(theirs))
    assert squared.tolist() == pytest.approx([2.5, 4 / 3])
    soft = (theirs / TEMPERATURE).softmax(-1)
    divergence = kd.kl_loss(outputs, batch(soft))
    first = F.kl_div((mine[0, :2] / 2).log_softmax(-1), soft[0, :2], reduction="sum")
    second = F.kl_div((mine[1] / 2).log_softmax(-1), soft[1, :3], reduction="sum")
    assert divergence.tolist() == pytest.approx([4 * float(first), 4 * float(second)], rel=1e-5)
    (squared.sum() + divergence.sum()).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_a_tuned_head_is_distilled_as_well(model):
    task = small.classes(tuned_head=True)
    begin = start(model, task).vectors_PD
    batch = encoded(model, task, flipped(small.records(24), "good", "bad"))
    teacher = tuned(model, batch, begin)
    learned = distill(model, begin, [TaskExamples(batch, teacher[None])], steps=40, learning_rate=RATE, seed=0)
    assert learned.after < 0.5 * learned.before
    assert not torch.equal(learned.vectors_PD[-2:], begin[-2:])


def test_tasks_weigh_the_same_however_many_examples_they_have(model, two):
    begin, taught = two
    pairs = zip((32, 4), taught, strict=True)
    many, few = (TaskExamples(batch.select(range(n)), teacher[None]) for n, (batch, teacher) in pairs)
    grads = []
    for lesson in (many, few):
        batch = kd._taught(model, lesson, "squared")
        grads.append(kd.mean_gradient(model, [(begin, batch)], kd.squared))
    together = [(begin, kd._taught(model, lesson, "squared")) for lesson in (many, few)]
    found = kd.mean_gradient(model, together, kd.squared)
    assert small.close(found, torch.stack(grads).mean(0))


def test_the_seed_fixes_what_is_distilled(model, two):
    begin, taught = two
    lessons = [TaskExamples(batch, teacher[None]) for batch, teacher in taught]
    kept = begin.clone()
    how = {"steps": 4, "learning_rate": RATE, "batch_size": 4}
    first, again, other = (distill(model, begin, lessons, seed=seed, **how) for seed in (0, 0, 1))
    assert torch.equal(first.vectors_PD, again.vectors_PD)
    assert first[1:] == again[1:]
    assert not torch.equal(first.vectors_PD, other.vectors_PD)
    assert torch.equal(begin, kept)
    assert not first.vectors_PD.requires_grad


def test_what_is_measured_was_not_trained_on(model, two):
    _, ((batch, _), _) = two
    rest, held = kd.held_back(batch, 3)
    assert (len(rest), len(held)) == (30, 10)
    assert {*map(id, rest.items)} | {*map(id, held.items)} == {*map(id, batch.items)}
    few, same = kd.held_back(batch.select(range(7)), 3)
    assert len(few) == len(same) == 7


def test_a_worse_prompt_has_not_gained(model, two):
    begin, ((batch, teacher), _) = two
    learned = distill(model, teacher, [TaskExamples(batch, teacher[None])], steps=1, learning_rate=50.0, seed=0)
    assert not learned.gained
    assert not kd.DistilledPrompt(begin, 1.0, float("nan")).gained


def test_lessons_that_cannot_be_taught_say_why(model, two):
    begin, ((batch, teacher), _) = two
    stacked = torch.stack([teacher, begin])

    def refused(lessons, match):
        with pytest.raises(ConfigError, match=match):
            distill(model, begin, lessons, steps=1, learning_rate=RATE, seed=0)

    refused([], "lessons")
    refused([TaskExamples(batch.select([]), stacked)], "lessons")
    refused([TaskExamples(batch, stacked, weights=[1.0])], "expected 2 numbers")
    refused([TaskExamples(batch, stacked, weights=[0.0, 0.0])], "not all 0")
    refused([TaskExamples(batch, stacked, weights=[2.0, -1.0])], "from 0 on")


def episodes(model: QueryEngine, number: int = 4, seed: int = 0) -> list[Batch]:
    """Tasks that have one thing in common: everything is by the sea. The start says so of half of it."""
    found = []
    for i in range(number):
        records = [Record(r.key, {**r.fields, "target": "sea"}) for r in place_records(24, seed + i)]
        found.append(encoded(model, places(), records))
    return found


def reptiles(model, tasks, begin, **more):
    settings = {"outer_rate": 0.5, "outer_steps": 12, "seed": 0, **more}
    return reptile(model, tasks, begin, INNER, **settings)


def mamls(model, tasks, begin, **more):
    settings = {"outer_rate": 0.1, "outer_steps": 12, "seed": 0, **more}
    return first_order_maml(model, tasks, begin, INNER, **settings)


@pytest.mark.parametrize("learn", [reptiles, mamls])
def test_a_new_task_is_sooner_learned_from_where_meta_learning_ends(model, learn):
    begin = start(model, places()).vectors_PD
    learned = learn(model, episodes(model), begin)
    assert learned.gained
    assert learned.after < 0.7 * learned.before
    (new,) = episodes(model, 1, seed=50)
    support, held = new.select(range(12)), new.select(range(12, 24))

    def fitted(prompt: torch.Tensor, steps: int) -> float:
        return loss(model, InnerLoop(steps, INNER.rate).adapted(model, prompt, [support], 0)[0], held)

    assert fitted(learned.vectors_PD, 1) < fitted(begin, 4)
    assert fitted(learned.vectors_PD, 2) < 0.7 * fitted(begin, 2)


@pytest.mark.parametrize("learn", [reptiles, mamls])
def test_the_seed_fixes_what_is_learned(model, learn):
    begin = start(model, places()).vectors_PD
    tasks, kept = episodes(model, 2), begin.clone()
    first, again, other = (learn(model, tasks, begin, outer_steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors_PD, again.vectors_PD)
    assert first[1:] == again[1:]
    assert not torch.equal(first.vectors_PD, other.vectors_PD)
    assert torch.equal(begin, kept)


@pytest.mark.parametrize("learn", [reptiles, mamls])
def test_no_steps_leave_the_start(model, learn):
    begin = start(model, places()).vectors_PD
    learned = learn(model, episodes(model, 2), begin, outer_steps=0)
    assert torch.equal(learned.vectors_PD, begin)
    assert learned.before == learned.after


def test_one_step_of_reptile_is_its_formula(model):
    begin = start(model, places()).vectors_PD
    tasks = [batch.select(range(6)) for batch in episodes(model, 3)]  # so few that all are in one batch, in any order
    found = reptiles(model, tasks, begin, outer_rate=0.25, outer_steps=1).vectors_PD
    adapted = torch.stack([INNER.adapted(model, begin, [batch], 9)[0] for batch in tasks])
    assert small.close(found, begin + 0.25 * (adapted.mean(0) - begin))


def test_first_order_maml_takes_its_gradient_on_the_query_at_the_adapted_prompt(model, monkeypatch):
    begin, (task,) = start(model, places()).vectors_PD, episodes(model, 1)
    asked = []
    monkeypatch.setattr(
        meta_learning, "mean_gradient", lambda model, pairs: asked.append(pairs) or torch.zeros_like(begin)
    )
    mamls(model, [task], begin, outer_steps=2)
    ((first, query),), ((_, turned),) = asked
    part = meta_learning._episodes([task], 0)[0]
    assert (query.items, turned.items) == (part.query.items, part.support.items)
    assert not {*map(id, part.query.items)} & {*map(id, part.support.items)}
    assert not small.close(first, begin, 1e-3)
    assert loss(model, first, part.support) < loss(model, begin, part.support)


def test_tasks_with_different_label_sets_are_learned_together(model):
    begin = start(model, places()).vectors_PD
    tasks = [*episodes(model, 1), encoded(model, small.classes(), small.records(24))]
    assert reptiles(model, tasks, begin).gained


class Broken:
    """A optimizer that asks once and fails."""

    @staticmethod
    def tune(client, start_PD, batches, **_):
        yield Query(start_PD[None], next(batches), grad=True)
        raise FloatingPointError("the optimizer's own")


def test_an_inner_loop_that_fails_is_heard(model, monkeypatch):
    begin, tasks = start(model, places()).vectors_PD, episodes(model, 2)
    with monkeypatch.context() as patch:
        patch.setattr(meta_learning, "load", lambda kind, name: Broken)
        with pytest.raises(FloatingPointError, match="the optimizer's own"):
            reptiles(model, tasks, begin)
    monkeypatch.setattr(model.backbone, "supports_gradients", False)
    with pytest.raises(BackboneError, match="no gradients"):
        reptiles(model, tasks, begin)


@pytest.mark.parametrize("learn", [reptiles, mamls])
def test_episodes_that_cannot_be_learned_from_say_why(model, learn):
    begin, (task,) = start(model, places()).vectors_PD, episodes(model, 1)
    unlabelled = [Record(r.key, {"text": r.fields["text"]}) for r in small.records(4)]
    with pytest.raises(ConfigError, match="at least one"):
        learn(model, [], begin)
    with pytest.raises(ConfigError, match=r"1 examples with labels.*at least two"):
        learn(model, [task.select([0])], begin)
    with pytest.raises(ConfigError, match="4 examples without labels"):
        learn(model, [encoded(model, small.classes(), unlabelled)], begin)
