"""An input prompt that imitates one at a later layer: that it learns to, and says how well on texts it never saw."""

import json
from dataclasses import replace

import pytest
import torch

import decoders
import small
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import LibraryError
from ficpd.experiments.build import build_context
from ficpd.experiments.config import parse
from ficpd.library import peft_distillation
from ficpd.library.library import PromptLibrary
from ficpd.library.peft_distillation import Texts, distill_library_prompt, distill_to_input
from ficpd.library.peft_io import export, own_base, read_folder, reentry_lines
from ficpd.library.session import load_library
from ficpd.tasks import classification, generation
from ficpd.tasks.build import start_text
from ficpd.types import ModelOutput, Prompt, Readout, Record

LONG = {"good": "very good", "bad": "bad and dull", "so": "fine"}


def texts(count: int = 64, seed: int = 3) -> Texts:
    return Texts(small.records(count, seed), "texts.csv")


def few_texts() -> Texts:
    """Eight texts, each four times, so that what is held back was seen: a random decoder generalises nothing."""
    words = decoders.WORDS
    lines = [" ".join(words[i : i + 3 + i % 2]) for i in range(8)] * 4
    return Texts([Record(line, {"text": line}) for line in lines], "lines")


def strong(model: QueryEngine, task, enters_at: int = 1, scale: float = 3.0) -> Prompt:
    """A prompt far from any start, so that its answers are its own."""
    prompt = small.start(model, task, 3, enters_at)
    drawn = torch.randn(prompt.vectors_PD.shape, generator=torch.Generator().manual_seed(7))
    return prompt.with_vectors(prompt.vectors_PD + scale * drawn)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, whose prompts enter at layer 1."""
    folder = tmp_path_factory.mktemp("reentry")
    small.run(folder, "ficpd", "federation.num_rounds=6")
    return folder / "run"


def test_the_imitation_answers_like_the_original(model):
    task = small.classes()
    prompt = strong(model, task)
    done = distill_to_input(prompt, texts(), task, model, steps=80)
    assert (done.prompt.enters_at, done.prompt.head_rows, done.prompt.vectors_PD.shape) == (0, 0, (3, 16))
    assert done.after.loss < done.before.loss / 4
    assert done.after.same > 0.85
    assert (done.facts["tuned_on"], done.facts["held_back"], done.facts["from_layer"]) == (48, 16, 1)


def test_what_it_says_of_itself_is_so(model):
    """The agreement is that of its logits with the original's on the quarter held back, which tuning never saw."""
    task, given = small.classes(), texts(16)
    prompt = strong(model, task)
    done = distill_to_input(prompt, given, task, model, steps=20, seed=1)
    shown: list = []

    class Watched(QueryEngine):
        def answer(self, queries):
            shown.extend(item for q in queries if q.grad for items in q.batch.items for item in items)
            return super().answer(queries)

    again = distill_to_input(prompt, given, task, Watched(model.backbone), steps=20, seed=1)
    assert torch.equal(done.prompt.vectors_PD, again.prompt.vectors_PD)
    seen = {tuple(item.content.tolist()) for item in shown}
    held = []
    for record in given.records:
        (item,) = task.encode([record], model.backbone, done.prompt).items[0]
        held += [] if tuple(item.content.tolist()) in seen else [record]
    assert len(held) == 4
    theirs = peft_distillation.logits(prompt.vectors_PD, task.encode(held, model.backbone, prompt), model)
    for mine, said in ((done.start, done.before), (done.prompt, done.after)):
        ours = peft_distillation.logits(mine.vectors_PD, task.encode(held, model.backbone, mine), model)
        assert said.loss == pytest.approx(float((ours - theirs).square().mean()), rel=1e-3)
        assert said.same == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).float().mean()))


def test_the_seed_and_the_number_of_virtual_tokens_are_free(model):
    task = small.classes()
    prompt, given = strong(model, task), texts(16)
    first, other = (distill_to_input(prompt, given, task, model, num_tokens=5, steps=20, seed=seed) for seed in (1, 2))
    assert first.prompt.vectors_PD.shape == other.prompt.vectors_PD.shape == (5, 16)
    assert first.facts["helped"]
    assert other.facts["helped"]
    assert not torch.equal(first.prompt.vectors_PD, other.prompt.vectors_PD)


