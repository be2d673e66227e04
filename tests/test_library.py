"""Prompt libraries: kept whole, found by the way a prompt has come, fitted to few records."""

import json
import shutil

import pytest
import torch

import small
from ficpd.compute import Compute
from ficpd.errors import LibraryError
from ficpd.library import PromptLibrary, guarantee, model_card
from ficpd.tuners import Training
from ficpd.types import Prompt, Query

CARD = {
    "backbone": {"name": "tiny", "kind": "tiny", "options": {}},
    "task": {"name": "classification"},
    "method": "ficpd",
    "num_clients": 3,
    "num_rounds": 2,
    "privacy": {"unit": "none", "epsilon": None, "delta": None},
}
TRAINING = Training(learning_rate=0.05, batch_size=8)


def library(model: Compute, task=None, **ways: torch.Tensor) -> PromptLibrary:
    """Prompts that have come these ways from one start; two of a fixed seed if none are given."""
    begin = small.start(model, task or small.classes())
    random = torch.Generator().manual_seed(1)
    ways = ways or {name: torch.randn(begin.vectors_PD.shape, generator=random) for name in ("global", "prototype-0")}
    return PromptLibrary(begin, {n: begin.with_vectors(begin.vectors_PD + way) for n, way in ways.items()}, CARD)


def same(left: Prompt, right: Prompt) -> bool:
    alike = (left.backbone, left.enters_at, left.head_rows) == (right.backbone, right.enters_at, right.head_rows)
    return alike and torch.equal(left.vectors_PD, right.vectors_PD)


def axis(model: Compute, place: int, length: float = 1.0) -> torch.Tensor:
    way = torch.zeros_like(small.start(model, small.classes()).vectors_PD)
    way.view(-1)[place] = length
    return way


# ---------------------------------------------------------------- kept


@pytest.mark.parametrize("head", [False, True])
def test_a_library_comes_back_as_it_was_saved(tmp_path, model, head):
    given = library(model, small.classes(tuned_head=head))
    given.save(tmp_path / "lib")
    back = PromptLibrary.load(tmp_path / "lib")
    assert same(back.start, given.start)
    assert back.prompts.keys() == given.prompts.keys()
    assert all(same(prompt, given.prompts[name]) for name, prompt in back.prompts.items())
    assert back.card == CARD
    assert {file.name for file in (tmp_path / "lib").iterdir()} == {"prompts.safetensors", "card.json", "README.md"}
    assert [folder.name for folder in tmp_path.iterdir()] == ["lib"]


def test_prompts_that_are_the_start_itself_can_be_saved(tmp_path, model):
    begin = small.start(model, small.classes())
    PromptLibrary(begin, {"global": begin, "view": begin.with_vectors(begin.vectors_PD[None][0])}, CARD).save(
        tmp_path / "lib"
    )
    back = PromptLibrary.load(tmp_path / "lib")
    assert all(same(prompt, begin) for prompt in back.candidates().values())
    assert list(back.prompts) == ["global", "view"]


