"""Keys of a session, each for one use between two named parties (X25519, RFC 7748; HKDF-SHA256, RFC 5869)."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.secagg.errors import ProtocolViolation
from privacy.secagg.masking import CipherName, Mask
from privacy.secagg.messages import KEY_BYTES, Advert, packed


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def commitment(seed: bytes) -> bytes:
    """Binds a site to its self-mask seed; 256 random bits hide in it."""
    return hashlib.sha256(packed("self mask", seed)).digest()


def sealing_key(private: bytes, public: bytes, *, binding: bytes, sender: str, recipient: str) -> bytes:
    """AES-GCM key for the one message of a session from sender to recipient."""
    return _derived(_agreed(private, public), binding, packed("seal", sender, recipient))


def pair_mask(private: bytes, public: bytes, *, binding: bytes, mine: Advert, theirs: Advert) -> Mask:
    """The mask that the lesser name adds and the greater subtracts; both derive the same key."""
    one, other = sorted((mine.party, theirs.party))
    key = _derived(_agreed(private, public), binding, packed("mask", one, other))
    cipher: CipherName = "aes" if mine.cipher == theirs.cipher == "aes" else "chacha"
    return key, cipher, 1 if mine.party == one else -1


def self_mask(seed: bytes, *, binding: bytes, owner: Advert) -> Mask:
    """The mask that a site adds for itself, and the server takes off if the site survived."""
    return _derived(seed, binding, packed("self", owner.party)), owner.cipher, 1


def _agreed(private: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of low order: everybody would know the secret
        remedy = "the peer's key is no key; look for who stands between"
        raise ProtocolViolation(argument="public key", value="of low order", remedy=remedy) from error


def _derived(secret: bytes, binding: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=binding, info=info).derive(secret)
