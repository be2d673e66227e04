"""`reach` against real servers: each cause has words of its own, and comes in time."""

import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from secured import certificate, serving, tls

from ficpd.deployment import certificates
from ficpd.deployment.tls_check import reach
from ficpd.errors import ConfigError, SiteError


@pytest.fixture(scope="module")
def signing() -> certificates.Signed:
    return certificates.authority()


@pytest.fixture
def ca(signing: certificates.Signed, tmp_path: Path) -> Path:
    (tmp_path / "ca.crt").write_bytes(signing.pem)
    return tmp_path / "ca.crt"


def test_what_answers_is_told(signing: certificates.Signed, ca: Path, tmp_path: Path):
    written = certificates.server(signing, "federation.example.org")
    pair = tmp_path / "server.crt", tmp_path / "server.key"
    pair[0].write_bytes(written.pem)
    pair[1].write_bytes(written.key_pem)
    with serving(tls(pair)) as address:
        said = reach(address, ca)
    assert address in said
    assert "federation.example.org, localhost" in said
    assert written.ends in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"begins": -30, "ends": -2}, "ended on .* and here it is .*needs a new one"),
        ({"begins": 2}, "is valid from .* on, and here it is .*clock"),
        ({"names": ("superlink.example.org", "192.0.2.7")}, r"for superlink.example.org, 192.0.2.7, not for 127.0.0.1"),
    ],
)
def test_a_certificate_that_does_not_hold(
    change: dict, words: str, signing: certificates.Signed, ca: Path, tmp_path: Path
) -> None:
    with (
        serving(tls(certificate(tmp_path, "bad", signing, **change))) as address,
        pytest.raises(SiteError, match=words),
    ):
        reach(address, ca)


def test_another_authority(ca: Path, tmp_path: Path):
    """Of the same name, too: that is what a second `deploy init` makes."""
    with (
        serving(tls(certificate(tmp_path, "other", certificates.authority()))) as address,
        pytest.raises(SiteError, match=r"not signed by .*ca.crt \(SHA-256 [0-9a-f:]{95}\).*compare"),
    ):
        reach(address, ca)
    with serving(tls((tmp_path / "other.crt", tmp_path / "other.key"))) as address:  # noqa: SIM117
        with pytest.raises(SiteError, match="not signed by an authority that this machine trusts"):
            reach(address)


def test_no_tls(ca: Path):
    with (
        serving(lambda plain: plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address,
        pytest.raises(SiteError, match="answers, but not with TLS"),
    ):
        reach(address, ca)
    with serving(lambda plain: None) as address, pytest.raises(SiteError, match="answers, but not with TLS"):
        reach(address, ca)


def test_one_who_says_nothing(ca: Path):
    """A server that takes the connection and sleeps must not hold us up."""
    began, done = time.monotonic(), threading.Event()
    with serving(lambda plain: done.wait(5) and None) as address:
        with pytest.raises(SiteError, match="says nothing"):
            reach(address, ca, seconds=0.5)
        assert time.monotonic() - began < 2
        done.set()


def test_nobody_listens(ca: Path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(SiteError, match=f"nobody listens at {address}; is the coordinator running"):
        reach(address, ca)


def test_a_name_that_is_none(ca: Path):
    with pytest.raises(SiteError, match=r"name 'federation\.invalid' cannot be resolved"):
        reach("federation.invalid:9443", ca, seconds=2)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        reach("https://federation.example.org", ca)


def test_a_name_server_that_sleeps(ca: Path, monkeypatch: pytest.MonkeyPatch):
    waiting = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: waiting.wait(5))
    began = time.monotonic()
    with pytest.raises(SiteError, match="name server does not answer"):
        reach("federation.example.org:9443", ca, seconds=0.3)
    assert time.monotonic() - began < 2
    waiting.set()


def test_an_authority_that_is_none(tmp_path: Path):
    with pytest.raises(SiteError, match=r"no.crt cannot be read .*expected ca.crt of the coordinator"):
        reach("127.0.0.1:1", tmp_path / "no.crt")
    (tmp_path / "bad.crt").write_text("-----BEGIN CERTIFICATE-----\nnone\n")
    with pytest.raises(SiteError, match=r"bad.crt cannot be read"):
        reach("127.0.0.1:1", tmp_path / "bad.crt")
