"""The primitives of a secure sum, from `cryptography` and `pycryptodome`: keys, signatures, masks and shares.

X25519 and Ed25519 keys (RFC 7748, RFC 8032), HKDF (RFC 5869), ChaCha20 and Poly1305 (RFC 8439), secret sharing (Shamir,
CACM 1979). Masks are uniform in the ring of integers modulo 2^64.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import chain, combinations, islice
from typing import Any

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ficpd.errors import CodecError

SECRET = 32
"""Bytes of a key, a seed, a public key and a share."""
HALF = 16
"""Bytes of a secret that `Shamir` shares at a time."""
TRIES = 200
"""Sets of shares that `combine` tries before it gives up."""


def statement(*parts: Any) -> bytes:
    """Encodes a statement, to be signed or to derive a key. Different parts give different bytes."""
    return json.dumps(["ficpd secure sum", *parts], sort_keys=True, separators=(",", ":")).encode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_signed(public: bytes, signature: bytes, content: bytes) -> bool:
    """Returns whether the owner of an Ed25519 key signed this content."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def sign(private: Ed25519PrivateKey, content: bytes) -> bytes:
    return private.sign(content)


def agreed_key(private: X25519PrivateKey, public: bytes, *purpose: Any) -> bytes:
    """Derives the key of two clients for one purpose. Raises `CodecError` for a public key of low order."""
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise CodecError(f"a client's public key is invalid: {error}. Leave that client out") from error
    return derived(secret, *purpose)


def derived(secret: bytes, *purpose: Any) -> bytes:
    """Derives a key of one purpose."""
    return HKDF(SHA256(), SECRET, None, statement(*purpose)).derive(secret)


def mask(key: bytes, size: int) -> np.ndarray:
    """Returns uint64 [size], ChaCha20's stream. A key makes one mask, so the nonce is zero."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(8 * size))
    return np.frombuffer(stream, "<u8").astype(np.uint64)


def encrypt(key: bytes, content: bytes) -> bytes:
    """Encrypts one content. A key encrypts once, so the nonce is zero."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None)


def decrypt(key: bytes, content: bytes) -> bytes | None:
    """Returns the content; None if it was not encrypted with this key."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), content, None)
    except InvalidTag:
        return None


def split(secret: bytes, threshold: int, number: int) -> list[bytes]:
    """Splits `SECRET` bytes into shares 1 to `number`, each of `SECRET` bytes. Any `threshold` of them restore it."""
    halves = (Shamir.split(threshold, number, secret[at : at + HALF], False) for at in (0, HALF))
    return [left + right for (_, left), (_, right) in zip(*halves, strict=True)]


def combine(shares: Mapping[int, bytes], threshold: int, is_right: Callable[[bytes], bool]) -> bytes | None:
    """Restores a secret from numbered shares, of which some may be wrong. Returns None after `TRIES` sets.

    Sets of neighbours in a ring come first, because for any single wrong share one of them leaves it out.
    """
    numbers = sorted(shares)
    ring = ([*numbers[at:], *numbers[:at]][:threshold] for at in range(len(numbers) if len(numbers) > threshold else 0))
    for chosen in islice(chain(ring, combinations(numbers, threshold)), TRIES):
        halves = ([(number, shares[number][at : at + HALF]) for number in chosen] for at in (0, HALF))
        secret = b"".join(Shamir.combine(half, False) for half in halves)
        if is_right(secret):
            return secret
    return None


def public_of(secret: bytes) -> bytes:
    """Returns the public key of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
