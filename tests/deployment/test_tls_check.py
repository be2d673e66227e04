"""`reach` against real servers: an error names the address and the reason, and comes in time."""

import re
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from secured import certificate, serving, tls

from ficpd.deployment import certificates
from ficpd.deployment.tls_check import check_tls
from ficpd.errors import ConfigError, SiteError


@pytest.fixture(scope="module")
def signing() -> certificates.SignedCert:
    return certificates.create_ca()


@pytest.fixture
def ca(signing: certificates.SignedCert, tmp_path: Path) -> Path:
    (tmp_path / "ca.crt").write_bytes(signing.pem)
    return tmp_path / "ca.crt"


def refused(address: str, ca: Path | None, reason: str, seconds: float = 8.0) -> None:
    """Asserts that `reach` names the address and gives the reason."""
    with pytest.raises(SiteError, match=f"^{re.escape(address)} .*({reason})"):
        check_tls(address, ca, seconds)


def test_a_good_certificate(signing: certificates.SignedCert, ca: Path, tmp_path: Path):
    written = certificates.create_server_cert(signing, "federation.example.org")
    pair = tmp_path / "server.crt", tmp_path / "server.key"
    pair[0].write_bytes(written.pem)
    pair[1].write_bytes(written.key_pem)
    with serving(tls(pair)) as address:
        said = check_tls(address, ca)
    assert address in said
    assert "federation.example.org, localhost" in said
    assert written.ends in said


@pytest.mark.parametrize(("change", "reason"), [
    ({"begins": -30, "ends": -2}, "certificate has expired"),
    ({"begins": 2}, "certificate is not yet valid"),
    ({"names": ("superlink.example.org", "192.0.2.7")}, "not valid for '127.0.0.1'"),
])  # fmt: skip
def test_a_certificate_that_does_not_hold(change: dict, reason: str, signing, ca: Path, tmp_path: Path) -> None:
    with serving(tls(certificate(tmp_path, "bad", signing, **change))) as address:
        refused(address, ca, reason)


@pytest.mark.parametrize("given", [True, False])
def test_another_authority(given: bool, ca: Path, tmp_path: Path):
    """Also one of the same name, as a second `deploy init` makes."""
    with serving(tls(certificate(tmp_path, "other", certificates.create_ca()))) as address:
        refused(address, ca if given else None, "unable to get local issuer certificate|self.signed|signature failure")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "WRONG_VERSION_NUMBER|record layer"), (b"", "EOF|reset by peer")],
)
def test_no_tls(answer: bytes, reason: str, ca: Path):
    with serving(lambda plain: plain.sendall(answer)) as address:
        refused(address, ca, reason)


def test_a_server_that_does_not_answer(ca: Path):
    began, done = time.monotonic(), threading.Event()
    with serving(lambda plain: done.wait(5) and None) as address:
        refused(address, ca, "timed out|no answer within 0.5 s", seconds=0.5)
        assert time.monotonic() - began < 2
        done.set()


def test_nothing_listens(ca: Path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    refused(address, ca, "Connection refused")


def test_an_unknown_name(ca: Path):
    refused("federation.invalid:9443", ca, "Name or service not known|[Nn]ame resolution|no answer within", seconds=2)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        check_tls("https://federation.example.org", ca)


def test_a_resolver_that_does_not_answer(ca: Path, monkeypatch: pytest.MonkeyPatch):
    waiting = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: waiting.wait(5) and [])
    began = time.monotonic()
    refused("federation.example.org:9443", ca, "no answer within 0.3 s", seconds=0.3)
    assert time.monotonic() - began < 2
    waiting.set()


def test_an_authority_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "bad.crt").write_text("-----BEGIN CERTIFICATE-----\nnone\n")
    for name in ("no.crt", "bad.crt"):
        with pytest.raises(SiteError, match=rf"{name} cannot be read .*expected ca.crt of the coordinator"):
            check_tls("127.0.0.1:1", tmp_path / name)
