"""Libraries go to the Hugging Face hub and come from it: three files, no path of a machine, one sentence for an error."""

import fnmatch
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import huggingface_hub
import pytest
from huggingface_hub import HfApi, errors

import ficpd as package
import small
from ficpd.errors import LibraryError, PackageError
from ficpd.library import hub
from ficpd.library.library import PromptLibrary

NAME = "clinic/triage"
FILES = ["README.md", "card.json", "prompts.safetensors"]
PROTECTED = {
    "mechanism": "record_gaussian", "unit": "record", "epsilon": 2.0, "delta": 1e-5, "noise": "cryptographic",
}  # fmt: skip
TEXTS = ["the film was lovely", "awful and grey", "a story twice"]


class FakeHub:
    """The hub's client as far as it is called; repositories are folders."""

    def __init__(self, place: Path):
        self.place, self.private, self.tokens, self.revisions = place, {}, [], []

    def client(self, token: str | None = None) -> Mock:
        """Returns a client that takes what the real one does."""
        self.tokens.append(token)
        client = create_autospec(HfApi, instance=True)
        for name in ("create_repo", "repo_info", "upload_folder"):
            getattr(client, name).side_effect = getattr(self, name)
        return client

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.private.setdefault(repo_id, private)
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        assert commit_message
        self._copy(Path(folder_path), self.place / repo_id, allow_patterns)

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (self.place / repo_id).exists():
            raise errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
        self.revisions.append(revision)
        self._copy(self.place / repo_id, self.place / "cache" / repo_id, allow_patterns)
        return str(self.place / "cache" / repo_id)

    def _copy(self, source: Path, target: Path, patterns: list[str]) -> None:
        for file in (file for file in source.rglob("*") if file.is_file()):
            name = str(file.relative_to(source))
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)


