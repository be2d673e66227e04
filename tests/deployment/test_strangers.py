"""SuperLink's one port also takes runs: behind the nginx that `deploy init` writes, nobody outside can send any."""

import http.client
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from superlink import Coordinator

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")]

BYTES = 6_000_000  # more than a piece of Flower's messages, and than nginx lets through unasked

PROJECT = """
[project]
name = "echo"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "tests"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"
[tool.flwr.app.config]
bytes = 1
"""
SERVER = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    call = RecordDict({"call": ConfigRecord({"body": b"x" * context.run_config["bytes"]})})
    for reply in grid.send_and_receive(
        [Message(call, dst_node_id=node, message_type="query") for node in grid.get_node_ids()], timeout=100
    ):
        print("answered with", len(reply.content["call"]["body"]), "bytes", flush=True)
"""
CLIENT = """
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    return Message(message.content, reply_to=message)
"""


@pytest.fixture(scope="module")
def proxy(coordinator: Coordinator) -> Iterator[int]:
    with coordinator.proxy() as port:
        yield port


@pytest.fixture(scope="module")
def app(coordinator: Coordinator) -> Path:
    folder = coordinator.folder / "app"
    (folder / "echo").mkdir(parents=True)
    texts = {"pyproject.toml": PROJECT, "LICENSE": "none", "echo/__init__.py": "", "echo/server.py": SERVER}
    for name, text in (texts | {"echo/client.py": CLIENT}).items():
        (folder / name).write_text(text)
    return folder


def test_sites_work_through_the_proxy(coordinator: Coordinator, proxy: int, app: Path):
    """A SuperNode comes in by the published port; the coordinator's own run reaches it, and large bytes come back."""
    key = coordinator.written / "sites" / "north" / "supernode.key"
    with coordinator.supernode("north", key, f"localhost:{proxy}", coordinator.ca) as (process, log):
        end = time.monotonic() + 60
        while not coordinator.online():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        done = coordinator.flwr("run", str(app), "ficpd", "-c", f"bytes={BYTES}", "--stream")
    assert f"answered with {BYTES} bytes" in done.stdout, done.stdout + done.stderr
    used = (coordinator.folder / "access.log").read_text()
    for what in ("activate-node", "pull-object", "push-object", "push-messages"):
        assert f'POST /v1/fleet/{what} HTTP/1.1" 200' in used


def test_strangers_are_refused(coordinator: Coordinator, proxy: int, app: Path):
    """They know the address and the authority's certificate, as everybody may."""
    home = coordinator.connection("stranger", f"localhost:{proxy}", coordinator.ca)
    before, key = coordinator.runs(), coordinator.written / "sites" / "south" / "supernode.pub"
    for words in (["run", str(app)], ["list"], ["supernode", "list"], ["supernode", "register", str(key)]):
        done = coordinator.flwr(*words, "there", home=home)
        assert done.returncode == 1
        assert "403 Forbidden" in done.stdout + done.stderr
    assert coordinator.runs() == before


def test_the_inner_port_would_take_it(coordinator: Coordinator, app: Path):
    """That the test above refuses what would else be taken; and that SuperLink is on this machine's own address alone."""
    home = coordinator.connection("inside", f"127.0.0.1:{coordinator.port}", coordinator.ca)
    assert coordinator.flwr("list", "there", home=home).returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", coordinator.port), timeout=5)


PATHS = [
    "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/health", "/",
    "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/..%252fcontrol/start-run", "/v1/fleet/x/../../control/start-run", "/v1/fleet/..;/control/start-run",
    "//v1/control/start-run", "/v1/fleet/..\\control/start-run", "/V1/control/start-run",
    "https://localhost/v1/control/start-run", "/v1/control/start-run/../../fleet/pull-messages",
    "/v1/control/start-run?/v1/fleet/", "/v1/control/start-run/%2e%2e/%2e%2e/fleet/pull-messages",
]  # fmt: skip


def test_no_spelling_of_a_path_gets_past(coordinator: Coordinator, proxy: int):
    """What SuperLink saw is in its log: nothing but the Fleet API's paths."""
    log = coordinator.folder / "superlink.log"
    seen = len(log.read_bytes())
    context = ssl.create_default_context(cafile=coordinator.ca)
    for path in PATHS:
        asking = http.client.HTTPSConnection("localhost", proxy, context=context, timeout=10)
        headers = {"Content-Type": "application/protobuf", "X-Original-URL": "/v1/control/start-run"}
        asking.request("POST", path, b"", headers)
        assert asking.getresponse().status in (400, 401, 403, 404, 415, 422), path
        asking.close()
    came = [line for line in log.read_bytes()[seen:].decode(errors="replace").splitlines() if "POST" in line]
    assert came, "those that are the Fleet API's come through"
    assert all('"POST /v1/fleet/' in line for line in came if "POST /v1/runtime/" not in line), came
