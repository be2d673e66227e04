"""Images from end to end: digits in folders, a small random vision transformer, a head that starts from a few examples."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import sights
import small
from ficpd.cli import app
from ficpd.errors import BackboneError, ConfigError, DataError
from ficpd.experiments.build import build_context
from ficpd.experiments.config import parse
from ficpd.experiments.results import RunResult
from ficpd.experiments.runner import run
from ficpd.library.records import read_records
from ficpd.library.session import load_library

EXAMPLES = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`model`; `digits` with train and test, a folder for each label; `public`, three examples of each."""
    place = tmp_path_factory.mktemp("digits")
    (place / "model").mkdir()
    sights.write_vit(place / "model", spread=0.2)
    digits, seen = load_digits(), dict.fromkeys(range(10), 0)
    for number, (pixels, label) in enumerate(zip(digits.images[:630], digits.target[:630], strict=True)):
        seen[label] += 1
        side = "public" if seen[label] <= EXAMPLES else "digits/test" if number % 4 == 0 else "digits/train"
        folder = place / side / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"{number}.png")
    return place


def experiment(place: Path, *changes: str):
    labels = ", ".join(f'{d} = "the digit {d}"' for d in range(10))
    text = f"""
name = "digits"
baselines = []
[backbone]
name = {json.dumps(str(place / "model"))}
attention = "eager"
dtype = "float32"
[prompt]
num_tokens = 3
head_examples = {json.dumps(str(place / "public"))}
[task]
name = "classification"
labels = {{ {labels} }}
tuned_head = true
[data]
source = {json.dumps(str(place / "digits"))}
columns = {{ image = "image", target = "target" }}
[partition]
kind = "dirichlet"
concentration = 2.0
num_clients = 4
[method]
name = "fedavg"
[training]
local_steps = 10
batch_size = 16
[federation]
num_rounds = 6
"""
    return parse(text, "digits.toml", changes)


@pytest.fixture(scope="module")
def finished(place) -> Path:
    run(experiment(place), place / "run")
    return place / "run"


@pytest.mark.slow
def test_a_federation_learns_to_see(finished):
    metrics = RunResult.load(finished).scores
    assert metrics.zero_shot["accuracy"] > 0.15  # class means of three examples, of random features; guessing finds 0.1
    assert metrics.global_prompt["accuracy"] > metrics.zero_shot["accuracy"] + 0.15


def test_its_library_sees_images_of_others(finished, place):
    opened = load_library(finished)
    assert not opened.library.keys  # the backbone knows no words that a task could be described with
    records = read_records(place / "digits" / "test", {"image": "image"})
    found = opened.evaluate_prompts(records)
    assert found["global"]["accuracy"] > found["zero-shot"]["accuracy"]
    one = place / "digits" / "test" / "7"
    told = CliRunner().invoke(app, ["predict", str(finished), "--data", str(one), "-c", "image=image"])
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(file) for file in sorted(one.iterdir())]
    predicted = opened.predict(read_records(one, {"image": "image"}, False), prompt="global")
    assert [line["prediction"] for line in lines] == predicted


@pytest.mark.parametrize(("changes", "error", "words"), [
    (["task.tuned_head=false", "prompt.head_examples="], ConfigError, "no head is tuned"),
    (["distillation.how=kl"], ConfigError, "examples are texts"),
    (["data.columns={text='image', target='target'}"], DataError, "holds no file ending in"),
    (["prompt.num_tokens=2000"], BackboneError, "2000 virtual tokens"),
    (["backbone.options={image_size=18}"], BackboneError, "take 16 or 20"),
    (["prompt.head_examples=nowhere"], DataError, "prompt.head_examples: there is no file or folder 'nowhere'"),
])  # fmt: skip
def test_what_cannot_be_run_is_said_before_the_first_round(place, changes, error, words):
    with pytest.raises(error, match=words):
        build_context(experiment(place, *changes))


@pytest.mark.parametrize("folder", ["digits", "digits/train", "digits/../digits/test", "."])
def test_the_clients_own_records_are_no_public_examples(place, folder):
    with pytest.raises(ConfigError, match="the clients' private records"):
        build_context(experiment(place, f"prompt.head_examples={place / folder}"))


def test_without_words_and_without_a_head_there_is_nothing_to_classify_by(place):
    whole = experiment(place)
    prompt, task = whole.prompt.model_copy(update={"head_examples": None}), {**whole.task, "tuned_head": False}
    with pytest.raises(BackboneError, match="tuned_head = true"):
        build_context(whole.model_copy(update={"prompt": prompt, "task": task}))


def test_a_head_without_examples_starts_anywhere_but_always_there(place):
    whole = experiment(place)
    whole = whole.model_copy(update={"prompt": whole.prompt.model_copy(update={"head_examples": None})})
    heads = [build_context(whole.model_copy(update={"seed": seed})).start.vectors_PD[3:] for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not small.close(heads[0], heads[2], 0.1)


def test_directions_and_clip_norm_come_from_made_up_images(place):
    changes = [
        "compression.name=subspace", "compression.dimension=8", "privacy.name=record_gaussian", "privacy.epsilon=50",
    ]  # fmt: skip
    context = build_context(experiment(place, *changes))
    assert context.experiment.privacy["clip_norm"] > 0
    assert context.compression.subspace.size == 8
    assert context.compression.subspace.grad_scale.min() > 0


def test_a_clip_needs_no_head_and_its_tasks_have_keys(place, tmp_path):
    """Its labels are words; the library is found by them, and fitted to others' images."""
    (tmp_path / "clip").mkdir()
    sights.write_clip(tmp_path / "clip")
    two = {"0": "a good film", "1": "a bad story"}
    whole = experiment(place, f"backbone.name={tmp_path / 'clip'}", "federation.num_rounds=1", "training.local_steps=2")
    task = {**whole.task, "labels": two, "tuned_head": False, "instruction": "a photo of"}
    data = whole.data.model_copy(update={"where": {"target": ("0", "1")}})
    prompt = whole.prompt.model_copy(update={"head_examples": None})
    run(whole.model_copy(update={"prompt": prompt, "task": task, "data": data}), tmp_path / "run")
    opened = load_library(tmp_path / "run")
    assert set(opened.library.keys) == {"global"}
    records = [r for r in read_records(place / "public", {"image": "image"}) if r.fields["target"] in two]
    mine = opened.adapt(records, shots=0)
    mine.save(tmp_path / "mine")
    assert "ensemble" in " ".join(mine.library.card["adapted"]["table"])
    assert len(load_library(tmp_path / "mine").predict(records)) == 2 * EXAMPLES
