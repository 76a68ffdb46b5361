"""Who a site is: the key and certificate of its provisioned kit, and the one root that all of them come from.

Every signature is over ``\\x00`` + purpose + content. NVFlare's login signs text that begins with a site's name with
the same key; a leading zero byte cannot be the beginning of one, so that neither passes for the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from privacy.secagg.errors import ProtocolViolation

Purpose = Literal["advert", "survivors"]

_PADDING = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)


@dataclass(frozen=True, kw_only=True)
class Root:
    """The pinned certificate authority of the federation.

    Attributes:
        certificate: PEM.
    """

    certificate: bytes

    def verify(self, *, party: str, certificate: bytes, purpose: Purpose, content: bytes, signature: bytes) -> None:
        """Check that the root's site of this name signed the content for this purpose.

        Raises:
            ProtocolViolation: another issuer, another name, out of date, a user's certificate, or a bad signature.
        """
        try:
            root = x509.load_pem_x509_certificate(self.certificate)
            leaf = x509.load_pem_x509_certificate(certificate)
            leaf.verify_directly_issued_by(root)
            key = leaf.public_key()
            if not isinstance(key, rsa.RSAPublicKey):
                raise TypeError("no RSA key")
            key.verify(signature, _tagged(purpose, content), _PADDING, hashes.SHA256())
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ProtocolViolation(
                argument=f"{purpose} of {party}",
                value=type(error).__name__,
                remedy="not signed by a site of the pinned root; look for who stands between",
            ) from error
        names = [attribute.value for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        roles = leaf.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)
        if names != [party] or roles:
            what = "a user's" if roles else "another party's"
            raise ProtocolViolation(argument=f"certificate of {party}", value=what, remedy="a site signs for itself")
        now = datetime.now(timezone.utc)
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            remedy = "provision the site anew, or mend the clock"
            raise ProtocolViolation(argument=f"certificate of {party}", value="out of date", remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A site's own.

    Attributes:
        party: its name.
        key: PEM of its private RSA key.
        certificate: PEM, issued by the root.
        root: pinned.

    Raises:
        ProtocolViolation: key, certificate and root do not belong together.
    """

    party: str
    key: bytes = field(repr=False)
    certificate: bytes
    root: Root

    def __post_init__(self) -> None:
        content = b"belongs together"
        self.root.verify(
            party=self.party,
            certificate=self.certificate,
            purpose="advert",
            content=content,
            signature=self.sign("advert", content),
        )

    def sign(self, purpose: Purpose, content: bytes) -> bytes:
        """RSA-PSS with SHA-256 over the tagged content.

        Raises:
            ProtocolViolation: the key cannot be read.
        """
        return _private_key(self.key).sign(_tagged(purpose, content), _PADDING, hashes.SHA256())


@lru_cache(maxsize=128)
def _private_key(pem: bytes) -> rsa.RSAPrivateKey:
    """The key in a PEM; checking one takes longer than a signature."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise TypeError("no RSA key")
    except (ValueError, TypeError) as error:
        remedy = "give the RSA key of the provisioned kit, without a passphrase"
        raise ProtocolViolation(argument="key", value=type(error).__name__, remedy=remedy) from error
    return key


def _tagged(purpose: Purpose, content: bytes) -> bytes:
    return b"\x00fedct secure aggregation 1 " + purpose.encode() + b"\x00" + content
