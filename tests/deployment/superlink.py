"""A coordinator as `ficpd deploy init` writes it, on ports of this machine alone; for the slow tests."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ficpd.deployment import demo, flower_cli, provision

SITES = ["north", "south"]
PUBLISHED, UNUSED = 9443, ("fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True)
class Coordinator:
    folder: Path
    home: Path
    port: int

    @property
    def written(self) -> Path:
        return self.folder / "deploy"

    @property
    def ca(self) -> Path:
        return self.written / "coordinator" / "ca.crt"

    def flwr(self, *words: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Flower's command, as the coordinator's own people call it, or from another `home`."""
        environment = flower_cli.clean_env({"FLWR_HOME": str(home or self.home), "COLUMNS": "200"})
        command = [flower_cli.flower_binary("flwr"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)

    def online(self) -> list[str]:
        listed = json.loads(self.flwr("supernode", "list", "ficpd", "--format", "json").stdout)
        return [node["node-id"] for node in listed["nodes"] if node["status"] == "online"]

    def runs(self) -> int:
        return len(json.loads(self.flwr("list", "ficpd", "--format", "json").stdout)["runs"])

    def connection(self, name: str, address: str, ca: Path) -> Path:
        """A home of somebody who knows an address and an authority's certificate, and has no key."""
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        text = f'[superlink]\ndefault = "there"\n[superlink.there]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
        (home / "config.toml").write_text(text)
        return home

    @contextmanager
    def supernode(self, name: str, key: Path, address: str, ca: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """The process and its log."""
        (port,) = flower_cli.free_ports(1)
        command = [
            flower_cli.flower_binary("flower-supernode"), "--superlink", address, "--root-certificates", str(ca),
            "--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        with demo._started(name, command, {"FLWR_HOME": str(self.folder / f"home-{name}")}, self.folder) as process:
            yield process, self.folder / f"{name}.log"

    @contextmanager
    def proxy(self) -> Iterator[int]:
        """The port of an nginx with the configuration that `deploy init` wrote, but for ports and places."""
        (port,) = flower_cli.free_ports(1)
        text = (self.written / "coordinator" / "nginx.conf").read_text()
        kept = [line for line in text.splitlines() if "listen [::]" not in line]
        text = "\n".join(kept).replace("/etc/ficpd", str(self.written / "coordinator"))
        text = text.replace(f"listen {PUBLISHED}", f"listen 127.0.0.1:{port}")
        text = text.replace(f"127.0.0.1:{provision.INNER_PORT}", f"127.0.0.1:{self.port}")
        (self.folder / "site.conf").write_text(text)
        places = "".join(f"{kind}_temp_path {self.folder}/{kind};\n" for kind in ("client_body", "proxy", *UNUSED))
        user = "user root;\n" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"{user}daemon off;\npid {self.folder}/nginx.pid;\nevents {{}}\nhttp {{\n{places}"
            f"access_log {self.folder}/access.log;\ninclude {self.folder}/site.conf;\n}}\n"
        )
        command = ["nginx", "-e", str(self.folder / "error.log"), "-c", str(self.folder / "nginx.conf")]
        with demo._started("nginx", command, {}, self.folder) as process:
            demo._wait(lambda: demo._listens(port), process, self.folder / "nginx.log")
            yield port


@contextmanager
def coordinating(folder: Path) -> Iterator[Coordinator]:
    """A SuperLink with TLS and the keys of two sites registered."""
    provision.init(folder / "deploy", SITES, f"localhost:{PUBLISHED}")
    (port,) = flower_cli.free_ports(1)
    home = demo._coordinator(folder, port, rounds=1)
    with ExitStack() as running:
        running.callback(left_alone, folder)
        command = demo._superlink(folder, port)
        link = running.enter_context(demo._started("superlink", command, {"FLWR_HOME": str(home)}, folder))
        demo._wait(lambda: demo._listens(port), link, folder / "superlink.log")
        made = Coordinator(folder, home, port)
        for name in SITES:
            done = made.flwr("supernode", "register", str(made.written / "sites" / name / "supernode.pub"), "ficpd")
            assert done.returncode == 0, done.stdout + done.stderr
        yield made


def left_alone(folder: Path) -> None:
    """End what Flower's helpers, in sessions of their own, leave behind where a run is cut off: whose FLWR_HOME is ours."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={folder}/".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue
