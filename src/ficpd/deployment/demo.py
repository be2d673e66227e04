"""Runs `ficpd deploy demo`: a federation of three organisations with separate processes on one machine.

TLS, SuperNode keys, sockets, ledgers and policies are those of `ficpd deploy init`. Paths, ports and records differ. There
is no nginx.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from ficpd.deployment.flower_cli import clean_env, flower_binary, flwr_run, free_ports
from ficpd.deployment.provision import INNER_PORT, init
from ficpd.errors import RunError

SITES = {"north": "tweets", "south": "films", "east": "products"}
"""Each site's domain of the built-in sentence ratings."""

START_SECONDS, STOP_SECONDS = 120.0, 20.0

Say = Callable[[str], Any]


def demo(out: Path, rounds: int, say: Say, secure_aggregation: bool = False) -> None:
    """Runs the demo, writes the run directory `out` and ends all processes. Raises `RunError`."""
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out")
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        # the folder's name is short, because a socket's path has at most 107 bytes
        with tempfile.TemporaryDirectory(prefix="ficpd-", ignore_cleanup_errors=True) as folder, ExitStack() as running:
            _run(Path(folder), out, rounds, say, running, secure_aggregation)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(folder: Path, out: Path, rounds: int, say: Say, running: ExitStack, secure: bool) -> None:
    inner, *outer = free_ports(1 + len(SITES))
    init(folder / "deploy", list(SITES), f"127.0.0.1:{inner}", secure)
    flwr_home = _coordinator(folder, inner, rounds)
    ca = folder / "deploy" / "ca" / "ca.crt"
    began = time.monotonic()
    env = {"FLWR_HOME": str(flwr_home)}
    link = running.enter_context(_started("superlink", _superlink(folder, inner), env, folder))
    _wait(lambda: _listens(inner), link, folder / "superlink.log")
    say(f"SuperLink listens after {time.monotonic() - began:.1f} s")
    began, sites = time.monotonic(), {}
    for (name, domain), port in zip(SITES.items(), outer, strict=True):
        public = folder / "deploy" / "coordinator" / "sites" / f"{name}.pub"
        _flwr(flwr_home, "supernode", "register", "--name", name, str(public), "ficpd")
        command = [sys.executable, "-m", "ficpd", "site", "run", str(_site(folder, name, domain))]
        sites[name] = running.enter_context(_started(f"site-{name}", command, {}, folder))
        command = _supernode(folder, name, ca, inner, port)
        site_env = {"FLWR_HOME": str(folder / f"flower-{name}")}
        running.enter_context(_started(f"supernode-{name}", command, site_env, folder))
    for name, site in sites.items():
        _wait(lambda name=name: (folder / f"{name}.sock").exists(), site, folder / f"site-{name}.log")
    _wait(lambda: _online(flwr_home) == len(SITES), link, folder / "superlink.log")
    say(f"{len(SITES)} sites are connected after {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    recipe = folder / "recipe.toml"
    if flwr_run(recipe.read_text(encoding="utf-8"), recipe.name, out, False, ["ficpd"], env):
        raise RunError(f"the run ended without a result in {out}:\n{_tail(folder / 'superlink.log')}")
    say(f"{rounds} rounds with setup and evaluation: {time.monotonic() - began:.1f} s")
    for name in SITES:
        say(f"\n{name}:")
        command = [sys.executable, "-m", "ficpd", "site", "status", str(folder / f"{name}.toml")]
        subprocess.run(command, env=clean_env(), check=True)
    say(f"\nlibrary: {out / 'library'}")


def _coordinator(folder: Path, port: int, rounds: int) -> Path:
    """Writes FLWR_HOME and the recipe from those of `init`, with other paths and ports; returns FLWR_HOME."""
    written = folder / "deploy" / "coordinator"
    flwr_home = folder / "flower-coordinator"
    flwr_home.mkdir()
    config = (written / "config.toml").read_text(encoding="utf-8")
    config = config.replace(f":{INNER_PORT}", f":{port}").replace("/etc/ficpd", str(written))
    (flwr_home / "config.toml").write_text(config, encoding="utf-8")
    recipe = tomllib.loads((written / "recipe.toml").read_text(encoding="utf-8"))
    recipe["federation"]["num_rounds"] = rounds
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    return flwr_home


def _site(folder: Path, name: str, domain: str) -> Path:
    """Writes a site's settings from those of `init`, with its records; returns the file."""
    given: dict[str, Any] = tomllib.loads((folder / "deploy/sites" / name / "site.toml").read_text(encoding="utf-8"))
    given["socket"], given["state"] = str(folder / f"{name}.sock"), str(folder / f"state-{name}")
    given["card"]["domain"] = domain
    columns = {"text": "text", "target": "polarity", "domain": "domain"}
    if "secure_sum" in given:
        own = folder / "deploy" / "sites" / name
        given["secure_sum"] = {"key": str(own / "signing.key"), "known": str(own / "signing-keys")}
    given["data"] |= {"source": "ratings", "columns": columns, "where": {"domain": [domain]}}
    settings = folder / f"{name}.toml"
    settings.write_text(tomli_w.dumps(given), encoding="utf-8")
    return settings


def _superlink(folder: Path, port: int) -> list[str]:
    written = folder / "deploy" / "coordinator"
    return [
        flower_binary("flower-superlink"), "--host", "127.0.0.1", "--port", str(port),
        "--ssl-ca-certfile", str(written / "ca.crt"), "--ssl-certfile", str(written / "server.crt"),
        "--ssl-keyfile", str(written / "server.key"), "--enable-supernode-auth",
        "--database", str(folder / "superlink.db"), "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def _supernode(folder: Path, name: str, ca: Path, superlink: int, port: int) -> list[str]:
    key = folder / "deploy" / "sites" / name / "supernode.key"
    return [
        flower_binary("flower-supernode"), "--superlink", f"127.0.0.1:{superlink}", "--root-certificates", str(ca),
        "--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(port),
        "--node-config", f'socket="{folder / name}.sock" name="{name}"',
    ]  # fmt: skip


def _online(flwr_home: Path) -> int:
    listed = json.loads(_flwr(flwr_home, "supernode", "list", "ficpd", "--format", "json"))
    return sum(node["status"] == "online" for node in listed["nodes"])


def _flwr(flwr_home: Path, *words: str) -> str:
    command, env = [flower_binary("flwr"), *words], clean_env({"FLWR_HOME": str(flwr_home)})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"flwr {' '.join(words)}: {(done.stdout + done.stderr).strip()}")
    return done.stdout


@contextmanager
def _started(name: str, command: list[str], more: Mapping[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process in a new session with its output in a log; ends it and all its children."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=clean_env(more), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with ExitStack() as family:
            left = [family.enter_context(_pidfd(pid)) for pid in _children(process.pid)]
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for handle in filter(None, left):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Lists a process's descendants. Some have another session, so a signal to the group does not reach them."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in file.read_text(encoding="utf-8").split()]
    return [member for child in found for member in (child, *_children(child))]


@contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """Yields a handle that stays valid when the process id is reused; None if the process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            reason = "ended" if process.poll() is not None else f"was not ready after {START_SECONDS:.0f} s"
            raise RunError(f"{log.stem} {reason}:\n{_tail(log)}")
        time.sleep(0.2)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
