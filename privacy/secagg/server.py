"""The server's part of one session: it passes messages on, adds masked vectors, and unmasks the sum.

It need not be trusted; what it checks keeps one broken site from spoiling the sum of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from privacy.errors import InvalidPlan
from privacy.secagg.encoding import RingBits, Vector
from privacy.secagg.errors import ProtocolViolation, TooFew
from privacy.secagg.identity import Root
from privacy.secagg.keys import commitment, pair_mask, public_key, self_mask
from privacy.secagg.masking import Mask, add_masks
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
from privacy.secagg.rules import Rules
from privacy.secagg.shamir import combine


class Server:
    """The sum of one session. Its methods are called in the order in which they stand here.

    Args:
        session: which sum.
        rules: the job's.
        root: of the sites' certificates.
        ring_bits: of the ring: sums are modulo 2^8, 2^16 or 2^32.
    """

    def __init__(self, *, session: Session, rules: Rules, root: Root, ring_bits: RingBits = 32) -> None:
        self.session = session
        self._rules, self._root, self._ring_bits = rules, root, ring_bits
        self._adverts: dict[str, Advert] = {}
        self._boxes: dict[str, tuple[Sealed, ...]] = {}
        self._survived: set[str] = set()
        self._signatures: dict[str, Signed] = {}
        self._revealed: dict[str, dict[str, bytes]] = {}
        self.survivors = Survivors(shared=(), survived=())

    def add_advert(self, party: str, advert: Advert) -> None:
        """Stage 0: a site's keys.

        Raises:
            ProtocolViolation: a second advert, another's, or one that its site did not sign for this session.
        """
        _once(party, self._adverts, "advert")
        _own(party, advert.party, "advert")
        content = packed(self.session.canonical, advert.canonical)
        self._root.verify(
            party=party,
            certificate=advert.certificate,
            purpose="advert",
            content=content,
            signature=advert.signature,
        )
        self._adverts[party] = advert

    @property
    def advertised(self) -> int:
        """How many sites have, so far."""
        return len(self._adverts)

    def roster(self, *, size: int) -> Roster:
        """End of stage 0: who takes part, in a session of vectors of the given size.

        Raises:
            TooFew: fewer than the rules demand.
        """
        self._roster = Roster(adverts=tuple(self._adverts[party] for party in sorted(self._adverts)))
        try:
            self._threshold = self._rules.threshold(len(self._adverts))
        except ProtocolViolation as error:
            raise TooFew(argument="adverts", value=len(self._adverts), remedy=str(error)) from error
        self._binding = bound(self.session, self._roster, self._rules, size=size, ring_bits=self._ring_bits)
        self.total: Vector = np.zeros(size, np.dtype(f"uint{self._ring_bits}"))
        return self._roster

    def add_boxes(self, party: str, boxes: Iterable[Sealed]) -> None:
        """Stage 1: a site's shares, sealed to each peer.

        Raises:
            ProtocolViolation: a second time, or not one box for each peer.
        """
        _once(party, self._boxes, "boxes")
        boxes = tuple(boxes)
        wanted = sorted((party, peer) for peer in self._adverts if peer != party)
        right = party in self._adverts and sorted((box.sender, box.recipient) for box in boxes) == wanted
        _check(right, f"boxes of {party}", len(boxes), "one for each peer on the roster")
        self._boxes[party] = boxes

    def boxes(self) -> tuple[Sealed, ...]:
        """End of stage 1: all boxes between those who shared.

        Raises:
            TooFew: fewer than t shared.
        """
        self._enough(len(self._boxes), "sites that shared")
        return tuple(box for boxes in self._boxes.values() for box in boxes if box.recipient in self._boxes)

    def add_masked(self, party: str, vector: Any) -> None:
        """Stage 2: a masked vector, added to the sum.

        Raises:
            ProtocolViolation: a second one, one of a site that did not share, of another size or ring, or too late.
        """
        _check(not self.survivors.survived, f"vector of {party}", "after the end", "the survivors are named; drop it")
        _check(party in self._boxes and party not in self._survived, "vector", f"of {party}", "one of each that shared")
        right = isinstance(vector, np.ndarray) and (vector.shape, vector.dtype) == (self.total.shape, self.total.dtype)
        _check(right, f"vector of {party}", type(vector).__name__, "the session's size and ring")
        np.add(self.total, vector, out=self.total)
        self._survived.add(party)

    def close(self) -> Survivors:
        """End of stage 2: the survivors, to be signed.

        Raises:
            TooFew: fewer than t survived.
        """
        self._enough(len(self._survived), "masked vectors")
        self.survivors = Survivors(shared=sorted_names(self._boxes), survived=sorted_names(self._survived))
        return self.survivors

    def add_signature(self, party: str, signed: Signed) -> None:
        """Stage 3: a survivor's signature.

        Raises:
            ProtocolViolation: not a survivor's, a second one, or on something else.
        """
        _once(party, self._signatures, "signature")
        _own(party, signed.party, "signature")
        _check(party in self._survived, "signature", f"of {party}", "only survivors sign")
        self._root.verify(
            party=party,
            certificate=self._adverts[party].certificate,
            purpose="survivors",
            content=survivors_content(self._binding, self.survivors),
            signature=signed.signature,
        )
        self._signatures[party] = signed

    def signatures(self) -> tuple[Signed, ...]:
        """End of stage 3: what every survivor must see before it reveals anything.

        Raises:
            TooFew: fewer than t signed.
        """
        self._enough(len(self._signatures), "signatures")
        return tuple(self._signatures[party] for party in sorted(self._signatures))

    def add_revealed(self, party: str, shares: Sequence[Revealed]) -> None:
        """Stage 4: the shares that a survivor holds, one of each who shared.

        Raises:
            ProtocolViolation: a second time, not a survivor's, or not one share for each.
        """
        _once(party, self._revealed, "shares")
        _check(party in self._survived, "shares", f"of {party}", "only survivors reveal")
        right = sorted(share.peer for share in shares) == list(self.survivors.shared)
        _check(right, f"shares of {party}", len(shares), "one for each who shared")
        self._revealed[party] = {share.peer: share.share for share in shares}

    def unmask(self) -> Vector:
        """End of stage 4: the sum of the survivors' vectors, in place of the masked sum.

        Streams the masks, in memory of one block beside the sum.

        Raises:
            TooFew: fewer than t revealed.
            ProtocolViolation: the shares do not give what a site advertised: one of them is false.
        """
        self._enough(len(self._revealed), "sites that revealed their shares")
        masks: list[Mask] = []
        for party in self.survivors.shared:
            owner, secret = self._adverts[party], self._recovered(party)
            if party in self._survived:
                _check(commitment(secret) == owner.self_mask, f"seed of {party}", "not as advertised", "start anew")
                masks.append(_turned(self_mask(secret, binding=self._binding, owner=owner)))
                continue
            _check(public_key(secret) == owner.mask_key, f"masking key of {party}", "not as advertised", "start anew")
            masks += [
                # What the survivor added is what the one that is gone would have taken away.
                pair_mask(secret, theirs.mask_key, binding=self._binding, mine=owner, theirs=theirs)
                for theirs in (self._adverts[survivor] for survivor in self.survivors.survived)
            ]
        add_masks(self.total, masks)
        return self.total

    def _recovered(self, party: str) -> bytes:
        numbers = {name: number for number, name in enumerate(self._roster.parties, start=1)}
        revealing = sorted(self._revealed)[: self._threshold]
        try:
            return combine({numbers[peer]: self._revealed[peer][party] for peer in revealing})
        except InvalidPlan as error:
            raise ProtocolViolation(argument=f"secret of {party}", value="none", remedy=str(error)) from error

    def _enough(self, count: int, what: str) -> None:
        if count < self._threshold:
            remedy = f"at least {self._threshold} are needed; nothing is decoded, start a new session"
            raise TooFew(argument=what, value=count, remedy=remedy)


def _turned(mask: Mask) -> Mask:
    key, cipher, sign = mask
    return key, cipher, -sign


def _once(party: str, seen: Mapping[str, object], what: str) -> None:
    _check(party not in seen, what, f"of {party}", "a second one in one session")


def _own(party: str, named: str, what: str) -> None:
    _check(party == named, what, f"of {named} from {party}", "a site speaks for itself")


def _check(holds: bool, argument: str, value: object, remedy: str) -> None:
    if not holds:
        raise ProtocolViolation(argument=argument, value=value, remedy=remedy)
