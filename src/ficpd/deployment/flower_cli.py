"""Submits a recipe to the coordinator's SuperLink and follows its log to the end."""

import os
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import tomli_w

from ficpd.errors import ConfigError, did_you_mean, needs
from ficpd.experiments.config import Experiment, to_toml
from ficpd.registry import validate

APP = Path(__file__).parent / "flower-app"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
"""Turns telemetry and downloads off."""


def run_with_flower(experiment: Experiment, recipe: str | None, out: Path, resume: bool) -> int:
    """Runs an experiment among real sites; returns the exit status of `flwr run`.

    `recipe`: the unchanged file of the experiment, so that sites can name its lines. Raises `ConfigError` without the
    option `superlink`, and the errors of `check_superlink`.
    """
    from ficpd.deployment.flower_engine import Config

    config = validate(Config, experiment.engine.options, "engine.options")
    if config.superlink is None:
        raise ConfigError(
            'engine.name = "flower" runs among real sites and needs engine.options.superlink, the name of a connection in '
            "Flower's config.toml; set it, or leave the engine out for a simulation"
        )
    text, name = to_toml(experiment), f"{experiment.name}.toml"
    if recipe and Path(recipe).is_file():
        text, name = Path(recipe).read_text(encoding="utf-8"), Path(recipe).name
    check_superlink(config.superlink)
    return flwr_run(text, name, out, resume, [config.superlink])


def flwr_run(
    text: str, name: str, out: Path, resume: bool, where: Sequence[str], more: Mapping[str, str] | None = None
) -> int:
    """Runs the app with a recipe by `flwr run`; returns its exit status.

    where: a connection's name in `$FLWR_HOME/config.toml`, or options of `flwr run`.
    out: the run directory on the coordinator's machine. SuperLink's user writes it.
    more: further environment variables.
    """
    given = {"recipe": text, "recipe-name": name, "out": str(out.absolute()), "resume": resume}
    with tempfile.TemporaryDirectory(prefix="ficpd-") as folder:
        config = Path(folder) / "run.toml"
        config.write_text(tomli_w.dumps(given), encoding="utf-8")
        command = [flower_binary("flwr"), "run", str(APP), *where, "--run-config", str(config), "--stream"]
        return subprocess.run(command, env=clean_env(more), check=False).returncode


def check_superlink(connection: str) -> None:
    """Checks that a SuperLink answers, unless its connection is insecure.

    Raises `SiteError` within ten seconds if it does not answer, and `ConfigError` for an unknown connection.
    """
    from ficpd.deployment.tls_check import check_tls

    file = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser() / "config.toml"
    try:
        known = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {}) if file.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    named = {name: link for name, link in known.items() if isinstance(link, dict)}
    if connection not in named or "address" not in named[connection]:
        raise ConfigError(
            f"{file}: {did_you_mean('superlink', connection, named)}. engine.options.superlink names one with an address; "
            "`ficpd deploy init` writes such a file"
        )
    link = named[connection]
    if not link.get("insecure", False):
        ca = link.get("root-certificates")
        check_tls(str(link["address"]), Path(ca) if ca else None)


def flower_binary(program: str) -> str:
    """Returns the path of one of Flower's programs. Raises `ConfigError` if Flower is not installed."""
    path = Path(sys.executable).parent / program
    with needs(f"{program}, a program of Flower,", "flower"):
        if find_spec("flwr") is None or not path.exists():
            raise ModuleNotFoundError(name="flwr")
    return str(path)


def clean_env(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns this process's environment, without telemetry and downloads of Flower."""
    # Flower starts its helpers by name, so PATH begins with this Python's programs.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "PATH": path, **(more or {})}


def free_ports(number: int) -> list[int]:
    """Returns free ports of this machine. Flower's default port may belong to another user's SuperLink."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
