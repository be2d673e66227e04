"""A private run's directory is its owner's; what is copied from it tells no more than the mechanism released."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import small
from ficpd.cli import app
from ficpd.errors import RunError
from ficpd.experiments.publish import publish
from ficpd.library.card import BEGAN
from ficpd.library.library import PromptLibrary
from ficpd.library.session import load_library

PRIVATE = ("privacy.name=record_gaussian", "privacy.epsilon=8.0", "privacy.delta=1e-3", "privacy.clip_norm=0.5")
SECURE = (*PRIVATE, "privacy.noise=cryptographic")
DEAF = ("privacy.name=troubled.deaf", *SECURE[1:])


def content(folder: Path) -> dict[str, Any]:
    """Every file's bytes. Of tensors the header has no order, so its entries and the bytes behind it."""
    found: dict[str, Any] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        body = found[str(file.relative_to(folder))] = file.read_bytes()
        if file.suffix == ".safetensors":
            length = int.from_bytes(body[:8], "little")
            found[str(file.relative_to(folder))] = json.loads(body[8 : 8 + length]), body[8 + length :]
    return found


def reworded(file: Path, words: str) -> Path:
    heads, *rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([heads, *(row.replace(" ", words, 1) for row in rows)]))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "ficpd", "fpl"])
def test_what_is_published_is_the_same_whatever_the_records_say(tmp_path, method, monkeypatch):
    found, table = [], small.table
    for place, words in enumerate((" ", " quite another ")):
        monkeypatch.setattr(small, "table", lambda file, words=words: reworded(table(file), words))
        small.run(tmp_path / str(place), method, *DEAF)
        publish(tmp_path / str(place) / "run", tmp_path / str(place) / "out")
        found.append((content(tmp_path / str(place) / "out"), content(tmp_path / str(place) / "run")))
    (first, run), (second, other) = found
    assert (tmp_path / "0" / "records.csv").read_bytes() != (tmp_path / "1" / "records.csv").read_bytes()
    assert first == second
    assert {"README.md", "library/prompts.safetensors", "library/card.json"} <= first.keys()
    assert run["checkpoint"] != other["checkpoint"] or run["result.json"] != other["result.json"]


def test_a_private_runs_directory_and_ledger_are_their_owners(tmp_path):
    small.run(tmp_path, "fedavg", *PRIVATE, rounds=1)
    folder = tmp_path / "run"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.glob("ledger.sqlite*")} == {0o600}
    assert "ficpd publish" in (folder / "NOT-RELEASED.md").read_text()
    small.run(tmp_path / "open", "fedavg", rounds=1)
    assert not (tmp_path / "open" / "run" / "NOT-RELEASED.md").exists()


def test_what_no_guarantee_covers_is_not_published(tmp_path):
    small.run(tmp_path / "open", "fedavg", rounds=1)
    small.run(tmp_path / "known", "fedavg", *PRIVATE, rounds=1)
    out = tmp_path / "out"
    for run, why in (("open", "no guarantee"), ("known", "privacy.noise"), ("none", "no finished run")):
        with pytest.raises(RunError, match=why):
            publish(tmp_path / run / "run", out)
    assert not out.exists()
    out.mkdir()
    (out / "file").touch()
    small.run(tmp_path / "secure", "fedavg", *SECURE, rounds=1)
    with pytest.raises(RunError, match="is not empty"):
        publish(tmp_path / "secure" / "run", out)
    shown = CliRunner().invoke(app, ["publish", str(tmp_path / "secure" / "run"), str(tmp_path / "new")])
    assert shown.exit_code == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["README.md", "library"]


def test_a_start_that_no_guarantee_covers_is_not_published(tmp_path):
    """The library holds the start itself, and all its prompts stem from it."""
    small.run(tmp_path / "open", "fedavg", rounds=1)
    small.run(tmp_path / "secure", "fedavg", *SECURE, rounds=1)
    out = tmp_path / "out"
    runs = (("first", "open", "no privacy guarantee"), ("second", "first", "began with a saved prompt"))
    for name, before, why in runs:
        begun = ("prompt.init=library", f"prompt.library={tmp_path / before / 'run'}")
        small.run(tmp_path / name, "fedavg", *SECURE, *begun, rounds=1)
        with pytest.raises(RunError, match=f"began with a saved prompt.*{why}"):
            publish(tmp_path / name / "run", out)
        assert "saved prompt `global`, privacy: none." in PromptLibrary.load(tmp_path / name / "run").page()
    assert not out.exists()
    begun = ("prompt.init=library", f"prompt.library={tmp_path / 'secure' / 'run'}")
    small.run(tmp_path / "third", "fedavg", *SECURE, *begun, rounds=1)
    publish(tmp_path / "third" / "run", out)
    said = "saved prompt `global`, privacy: ε = 8.00 per record, cryptographic noise."
    assert said in (out / "README.md").read_text()
    assert said in (out / "library" / "README.md").read_text()


def test_an_adapted_prompt_is_no_start_to_publish(tmp_path):
    small.run(tmp_path / "secure", "fedavg", *SECURE, rounds=1)
    records = [{"text": f"{word} film", "target": word} for word in ("good", "bad") * 2]
    load_library(tmp_path / "secure" / "run").adapt(records, how="tune").save(tmp_path / "mine")
    for of, covered in (("global", True), ("adapted", False)):
        begun = ("prompt.init=library", f"prompt.library={tmp_path / 'mine'}", f"prompt.of={of}")
        small.run(tmp_path / of, "fedavg", *SECURE, *begun, rounds=1)
        assert ("adapted" in PromptLibrary.load(tmp_path / of / "run").card[BEGAN]) != covered
        if covered:
            publish(tmp_path / of / "run", tmp_path / "out")
        else:
            with pytest.raises(RunError, match="`adapted` is fitted to records without a guarantee"):
                publish(tmp_path / of / "run", tmp_path / "other")


def test_only_the_librarys_own_files_are_published_and_no_later_change(tmp_path):
    small.run(tmp_path, "fedavg", *SECURE, rounds=1)
    library = tmp_path / "run" / "library"
    (library / "notes.txt").write_text("a patient's name")
    publish(tmp_path / "run", tmp_path / "out")
    published = sorted(file.name for file in (tmp_path / "out" / "library").iterdir())
    assert published == ["README.md", "card.json", "prompts.safetensors"]
    records = [{"text": f"{word} film", "target": word} for word in ("good", "bad") * 2]
    load_library(library).adapt(records, how="tune").library.save(library)
    with pytest.raises(RunError, match="fitted to records without a guarantee"):
        publish(tmp_path / "run", tmp_path / "other")
