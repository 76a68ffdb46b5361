"""A site's part of one session (arXiv:1611.04482, fig. 4), stage by stage.

    ADVERTISED ──share──▶ SHARED ──receive──▶ READY ──mask──▶ MASKED ──confirm──▶ CONFIRMED ──reveal──▶ DONE

Each stage happens once and in this order. Whatever is not as it must be ends the part: the stage becomes ABORTED, the
secrets are gone, and every later call is refused. A retry is another session with fresh keys.

What the site relies on. Its vector stays hidden in the sum of the survivors' if at most c of the other sites work for
the server, whatever the server does: pairwise masks with an honest survivor are removed only with t shares of a
masking key, own masks only with t shares of a seed, and no honest site gives both kinds of one peer, because it signs
one set of survivors per session and reveals only for a set that t sites signed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from privacy.errors import InvalidPlan
from privacy.secagg.encoding import RingBits, Vector
from privacy.secagg.errors import ProtocolViolation
from privacy.secagg.identity import Identity
from privacy.secagg.keys import commitment, pair_mask, public_key, sealing_key, self_mask
from privacy.secagg.masking import CipherName, Mask, add_masks
from privacy.secagg.messages import (
    Advert,
    Revealed,
    Roster,
    Sealed,
    Session,
    Signed,
    Survivors,
    bound,
    packed,
    sorted_names,
    survivors_content,
)
from privacy.secagg.rules import Floor, Rules
from privacy.secagg.shamir import SECRET_BYTES, SHARE_BYTES, split

_NONCE = bytes(12)  # each sealing key seals one message


class Stage(str, Enum):
    """What this site has done."""

    ADVERTISED = "advertised"
    SHARED = "shared"
    READY = "ready"
    MASKED = "masked"
    CONFIRMED = "confirmed"
    DONE = "done"
    ABORTED = "aborted"


@dataclass
class _Secrets:
    """What dies with the session."""

    mask_key: bytes = field(default=b"", repr=False)
    share_key: bytes = field(default=b"", repr=False)
    seed: bytes = field(default=b"", repr=False)
    # Peer → its two shares, of masking key and seed, as dealt to this site.
    held: dict[str, bytes] = field(default_factory=dict, repr=False)


class Client:
    """One site, one session.

    Args:
        identity: the site's.
        session: which sum.
        rules: the job's.
        floor: the site's.
        ring_bits: of the ring: sums are modulo 2^8, 2^16 or 2^32.
        cipher: in which this machine makes key streams fast.

    Raises:
        ProtocolViolation: rules below the floor.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        session: Session,
        rules: Rules,
        floor: Floor,
        ring_bits: RingBits = 32,
        cipher: CipherName = "aes",
    ) -> None:
        for name in ("min_survivors", "colluding_sites"):
            asked, least = getattr(rules, name), getattr(floor, name)
            if asked < least:
                raise ProtocolViolation(argument=name, value=asked, remedy=f"this site demands at least {least}")
        self.session = session
        self.stage = Stage.ADVERTISED
        self._identity, self._rules, self._floor, self._ring_bits = identity, rules, floor, ring_bits
        self._secrets = _Secrets(
            mask_key=secrets.token_bytes(SECRET_BYTES),
            share_key=secrets.token_bytes(SECRET_BYTES),
            seed=secrets.token_bytes(SECRET_BYTES),
        )
        unsigned = Advert(
            party=identity.party,
            certificate=identity.certificate,
            mask_key=public_key(self._secrets.mask_key),
            share_key=public_key(self._secrets.share_key),
            self_mask=commitment(self._secrets.seed),
            cipher=cipher,
            signature=b"",
        )
        signature = identity.sign("advert", packed(session.canonical, unsigned.canonical))
        self.advert = Advert(**{**vars(unsigned), "signature": signature})
        self._roster = Roster(adverts=())
        self._size = 0
        self._binding = b""
        self._shared: tuple[str, ...] = ()
        self._survivors = Survivors(shared=(), survived=())

    @property
    def party(self) -> str:
        """This site's name."""
        return self._identity.party

    @property
    def parties(self) -> int:
        """n of the roster."""
        return len(self._roster.adverts)

    def share(self, roster: Roster, *, size: int) -> tuple[Sealed, ...]:
        """Stage 1: check who takes part, and deal out shares of both secrets, sealed to each peer.

        Args:
            roster: as the server says.
            size: coordinates of the vector that will be masked.

        Raises:
            ProtocolViolation: too few, unsorted or repeated sites, one that is no peer of this site, another advert of
                this site than its own, or an advert that its site's provisioned key did not sign for this session.
        """
        with self._stage(Stage.ADVERTISED, Stage.SHARED):
            parties = roster.parties
            _check(parties == sorted_names(set(parties)), "roster", "unsorted or repeated", "name each site once")
            strangers = sorted(set(parties) - set(self._floor.peers))
            _check(not strangers, "roster", strangers, "no peers of this site: its policy names all it sums with")
            threshold = self._rules.threshold(len(parties))
            mine = [advert for advert in roster.adverts if advert.party == self.party]
            _check(mine == [self.advert], "advert", "not what this site sent", "look for who stands between")
            for advert in roster.adverts:
                self._identity.root.verify(
                    party=advert.party,
                    certificate=advert.certificate,
                    purpose="advert",
                    content=packed(self.session.canonical, advert.canonical),
                    signature=advert.signature,
                )
            keys = [key for advert in roster.adverts for key in (advert.mask_key, advert.share_key)]
            _check(len(set(keys)) == len(keys), "roster", "a key twice", "each key is for one use; start anew")
            self._roster, self._size = roster, size
            self._binding = bound(self.session, roster, self._rules, size=size, ring_bits=self._ring_bits)
            dealt = [
                split(secret, threshold=threshold, parties=len(parties))
                for secret in (self._secrets.mask_key, self._secrets.seed)
            ]
            boxes = []
            for advert, *pair in zip(roster.adverts, *dealt, strict=True):
                if advert.party == self.party:
                    self._secrets.held[self.party] = b"".join(pair)
                else:
                    boxes.append(self._seal(advert, b"".join(pair)))
            return tuple(boxes)

    def receive(self, boxes: Iterable[Sealed]) -> None:
        """Stage 2, first half: open the shares of all that shared; they are the peers whose masks this site takes.

        Raises:
            ProtocolViolation: too few, a box twice or for another, or one that does not open.
        """
        with self._stage(Stage.SHARED, Stage.READY):
            adverts = {advert.party: advert for advert in self._roster.adverts}
            for box in boxes:
                known = box.sender in adverts and box.recipient == self.party and box.sender not in self._secrets.held
                _check(known, "box", f"of {box.sender!r}", "one from each peer on the roster, for this site")
                self._secrets.held[box.sender] = self._open(adverts[box.sender], box)
            self._shared = sorted_names(self._secrets.held)
            threshold = self._threshold()
            _check(len(self._shared) >= threshold, "shares", f"of {len(self._shared)}", f"at least {threshold} needed")

    def masks(self) -> Vector:
        """The sum of this site's masks, [size]: to be made before or while the vector is computed.

        Raises:
            ProtocolViolation: not after :meth:`receive`, or after :meth:`mask`.
        """
        if self.stage is not Stage.READY:
            raise _out_of_order(self.stage, Stage.READY)
        total = np.zeros(self._size, np.dtype(f"uint{self._ring_bits}"))
        add_masks(total, self._all_masks())
        return total

    def mask(self, masks: Vector, add: Callable[[Vector], object]) -> Vector:
        """Stage 2, second half: the encoded vector under its masks, in place of the masks.

        Args:
            masks: from :meth:`masks`.
            add: adds the encoded vector to what it is given, in place.

        Raises:
            ProtocolViolation: a second vector in this session, or masks of another size or ring.
        """
        with self._stage(Stage.READY, Stage.MASKED):
            right = masks.shape == (self._size,) and masks.dtype == np.dtype(f"uint{self._ring_bits}")
            _check(right, "masks", (masks.shape, masks.dtype), "the session's size and ring")
            add(masks)
            return masks

    def confirm(self, survivors: Survivors) -> Signed:
        """Stage 3: sign the one set of survivors that this site will ever unmask in this session.

        Raises:
            ProtocolViolation: too few, this site or a stranger among them wrongly, or others shared than it saw.
        """
        with self._stage(Stage.MASKED, Stage.CONFIRMED):
            _check(survivors.shared == self._shared, "shared", survivors.shared, "not those whose shares came here")
            survived = survivors.survived
            right = survived == sorted_names(set(survived)) and set(survived) <= set(self._shared)
            _check(right and self.party in survived, "survived", survived, "some of those who shared, and this site")
            threshold = self._threshold()
            _check(len(survived) >= threshold, "survived", survived, f"at least {threshold} needed")
            self._survivors = survivors
            content = survivors_content(self._binding, survivors)
            return Signed(party=self.party, signature=self._identity.sign("survivors", content))

    def reveal(self, signatures: Sequence[Signed]) -> tuple[Revealed, ...]:
        """Stage 4: for each peer one share, of its seed if it survived, of its masking key if it did not.

        Raises:
            ProtocolViolation: fewer than t survivors signed the same set.
        """
        with self._stage(Stage.CONFIRMED, Stage.DONE):
            content = survivors_content(self._binding, self._survivors)
            certificates = {advert.party: advert.certificate for advert in self._roster.adverts}
            for signed in signatures:
                survived = signed.party in self._survivors.survived
                _check(survived, "signature", f"of {signed.party!r}", "only survivors sign")
                self._identity.root.verify(
                    party=signed.party,
                    certificate=certificates[signed.party],
                    purpose="survivors",
                    content=content,
                    signature=signed.signature,
                )
            signers, threshold = {signed.party for signed in signatures}, self._threshold()
            _check(
                len(signers) >= threshold, "signatures", len(signers), f"at least {threshold} must sign the same set"
            )
            revealed = tuple(
                Revealed(
                    peer=peer, share=pair[SHARE_BYTES:] if peer in self._survivors.survived else pair[:SHARE_BYTES]
                )
                for peer, pair in sorted(self._secrets.held.items())
            )
            self._secrets = _Secrets()
            return revealed

    def abort(self) -> None:
        """End this part and forget its secrets."""
        self.stage, self._secrets = Stage.ABORTED, _Secrets()

    def dump(self) -> bytes:
        """Everything, secrets included, for the site's own disk between two stages; nothing of a finished session."""
        values: dict[str, Any] = {"stage": self.stage.value, "session": asdict(self.session)}
        if self.stage not in (Stage.DONE, Stage.ABORTED):
            values |= {
                "rules": asdict(self._rules),
                "ring_bits": self._ring_bits,
                "size": self._size,
                "advert": asdict(self.advert),
                "roster": [asdict(advert) for advert in self._roster.adverts],
                "binding": self._binding,
                "shared": self._shared,
                "survivors": asdict(self._survivors),
                "secrets": asdict(self._secrets),
            }
        return json.dumps(values, default=bytes.hex).encode()

    @classmethod
    def load(cls, content: bytes, *, identity: Identity, floor: Floor) -> Client:
        """What :meth:`dump` wrote.

        Raises:
            ProtocolViolation: another site's, or not what was written.
        """
        try:
            values = json.loads(content)
            client = cls.__new__(cls)
            client.stage, client.session = Stage(values["stage"]), Session(**values["session"])
            client._identity, client._floor, client._secrets = identity, floor, _Secrets()
            if client.stage in (Stage.DONE, Stage.ABORTED):
                return client
            client._rules, client._ring_bits = Rules(**values["rules"]), values["ring_bits"]
            client._size, client.advert = values["size"], _advert(values["advert"])
            client._roster = Roster(adverts=tuple(_advert(advert) for advert in values["roster"]))
            client._binding, client._shared = bytes.fromhex(values["binding"]), tuple(values["shared"])
            client._survivors = Survivors(**{name: tuple(parties) for name, parties in values["survivors"].items()})
            held = {peer: bytes.fromhex(pair) for peer, pair in values["secrets"].pop("held").items()}
            client._secrets = _Secrets(**{k: bytes.fromhex(v) for k, v in values["secrets"].items()}, held=held)
        except (KeyError, TypeError, ValueError, InvalidPlan) as error:
            remedy = "start a new session"
            raise ProtocolViolation(argument="state", value=type(error).__name__, remedy=remedy) from error
        _check(client.advert.party == identity.party, "state", client.advert.party, "another site's")
        return client

    @contextmanager
    def _stage(self, wanted: Stage, then: Stage) -> Iterator[None]:
        """Do a stage once, in its place; whatever goes wrong in it ends this part."""
        if self.stage is not wanted:
            found = self.stage
            self.abort()
            raise _out_of_order(found, wanted)
        try:
            yield
        except BaseException:
            self.abort()
            raise
        self.stage = then

    def _threshold(self) -> int:
        return self._rules.threshold(self.parties)

    def _all_masks(self) -> list[Mask]:
        mine = [self_mask(self._secrets.seed, binding=self._binding, owner=self.advert)]
        return mine + [
            pair_mask(self._secrets.mask_key, advert.mask_key, binding=self._binding, mine=self.advert, theirs=advert)
            for advert in self._roster.adverts
            if advert.party in self._shared and advert.party != self.party
        ]

    def _seal(self, to: Advert, pair: bytes) -> Sealed:
        names = {"sender": self.party, "recipient": to.party}
        key = sealing_key(self._secrets.share_key, to.share_key, binding=self._binding, **names)
        return Sealed(**names, box=AESGCM(key).encrypt(_NONCE, pair, self._binding))

    def _open(self, sender: Advert, box: Sealed) -> bytes:
        names = {"sender": sender.party, "recipient": self.party}
        key = sealing_key(self._secrets.share_key, sender.share_key, binding=self._binding, **names)
        try:
            return AESGCM(key).decrypt(_NONCE, box.box, self._binding)
        except InvalidTag as error:
            remedy = "not sealed by it for this session; look for who stands between"
            raise ProtocolViolation(argument=f"box of {sender.party}", value="does not open", remedy=remedy) from error


def _advert(values: Mapping[str, Any]) -> Advert:
    texts = ("party", "cipher")
    fields: dict[str, Any] = {k: value if k in texts else bytes.fromhex(value) for k, value in values.items()}
    return Advert(**fields)


def _check(holds: bool, argument: str, value: object, remedy: str) -> None:
    if not holds:
        raise ProtocolViolation(argument=argument, value=value, remedy=remedy)


def _out_of_order(found: Stage, wanted: Stage) -> ProtocolViolation:
    return ProtocolViolation(
        argument="stage", value=found.value, remedy=f"{wanted.value} comes before this, once; start a new session"
    )
