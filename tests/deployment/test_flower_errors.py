"""Flower's messages where a site cannot come in, with real processes; `reach` gives the same reason sooner.

Where one of these fails after an update of Flower, docs/deploy.md's table of its messages is to be looked through.
"""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("flwr")
from secured import certificate, serving, tls
from superlink import Coordinator

from ficpd.deployment import certificates
from ficpd.deployment.flower_cli import free_ports
from ficpd.deployment.tls_check import check_tls
from ficpd.errors import SiteError

pytestmark = pytest.mark.slow

SECONDS = 40.0
"""For a process that takes 3 to 10 on a busy machine."""


@contextmanager
def bad_server(coordinator: Coordinator, kind: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Address and authority of a coordinator with one thing wrong."""
    signing = certificates.create_ca()
    (folder / "ca.crt").write_bytes(signing.pem)
    change = {"expired": {"begins": -30, "ends": -2}, "other name": {"names": ("superlink.example.org",)}}.get(kind, {})
    pair = certificate(folder, "server", signing, **change)
    with serving(tls(pair)) as address:
        yield address, coordinator.ca if kind == "other authority" else folder / "ca.crt"


@pytest.mark.parametrize(("kind", "reason"), [
    ("expired", "certificate has expired"),
    ("other name", "IP address mismatch"),
    ("other authority", "unable to get local issuer certificate|self.signed"),
])  # fmt: skip
def test_certificates(coordinator: Coordinator, kind: str, reason: str, tmp_path: Path):
    """A SuperNode ends and says it in OpenSSL's words; `flwr run` says the same sentence of everything."""
    with bad_server(coordinator, kind, tmp_path) as (address, ca):
        began = time.monotonic()
        with pytest.raises(SiteError, match=reason):
            check_tls(address, ca)
        assert time.monotonic() - began < 10
        key = coordinator.written / "sites" / "north" / "supernode.key"
        with coordinator.supernode(kind.replace(" ", "-"), key, address, ca) as (process, log):
            assert process.wait(SECONDS) == 1
        said = log.read_text(errors="replace")
        assert "Exit Code: 305" in said
        assert re.search(reason, said), said
        done = coordinator.flwr("list", "there", home=coordinator.connection("caller", address, ca))
        assert done.returncode == 1
        assert "Connection to the SuperLink is unavailable" in " ".join(done.stdout.split() + done.stderr.split())


def test_an_unregistered_key(coordinator: Coordinator, tmp_path: Path):
    """All is right but the key. Code 2004 is also what a site's own node gets while it is still counted as there."""
    address = f"127.0.0.1:{coordinator.port}"
    assert "answers with TLS" in check_tls(address, coordinator.ca)
    private, _ = certificates.create_node_key("stranger")
    (tmp_path / "key").write_bytes(private)
    with coordinator.supernode("unregistered", tmp_path / "key", address, coordinator.ca) as (process, log):
        assert process.wait(SECONDS) == 1
    said = log.read_text(errors="replace")
    assert "[code: 2004] Failed to activate SuperNode" in said
    assert coordinator.online() == []


def test_nobody_there(coordinator: Coordinator):
    """A SuperNode waits for ever and does not say for whom. That is right for a service, and no answer to a person."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    with pytest.raises(SiteError, match=f"{address} .*Connection refused"):
        check_tls(address, coordinator.ca)
    key = coordinator.written / "sites" / "north" / "supernode.key"
    with coordinator.supernode("alone", key, address, coordinator.ca) as (process, log):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(15)
        said = log.read_text(errors="replace")
    assert "Connection attempt failed, retrying" in said
    assert address not in said
