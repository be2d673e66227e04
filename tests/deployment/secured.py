"""Servers with certificates for tests, good ones and each kind of bad one."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ficpd.deployment import certificates

HERE = ("127.0.0.1", "localhost")


def certificate(
    folder: Path, name: str, ca: certificates.SignedCert, names: tuple[str, ...] = HERE, begins: float = -1,
    ends: float = 30,
) -> tuple[Path, Path]:  # fmt: skip
    """A server's certificate for `names`, valid from `begins` to `ends` days from now: the files of certificate and key."""
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.now(UTC)
    called = [x509.IPAddress(ip_address(one)) if one[0].isdigit() else x509.DNSName(one) for one in names]
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins))
        .not_valid_after(now + timedelta(days=ends))
        .add_extension(x509.SubjectAlternativeName(called), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), critical=False)
        .sign(ca.key, hashes.SHA384())
    )
    pem, secret = folder / f"{name}.crt", folder / f"{name}.key"
    pem.write_bytes(built.public_bytes(Encoding.PEM))
    secret.write_bytes(certificates.SignedCert(key, built).key_pem)
    return pem, secret


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that gives every connection to `answer`."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def work() -> None:
            while True:
                try:
                    one, _ = listening.accept()
                except OSError:
                    return
                with one:
                    answer(one)

        thread = threading.Thread(target=work)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def tls(pair: tuple[Path, Path]) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)

    def answer(plain: socket.socket) -> None:
        try:
            with context.wrap_socket(plain, server_side=True) as secured:
                secured.recv(1)
        except OSError:
            pass

    return answer