@pytest.fixture
def online(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", fake.client)
    fetch = create_autospec(huggingface_hub.snapshot_download, side_effect=fake.snapshot_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return fake


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    small.run(folder, "ficpd", rounds=1)
    return folder / "run"


@pytest.fixture
def library(run) -> PromptLibrary:
    """The run's library as if its noise were cryptographic."""
    loaded = PromptLibrary.load(run)
    return replace(loaded, card={**loaded.card, "privacy": PROTECTED})


def content(file: Path) -> tuple[Any, bytes]:
    """Reads a file of tensors. Its header has no order."""
    body = file.read_bytes()
    length = int.from_bytes(body[:8], "little")
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def test_a_library_comes_back_from_the_hub_and_predicts_the_same(library, online, tmp_path):
    assert library.push_to_hub(NAME, token="secret") == f"https://huggingface.co/{NAME}"
    assert online.private == {NAME: True}
    assert online.tokens == ["secret"]
    library.save(tmp_path / "local")
    sent = online.place / NAME
    assert sorted(file.name for file in sent.rglob("*")) == FILES
    assert content(sent / "prompts.safetensors") == content(tmp_path / "local" / "prompts.safetensors")
    assert json.loads((sent / "card.json").read_text()) == library.card
    wanted = package.load_library(tmp_path / "local").predict(TEXTS, scores=True)
    assert package.load_library(f"hf:{NAME}", revision="v1").predict(TEXTS, scores=True).equals(wanted)
    assert online.revisions == ["v1"]
    back = package.PromptLibrary.from_pretrained(NAME)
    assert back.card == library.card
    assert back.prompts["global"].vectors_PD.equal(library.prompts["global"].vectors_PD)


def test_only_a_librarys_files_are_fetched(library, online):
    library.push_to_hub(NAME)
    for name in ("code.py", "weights.bin", "library/model.pkl", "other.json"):
        (online.place / NAME / name).parent.mkdir(exist_ok=True)
        (online.place / NAME / name).write_text("x")
    PromptLibrary.from_pretrained(NAME)
    assert sorted(file.name for file in (online.place / "cache" / NAME).rglob("*")) == FILES


def test_a_folder_has_precedence_over_the_hub(library, run, online, tmp_path, monkeypatch):
    assert PromptLibrary.from_pretrained(run).prompts.keys() == library.prompts.keys()
    monkeypatch.chdir(tmp_path)
    library.save(Path(NAME))
    assert PromptLibrary.from_pretrained(NAME).card == library.card
    assert online.revisions == []
    with pytest.raises(LibraryError, match="revision 'v1'"):
        PromptLibrary.from_pretrained(NAME, revision="v1")


def test_a_library_of_the_hub_is_checked_as_one_of_a_folder(library, online):
    library.push_to_hub(NAME)
    (online.place / NAME / "card.json").write_text("{}")
    with pytest.raises(LibraryError, match="damaged"):
        PromptLibrary.from_pretrained(NAME)
    (online.place / NAME / "prompts.safetensors").unlink()
    shutil.rmtree(online.place / "cache")
    with pytest.raises(LibraryError, match=f"hf:{NAME} holds no prompt library"):
        PromptLibrary.from_pretrained(NAME)


def test_the_page_states_privacy_and_how_to_use_it(library, online):
    library.push_to_hub(NAME)
    page = (online.place / NAME / "README.md").read_text(encoding="utf-8")
    assert page.startswith("---\nlibrary_name:")
    assert "- privacy: ε = 2.00 per record, cryptographic noise\n" in page
    assert "Made of released updates only: ε = 2.00 per record, cryptographic noise." in page
    assert f"ficpd predict hf:{NAME}" in page
    assert "THIS_FOLDER" not in page
    assert "base_model" not in page
    library.push_to_hub(NAME, backbone="owner/model")
    assert 'base_model: "owner/model"' in (online.place / NAME / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("card", "why"), [
    ({"privacy": {"unit": "none", "epsilon": None}}, "no privacy guarantee"),
    ({"privacy": {**PROTECTED, "noise": "simulated"}}, "comes from a seed"),
    ({"privacy": {**PROTECTED, "rehearsed": ["north"]}}, "comes from a seed"),
    ({"adapted": {"task": "classification"}}, "fitted to records without a guarantee"),
])  # fmt: skip
def test_what_no_guarantee_covers_is_sent_on_demand_only(library, online, card, why):
    unsafe = replace(library, card={**library.card, **card})
    with pytest.raises(LibraryError, match=f"{why}.*unprotected=True"):
        unsafe.push_to_hub(NAME)
    assert not online.place.exists()
    unsafe.push_to_hub(NAME, unprotected=True)
    assert f"Nobody is protected: {hub.weakness(unsafe.card)}" in (online.place / NAME / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "path", ["/home/ada/models/minilm", "~/models", "C:\\Users\\ada", "see /srv/data/x.csv", "\\\\server\\share"]
)
def test_no_path_of_a_machine_is_sent(library, online, path):
    here = replace(library, card={**library.card, "backbone": {**library.card["backbone"], "options": {"a": [path]}}})
    with pytest.raises(LibraryError, match=r"card\.backbone\.options\.a\.0 .* path of this machine"):
        here.push_to_hub(NAME)
    with pytest.raises(LibraryError, match=r"a key of card\.versions"):
        replace(library, card={**library.card, "versions": {path: "1"}}).push_to_hub(NAME)
    assert not online.place.exists()


def test_a_backbone_in_a_folder_needs_its_hub_id(library, online, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path / "weights"), "weights"):
        here = replace(library, card={**library.card, "backbone": {**library.card["backbone"], "name": folder}})
        with pytest.raises(LibraryError, match="backbone='OWNER/NAME'"):
            here.push_to_hub(NAME)
        here.push_to_hub(NAME, backbone="owner/model")
        assert str(tmp_path) not in (online.place / NAME / "card.json").read_text()
        assert PromptLibrary.from_pretrained(NAME).card["backbone"]["name"] == "owner/model"


def test_ordinary_texts_are_no_paths():
    hub.refuse_paths({"labels": ["and/or", "https://example.org/a/b", "1/2/2024", "24/7", "a: /", "yes :/ no"], "n": 2})


def test_a_public_repository_gets_nothing_that_was_to_be_private(library, online):
    online.private[NAME] = False
    with pytest.raises(LibraryError, match="public already"):
        library.push_to_hub(NAME)
    assert not online.place.exists()
    library.push_to_hub(NAME, private=False)
    assert (online.place / NAME / "card.json").exists()


@pytest.mark.parametrize(("error", "told"), [
    (errors.LocalEntryNotFoundError("x"), "not in the cache, and the hub cannot be reached"),
    (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
    (errors.HFValidationError("the id is odd"), "the id is odd"),
    (ConnectionError("no\nroute"), "no route; check the id, your login"),
])  # fmt: skip
def test_an_error_of_the_hub_is_one_sentence(monkeypatch, library, error, told):
    def fails(*given, **more):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    monkeypatch.setattr("huggingface_hub.HfApi", fails)
    with pytest.raises(LibraryError, match=f"hf:{NAME} at revision 'v1': .* does not give it .*{told}") as seen:
        PromptLibrary.from_pretrained(NAME, revision="v1")
    assert "\n" not in str(seen.value)
    with pytest.raises(LibraryError, match=f"hf:{NAME}: .* does not take it .*{told}"):
        library.push_to_hub(NAME)


def test_an_id_that_is_none_and_a_missing_package_are_said(library, monkeypatch):
    with pytest.raises(LibraryError, match="OWNER/NAME"):
        library.push_to_hub("triage")
    with pytest.raises(LibraryError, match="holds no prompt library"):
        PromptLibrary.from_pretrained("triage")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for ask in (PromptLibrary.from_pretrained, library.push_to_hub):
        with pytest.raises(PackageError, match=r"needs the package huggingface_hub.*ficpd\[hub\]"):
            ask(NAME)


@pytest.mark.slow
def test_publish_sends_what_it_copied(ficpd, tmp_path, online):
    small.run(tmp_path, "fedavg", "privacy.name=record_gaussian", "privacy.epsilon=8.0", "privacy.delta=1e-3",
              "privacy.clip_norm=0.5", "privacy.noise=cryptographic", rounds=1)  # fmt: skip
    out = ficpd("publish", tmp_path / "run", tmp_path / "out", "--hub", NAME).said()
    assert f"hub:    https://huggingface.co/{NAME}\n" in out
    copied = tmp_path / "out" / "library"
    assert content(online.place / NAME / "prompts.safetensors") == content(copied / "prompts.safetensors")
    assert (online.place / NAME / "card.json").read_bytes() == (copied / "card.json").read_bytes()
    assert online.private == {NAME: True}
