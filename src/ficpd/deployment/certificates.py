"""Creates the keys and certificates of a federation on the curve P-384: its CA, its server, its SuperNodes.

Needs `cryptography`, a dependency of Flower.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_YEARS, SERVER_YEARS = 10, 2
LOCAL = ("localhost", "127.0.0.1", "::1")
"""The coordinator's programs and its proxy reach SuperLink by these names."""


@dataclass(frozen=True)
class SignedCert:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def ends(self) -> str:
        """Returns the certificate's last valid day, such as 2036-01-31."""
        return self.certificate.not_valid_after_utc.date().isoformat()


def create_ca() -> SignedCert:
    """Creates the federation's certificate authority. It can sign servers, but no other authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _common_name("FICPD federation authority")
    built = (
        _builder(name, key.public_key(), CA_YEARS)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return SignedCert(key, built.sign(key, hashes.SHA384()))


def create_server_cert(ca: SignedCert, host: str) -> SignedCert:
    """Creates a server's certificate for `host` (a DNS name or an IP address) and for local names."""
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_alternative(name) for name in dict.fromkeys((host, *LOCAL))]
    of_ca = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    built = (
        _builder(_common_name("FICPD coordinator"), key.public_key(), SERVER_YEARS)
        .issuer_name(ca.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(of_ca, critical=False)
    )
    return SignedCert(key, built.sign(ca.key, hashes.SHA384()))


def create_node_key(comment: str) -> tuple[bytes, bytes]:
    """Creates a SuperNode's private and public key in OpenSSH's formats, like `ssh-keygen -t ecdsa -b 384`."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), public + f" {comment}\n".encode()


def create_signing_key() -> tuple[bytes, bytes]:
    """Creates a site's signing key for secure sums (private, public) as PEM, like `openssl genpkey`."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), public


def _builder(subject: x509.Name, public: ec.EllipticCurvePublicKey, years: int) -> x509.CertificateBuilder:
    """Starts a certificate that is valid from an hour ago, because clocks may be slow."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=365 * years))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(**given: bool) -> x509.KeyUsage:
    uses = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{use: given.get(use, False) for use in uses})
