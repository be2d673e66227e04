"""A site's own TOML file: who it is, where its records are, and what it allows. And which line of a file says so."""

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ficpd.backbones.loading import BackboneConfig, EngineConfig
from ficpd.backbones.query_engine import UNBATCHED
from ficpd.data.loading import Config as Source
from ficpd.errors import ConfigError, did_you_mean
from ficpd.registry import FrozenConfig, load, validate, validated_section

EXACT = "float32"
"""What records are computed in side by side where noise is for one of them: bfloat16 rounds the others too much."""
LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path (Linux, sun_path)."""


class Policy(FrozenConfig):
    """What the owner allows, whatever a server asks.

    `epsilon` and `delta`: for all runs together, for ever. `methods`: those that the site carries out; it could also do
    dp_fpl, dp_zo, dp_cma_es, fedhpl, prompt_dpsgd, local and, where nothing is promised, fedbpt. `mechanisms` "none" lets
    updates out without a guarantee, "client_gaussian:central" lets the server add the noise (the site pays for the whole run
    with its first order). `max_num_tokens`: virtual tokens of a prompt (None: half of what the
    backbone takes); every record has to fit beside so many. `max_candidates`: prompts that a step may try on each record.
    `max_clip_norm` None: any.
    `share_metrics`: scores on the own test records may be told, in runs without a guarantee; with one they stay, because it
    does not cover them.
    """

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    methods: tuple[str, ...] = ("fedavg", "fedprox", "ficpd", "fpl")
    mechanisms: tuple[str, ...] = ("record_gaussian",)
    max_num_tokens: int | None = Field(default=None, ge=1)
    max_local_steps: int = Field(default=50, ge=1)
    max_batch_size: int = Field(default=128, ge=1)
    max_candidates: int = Field(default=128, ge=1)
    max_rounds: int = Field(default=1000, ge=1)
    max_runs: int = Field(default=1000, ge=1)
    max_clip_norm: float | None = Field(default=None, gt=0)
    share_metrics: bool = False


class Simulation(FrozenConfig):
    """For rehearsals: noise and sampling from a seed, so that a run can be repeated. Whoever knows it can take noise off."""

    private_seed: int


class SiteConfig(FrozenConfig):
    """`name`: as the coordinator knows the site; in a federation of several tasks it begins with the task's group and a
    dot. `card`: all that is public of it. `state`: a folder of its own, for ledger, terms and what stays here."""

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

    @property
    def chunk_tokens(self) -> int | None:
        """Positions of one forward: the owner's, else one record's where a mechanism requires that.

        A record computed beside others depends on them by rounding (`clipping.MARGIN`).
        """
        return self.engine.chunk_tokens or (UNBATCHED if self.unbatched else None)

    @property
    def unbatched(self) -> bool:
        """Whether a mechanism that the policy allows requires a forward for each record (`DPConfig.unbatched`)."""
        return any(load("privacy", name).Config.unbatched for name in self.policy.mechanisms)

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
}  # fmt: skip


def read(path: Path | str) -> SiteConfig:
    """Raises `ConfigError` naming key, value and file; paths in it are taken from where the file lies."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no site file {path}; `ficpd deploy init` writes one for each site")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
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
    here, backbone = path.resolve().parent, config.backbone
    found = here / Path(config.data.source).expanduser()
    beside = config.chunk_tokens not in (None, UNBATCHED)
    if beside and backbone.dtype == "auto" and config.unbatched:
        backbone = backbone.model_copy(update={"dtype": EXACT})
    return config.model_copy(
        update={
            "backbone": backbone,
            "socket": here / config.socket.expanduser(),
            "state": here / config.state.expanduser(),
            "data": config.data.model_copy(update={"source": str(found)}) if found.exists() else config.data,
        }
    )


def line_number(text: str, key: str) -> int | None:
    """The line, from 1, in which TOML text gives `part.key` a value; None where it does not, so that a default holds.

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
    """`site.toml line 12`, or that it is that file's default."""
    line = line_number(text, key)
    return f"{name} line {line}" if line else f"{name}, by default"
