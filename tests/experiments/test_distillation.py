"""The server's last step: examples that are nobody's, in a file, and one prompt distilled from the prototypes."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

import decoders
import small
import test_groups
from ficpd.backbones.causal_lm import CausalLM
from ficpd.deployment import coordinator
from ficpd.errors import BackboneError, ConfigError, DataError
from ficpd.experiments import distillation
from ficpd.experiments.build import build_context
from ficpd.experiments.config import parse
from ficpd.experiments.distillation import validate_distillation
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import run as run_experiment
from ficpd.experiments.setup import build_method
from ficpd.library.distillation import generation as synthesis
from ficpd.library.distillation.filters import FilterResult
from ficpd.library.library import PromptLibrary
from ficpd.tasks import generation
from ficpd.types import Query
from site_of import Nobody, recipe

TEXTS = "\n".join(r.fields["text"] for r in small.records(60, 77)) + "\n"


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "public.txt").write_text(TEXTS)
    return f"distillation.texts={tmp_path / 'public.txt'}"


@pytest.mark.parametrize("how", ["squared", "kl", "reptile", "maml"])
def test_a_run_ends_in_a_distilled_prompt_and_a_file_of_examples(tmp_path, texts, how):
    found = test_groups.run(
        tmp_path, f"distillation.how={how}", texts, "distillation.steps=10", "distillation.least_agreement=0.5",
        "method.num_prototypes=2", rounds=2,
    )  # fmt: skip
    facts, library = found.distillation, PromptLibrary.load(tmp_path / "run")
    assert set(library.prompts) == {"global", "prototype-0", "prototype-1", "distilled"}
    moved = not (library.prompts["distilled"].vectors_PD == library.prompts["global"].vectors_PD).all()
    assert moved == facts.gained
    lines = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} <= {"good", "bad", "up", "down"}
    assert len(lines) == sum(int(said.split()[0]) for said in facts.examples.values())
    assert 0 <= found.scores.distilled["accuracy"] <= 1
    page = small.page(tmp_path)
    assert f"({how})" in page
    assert "One prompt was distilled from the prototypes" in page


@pytest.mark.parametrize("how", ["reptile", "maml"])
def test_each_prototype_is_a_task_with_the_labels_that_it_gives(tmp_path, texts, how, monkeypatch):
    """Two prototypes of one task that learned opposite things are two episodes of the same texts."""
    learn = {"reptile": distillation.reptile, "maml": distillation.first_order_maml}[how]
    seen: list = []
    monkeypatch.setattr(
        distillation, learn.__name__, lambda *args, **more: seen.append(args[1]) or learn(*args, **more)
    )
    given = small.experiment(tmp_path, "ficpd", f"distillation.how={how}", texts, "distillation.steps=2")
    context = build_context(given)
    model, task, start = context.model, context.task, context.start
    one = start.with_vectors(model.backbone.init_prompt("good fine", start.num_virtual_tokens, start.enters_at, 0))
    other = start.with_vectors(-5 * one.vectors_PD)
    basis = {"global": start, "prototype-0": one, "prototype-1": other}
    mine = {"prototype-0": [""], "prototype-1": [""]}
    monkeypatch.setattr(
        synthesis, "vote_labels", lambda model, prompts, task, drafts, least: FilterResult(drafts, Counter())
    )
    distillation.distill_library(context, basis, mine, {"prototype-0": 2, "prototype-1": 1}, RunDir(tmp_path / "run"))
    (episodes,) = seen
    assert len(episodes) == 2
    for episode, prompt in zip(episodes, (one, other), strict=True):
        answer = model.answer([Query(prompt.vectors_PD[None], episode, outputs=True)])[0]
        told = task.predict(answer, episode)
        assert [task.label_space[int(place)] for place in episode.targets] == told
    assert not torch.equal(episodes[0].targets, episodes[1].targets)


def test_a_task_without_labels_teaches_nothing_and_keeps_nobody_else_from_it(tmp_path, texts):
    recipe = test_groups.toml(tmp_path, rounds=2)
    rated = (tmp_path / "b.csv").read_text().replace(",up,", ",1.5,").replace(",down,", ",4.5,")
    (tmp_path / "b.csv").write_text(rated)
    rating = "groups.opposed.task={name='regression',anchors={'bad dull'=1.0,'good fine'=5.0}}"
    changes = ["distillation.how=squared", texts, "distillation.least_agreement=0.5", rating]
    found = run_experiment(parse(recipe, "groups.toml", changes), tmp_path / "run")
    assert found.distillation.examples["opposed"] == "0 examples: a task without labels"
    assert int(found.distillation.examples["plain"].split()[0]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("private", [(), ("privacy.name=record_gaussian", "privacy.noise_multiplier=1")])
def test_copies_of_training_records_are_dropped_or_under_a_guarantee_counted(tmp_path, private):
    """Under a guarantee nothing is chosen by records."""
    test_groups.toml(tmp_path)
    train = [line.split(",")[0] for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    (tmp_path / "public.txt").write_text("\n".join(dict.fromkeys(train)) + "\n")
    found = test_groups.run(
        tmp_path, "distillation.how=squared", f"distillation.texts={tmp_path / 'public.txt'}",
        "distillation.least_agreement=0.5", *private, rounds=2,
    ).distillation  # fmt: skip
    assert ("memorised" in found.examples["plain"]) == (not private)
    assert found.memorised["plain"] > 0 if private else found.memorised == {"plain": 0, "opposed": 0}


def test_without_any_example_the_global_prompt_stays(tmp_path):
    (tmp_path / "public.txt").write_text("?!\n..\n")
    changes = ("distillation.how=squared", f"distillation.texts={tmp_path / 'public.txt'}")
    found = test_groups.run(tmp_path, *changes, rounds=2)
    assert found.distillation.gained is False
    assert found.distillation.examples["plain"].startswith("0 examples; dropped: 2")
    assert found.scores.distilled == found.scores.global_prompt


def test_words_of_the_vocabulary_serve_where_nothing_else_is_given(tmp_path):
    found = test_groups.run(tmp_path, "distillation.how=kl", "distillation.per_label=8", rounds=2)
    assert found.distillation.writer == "words of the vocabulary"


def with_writer(folder, monkeypatch, write) -> dict:
    """A run whose distillation has a decoder of its own to write, which writes what `write` says to each request."""
    decoders.write(folder / "decoder")

    def generate(self, prompt, texts, max_tokens, temperature=0.0, seed=0):
        return [write(text) for text in texts]

    monkeypatch.setattr(CausalLM, "generate", generate)
    changes = [
        f"distillation.writer={folder / 'decoder'}",
        "distillation.per_label=10",
        "distillation.least_agreement=0.5",
    ]
    return test_groups.run(folder, "distillation.how=squared", *changes, rounds=2)


def test_a_writer_of_its_own_writes_for_every_label(tmp_path, monkeypatch):
    """Each task's labels are asked for, and what comes is voted on by the prototypes on the federation's own backbone."""
    asked: list[str] = []
    texts = iter(r.fields["text"] for r in small.records(400, 77))

    def write(request: str) -> str:
        asked.append(request)
        return next(texts)

    found = with_writer(tmp_path, monkeypatch, write).distillation
    assert found.writer != "words of the vocabulary"
    assert len(asked) == 40
    assert sum("it was good fine" in request for request in asked) == 20
    lines = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} <= {"good", "bad", "up", "down"}
    assert len(lines) == sum(int(said.split()[0]) for said in found.examples.values()) > 1


@pytest.mark.parametrize("said", ["", "   \n\n", "?!"])
def test_a_writer_that_writes_nothing_leaves_the_global_prompt(tmp_path, monkeypatch, said):
    found = with_writer(tmp_path, monkeypatch, lambda request: said)
    assert found.distillation.gained is False
    assert found.distillation.examples["plain"].startswith("0 examples; dropped: 20 ")
    assert (tmp_path / "run" / "synthetic.jsonl").read_text() == ""
    assert found.scores.distilled == found.scores.global_prompt
    assert "One prompt was distilled" in small.page(tmp_path)


@pytest.mark.slow
def test_smollm2_writes_for_a_federation_of_another_backbone(tmp_path):
    found = test_groups.run(
        tmp_path, "distillation.how=squared", "distillation.writer=smollm2", "distillation.per_label=6",
        "distillation.least_agreement=0.5", rounds=2,
    ).distillation  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    assert "smollm2" in found.writer.lower()
    assert lines
    assert all(len(line["text"].split()) >= 3 for line in lines)


def test_methods_without_prototypes_have_nothing_to_distil(tmp_path):
    found = test_groups.run(tmp_path, "distillation.how=kl", method="fedavg", rounds=2)
    assert "distillation" not in found


def test_a_writer_and_texts_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match="one of them"):
        parse(test_groups.toml(tmp_path), "x", ["distillation.writer=smollm2", "distillation.texts=a.txt"])


IN_VAIN = [
    (small.NUMBERS, ConfigError, r'distillation.how = "kl": task .regression.*\. Set it to "none"'),
    ("distillation.texts=nowhere.txt", DataError, r"distillation\.texts: nowhere\.txt: cannot be read"),
    ("distillation.writer=smolm2", BackboneError, r"distillation\.writer: weights 'smolm2'.*name a .* \(smollm2, "),
    ("distillation.writer=tiny", BackboneError, r"distillation\.writer = 'tiny' is of kind tiny, which writes nothing"),
]


@pytest.fixture
def no_hub(monkeypatch):
    """A name that no file has is unknown at once."""

    def unknown(name: str, *rest: object):
        raise BackboneError(f"weights {name!r}: no folder here, and the hub does not give it.")

    monkeypatch.setattr("ficpd.backbones.weights._snapshot", unknown)


def given(folder, change: str, method: str = "ficpd", *more: str):
    experiment = small.experiment(folder, method, "distillation.how=kl", change, *more)
    if change == small.NUMBERS:
        small.numbered(folder / "records.csv")
    return experiment


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(("change", "kind", "said"), IN_VAIN)
def test_a_run_that_could_not_be_distilled_at_its_end_is_not_begun(tmp_path, change, kind, said):
    with pytest.raises(kind, match=said):
        run_experiment(given(tmp_path, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(("change", "kind", "said"), IN_VAIN)
def test_no_site_is_waited_for_by_a_run_that_could_not_be_distilled(tmp_path, change, kind, said):
    text = recipe(build_context(given(tmp_path, change, "fpl")))
    with pytest.raises(kind, match=said):
        coordinator.run_coordinator(text, "small.toml", tmp_path / "served", Nobody(), say=lambda line: None)  # type: ignore[arg-type]
    assert not (tmp_path / "served").exists()


def test_a_baseline_that_could_not_be_distilled_stops_the_run_before_it_begins(tmp_path):
    experiment = given(tmp_path, "distillation.texts=nowhere.txt", "fedavg", 'baselines=["local", "fpl"]')
    with pytest.raises(DataError, match="nowhere"):
        run_experiment(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", [small.numbers(), small.choices(), generation.build(generation.Config())])
def test_some_task_must_have_labels(tmp_path, task):
    context = build_context(small.experiment(tmp_path, "ficpd", "distillation.how=squared"))
    method = build_method(context, context.experiment.method)
    validate_distillation(replace(context, tasks={"a": small.classes(), "b": task}), method)
    with pytest.raises(ConfigError, match=rf'"squared": task .{task.to_config()["name"]}'):
        validate_distillation(replace(context, tasks={"a": task, "b": task}), method)


def test_what_is_not_used_does_not_stop_a_method_without_prototypes(tmp_path):
    assert run_experiment(given(tmp_path, small.NUMBERS, "fedavg"), tmp_path / "run").num_rounds == 3
