"""Why an address cannot be reached, in words and soon: Flower retries for ever, or says the same of every cause."""

import socket
import ssl
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from ficpd.deployment.provision import checked_address
from ficpd.errors import SiteError

SECONDS = 8.0
NOT_YET, ENDED = 9, 10
NO_TRUST = {2, 7, 18, 19, 20, 21}
OTHER_NAME = {62, 64}
"""OpenSSL's verification results (X509_V_ERR_*)."""


def reach(address: str, ca: Path | None = None, seconds: float = SECONDS) -> str:
    """A handshake with `address` (HOST:PORT), checked as Flower checks it; a sentence on what answered.

    `ca`: the authority's certificate (PEM); None: those that this machine trusts. Raises `SiteError` that says what is
    wrong, what was expected and what to do, about `seconds` later at the latest; `ConfigError` for what is no address.
    """
    checked_address(address)
    trusted = _authority(ca) if ca else []
    context = ssl.create_default_context(cafile=ca)
    end = time.monotonic() + seconds
    try:
        seen = _shake(address, context, end)
    except ssl.SSLCertVerificationError as error:
        blind = ssl.create_default_context()
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
        shown = _shake(address, blind, end + 1)
        raise SiteError(_objection(address, shown, error, ca, trusted)) from error
    return f"{address} answers with TLS; its certificate is for {_names(seen)}, until {_day(seen.not_valid_after_utc)}"


def _authority(ca: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(ca.read_bytes())
    except (OSError, ValueError) as error:
        raise SiteError(f"{ca} cannot be read ({error}); expected ca.crt of the coordinator, in PEM") from error


def _shake(address: str, context: ssl.SSLContext, end: float) -> x509.Certificate:
    """The server's certificate. Raises `SSLCertVerificationError` as it is, and for all else a `SiteError`."""
    host, port = checked_address(address)
    with _connected(address, _places(host, port, end), end) as plain:
        plain.settimeout(max(0.1, end - time.monotonic()))
        try:
            with context.wrap_socket(plain, server_hostname=host) as secured:
                return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
        except ssl.SSLCertVerificationError:
            raise
        except TimeoutError as error:
            raise SiteError(
                f"{address} takes the connection and then says nothing; is this the coordinator's port?"
            ) from error
        except (ssl.SSLError, ConnectionError, EOFError) as error:
            why = getattr(error, "reason", None) or error
            raise SiteError(
                f"{address} answers, but not with TLS ({why}); is it the right port? A coordinator started without "
                "--ssl-certfile, or with --insecure, speaks no TLS"
            ) from error


def _connected(address: str, found: list[Any], end: float) -> socket.socket:
    """To the first place that answers; each has its share of the time."""
    said = OSError()
    for number, (family, kind, protocol, _, there) in enumerate(found):
        one = socket.socket(family, kind, protocol)
        one.settimeout(max(0.1, (end - time.monotonic()) / (len(found) - number)))
        try:
            one.connect(there)
            return one
        except OSError as error:
            one.close()
            said = error
    if isinstance(said, ConnectionRefusedError):
        raise SiteError(f"nobody listens at {address}; is the coordinator running, and is this its port?") from said
    raise SiteError(
        f"{address} cannot be reached ({said.strerror or 'no answer'}); is a firewall in between, or the machine off?"
    ) from said


def _places(host: str, port: int, end: float) -> list[Any]:
    """A name server cannot be asked to hurry, so a thread waits for it."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(0.1, end - time.monotonic()))
    if not found or isinstance(found[0], Exception):
        why = found[0] if found else "the name server does not answer"
        raise SiteError(f"the name {host!r} cannot be resolved ({why}); is it spelt right, and is there a network?")
    return found[0]


def _objection(
    address: str,
    seen: x509.Certificate,
    error: ssl.SSLCertVerificationError,
    ca: Path | None,
    trusted: list[x509.Certificate],
) -> str:
    code, now = error.verify_code, datetime.now(UTC)
    if code == ENDED:
        if seen.not_valid_after_utc > now:
            return (
                f"the authority's own certificate in {ca} has ended; the coordinator has to make and hand out a new one"
            )
        return (
            f"the certificate of {address} ended on {_day(seen.not_valid_after_utc)}, and here it is {_day(now)}; the "
            "coordinator needs a new one, signed by the same authority"
        )
    if code == NOT_YET:
        begins = max(one.not_valid_before_utc for one in (seen, *trusted))
        return (
            f"the certificate of {address} is valid from {_day(begins)} on, and here it is {_day(now)}; is this machine's "
            "clock wrong, or was the coordinator's?"
        )
    if code in OTHER_NAME:
        return (
            f"{address} has a certificate for {_names(seen)}, not for {checked_address(address)[0]}; use an "
            "address that it names, or have the coordinator's certificate made for this one"
        )
    if code in NO_TRUST:
        known = f"{ca} (SHA-256 {_print(trusted[0])})" if trusted else "an authority that this machine trusts"
        return (
            f"the certificate of {address} is not signed by {known}; it names {_called(seen.issuer)!r} as its issuer. Ask "
            "the coordinator for this server's ca.crt and compare its SHA-256 by telephone; never go on without"
        )
    return f"the certificate of {address} does not hold: {error.verify_message}"


def _names(seen: x509.Certificate) -> str:
    try:
        named = seen.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return f"no name at all (its subject is {_called(seen.subject)!r}, which does not count)"
    return ", ".join(str(one.value) for one in named)


def _called(name: x509.Name) -> str:
    return name.rfc4514_string()


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _print(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex(":")
