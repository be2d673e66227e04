"""A ClientApp is code that the coordinator sends. It runs as the SuperNode's user, and here it tries all that it can.

Two users and a real site process, laid out as the systemd units say: modes and owners keep the SuperNode's user out.
"""

import configparser
import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest

from ficpd.federation import codec
from ficpd.federation.codec import SiteRequest

SITE_USER, SUPERNODE_USER, OTHER_USER = 61201, 61202, 61203
CANARY = "zanzibar"
"""In every record, and nowhere else."""

SITE = """
name = "north"
socket = "run/north.sock"
state = "state"
card = { language = "English" }
backbone = { name = "tiny" }
task = { name = "classification", instruction = "it was", labels = { good = "good", bad = "bad" } }
data = { source = "records.csv", columns = { text = "text", target = "label" }, test_fraction = 0.2 }
policy = { epsilon = 1.0 }
"""

HANDED_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does for a unit with a socket."""

ROGUE = """
import ctypes, json, os, signal, sys
pid, paths = int(sys.argv[1]), sys.argv[2:]
libc = ctypes.CDLL(None, use_errno=True)

def read(path):
    with open(path, "rb") as file:
        return file.read(16)

def called(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

tries = {path: lambda path=path: os.listdir(path) if os.path.isdir(path) else read(path) for path in paths}
files = [path for path in paths if not os.path.isdir(path)]
tries |= {f"write {path}": lambda path=path: os.close(os.open(path, os.O_WRONLY)) for path in files}
tries |= {name: lambda name=name: read(f"/proc/{pid}/{name}") for name in ("mem", "environ", "maps", "auxv")}
tries |= {name: lambda name=name: os.listdir(f"/proc/{pid}/{name}") for name in ("fd", "map_files")}
tries |= {name: lambda name=name: os.readlink(f"/proc/{pid}/{name}") for name in ("cwd", "exe", "root")}
tries["kill"] = lambda: os.kill(pid, signal.SIGTERM)
tries["ptrace"] = lambda: called(libc.ptrace(0x4206, pid, None, None))  # PTRACE_SEIZE: stops nobody
tries["pidfd_getfd"] = lambda: called(libc.syscall(438, os.pidfd_open(pid), 3, 0))
got = {}
for name, attempt in tries.items():
    try:
        got[name] = f"got {attempt()!r}"
    except OSError as error:
        got[name] = os.strerror(error.errno)
print(json.dumps(got))
"""

ASK = """
import errno, http.client, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(30)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    sys.exit(errno.EACCES)
except ConnectionRefusedError:
    sys.exit(errno.ECONNREFUSED)
asking = http.client.HTTPConnection("site")
asking.sock = sock
asking.request(sys.argv[2], sys.argv[3], sys.stdin.buffer.read())
answer = asking.getresponse()
sys.stdout.buffer.write(b"%d " % answer.status + answer.read())
"""


@dataclass(frozen=True)
class Interpreter:
    """This Python, or a copy of it where only root may go: who is another user has to be able to run it."""

    path: str
    environment: dict[str, str]

    def start(self, user: int, code: str, *words: str, env: Mapping[str, str] | None = None, **more):
        environment = self.environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
        command = [self.path, "-c", code, *words]
        return subprocess.Popen(command, user=user, group=user, extra_groups=[], env=environment, cwd="/", **more)

    def run(self, user: int, code: str, *words: str, given: bytes = b"") -> tuple[int, bytes]:
        """Exit status and output of a few lines."""
        pipe = subprocess.PIPE
        with self.start(user, code, *words, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            out, err = process.communicate(given)
        assert process.returncode in (0, errno.EACCES, errno.ECONNREFUSED), err.decode()
        return process.returncode, out


@pytest.fixture(scope="module")
def python() -> Iterator[Interpreter]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be two users")
    with tempfile.TemporaryDirectory(prefix="ficpd-python-") as name:
        home = Path(name) / "python"
        Path(name).chmod(0o755)
        if all(parent.stat().st_mode & 0o001 for parent in Path(os.path.realpath(sys.executable)).parents):
            yield Interpreter(sys.executable, {})
            return
        left = shutil.ignore_patterns("site-packages", "test", "idlelib", "*.a", "share", "include", "__pycache__")
        shutil.copytree(sys.base_prefix, home, symlinks=True, ignore=left)
        packages = [path for path in sys.path if path and not path.startswith(sys.base_prefix)]
        yield Interpreter(
            str(home / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"),
            {"PYTHONHOME": str(home), "LD_LIBRARY_PATH": str(home / "lib"), "PYTHONPATH": os.pathsep.join(packages)},
        )


def unit(name: str) -> configparser.ConfigParser:
    """A systemd unit as `ficpd deploy init` writes it."""
    found = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    found.optionxform = str  # type: ignore[assignment]
    found.read_string((resources.files("ficpd.deployment") / "templates" / "site" / name).read_text())
    return found


@dataclass(frozen=True)
class Running:
    pid: int
    folder: Path
    socket: Path
    python: Interpreter

    def ask(self, user: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body; status -EACCES: the user may not connect, -ECONNREFUSED: nobody is there."""
        status, answer = self.python.run(user, ASK, str(self.socket), method, path, given=body)
        if status:
            return -status, b""
        first, _, rest = answer.partition(b" ")
        return int(first), rest


@pytest.fixture(scope="module")
def site(python: Interpreter) -> Iterator[Running]:
    """Started as by systemd, but with a loose umask and a loose state folder: the site must not rely on either."""
    with tempfile.TemporaryDirectory(prefix="ficpd-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "site.toml").write_text(SITE)
        records = folder / "records.csv"
        records.touch(mode=0o600)
        rows = [f"the film was {CANARY} {word} {place},{word}" for place in range(20) for word in ("good", "bad")]
        records.write_text("\n".join(["text,label", *rows]) + "\n")
        os.chown(records, SITE_USER, SITE_USER)
        for own in ("state", "cache"):
            (folder / own).mkdir()
            os.chown(folder / own, SITE_USER, SITE_USER)
        path = folder / "run" / "north.sock"
        with bound_as_the_unit_says(path) as listening, (folder / "log").open("wb") as log:
            process = python.start(
                SITE_USER, HANDED_OVER, str(listening.fileno()),
                python.path, "-m", "ficpd", "site", "run", str(folder / "site.toml"),
                env={"FICPD_CACHE": str(folder / "cache"), "HOME": "/nonexistent"}, umask=0o022,
                pass_fds=(listening.fileno(),), stdout=log, stderr=log,
            )  # fmt: skip
            try:
                started = Running(process.pid, folder, path, python)
                listening.close()
                assert started.ask(0, "GET", "/")[0] == 404, (folder / "log").read_text()
                yield started
            finally:
                process.kill()
                process.wait()


def bound_as_the_unit_says(path: Path) -> socket.socket:
    says = unit("ficpd-site.socket")["Socket"]
    path.parent.mkdir()
    path.parent.chmod(int(says["DirectoryMode"], 8))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    wanted = {"ficpd-supernode.service": SUPERNODE_USER, "ficpd-site.service": SITE_USER}
    users = {unit(name)["Service"]["User"]: user for name, user in wanted.items()}
    users["root"] = 0
    os.chown(path, users[says["SocketUser"]], users[says["SocketGroup"]])
    path.chmod(int(says["SocketMode"], 8))
    listening.listen(16)
    return listening


def test_the_units_keep_two_users_apart():
    site, node = unit("ficpd-site.service")["Service"], unit("ficpd-supernode.service")["Service"]
    assert site["User"] != node["User"]
    assert node["Group"] != site["Group"]
    assert int(site["StateDirectoryMode"], 8) & 0o077 == 0
    assert int(site["UMask"], 8) & 0o077 == 0o077


@pytest.mark.slow
def test_nothing_can_be_read_but_the_socket(site: Running):
    """Records, ledger, seed, and the process itself with all that it has in memory."""
    state = site.folder / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    wanted = [str(site.folder / "records.csv"), str(state), *(str(path) for path in state.rglob("*"))]
    assert any(path.endswith("ledger.sqlite") for path in wanted)
    _, own = site.python.run(SITE_USER, ROGUE.replace("SIGTERM", "SIGCONT"), str(site.pid), *wanted[:2])
    assert "got" in json.loads(own)["environ"], "the site's own user can, so that these tries are tries"
    _, out = site.python.run(SUPERNODE_USER, ROGUE, str(site.pid), *wanted)
    got = json.loads(out)
    refusals = {"Permission denied", "Operation not permitted"}
    assert {name: what for name, what in got.items() if what not in refusals} == {}
    assert site.ask(SUPERNODE_USER, "POST", "/query", b"?")[0] == 422, "and the process is still there"


def test_the_socket_is_the_supernodes_alone(site: Running):
    assert site.ask(SUPERNODE_USER, "POST", "/query", codec.encode_call(SiteRequest("hello")))[0] == 200
    assert site.ask(OTHER_USER, "POST", "/query", codec.encode_call(SiteRequest("hello")))[0] == -errno.EACCES
    code = "import os, sys; os.replace(sys.argv[1], sys.argv[1] + '.mine')"
    with pytest.raises(AssertionError, match="PermissionError"):
        site.python.run(SUPERNODE_USER, code, str(site.socket))


def test_what_a_caller_gets_is_public(site: Running):
    """Name, card, backbone, version, whether it rehearses; errors that quote no record; no map of what could be asked."""
    status, body = site.ask(SUPERNODE_USER, "POST", "/query", codec.encode_call(SiteRequest("hello")))
    assert status == 200
    assert set(json.loads(body)) == {"name", "card", "backbone", "version", "rehearsal"}
    answers = [body]
    for what in ("train", "evaluate", "records"):
        answers.append(site.ask(SUPERNODE_USER, "POST", "/train", codec.encode_call(SiteRequest(what)))[1])
    for path in ("/", "/docs", "/openapi.json", "/records", "/../records.csv", str(site.folder / "records.csv")):
        status, body = site.ask(SUPERNODE_USER, "GET", path)
        assert status == 404, path
        answers.append(body)
    assert not any(CANARY.encode() in body for body in answers)


def test_the_sites_own_figures_are_not_told(site: Running):
    """How many records there are, scores on them, what is spent, and errors in full are for the site's own people."""
    status, body = site.ask(SUPERNODE_USER, "GET", "/status")
    assert status in (403, 404), body.decode()
