"""Reads a site's signing keys for secure sums: its own, and all sites' public ones (`ficpd deploy init`)."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from ficpd.deployment.run_spec import RunSpec
from ficpd.deployment.site.config import SiteConfig
from ficpd.errors import PolicyError, SiteError
from ficpd.federation.rounds import sample_cohort
from ficpd.federation.secure_sum.member import Member
from ficpd.interfaces import Mechanism
from ficpd.privacy.shared_gaussian import SharedGaussian


def member_of(config: SiteConfig, run: str, spec: RunSpec, mechanism: Mechanism) -> Member | None:
    """Returns this site's member of a run's secure sums; None for a mechanism without them.

    The site itself samples each round's cohort. Raises `PolicyError` without keys, and `SiteError` for unusable keys.
    """
    if not isinstance(mechanism, SharedGaussian):
        return None
    if config.secure_sum is None:
        raise PolicyError(
            f"{config.name} has no [secure_sum] in its site file: expected its signing key and those of all sites. "
            "`ficpd deploy init --secure-aggregation` writes them"
        )
    known = {file.stem: _public(file) for file in sorted(config.secure_sum.known.glob("*.pub"))}
    private = _private(config.secure_sum.key)
    if known.get(config.name) != private.public_key().public_bytes_raw():
        raise SiteError(
            f"{config.secure_sum.known / config.name}.pub is not the public half of {config.secure_sum.key}. Copy it there"
        )
    return Member(
        config.name, run, private, known, lambda round: sample_cohort(spec.schedule, spec.names, round),
        mechanism.tolerance_of, spec.digest(),
    )  # fmt: skip


def _private(file: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise SiteError(f"secure_sum.key = {file}: {error}. Expected an Ed25519 key (PEM)") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SiteError(f"secure_sum.key = {file}: expected an Ed25519 key (PEM)")
    return key


def _public(file: Path) -> bytes:
    try:
        key = load_pem_public_key(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SiteError(f"{file}: {error}. Expected the public half of an Ed25519 key (PEM)") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SiteError(f"{file}: expected the public half of an Ed25519 key (PEM)")
    return key.public_bytes_raw()
