"""The app's client half against a real HTTP server on a Unix socket: bytes and refusals pass unchanged."""

import http.server
import json
import os
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ficpd

pytest.importorskip("flwr")
pytestmark = [  # httpx does not close a socket that nobody answers
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
from flwr.app import ConfigRecord, Context, Message, RecordDict  # noqa: E402

APP = Path(ficpd.__file__).parent / "deployment" / "flower-app"
EVERY_BYTE = bytes(range(256)) * 4096


class Handler(http.server.BaseHTTPRequestHandler):
    """A site that refuses what ends in 0, and else answers path and body, reversed."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        answer = b'{"error": "budget", "refused": true}' if body.endswith(b"\0") else self.path.encode() + body[::-1]
        self.send_response(409 if body.endswith(b"\0") else 200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def address_string(self) -> str:
        return "site"

    def log_message(self, *words: object) -> None: ...


class Site(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short name (a socket's path has at most 107 bytes) and a site at `3.sock`."""
    with tempfile.TemporaryDirectory(prefix="ficpd-") as folder, Site(f"{folder}/3.sock", Handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield Path(folder)
        site.shutdown()


@pytest.fixture
def carrier(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(APP)
    import ficpd_carrier.client_app
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):  # a message says whose it is; outside of Flower it is nobody's
        monkeypatch.setattr(TaskIdentity, name, 1)
    yield ficpd_carrier.client_app
    for name in [name for name in sys.modules if name.startswith("ficpd_carrier")]:
        del sys.modules[name]


def answered(carrier: ModuleType, kind: str, body: bytes, node: dict[str, str | int]) -> tuple[int, bytes]:
    call = Message(RecordDict({"call": ConfigRecord({"body": body})}), dst_node_id=1, message_type=kind)
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})
    answer = carrier.app(call, context).content.config_records["answer"]
    return answer["status"], answer["body"]


@pytest.mark.parametrize("kind", ["train", "query"])
def test_bytes_are_carried_both_ways(carrier, sockets, kind, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a hospital's proxy is not asked
    status, body = answered(carrier, kind, EVERY_BYTE, {"socket": f"{sockets}/3.sock"})
    assert (status, body) == (200, f"/{kind}".encode() + EVERY_BYTE[::-1])


def test_a_refusal_is_carried(carrier, sockets):
    status, body = answered(carrier, "train", b"order\0", {"socket": f"{sockets}/3.sock"})
    assert status == 409
    assert json.loads(body) == {"error": "budget", "refused": True}


def test_the_owner_says_which_socket_not_the_server(carrier, sockets, monkeypatch):
    monkeypatch.setenv("FICPD_SOCKETS", "/nowhere")
    assert answered(carrier, "train", b"x", {"sockets-folder": str(sockets), "partition-id": 3})[0] == 200
    assert answered(carrier, "train", b"x", {"partition-id": 3})[0] == 503
    monkeypatch.setenv("FICPD_SOCKETS", str(sockets))
    assert answered(carrier, "train", b"x", {"partition-id": 3})[0] == 200
    assert answered(carrier, "train", b"x", {"socket": "/nowhere", "partition-id": 3})[0] == 503


def test_no_site_is_said_at_once_and_in_words(carrier, sockets):
    (sockets / "left").touch()
    began = time.monotonic()
    for node, why in [
        ({"socket": f"{sockets}/none.sock"}, "none.sock"),
        ({"socket": f"{sockets}/left"}, "ficpd-site"),
        ({"socket": "/tmp/" + "long" * 40}, "long"),
        ({}, "--node-config"),
    ]:
        status, body = answered(carrier, "train", b"x", node)
        assert status == 503
        assert why in json.loads(body)["error"]
    assert time.monotonic() - began < 2


def test_the_client_half_imports_flower_and_httpx_alone():
    code = f"import sys; sys.path.insert(0, {str(APP)!r}); import flwr.clientapp, httpx; before = set(sys.modules)\n"
    code += "import ficpd_carrier.client_app; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ficpd'" not in done.stdout
    assert "torch" not in done.stdout


def test_flower_builds_a_small_bundle(tmp_path):
    flwr = Path(sys.executable).parent / "flwr"
    quiet = {"FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command, quietly = [flwr, "build", "--app", APP], os.environ | quiet
    done = subprocess.run(command, cwd=tmp_path, env=quietly, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = tmp_path.glob("ficpd.ficpd-carrier.*.fab")
    assert bundle.stat().st_size < 10_000


def test_the_link_at_the_root_is_the_app():
    link = Path(__file__).parents[2] / "deploy" / "flower"
    assert link.is_symlink()
    assert link.resolve() == APP.resolve()