def test_saving_again_puts_the_new_in_the_place_of_the_old(tmp_path, model):
    library(model).save(tmp_path / "lib")
    other = library(model, other=axis(model, 0))
    other.save(tmp_path / "lib")
    assert list(PromptLibrary.load(tmp_path / "lib").prompts) == ["other"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["lib"]


def test_a_save_that_breaks_off_leaves_the_old(tmp_path, model, monkeypatch):
    given = library(model)
    given.save(tmp_path / "lib")
    monkeypatch.setattr("ficpd.library.model_card", lambda library: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        library(model, other=axis(model, 0)).save(tmp_path / "lib")
    assert PromptLibrary.load(tmp_path / "lib").prompts.keys() == given.prompts.keys()


def test_a_run_directory_that_holds_one_will_do(tmp_path, model):
    library(model).save(tmp_path / "run" / "library")
    assert list(PromptLibrary.load(tmp_path / "run").prompts) == ["global", "prototype-0"]


def test_what_is_no_library_is_said_to_be_none(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "notes.txt"):
        with pytest.raises(LibraryError, match="holds no prompt library"):
            PromptLibrary.load(folder)


def rewrite(folder, **parts) -> None:
    """The library with another metadata, or with other tensors."""
    from safetensors.torch import load_file, save_file

    tensors = parts.get("tensors") or load_file(folder / "prompts.safetensors")
    save_file(tensors, folder / "prompts.safetensors", parts.get("metadata"))


DAMAGE = {
    "cut": lambda f: (f / "prompts.safetensors").write_bytes((f / "prompts.safetensors").read_bytes()[:-9]),
    "empty": lambda f: (f / "prompts.safetensors").write_bytes(b""),
    "no card": lambda f: (f / "card.json").unlink(),
    "half a card": lambda f: (f / "card.json").write_text('{"backbone": {'),
    "a card that is no text": lambda f: (f / "card.json").write_bytes(b"\xff\xfe\x00"),
    "a card that is no object": lambda f: (f / "card.json").write_text("[1, 2]"),
    "no metadata": lambda f: rewrite(f),
    "a layer that is no number": lambda f: rewrite(f, metadata={"backbone": "x", "enters_at": "top", "head_rows": "0"}),
    "no start": lambda f: rewrite(
        f, tensors={"global": torch.ones(3, 16)}, metadata={"backbone": "x", "enters_at": "0", "head_rows": "0"}
    ),
    "prompts of two shapes": lambda f: rewrite(
        f, tensors={"start": torch.ones(3, 16), "global": torch.ones(4, 16)},
        metadata={"backbone": "tiny:16x2", "enters_at": "1", "head_rows": "0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_refused(tmp_path, model, damage):
    library(model).save(tmp_path / "lib")
    DAMAGE[damage](tmp_path / "lib")
    with pytest.raises(LibraryError, match="is damaged or of another version"):
        PromptLibrary.load(tmp_path / "lib")


def test_a_library_of_another_backbone_is_refused(model):
    other = Compute(small.backbone(width=32))
    with pytest.raises(LibraryError, match=r"made on backbone tiny \(tiny:16x2\), this is tiny \(tiny:32x2\)"):
        library(model).check(other.backbone)
    library(model).check(model.backbone)
    with pytest.raises(LibraryError, match="mean nothing here"):
        library(model).losses(small.records(3), small.classes(), other)
    with pytest.raises(LibraryError, match="mean nothing here"):
        library(model).adapt(small.records(3), small.classes(), other, TRAINING)


# ---------------------------------------------------------------- found and composed


def test_the_nearest_is_the_one_of_the_same_direction(model):
    given = library(model, east=axis(model, 0, 0.1), north=axis(model, 1, 50.0), west=axis(model, 0, -1.0))
    assert given.nearest(axis(model, 0, 0.01) + axis(model, 1, 0.005), 3) == ["east", "north", "west"]
    assert given.nearest(axis(model, 1, 9.0)) == ["north"]
    assert given.nearest(axis(model, 0, -9.0), 1) == ["west"]
    assert len(given.nearest(axis(model, 5), 99)) == 3


def test_each_is_nearest_to_its_own_way(model):
    given = library(model)
    assert all(given.nearest(given.way(name)) == [name] for name in given.prompts)


def test_ties_go_by_name(model):
    given = library(model, b=axis(model, 0), a=axis(model, 0, 2.0))
    assert given.nearest(axis(model, 0), 2) == ["a", "b"]


def test_a_composition_is_the_start_and_the_weighted_ways(model):
    given = library(model, east=axis(model, 0, 2.0), north=axis(model, 1, 4.0))
    half = given.compose({"east": 0.5, "north": -0.25})
    assert small.close(half.vectors_PD, given.start.vectors_PD + axis(model, 0, 1.0) - axis(model, 1, 1.0))
    assert same(half, given.start.with_vectors(half.vectors_PD))
    assert small.close(given.compose({"east": 1.0}).vectors_PD, given.prompts["east"].vectors_PD)
    assert same(given.compose({}), given.start)


def test_a_composition_of_what_is_not_there_is_refused(model):
    with pytest.raises(LibraryError, match="no prompt 'south' in this library; it has global, prototype-0"):
        library(model).compose({"south": 1.0})


# ---------------------------------------------------------------- fitted


def loss_of(prompt: Prompt, records, task, model: Compute) -> float:
    batch = task.encode(records, model.backbone, prompt)
    return float(model.answer([Query(prompt.vectors_PD[None], batch)])[0].loss_KB.mean())


def test_losses_are_those_of_every_prompt(model):
    given, records, task = library(model), small.records(9), small.classes()
    losses = given.losses(records, task, model)
    assert list(losses) == ["start", "global", "prototype-0"]
    assert all(
        losses[n] == pytest.approx(loss_of(p, records, task, model), abs=1e-5) for n, p in given.candidates().items()
    )


@pytest.mark.parametrize("head", [False, True])
def test_adapting_improves_on_every_prompt_of_the_library(model, head):
    task = small.classes(tuned_head=head)
    given, records = library(model, task), small.records(48, 3)
    adapted = given.adapt(records, task, model, TRAINING, steps=20)
    assert adapted.tuned
    assert adapted.began_from == min(adapted.losses, key=adapted.losses.get)
    best = min(loss_of(prompt, records, task, model) for prompt in given.candidates().values())
    assert loss_of(adapted.prompt, records, task, model) < best - 0.02
    assert same(given.start.with_vectors(adapted.prompt.vectors_PD), adapted.prompt)


def test_the_best_of_the_library_is_begun_from(model):
    task, records = small.classes(), small.records(32, 3)
    fitted = library(model).adapt(records, task, model, TRAINING, steps=40).prompt
    begin = small.start(model, task)
    away = begin.with_vectors(begin.vectors_PD * -3)
    given = PromptLibrary(begin, {"away": away, "fitted": fitted}, CARD)
    assert given.adapt(records, task, model, TRAINING, steps=1).began_from == "fitted"


def test_tuning_that_does_not_help_is_not_kept(model):
    given, task, records = library(model), small.classes(), small.records(24, 3)
    wild = Training(learning_rate=1e4, batch_size=4)
    adapted = given.adapt(records, task, model, wild, steps=3)
    assert not adapted.tuned
    assert same(adapted.prompt, given.candidates()[adapted.began_from])


@pytest.mark.parametrize("count", [1, 7])
def test_with_few_records_the_best_is_taken_as_it_is(model, count):
    given, task, records = library(model), small.classes(), small.records(count)
    adapted = given.adapt(records, task, model, TRAINING)
    assert not adapted.tuned
    losses = {name: loss_of(prompt, records, task, model) for name, prompt in given.candidates().items()}
    assert adapted.began_from == min(losses, key=losses.get)
    assert same(adapted.prompt, given.candidates()[adapted.began_from])


def test_a_seed_fixes_an_adaptation(model):
    given, task, records = library(model), small.classes(), small.records(48, 3)
    one, two, other = (given.adapt(records, task, model, TRAINING, 20, seed).prompt for seed in (1, 1, 2))
    assert torch.equal(one.vectors_PD, two.vectors_PD)
    assert not torch.equal(one.vectors_PD, other.vectors_PD)


# ---------------------------------------------------------------- told


def test_the_page_says_what_it_is_and_what_it_cost(model):
    page = model_card(library(model, small.classes(tuned_head=True)))
    for words in ("global, prototype-0", "tiny (`tiny:16x2`)", "3 virtual tokens of width 16", "entering at layer 1"):
        assert words in page
    assert "ficpd, 3 clients, 2 rounds" in page
    assert "privacy: none" in page


def test_a_guarantee_is_told_with_its_unit():
    block = {"epsilon": 3.5, "delta": 1e-5, "unit": "record", "noise": "cryptographic"}
    assert guarantee(block) == "ε = 3.50 per record, cryptographic noise"
    assert guarantee({"epsilon": 0.0, "unit": "record", "noise": None}) == "nothing leaves"
    assert guarantee({}) == "none"


def test_the_card_is_plain_json(tmp_path, model):
    library(model).save(tmp_path / "lib")
    assert json.loads((tmp_path / "lib" / "card.json").read_text()) == CARD
    shutil.copytree(tmp_path / "lib", tmp_path / "elsewhere")
    assert PromptLibrary.load(tmp_path / "elsewhere").card == CARD
