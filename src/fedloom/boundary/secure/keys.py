"""Keys, sealed letters, signatures and masks: X25519, HKDF-SHA256, ChaCha20-Poly1305, Ed25519 and AES-256-CTR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedloom.boundary.secure.field import Lanes
from fedloom.errors import RunError

KEY = 32  # bytes, of every key here
_CHUNK = 1 << 18  # bytes of a key stream at a time: they stay in the processor's cache
_ZEROS = bytes(_CHUNK)
_ONCE = bytes(12)  # the nonce: every key here seals one letter


def public(private: bytes) -> bytes:
    """The public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, other: bytes, session: bytes, purpose: str) -> bytes:
    """The key that two parties agree on for one purpose in one session: each has its private key and the other's
    public one.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise RunError(f"a public key that is none: {error}") from error
    return derived(shared, session, purpose)


def derived(secret: bytes, session: bytes, purpose: str) -> bytes:
    """A key for one purpose in one session."""
    return HKDF(SHA256(), KEY, salt=session, info=f"fedloom secure {purpose}".encode()).derive(secret)


def sealed(key: bytes, letter: bytes, about: bytes) -> bytes:
    """A letter that only who has the key can read or forge; `about` is not in it but must be known to open it."""
    return ChaCha20Poly1305(key).encrypt(_ONCE, letter, about)


def opened(key: bytes, letter: bytes, about: bytes) -> bytes:
    """The letter that `sealed` closed; raises RunError if anybody changed it."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, letter, about)
    except InvalidTag as error:
        raise RunError("a sealed letter was changed on its way") from error


@dataclass(frozen=True)
class Identity:
    """A client's lasting signing key, and the public keys of all, from a registry that no server can write to."""

    private: bytes
    registry: Mapping[int, bytes]

    @staticmethod
    def public(private: bytes) -> bytes:
        """What the registry has of a signing key."""
        return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    def signed(self, what: bytes) -> bytes:
        """A signature, 64 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.private).sign(what)

    def check(self, client: int, what: bytes, signature: bytes) -> None:
        """Raises RunError unless that client signed this."""
        if client not in self.registry:
            raise RunError(f"client {client} has no key in the registry")
        try:
            Ed25519PublicKey.from_public_bytes(self.registry[client]).verify(signature, what)
        except InvalidSignature as error:
            raise RunError(f"client {client} did not sign what the server says it did") from error


def mask(lanes: Lanes, key: bytes, sign: int) -> None:
    """Adds the mask that a key stands for to the lanes, or takes it off (`sign` -1), in place."""
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
    buffer = bytearray(_CHUNK + 15)
    drawn = np.frombuffer(buffer, lanes.dtype, _CHUNK // lanes.itemsize)
    for start in range(0, len(lanes), len(drawn)):
        part = lanes[start : start + len(drawn)]
        stream.update_into(_ZEROS[: part.nbytes], buffer)
        if sign > 0:
            part += drawn[: len(part)]
        else:
            part -= drawn[: len(part)]
