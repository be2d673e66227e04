"""The server's last step: examples that are nobody's, in a file, and one prompt distilled from the prototypes."""

import json

import pytest

import small
import test_groups
from ficpd.errors import ConfigError
from ficpd.experiment import parse
from ficpd.library import PromptLibrary

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
    facts, library = found["distillation"], PromptLibrary.load(tmp_path / "run")
    assert set(library.prompts) == {"global", "prototype-0", "prototype-1", "distilled"}
    moved = not (library.prompts["distilled"].vectors_PD == library.prompts["global"].vectors_PD).all()
    assert moved == facts["gained"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} <= {"good", "bad", "up", "down"}
    assert len(lines) == sum(int(said.split()[0]) for said in facts["examples"].values())
    assert 0 <= found["metrics"]["distilled"]["accuracy"] <= 1
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"Distilled ({how})" in page
    assert "Synthetic examples by" in page


def test_copies_of_training_records_are_dropped(tmp_path):
    test_groups.toml(tmp_path)
    train = [line.split(",")[0] for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    (tmp_path / "public.txt").write_text("\n".join(dict.fromkeys(train)) + "\n")
    found = test_groups.run(
        tmp_path, "distillation.how=squared", f"distillation.texts={tmp_path / 'public.txt'}",
        "distillation.least_agreement=0.5", rounds=1,
    )  # fmt: skip
    assert "memorised" in found["distillation"]["examples"]["plain"]
    assert found["distillation"]["memorised"] == {"plain": 0, "opposed": 0}


def test_under_a_guarantee_copies_are_counted_and_nothing_is_chosen_by_records(tmp_path):
    test_groups.toml(tmp_path)
    train = [line.split(",")[0] for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    (tmp_path / "public.txt").write_text("\n".join(dict.fromkeys(train)) + "\n")
    found = test_groups.run(
        tmp_path, "distillation.how=squared", f"distillation.texts={tmp_path / 'public.txt'}",
        "distillation.least_agreement=0.5", "privacy.name=record_gaussian", "privacy.noise_multiplier=1", rounds=1,
    )  # fmt: skip
    assert "memorised" not in found["distillation"]["examples"]["plain"]
    assert found["distillation"]["memorised"]["plain"] > 0


def test_without_any_example_the_global_prompt_stays(tmp_path):
    (tmp_path / "public.txt").write_text("?!\n..\n")
    found = test_groups.run(
        tmp_path, "distillation.how=squared", f"distillation.texts={tmp_path / 'public.txt'}", rounds=1
    )
    assert found["distillation"]["gained"] is False
    assert found["distillation"]["examples"]["plain"].startswith("0 examples; dropped: 2")
    assert found["metrics"]["distilled"] == found["metrics"]["global"]


def test_words_of_the_vocabulary_serve_where_nothing_else_is_given(tmp_path):
    found = test_groups.run(tmp_path, "distillation.how=kl", "distillation.per_label=8", rounds=1)
    assert found["distillation"]["writer"] == "words of the vocabulary"


def test_methods_without_prototypes_have_nothing_to_distil(tmp_path):
    found = test_groups.run(tmp_path, "distillation.how=kl", method="fedavg", rounds=1)
    assert "distillation" not in found


def test_a_writer_and_texts_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match="one of them"):
        parse(test_groups.toml(tmp_path), "x", ["distillation.writer=smollm2", "distillation.texts=a.txt"])
