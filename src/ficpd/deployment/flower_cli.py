"""A recipe handed to the coordinator's SuperLink, or to Flower's simulation, and its log followed to the end."""

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

from ficpd.errors import ConfigError, unknown

APP = Path(__file__).parent / "flower-app"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
"""Nobody is told that Flower runs here, and nothing is fetched while it does."""


def submit(
    text: str, name: str, out: Path, resume: bool, where: Sequence[str], more: Mapping[str, str] | None = None
) -> int:
    """`flwr run` of our app with a recipe; its exit status. `where`: a connection's name in `$FLWR_HOME/config.toml`, or
    what a local simulation is told. `out`: the run directory on the coordinator's machine; SuperLink's user writes it.
    `more` goes into the environment.
    """
    given = {"recipe": text, "recipe-name": name, "out": str(out.absolute()), "resume": resume}
    with tempfile.TemporaryDirectory(prefix="ficpd-") as folder:
        config = Path(folder) / "run.toml"
        config.write_text(tomli_w.dumps(given), encoding="utf-8")
        command = [flower("flwr"), "run", str(APP), *where, "--run-config", str(config), "--stream"]
        return subprocess.run(command, env=environment(more), check=False).returncode


def reachable(connection: str) -> None:
    """Raises `SiteError` within ten seconds, in words, for a SuperLink that does not answer as it should; `ConfigError` for
    a connection that Flower's configuration does not know."""
    from ficpd.deployment.tls_check import reach

    file = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser() / "config.toml"
    try:
        known = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {}) if file.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    named = {name: place for name, place in known.items() if isinstance(place, dict)}
    if connection not in named or "address" not in named[connection]:
        raise ConfigError(
            f"{file}: {unknown('superlink', connection, named)}. engine.options.superlink names one with an address; "
            "`ficpd deploy init` writes such a file"
        )
    place = named[connection]
    if not place.get("insecure", False):
        ca = place.get("root-certificates")
        reach(str(place["address"]), Path(ca) if ca else None)


def flower(program: str) -> str:
    """The path of one of Flower's programs, beside this Python. Raises `ConfigError` where Flower is not installed."""
    path = Path(sys.executable).parent / program
    if find_spec("flwr") is None or not path.exists():
        raise ConfigError(f"{path} does not exist; install Flower: pip install 'ficpd[flower]'")
    return str(path)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's own, silent, and with this Python's programs first: Flower starts its helpers by name."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "PATH": path, **(more or {})}


def free_ports(number: int) -> list[int]:
    """Of this machine: on Flower's usual one another user's SuperLink would be taken for ours."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
