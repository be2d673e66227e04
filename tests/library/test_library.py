"""Prompt libraries: kept whole, found by key or by the way a prompt has come. Fitting: `test_adapt.py`."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import small
from disk import to_the_disk
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import LibraryError
from ficpd.library.card import guarantee
from ficpd.library.library import FORMAT, PromptLibrary, prompt_keys, require_standalone, task_embedding
from ficpd.library.mixture import Mixture
from ficpd.library.selection import prepare_shots
from ficpd.library.session import get_prompt
from ficpd.optimizers import LocalTrainingConfig
from ficpd.tasks import classification, generation
from ficpd.types import Prompt, Query, Readout

CARD = {
    "backbone": {"name": "tiny", "kind": "tiny", "options": {}},
    "tasks": {"mood": {"name": "classification"}},
    "method": "ficpd",
    "num_clients": 3,
    "num_rounds": 2,
    "privacy": {"unit": "none", "epsilon": None, "delta": None},
}
KEYS = {"global": torch.eye(16)[0], "prototype-0": torch.eye(16)[1]}
MIXTURE = Mixture(
    torch.ones(2, 3, 16), torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.25, 0.25]), torch.ones(3, 2, 16),
    torch.zeros(3, 2),
)  # fmt: skip


def library(model: QueryEngine, task=None, **ways: torch.Tensor) -> PromptLibrary:
    """Prompts that have come these ways from one start; two of a fixed seed if none are given."""
    begin = small.start(model, task or small.classes())
    random = torch.Generator().manual_seed(1)
    ways = ways or {name: torch.randn(begin.vectors_PD.shape, generator=random) for name in ("global", "prototype-0")}
    return PromptLibrary(begin, {n: begin.with_vectors(begin.vectors_PD + way) for n, way in ways.items()}, CARD)


def same(left: Prompt, right: Prompt) -> bool:
    alike = (left.backbone, left.enters_at, left.head_rows) == (right.backbone, right.enters_at, right.head_rows)
    return alike and torch.equal(left.vectors_PD, right.vectors_PD)


def axis(model: QueryEngine, place: int, length: float = 1.0) -> torch.Tensor:
    way = torch.zeros_like(small.start(model, small.classes()).vectors_PD)
    way.view(-1)[place] = length
    return way


@pytest.mark.parametrize("head", [False, True])
def test_a_library_comes_back_as_it_was_saved(tmp_path, model, head):
    read = Readout(torch.ones(2, 16), torch.tensor([0.5, -0.5]), torch.tensor([0.25, 0.75]))
    whole = library(model, small.classes(tuned_head=head))
    given = replace(whole, keys=KEYS, readouts={"global": read}, mixture=MIXTURE)
    given.save(tmp_path / "lib")
    back = PromptLibrary.load(tmp_path / "lib")
    assert same(back.start, given.start)
    assert small.same(back.keys, KEYS)
    assert small.same(vars(back.readouts["global"]), vars(read))
    assert small.same(vars(back.mixture), vars(MIXTURE))
    assert back.prompts.keys() == given.prompts.keys()
    assert all(same(prompt, given.prompts[name]) for name, prompt in back.prompts.items())
    assert back.card == CARD
    assert {file.name for file in (tmp_path / "lib").iterdir()} == {"prompts.safetensors", "card.json", "README.md"}
    assert [folder.name for folder in tmp_path.iterdir()] == ["lib"]


def test_prompts_that_are_the_start_itself_can_be_saved(tmp_path, model):
    begin = small.start(model, small.classes())
    prompts = {"global": begin, "view": begin.with_vectors(begin.vectors_PD[None][0])}
    PromptLibrary(begin, prompts, CARD).save(tmp_path / "lib")
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
    monkeypatch.setattr("ficpd.library.library.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        library(model, other=axis(model, 0)).save(tmp_path / "lib")
    assert PromptLibrary.load(tmp_path / "lib").prompts.keys() == given.prompts.keys()


def test_a_library_is_on_the_disk_before_it_has_its_name(tmp_path, model, monkeypatch):
    """Else a run whose result is there may have a library of empty files after a power cut."""
    steps = to_the_disk(monkeypatch)
    library(model).save(tmp_path / "lib")
    names = ("prompts.safetensors", "card.json", "README.md")
    assert steps == [step for name in names for step in ("file", f"-> {name}", "folder")] + ["-> lib", "folder"]


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


META = {"format": str(FORMAT), "backbone": "tiny:16x2", "enters_at": "1", "head_rows": "0"}
DAMAGE = {
    "cut": lambda f: (f / "prompts.safetensors").write_bytes((f / "prompts.safetensors").read_bytes()[:-9]),
    "empty": lambda f: (f / "prompts.safetensors").write_bytes(b""),
    "no card": lambda f: (f / "card.json").unlink(),
    "half a card": lambda f: (f / "card.json").write_text('{"backbone": {'),
    "a card that is no text": lambda f: (f / "card.json").write_bytes(b"\xff\xfe\x00"),
    "a card that is no object": lambda f: (f / "card.json").write_text("[1, 2]"),
    "no metadata": lambda f: rewrite(f),
    "a layer that is no number": lambda f: rewrite(f, metadata={**META, "enters_at": "top"}),
    "no start": lambda f: rewrite(
        f, tensors={"global": torch.ones(3, 16)}, metadata=META
    ),
    "a later format": lambda f: rewrite(f, metadata={**META, "format": "3"}),
    "an earlier format": lambda f: rewrite(f, metadata={**META, "format": "1"}),
    "a key of no prompt": lambda f: rewrite(
        f, tensors={"start": torch.ones(3, 16), "key/global": torch.ones(16)}, metadata=META
    ),
    "a key of another width": lambda f: rewrite(
        f, tensors={"start": torch.ones(3, 16), "global": torch.ones(3, 16), "key/global": torch.ones(8)}, metadata=META
    ),
    "a mixture without its weights": lambda f: rewrite(
        f, tensors={"start": torch.ones(3, 16), "mixture/prompts": torch.ones(1, 3, 16)}, metadata=META
    ),
    "a mixture of another width": lambda f: rewrite(
        f,
        tensors={"start": torch.ones(3, 16), "mixture/prompts": torch.ones(1, 3, 16), "mixture/prompt": torch.zeros(1),
                 "mixture/weight": torch.ones(1), "mixture/heads": torch.ones(1, 2, 9)},
        metadata=META,
    ),
    "a task of no kind": lambda f: (f / "card.json").write_text('{"backbone": {"name": "tiny"}, "tasks": {"a": {}}}'),
    "no task": lambda f: (f / "card.json").write_text('{"backbone": {"name": "tiny"}, "tasks": {}}'),
    "an adaptation that is no object": lambda f: (f / "card.json").write_text(json.dumps({**CARD, "adapted": "yes"})),
    "prompts of two shapes": lambda f: rewrite(
        f, tensors={"start": torch.ones(3, 16), "global": torch.ones(4, 16)}, metadata=META
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_refused(tmp_path, model, damage):
    library(model).save(tmp_path / "lib")
    DAMAGE[damage](tmp_path / "lib")
    with pytest.raises(LibraryError, match="is damaged or of another version"):
        PromptLibrary.load(tmp_path / "lib")


def test_a_mixture_is_no_single_prompt(model):
    given = library(model)
    mixed = replace(given, prompts={**given.prompts, "adapted": given.start}, mixture=MIXTURE)
    require_standalone(mixed, "global")
    with pytest.raises(LibraryError, match=r"one of a mixture of 2 prompts.*--how tune"):
        require_standalone(mixed, "adapted")


def test_a_library_of_another_backbone_is_refused(model):
    other = QueryEngine(small.backbone(width=32))
    with pytest.raises(LibraryError, match=r"made on backbone tiny \(tiny:16x2\), this is tiny \(tiny:32x2\)"):
        library(model).check(other.backbone)
    library(model).check(model.backbone)


def test_a_library_without_keys_finds_no_nearest_prompt(model):
    with pytest.raises(LibraryError, match="has no keys"):
        library(model).nearest(torch.ones(16))


@pytest.mark.parametrize("name", ["start", "key/a", "readout/a"])
def test_a_name_that_the_file_needs_is_no_prompts(tmp_path, model, name):
    begin = small.start(model, small.classes())
    with pytest.raises(LibraryError, match=f"prompt name '{name}'"):
        PromptLibrary(begin, {name: begin}, CARD).save(tmp_path / "lib")
    assert list(tmp_path.iterdir()) == []


def test_five_hundred_prompts(tmp_path, model):
    random = torch.Generator().manual_seed(1)
    begin = small.start(model, small.classes())
    names = [f"site-{i}" for i in range(500)]
    keys = dict(zip(names, torch.nn.functional.normalize(torch.randn(500, 16, generator=random)), strict=True))
    ways = torch.randn(500, *begin.vectors_PD.shape, generator=random)
    prompts = {name: begin.with_vectors(begin.vectors_PD + way) for name, way in zip(names, ways, strict=True)}
    PromptLibrary(begin, prompts, CARD, keys).save(tmp_path / "lib")
    back = PromptLibrary.load(tmp_path / "lib")
    assert back.prompts.keys() == set(names)
    assert small.same(back.keys, keys)
    assert [back.nearest(keys[name]) for name in names[:9]] == [[name] for name in names[:9]]
    assert len(back.candidates()) == 501
    page = back.page()
    assert "and 492 more" in page
    assert len(page) < 1000
    with pytest.raises(LibraryError, match="and 480 more"):
        get_prompt(back, "south")


def task_of(**labels: str):
    return classification.build(classification.Config(labels=labels, instruction="it was"))


def test_the_embedding_of_a_task_is_the_mean_of_the_answers_and_of_length_one(model):
    task = task_of(good="good fine", bad="bad dull")
    rows = model.backbone.readout("it was", ["good fine.", "bad dull."])
    assert small.close(task_embedding(task, model.backbone), torch.nn.functional.normalize(rows.mean(0), dim=0))
    assert float(task_embedding(small.numbers(), model.backbone).norm()) == pytest.approx(1, abs=1e-5)
    tuned = task_embedding(small.classes(tuned_head=True), model.backbone)
    assert small.close(tuned, task_embedding(task, model.backbone))


def test_a_task_without_answers_has_the_embedding_of_its_instruction(model):
    tasks = [generation.build(generation.Config(instruction=text)) for text in ("", "sum up")]
    keys = [task_embedding(task, model.backbone) for task in tasks]
    assert small.close(keys[1], torch.nn.functional.normalize(model.backbone.readout("sum", ["up"])[0], dim=0))
    assert small.close(keys[0], torch.nn.functional.normalize(model.backbone.readout("", ["generation"])[0], dim=0))


def test_the_nearest_by_key_was_made_for_the_most_similar_task(model):
    tasks = {"mood": task_of(a="good fine", b="bad dull"), "heat": task_of(a="hot warm", b="cold icy")}
    keys = prompt_keys(["global", "one", "two"], tasks, {"one": ["mood"], "two": ["heat"]}, model.backbone)
    given = PromptLibrary(small.start(model, small.classes()), {}, CARD, keys)
    assert given.nearest(task_embedding(task_of(x="bad dull", y="good fine"), model.backbone), 2) == ["one", "global"]
    assert given.nearest(task_embedding(task_of(x="cold icy", y="hot warm"), model.backbone))[0] == "two"
    between = torch.nn.functional.normalize(keys["one"] + keys["two"], dim=0)
    assert small.close(keys["global"], between)
    assert small.same(prompt_keys(["one"], tasks, {"one": ["mood", "heat"]}, model.backbone), {"one": keys["global"]})


def test_losses_are_those_of_every_prompt(model):
    given, records, task = library(model), small.records(9), small.classes()
    shots = prepare_shots(given, records, task, model, LocalTrainingConfig())
    prompts = given.candidates().values()
    queries = [Query(prompt.vectors_PD[None], task.encode(records, model.backbone, prompt)) for prompt in prompts]
    losses = [float(model.answer([query])[0].loss_KB.mean()) for query in queries]
    assert shots.loss_JB.mean(1).tolist() == pytest.approx(losses, abs=1e-5)


def test_the_page_says_what_it_is_and_what_it_cost(model):
    page = library(model, small.classes(tuned_head=True)).page()
    for words in ("global, prototype-0", "tiny (`tiny:16x2`)", "3 virtual tokens of width 16", "entering at layer 1"):
        assert words in page
    assert "ficpd, 3 clients, 2 rounds" in page
    assert "privacy: none" in page


def test_a_guarantee_is_told_with_its_unit():
    block = {"epsilon": 3.5, "delta": 1e-5, "unit": "record", "noise": "cryptographic"}
    assert guarantee(block) == "ε = 3.50 per record, cryptographic noise"
    assert guarantee({"epsilon": 0.0, "unit": "record", "noise": None}) == "nothing leaves"
    assert guarantee({}) == "none"


def test_the_page_says_when_somebody_elses_records_are_in_it(model):
    given = library(model)
    facts = {"task": "own", "shots": 5, "way": "nearest"}
    told = replace(given, card={**CARD, "adapted": facts}).page()
    assert "adapted: to 5 records by nearest" in told
    assert "no privacy guarantee for those records" in told
    assert "demonstrations" not in told
    shown = replace(given, card={**CARD, "adapted": {**facts, "demonstrations": ["a text"]}}).page()
    assert "demonstrations, head or mixture that come with it" in shown
    assert "adapted" not in given.page().split("Use it")[0]


def test_the_card_is_plain_json(tmp_path, model):
    library(model).save(tmp_path / "lib")
    assert json.loads((tmp_path / "lib" / "card.json").read_text()) == CARD
    shutil.copytree(tmp_path / "lib", tmp_path / "elsewhere")
    assert PromptLibrary.load(tmp_path / "elsewhere").card == CARD