def test_targets_of_the_texts_are_not_looked_at(model):
    """Texts may come from a labelled file with other labels than the task's."""
    task = small.classes()
    given = texts(16)
    other = Texts([replace(r, fields={**r.fields, "target": "neither"}) for r in given.records], "other")
    found = [distill_to_input(strong(model, task), t, task, model, steps=3).prompt.vectors_PD for t in (given, other)]
    assert torch.equal(*found)


def test_tuning_that_does_not_help_is_not_taken(model):
    """Nothing is nearer to the untuned start than itself."""
    task = small.classes()
    prompt = Prompt(model.backbone.init_prompt(start_text([task]), 3, 0, 0), model.backbone.fingerprint)
    done = distill_to_input(prompt, texts(16), task, model, steps=10)
    assert done.before.same == 1
    assert not done.facts["helped"]
    assert torch.equal(done.prompt.vectors_PD, done.start.vectors_PD)
    assert done.after == done.before


def test_a_tuned_head_is_imitated_without_one(model):
    task = small.classes(tuned_head=True)
    prompt = strong(model, task)
    assert prompt.head_rows == 2
    done = distill_to_input(prompt, texts(), task, model, steps=80)
    assert (done.prompt.head_rows, len(done.prompt.vectors_PD)) == (0, 3)
    assert done.after.loss < done.before.loss / 2
    headless = small.classes()
    batch = headless.encode(texts().records, model.backbone, done.prompt)
    theirs = peft_distillation.logits(prompt.vectors_PD, task.encode(texts().records, model.backbone, prompt), model)
    ours = peft_distillation.logits(done.prompt.vectors_PD, batch, model)
    assert float((ours - theirs).square().mean()) < done.before.loss


def test_a_readout_of_the_prompts_own_is_imitated(model):
    """With the answers swapped in its readout, the logits to imitate are those of the prompt with the other sign."""
    task = small.classes()
    prompt, given = strong(model, task), texts()
    bias_C = torch.tensor([0.2, -0.2])
    swapped = Readout(task.readout(model.backbone).flip(0), bias_C, torch.full((2,), 0.5))
    plain = distill_to_input(prompt, given, task, model, steps=60)
    swapped = distill_to_input(prompt, given, task, model, readout=swapped, steps=60)
    theirs = bias_C - peft_distillation.logits(
        prompt.vectors_PD, task.encode(given.records, model.backbone, prompt), model
    )
    batch = task.encode(given.records, model.backbone, plain.prompt)
    near, far = (peft_distillation.logits(p.vectors_PD, batch, model) - theirs for p in (swapped.prompt, plain.prompt))
    assert float(near.square().mean()) < float(far.square().mean()) / 2


def test_answers_of_several_tokens_are_imitated(decoder):
    """Their logits are likelihoods, one item per answer."""
    task = classification.build(classification.Config(labels=LONG, instruction="the sentiment is"))
    prompt = strong(decoder, task, 2)
    done = distill_to_input(prompt, few_texts(), task, decoder, steps=100)
    assert done.after.loss < done.before.loss / 2
    assert done.after.same == 1


def test_a_prompt_that_writes_is_imitated_in_what_it_writes(decoder):
    task = generation.build(generation.Config(instruction="the sentiment is", max_new_tokens=4))
    prompt = strong(decoder, task, 2, 1.0)
    done = distill_to_input(prompt, few_texts(), task, decoder, steps=200)
    assert done.facts["writes"]
    assert done.after.loss < done.before.loss / 2
    assert done.after.same > done.before.same


def test_a_missing_answer_counts_for_nothing():
    """A row with fewer candidates is padded with -inf: neither a difference nor a gradient comes of it."""
    scores_RN = torch.tensor([[1.0, 3.0, -torch.inf], [0.0, 0.0, 6.0]], requires_grad=True)
    task = small.classes()
    batch = task.encode(small.records(2), small.backbone(), strong(QueryEngine(small.backbone()), task))
    found = peft_distillation.center_logits(ModelOutput(torch.zeros(2, 1), scores_RN), replace(batch, readout_CD=None))
    assert found.tolist() == [[-1.0, 1.0, 0.0], [-2.0, -2.0, 4.0]]
    found.square().sum().backward()
    assert torch.isfinite(scores_RN.grad).all()


