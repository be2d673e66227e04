"""Writes the files of `ficpd deploy init`: one folder for the coordinator and one for each site."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from ipaddress import ip_address
from pathlib import Path

from ficpd.errors import ConfigError
from ficpd.privacy.shared_gaussian import SHARED, Config, tolerance

INNER_PORT = 9091
"""SuperLink's local port. nginx listens at the public address."""

SITE = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST = re.compile(rf"(?=.{{1,253}}$)({LABEL}\.)*{LABEL}")


RECORD_PRIVACY = """name = "record_gaussian"
epsilon = 2.0
noise = "cryptographic\""""
SUMMED_PRIVACY = """name = "shared_gaussian"
epsilon = 2.0
noise = "cryptographic"
# Every site has at least so many records; all plan the same noise by it.
least_records = 100
# Sites that may drop out of a round, and sites that may tell the server all they know (docs/privacy.md).
max_lost = @LOST@
max_colluding = @COLLUDING@"""
SIGNING = """

# Its keys in secure sums: its own, and the public halves of all sites (NAME.pub), from the sites and never from a server.
[secure_sum]
key = "/etc/ficpd/signing.key"
known = "/etc/ficpd/signing-keys\""""


def init(folder: Path, sites: Sequence[str], address: str, secure_aggregation: bool = False) -> None:
    """Writes `folder` atomically: a CA, the coordinator's folder and a folder for each site.

    address: the coordinator's public address (HOST:PORT).
    secure_aggregation: the sites share their noise in secure sums. Each site gets a signing key and all public keys.

    Only the owner can read private keys, and a site's folder has no other site's key. Raises `ConfigError` for a folder
    that is not empty, and for invalid names.
    """
    host, port = checked_address(address)
    _check_sites(sites)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is not empty; new keys would lock out sites with the old ones. Choose another folder"
        )
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".deploy-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir(mode=0o755)
            _write(made, sites, address, host, port, secure_aggregation)
            made.replace(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error


def checked_address(address: str) -> tuple[str, int]:
    """Splits `HOST:PORT`, with an IPv6 host in brackets. Raises `ConfigError` for another form.

    >>> checked_address("federation.example.org:9443"), checked_address("[::1]:9443")
    (('federation.example.org', 9443), ('::1', 9443))
    """
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536 and _names_a_machine(host, bare)):
        raise ConfigError(
            f"address {address!r}: expected HOST:PORT, such as federation.example.org:9443 (an IPv6 address in brackets)"
        )
    return bare, int(port)


def _names_a_machine(host: str, bare: str) -> bool:
    try:
        return (ip_address(bare).version == 6) == (bare != host)
    except ValueError:
        digits = host.replace(".", "").isdigit()  # an invalid IPv4 address
        return not digits and HOST.fullmatch(host) is not None


def _check_sites(sites: Sequence[str]) -> None:
    if not sites:
        raise ConfigError("no sites; give their names, such as --sites north,south,east")
    for name in sites:
        if not SITE.fullmatch(name):
            raise ConfigError(
                f"site name {name!r}: expected up to 32 small letters, digits and inner hyphens; it becomes a file's name"
            )
    if twice := sorted({name for name in sites if sites.count(name) > 1}):
        raise ConfigError(f"site name {twice[0]!r} is given twice; each organisation needs a unique name")


def _write(made: Path, sites: Sequence[str], address: str, host: str, port: int, secure: bool) -> None:
    from ficpd.deployment import certificates

    here = resources.files("ficpd.deployment")
    ca = certificates.create_ca()
    server = certificates.create_server_cert(ca, host)
    words = {
        "ADDRESS": address, "HOST": host, "PORT": str(port), "INNER": str(INNER_PORT), "NAMES": ", ".join(sites),
        "SITES": ", ".join(f'"{name}"' for name in sites), "CA_ENDS": ca.ends, "SERVER_ENDS": server.ends,
    } | _privacy_words(len(sites), secure)  # fmt: skip
    _fill(here / "templates" / "README.md", made / "README.md", words)
    _secret(made / "ca" / "ca.key", ca.key_pem)
    (made / "ca" / "ca.crt").write_bytes(ca.pem)

    coordinator = made / "coordinator"
    _fill(here / "templates" / "coordinator", coordinator, words)
    _fill(here / "nginx.conf", coordinator / "nginx.conf", words)
    _secret(coordinator / "server.key", server.key_pem)
    (coordinator / "server.crt").write_bytes(server.pem)
    (coordinator / "ca.crt").write_bytes(ca.pem)
    (coordinator / "sites").mkdir()
    lines = [
        "# Run once when SuperLink runs. Registers these sites' SuperNodes; SuperLink refuses all others.\n",
        "set -e\n",
    ]
    for name in sites:
        private, public = certificates.create_node_key(name)
        site = made / "sites" / name
        _fill(here / "templates" / "site", site, words | {"NAME": name})
        _secret(site / "supernode.key", private)
        (site / "supernode.pub").write_bytes(public)
        (site / "ca.crt").write_bytes(ca.pem)
        (coordinator / "sites" / f"{name}.pub").write_bytes(public)
        lines.append(f"/opt/ficpd/bin/flwr supernode register --name {name} /etc/ficpd/sites/{name}.pub ficpd\n")
    (coordinator / "register.sh").write_text("".join(lines), encoding="utf-8")
    if secure:
        _signing_keys(made, sites, certificates.create_signing_key)


def _privacy_words(number: int, secure: bool) -> dict[str, str]:
    """Returns the templates' words for the privacy of the records."""
    allowed = tolerance(Config(epsilon=1.0), number) if secure else None
    if allowed is None:
        return {"PRIVACY": RECORD_PRIVACY, "MECHANISM": "record_gaussian", "SIGNING": ""}
    summed = SUMMED_PRIVACY.replace("@LOST@", str(allowed.lost)).replace("@COLLUDING@", str(allowed.colluding))
    return {"PRIVACY": summed, "MECHANISM": SHARED, "SIGNING": SIGNING}


def _signing_keys(made: Path, sites: Sequence[str], create: Callable[[], tuple[bytes, bytes]]) -> None:
    """Writes each site's signing key, and all public keys into every site's folder."""
    pairs = {name: create() for name in sites}
    for name in sites:
        _secret(made / "sites" / name / "signing.key", pairs[name][0])
        known = made / "sites" / name / "signing-keys"
        known.mkdir()
        for other, (_, public) in pairs.items():
            (known / f"{other}.pub").write_bytes(public)


def _fill(template: Traversable, target: Path, words: Mapping[str, str]) -> None:
    """Copies a file, or a folder of files, and replaces every @WORD@."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if template.is_dir():
        for inner in template.iterdir():
            _fill(inner, target / inner.name, words)
        return
    text = template.read_text(encoding="utf-8")
    target.write_text(re.sub(r"@([A-Z_]+)@", lambda found: words[found[1]], text), encoding="utf-8")


def _secret(path: Path, content: bytes) -> None:
    """Writes a file that only its owner can read, from its creation on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)
