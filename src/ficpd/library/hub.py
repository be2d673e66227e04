"""Finds libraries in folders and on the Hugging Face hub, and sends them there.

Only three files are sent: the prompts as safetensors, the card, and the README page. None of them is code. This module
loads no torch.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ficpd.errors import FicpdError, LibraryError, needs
from ficpd.library.card import CARD, PAGE, TENSORS, guarantee, weakness

if TYPE_CHECKING:
    from ficpd.library.library import PromptLibrary

HUB = "hf:"
"""The prefix of a library's name on the hub."""
FILES = (TENSORS, CARD, PAGE)
ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOCAL = re.compile(r"(?<![\w/:.])(/[\w.+@-]+){2,}|(?<!\w)~[\w-]*[/\\]|\b[A-Za-z]:[\\/]|\\\\\w")
"""Matches an absolute path, a path in a home directory, and a Windows path."""
REASONS = {
    "RepositoryNotFoundError": "no such repository, or a private one; check the id, or log in by `hf auth login`",
    "GatedRepoError": "its owner has to admit you; ask at its page",
    "RevisionNotFoundError": "no such revision; check the branch, tag or commit",
    "LocalEntryNotFoundError": "not in the cache, and the hub cannot be reached; connect, or name a folder",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it",
    "LocalTokenNotFoundError": "no token; log in by `hf auth login`, or give `token`",
}
"""The reason and the next step, by class name of the hub client's error."""


def find_library(folder: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of a library.

    folder: that folder, a run directory with a library, or hf:OWNER/NAME for a library of the hub.
    revision: a branch, tag or commit of the hub.

    Raises `LibraryError` if there is none.
    """
    given, on_hub = str(folder), str(folder).startswith(HUB)
    if revision is not None and not on_hub:
        raise LibraryError(
            f"revision {revision!r}: {given} is a folder; leave the revision out, or name {HUB}OWNER/NAME"
        )
    place = download(given.removeprefix(HUB), revision) if on_hub else Path(folder)
    found = place / "library" if (place / "library" / CARD).exists() else place
    if not (found / TENSORS).exists():
        asked = given if on_hub else found
        why = f"no {TENSORS}" if place.exists() else "there is no such folder"
        raise LibraryError(f"{asked} holds no prompt library ({why}); give a run's or library's folder")
    return found


def locate(name: str | Path) -> str:
    """Adds `HUB` to an OWNER/NAME that is no local path; returns any other name unchanged."""
    text = str(name)
    return HUB + text if ID.fullmatch(text) and not Path(text).exists() else text


def download(name: str, revision: str | None = None) -> Path:
    """Downloads a library's files into the hub client's cache, or reads them from the cache offline."""
    with _hub(f"{HUB}{name}" + (f" at revision {revision!r}" if revision else ""), "does not give it"):
        from huggingface_hub import snapshot_download

        patterns = [*FILES, *(f"library/{file}" for file in FILES)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def push(library: "PromptLibrary", repo_id: str, private: bool, token: str | None, page: str) -> str:
    """Sends a library's three files to a repository, created if missing; returns its address.

    Raises `LibraryError` for a wrong id, for a local path in the library, and for an error of the hub. It is also
    raised if `private` is set and the repository is public.
    """
    if not ID.fullmatch(repo_id):
        raise LibraryError(f"{repo_id!r} is no id of the Hugging Face hub: expected OWNER/NAME")
    refuse_paths({"card": library.card, "prompts": [*library.prompts]})
    with TemporaryDirectory() as place:
        folder = Path(place) / "library"
        library.save(folder)
        (folder / PAGE).write_text(page, encoding="utf-8")
        with _hub(f"{HUB}{repo_id}", "does not take it"):
            return _upload(folder, repo_id, private, token)


def _upload(folder: Path, repo_id: str, private: bool, token: str | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = str(api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not api.repo_info(repo_id).private:
        raise LibraryError(f"{HUB}{repo_id} is public already; write private=False, or choose another name")
    api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=[*FILES], commit_message="Add a prompt library"
    )
    return address


@contextmanager
def _hub(name: str, refuses: str) -> Iterator[None]:
    """Turns an error of the hub's client into a `LibraryError` of one sentence."""
    try:
        with needs(name, "hub"):
            yield
    except FicpdError:
        raise
    except Exception as error:  # the hub's client raises many classes, also those of its HTTP library
        other = f"{' '.join(str(error).split())[:300]}; check the id, your login and that the hub can be reached"
        why = REASONS.get(type(error).__name__, other)
        raise LibraryError(f"{name}: the Hugging Face hub {refuses} ({type(error).__name__}): {why}") from error


def refuse_paths(tree: Any, place: str = "") -> None:
    """Raises `LibraryError` for the first text with a path of this machine."""
    if isinstance(tree, str) and LOCAL.search(tree):
        raise LibraryError(f"{place} = {tree!r} names a path of this machine, which others must not see; replace it")
    parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, part in parts:
        refuse_paths(str(key), f"a key of {place}")
        refuse_paths(part, f"{place}.{key}" if place else str(key))


def with_backbone(card: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Returns the card with the hub id of its backbone. Raises `LibraryError` if the backbone is a local folder."""
    from ficpd.backbones import catalog

    named = name or str(card["backbone"].get("name", ""))
    if LOCAL.search(named) or (not name and named not in catalog.NAMED and named and Path(named).expanduser().exists()):
        raise LibraryError(
            f"backbone {named!r} is a folder of this machine; give the model's hub id: backbone='OWNER/NAME'"
        )
    return {**card, "backbone": {**card["backbone"], "name": named}}


def hub_page(card: Mapping[str, Any], page: str, repo_id: str) -> str:
    """Returns the page of the repository: the library's page with the hub's metadata and a statement on privacy."""
    name = card["backbone"].get("name", "")
    about = {
        "library_name": "ficpd",
        **({"base_model": name} if ID.fullmatch(name) else {}),
        "tags": ["prompt-tuning", "federated-learning", "differential-privacy"],
    }
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items())  # JSON is YAML, too
    why = weakness(card)
    stated = f"Nobody is protected: {why}." if why else f"Made of released updates only: {guarantee(card['privacy'])}."
    return (
        f"---\n{lines}---\n\n{page.replace('THIS_FOLDER', HUB + repo_id)}\n## Privacy\n\n{stated} The repository has "
        "prompts, card and this page. Records, test scores, personal prompts and the ledger are not in it.\n"
    )
