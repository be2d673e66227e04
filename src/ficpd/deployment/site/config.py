"""Reads a site's TOML file: its identity, records and policy, and the line numbers of its settings."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ficpd.backbones.loading import BackboneConfig, EngineConfig
from ficpd.data.loading import Config as Source
from ficpd.errors import ConfigError, SiteError, did_you_mean
from ficpd.registry import FrozenConfig, load, validate, validated_section

EXACT = "float32"
"""The dtype of batched forward passes under record-level DP. bfloat16 makes records depend too much on their batch."""
LONGEST_SOCKET = 107
"""The maximum length of a Unix socket's path in bytes (Linux, sun_path)."""


class Policy(FrozenConfig):
    """The owner's limits. No server can change them.

    epsilon, delta: the budget of all runs together.
    methods: the allowed methods. Further ones are dp_fpl, dp_zo, dp_cma_es, fedhpl, prompt_dpsgd, local and, without a
        guarantee, fedbpt.
    mechanisms: the allowed mechanisms. "none" allows updates without a guarantee. With "client_gaussian:central" the
        server adds the noise, and the first assignment is charged for the whole run.
    max_num_tokens: the virtual tokens of a prompt. Every record must fit with them. None: half of the backbone's maximum.
    max_candidates: the prompts that a step may try on each record.
    max_records_per_subject: the records of one subject in a step, if the site's data name subjects. They determine a
        step's memory. `max_batch_size` then counts subjects.
    max_refusals: the run specs that the budget may refuse until the next charged assignment. Each refusal reveals a
        little about the number of records.
    max_clip_norm: the largest clip norm; None: any.
    least_colluding: the number of sites, colluding with the server, that a secure sum must withstand.
    share_metrics: sends scores on the test records, only in runs without a guarantee: a guarantee does not cover scores.
    """

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    methods: tuple[str, ...] = ("fedavg", "fedprox", "ficpd", "fpl")
    mechanisms: tuple[str, ...] = ("record_gaussian",)
    max_num_tokens: int | None = Field(default=None, ge=1)
    max_local_steps: int = Field(default=50, ge=1)
    max_batch_size: int = Field(default=128, ge=1)
    max_candidates: int = Field(default=128, ge=1)
    max_records_per_subject: int = Field(default=32, ge=1)
    max_rounds: int = Field(default=1000, ge=1)
    max_runs: int = Field(default=1000, ge=1)
    max_refusals: int = Field(default=20, ge=1)
    max_clip_norm: float | None = Field(default=None, gt=0)
    share_metrics: bool = False
    least_colluding: int = Field(default=1, ge=0)


class Simulation(FrozenConfig):
    """Repeatable noise and sampling from a seed, for simulations only: the seed is enough to remove the noise."""

    private_seed: int


class SigningKeys(FrozenConfig):
    """The keys of secure sums, as PEM. They never come from the server.

    key: the site's Ed25519 key.
    known: the folder of all sites' public keys, NAME.pub.
    """

    key: Path
    known: Path


def rehearsal_warning(names: Iterable[str]) -> str:
    """Returns the warning that the noise of these sites can be removed."""
    return (
        f"REHEARSAL, nothing is protected: the noise of {', '.join(names)} comes from [simulation] private_seed in its site "
        "file, and the seed is enough to remove it"
    )


