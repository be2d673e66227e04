"""Checks that an address answers with a trusted certificate. Flower itself retries forever without a reason."""

import socket
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ficpd.deployment.provision import checked_address
from ficpd.errors import SiteError

SECONDS = 8.0


def check_tls(address: str, ca: Path | None = None, seconds: float = SECONDS) -> str:
    """Makes a TLS handshake with `address` (HOST:PORT), with Flower's checks; describes the certificate.

    ca: the authority's certificate (PEM); None: this machine's trusted authorities.

    Raises `SiteError` with the reason within about `seconds`, and `ConfigError` for an invalid address.
    """
    host, port = checked_address(address)
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise SiteError(f"{ca} cannot be read ({error}); expected ca.crt of the coordinator, in PEM") from error
    found: list[Any] = []

    def shake() -> None:
        try:
            with (
                socket.create_connection((host, port), seconds) as plain,
                context.wrap_socket(plain, server_hostname=host) as secured,
            ):
                found.append(secured.getpeercert())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=shake, daemon=True)  # the resolver takes no timeout
    thread.start()
    thread.join(seconds)
    seen = found[0] if found else TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(seen, OSError):
        raise SiteError(
            f"{address} does not answer as a coordinator: {seen}. Check the address, the firewall, this machine's clock and "
            'ca.crt; "When something is wrong" in docs/deploy.md lists the causes'
        ) from seen
    names = ", ".join(name for _, name in seen["subjectAltName"])
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(seen["notAfter"]), UTC).date()
    return f"{address} answers with TLS; its certificate is for {names}, until {ends}"