def test_too_few_texts_are_refused(model):
    task = small.classes()
    with pytest.raises(LibraryError, match=r"7 texts \(texts.csv\) are too few .* at least 8"):
        distill_to_input(strong(model, task), texts(7), task, model)
    distill_to_input(strong(model, task), texts(8), task, model, steps=1)


def test_synthetic_examples_are_taken_where_the_run_has_some(folder, model, tmp_path):
    assert peft_distillation.default_texts(folder, model).weak
    lines = [json.dumps({"text": f"film {i}", "label": "good"}) for i in range(9)]
    for place in (tmp_path / "library", tmp_path):
        place.mkdir(exist_ok=True)
        (place / "synthetic.jsonl").write_text("\n".join(lines))
        found = peft_distillation.default_texts(tmp_path, model)
        assert (found.weak, found.records[8].fields, len(found.records)) == (False, {"text": "film 8"}, 9)
        (place / "synthetic.jsonl").unlink()
    (tmp_path / "synthetic.jsonl").write_text(lines[0] + '\n{"word": 3}\n')
    with pytest.raises(LibraryError, match='line 2: expected a JSON object with a "text"'):
        peft_distillation.default_texts(tmp_path, model)


def test_made_up_words_are_called_weak(folder):
    found = distill_library_prompt(load_library(folder), "global", steps=2)
    said = " ".join(reentry_lines(found.card))
    assert "random words" in said
    assert "quality on real texts" in said


def test_a_library_with_the_imitation_alone(folder):
    whole = PromptLibrary.load(folder)
    found = distill_library_prompt(load_library(folder), "global", texts(16), steps=2, num_tokens=4)
    assert found.prompts.keys() == {"global"}
    assert {prompt.enters_at for prompt in found.candidates().values()} == {0}
    assert found.card["backbone"]["enters_at"] == 0
    assert whole.card["backbone"]["enters_at"] == 1
    assert found.card["tasks"] == whole.card["tasks"]
    said = " ".join(reentry_lines(found.card))
    for words in ("at layer 1", "12 texts (texts.csv)", "4 texts held back"):
        assert words in said
    assert "quality on real texts" not in said


def test_a_wrong_prompt_or_task_is_named(folder, tmp_path):
    with pytest.raises(LibraryError, match="no prompt 'globl' in this library; it has global"):
        distill_library_prompt(load_library(folder), "globl")
    with pytest.raises(LibraryError, match="unknown task 'x'"):
        distill_library_prompt(load_library(folder), "global", task="x")
    two = PromptLibrary.load(folder)
    task = next(iter(two.card["tasks"].values()))
    replace(two, card={**two.card, "tasks": {"a": task, "b": task}}, learned={}).save(tmp_path / "two")
    with pytest.raises(LibraryError, match=r"several tasks; name one of them with --task: a, b"):
        distill_library_prompt(load_library(tmp_path / "two"), "global")
    found = distill_library_prompt(load_library(tmp_path / "two"), "global", texts(8), task="b", steps=1)
    assert found.prompts.keys() == {"global"}


@pytest.mark.slow
def test_on_minilm_an_input_prompt_answers_as_the_librarys_does(minilm_run, tmp_path):
    """What PEFT can load in place of a prompt that enters at layer 3, tuned on texts that the federation never saw."""
    resolved = parse((minilm_run / "resolved.toml").read_text(), "resolved.toml")
    records = [record for shard in build_context(resolved).shards.values() for record in shard.test][:160]
    made = distill_library_prompt(load_library(minilm_run), "global", Texts(records, "test records"), steps=120)
    facts = made.card["reentered"]
    assert facts["from_layer"] == 3
    assert facts["after"]["loss"] < 0.5 * facts["before"]["loss"]
    assert facts["after"]["same"] >= max(0.75, facts["before"]["same"])
    export(made, "global", tmp_path / "out", own_base(made))
    assert read_folder(tmp_path / "out")[0].shape == (10, 384)
    assert f"{facts['after']['same']:.1%} answered alike" in (tmp_path / "out" / "README.md").read_text()
