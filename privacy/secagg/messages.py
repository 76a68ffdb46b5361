"""What the parties send each other, and the bytes by which a session and its survivors are signed and bound."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from privacy.errors import require
from privacy.secagg.encoding import RingBits
from privacy.secagg.masking import CipherName
from privacy.secagg.rules import Rules
from privacy.secagg.shamir import SHARE_BYTES

KEY_BYTES = 32
MOST_SIGNATURE_BYTES = 1024  # RSA of 8192 bits
MOST_CERTIFICATE_BYTES = 16_384
MOST_NAME_CHARACTERS = 255
SEALED_BYTES = 2 * SHARE_BYTES + 16  # two shares and AES-GCM's tag


@dataclass(frozen=True, kw_only=True)
class Session:
    """One sum over one vector of each site. Keys are made for it and die with it.

    Attributes:
        job: hash of the experiment.
        run: name of the run.
        task: what is summed, such as ``train``.
        round_number: from 0.
        nonce: fresh for each attempt: a site opens none twice.
    """

    job: str
    run: str
    task: str
    round_number: int
    nonce: str

    @property
    def canonical(self) -> bytes:
        """Bytes that no other session has."""
        return packed(self.job, self.run, self.task, self.round_number, self.nonce)

    def __str__(self) -> str:
        return f"{self.task} in round {self.round_number + 1} of run {self.run}"


@dataclass(frozen=True, kw_only=True)
class Advert:
    """Stage 0, site → all: one-use keys.

    Attributes:
        party: the site.
        certificate: PEM.
        mask_key: X25519 public key from which pairwise masks come.
        share_key: X25519 public key to which shares are sealed.
        self_mask: SHA-256 that binds the site to its own mask's seed.
        cipher: in which the site makes key streams fast; a pair takes AES if both do.
        signature: over the session and all of the above.
    """

    party: str
    certificate: bytes
    mask_key: bytes
    share_key: bytes
    self_mask: bytes
    cipher: CipherName
    signature: bytes

    def __post_init__(self) -> None:
        for name in ("mask_key", "share_key", "self_mask"):
            _require_bytes(getattr(self, name), KEY_BYTES, name)
        _require_short(self.party, MOST_NAME_CHARACTERS, "party")
        _require_short(self.certificate, MOST_CERTIFICATE_BYTES, "certificate")
        _require_short(self.signature, MOST_SIGNATURE_BYTES, "signature")

    @property
    def canonical(self) -> bytes:
        """What is signed, without the session."""
        return packed(self.party, self.certificate, self.mask_key, self.share_key, self.self_mask, self.cipher)


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Stage 1, server → all: who advertised, each with its keys, by name.

    Attributes:
        adverts: sorted by party.
    """

    adverts: tuple[Advert, ...]

    @property
    def parties(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(advert.party for advert in self.adverts)


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A site's two shares for one peer: of its masking key and of its own mask's seed.

    Attributes:
        sender: whose secrets.
        recipient: who can open it.
        box: AES-256-GCM.
    """

    sender: str
    recipient: str
    box: bytes

    def __post_init__(self) -> None:
        _require_bytes(self.box, SEALED_BYTES, "box")
        _require_short(self.sender, MOST_NAME_CHARACTERS, "sender")
        _require_short(self.recipient, MOST_NAME_CHARACTERS, "recipient")


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """Stage 3, server → all: who shared, and whose masked vector is in the sum.

    Attributes:
        shared: U2, sorted.
        survived: U3, sorted, of ``shared``.
    """

    shared: tuple[str, ...]
    survived: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Signed:
    """Stage 3, site → all: a site's signature on the survivors.

    Attributes:
        party: the site.
        signature: over the bound session and the survivors.
    """

    party: str
    signature: bytes

    def __post_init__(self) -> None:
        _require_short(self.party, MOST_NAME_CHARACTERS, "party")
        _require_short(self.signature, MOST_SIGNATURE_BYTES, "signature")


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """Stage 4, site → server: the share that the site holds of one peer, of one kind.

    Attributes:
        peer: whose secret.
        share: of its own mask's seed if it survived, of its masking key if it did not.
    """

    peer: str
    share: bytes

    def __post_init__(self) -> None:
        _require_bytes(self.share, SHARE_BYTES, "share")
        _require_short(self.peer, MOST_NAME_CHARACTERS, "peer")


def bound(session: Session, roster: Roster, rules: Rules, *, size: int, ring_bits: RingBits) -> bytes:
    """SHA-256 over everything that the parties must agree on: salt of every key, and part of every signature."""
    adverts = packed(*(advert.canonical for advert in roster.adverts))
    numbers = (rules.min_survivors, rules.colluding_sites, size, ring_bits)
    return hashlib.sha256(packed("session", session.canonical, *numbers, adverts)).digest()


def survivors_content(binding: bytes, survivors: Survivors) -> bytes:
    """What a site signs of the survivors."""
    return packed(binding, packed(*survivors.shared), packed(*survivors.survived))


def packed(*parts: str | int | bytes) -> bytes:
    """Parts with their lengths: no other parts give the same bytes."""
    return b"".join(_with_length(part) for part in parts)


def _with_length(part: str | int | bytes) -> bytes:
    content = part if isinstance(part, bytes) else str(part).encode()
    return len(content).to_bytes(8, "big") + content


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """As they stand in every message."""
    return tuple(sorted(names))


def _require_bytes(value: object, length: int, argument: str) -> None:
    right = type(value) is bytes and len(value) == length
    require(right, argument=argument, value=type(value).__name__, remedy=f"give {length} bytes")


def _require_short(value: str | bytes, most: int, argument: str) -> None:
    remedy = f"give at most {most}: nothing else fits into a message"
    require(len(value) <= most, argument=argument, value=f"length {len(value)}", remedy=remedy)
