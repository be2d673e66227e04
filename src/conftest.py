"""Gives the examples of the public API's docstrings a folder with a table, recipes and a finished run."""

from pathlib import Path

import pytest

NOTES = {"cardio": "chest pain and a fast pulse", "neuro": "headache and a numb hand"}
FEW = ("an itching rash,skin", "dry skin on both arms,skin", "a blurred eye,eye", "her left eye is red,eye")
RECIPE = """
name = "notes"
[backbone]
name = "tiny"
[task]
name = "classification"
instruction = "this note belongs to"
labels = { cardio = "chest pulse", neuro = "headache hand" }
[data]
source = "notes.csv"
columns = { text = "text", target = "target", site = "site" }
[partition]
kind = "column"
column = "site"
[training]
batch_size = 8
[federation]
num_rounds = 3
"""
SHOWN = ("ficpd.experiments.api", "ficpd.library.library", "ficpd.library.session")
"""The modules of the public functions."""


@pytest.fixture(scope="session")
def examples(tmp_path_factory) -> Path:
    """A folder as the docstrings assume it."""
    import ficpd

    folder = tmp_path_factory.mktemp("examples")
    rows = (
        f'"{NOTES[name]}, day {day}",{name},hospital {day % 4}' for day, name in enumerate(["neuro", "cardio"] * 40)
    )
    (folder / "notes.csv").write_text("\n".join(["text,target,site", *rows]))
    (folder / "few.csv").write_text("\n".join(["text,target", *FEW * 4]))
    (folder / "notes.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ficpd.run("notes.toml", "runs/demo")
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(request, monkeypatch, doctest_namespace) -> None:
    """Starts an example of the public API in the folder, with its library."""
    if isinstance(request.node, pytest.DoctestItem) and request.node.name.startswith(SHOWN):
        import ficpd

        monkeypatch.chdir(request.getfixturevalue("examples"))
        doctest_namespace.update(ficpd=ficpd, library=ficpd.load_library("runs/demo"))