class SiteConfig(FrozenConfig):
    """The settings of a site.

    name: the site's name at the coordinator. With several tasks it begins with the task's group and a dot.
    card: public metadata.
    state: the folder of the ledger, the specs and all local results.
    """

    name: str = Field(min_length=1, max_length=200)
    socket: Path
    state: Path
    card: dict[str, str | float] = Field(default={})
    backbone: BackboneConfig = BackboneConfig()
    task: dict[str, Any]
    data: Source
    policy: Policy
    engine: EngineConfig = EngineConfig()
    simulation: Simulation | None = None
    secure_sum: SigningKeys | None = None

    @property
    def exact(self) -> bool:
        """Tells whether a record's results must not depend on other records, even by rounding (`QueryEngine`).

        An allowed mechanism requires this, unless the owner sets `engine.chunk_tokens`.
        """
        return self.requires_exact and self.engine.chunk_tokens is None

    @property
    def requires_exact(self) -> bool:
        """Tells whether a mechanism that the policy allows requires exact results (`DPConfig.exact`)."""
        return any(load("privacy", name.partition(":")[0]).Config.exact for name in self.policy.mechanisms)

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.\- ]+", name):
            raise ValueError("letters, digits, spaces, dots, dashes and underscores make a name")
        return name

    @field_validator("socket")
    @classmethod
    def _short(cls, socket: Path) -> Path:
        if (length := len(str(socket).encode())) > LONGEST_SOCKET:
            raise ValueError(
                f"a socket's path has at most {LONGEST_SOCKET} bytes, this one {length}; choose a shorter one"
            )
        return socket


PARTS = {
    "backbone": BackboneConfig, "data": Source, "policy": Policy, "engine": EngineConfig, "simulation": Simulation,
    "secure_sum": SigningKeys,
}  # fmt: skip


def read(path: Path | str) -> SiteConfig:
    """Reads a site's file. Paths are relative to it. Raises `ConfigError`, naming key, value and file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no site file {path}; `ficpd deploy init` writes one for each site")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not TOML: {error}") from error
    for key in tree:
        if key not in SiteConfig.model_fields:
            raise ConfigError(f"{path.name}: {did_you_mean('part', key, SiteConfig.model_fields)}")
    parts: dict[str, Any] = dict(tree)
    for key, model in PARTS.items():
        if key in parts:
            parts[key] = validate(model, parts[key], f"{path.name}: {key}")
    if "task" in parts:
        parts["task"] = validated_section("tasks", parts["task"], f"{path.name}: task")
    config = validate(SiteConfig, parts, path.name)
    here, backbone, keys = path.resolve().parent, config.backbone, config.secure_sum
    found = here / Path(config.data.source).expanduser()
    if config.engine.chunk_tokens is not None and backbone.dtype == "auto" and config.requires_exact:
        backbone = backbone.model_copy(update={"dtype": EXACT})
    return config.model_copy(
        update={
            "backbone": backbone,
            "socket": here / config.socket.expanduser(),
            "state": here / config.state.expanduser(),
            "data": config.data.model_copy(update={"source": str(found)}) if found.exists() else config.data,
            "secure_sum": keys and SigningKeys(key=here / keys.key.expanduser(), known=here / keys.known.expanduser()),
        }
    )


def check_rehearsal(config: SiteConfig, file: Path, rehearsal: bool) -> None:
    """Raises `SiteError` for a site file with a private seed, unless this is a rehearsal."""
    if config.simulation and not rehearsal:
        raise SiteError(
            f"{file.name}: [simulation] private_seed is enough to remove the noise. Delete [simulation]; for a trial "
            "without real records add --rehearsal"
        )


def line_number(text: str, key: str) -> int | None:
    """Returns the number, from 1, of the line that sets `part.key` in TOML text; None if no line does.

    >>> line_number('name = "a"\\n[policy]\\nepsilon = 2', "policy.epsilon")
    3
    """
    *parts, name = key.split(".")
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = [word.strip().strip("\"'") for word in header[1].split(".")]
        elif (found := re.match(r"\s*([\w.\-\"']+)\s*=", line)) and [
            *table, *(word.strip("\"'") for word in found[1].split("."))
        ] == [*parts, name]:  # fmt: skip
            return number
    return None


def location(name: str, text: str, key: str) -> str:
    """Returns `site.toml line 12`, or the file's name and "by default"."""
    line = line_number(text, key)
    return f"{name} line {line}" if line else f"{name}, by default"
