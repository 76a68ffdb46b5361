"""Sites with kits like those that NVFlare provisions, and a session among them with dropouts at any stage."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from nvflare.lighter.utils import Identity as Subject
from nvflare.lighter.utils import generate_cert, generate_keys, serialize_cert, serialize_pri_key

from privacy.secagg.client import Client
from privacy.secagg.encoding import RingBits, Vector
from privacy.secagg.identity import Identity, Root
from privacy.secagg.masking import CipherName
from privacy.secagg.messages import Session
from privacy.secagg.rules import Floor, Rules
from privacy.secagg.server import Server

SESSION = Session(job="a" * 64, run="run-1", task="train", round_number=0, nonce="first")


class Authority:
    """A root with its sites, made by NVFlare's provisioning code."""

    def __init__(self, name: str = "project") -> None:
        self._name = name
        self._key, public = generate_keys()
        self._certificate = generate_cert(Subject(name), Subject(name), self._key, public, ca=True)
        self.root = Root(certificate=serialize_cert(self._certificate))

    def certified(
        self, party: str, *, role: str | None = None, days: int = 360, begins: int = 0
    ) -> tuple[bytes, bytes]:
        """Key and certificate, PEM."""
        key, public = generate_keys()
        now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=begins)
        certificate = generate_cert(
            Subject(party, None, role), Subject(self._name), self._key, public, valid_days=days, not_valid_before=now
        )
        return serialize_pri_key(key), serialize_cert(certificate)

    def identity(self, party: str) -> Identity:
        key, certificate = self.certified(party)
        return Identity(party=party, key=key, certificate=certificate, root=self.root)


@lru_cache(maxsize=1)
def authority() -> Authority:
    return Authority()


@lru_cache(maxsize=128)
def identity(party: str) -> Identity:
    return authority().identity(party)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{number:02d}" for number in range(1, count + 1))


def client(
    party: str,
    peers: tuple[str, ...],
    *,
    rules: Rules,
    session: Session = SESSION,
    floor: Floor | None = None,
    ring_bits: RingBits = 32,
    cipher: CipherName = "aes",
) -> Client:
    floor = Floor(peers=peers, min_survivors=2) if floor is None else floor
    return Client(
        identity=identity(party), session=session, rules=rules, floor=floor, ring_bits=ring_bits, cipher=cipher
    )


@dataclass
class Sent:
    """What crossed the boundary of the sites."""

    masked: dict[str, Vector] = field(default_factory=dict)


def aggregate(
    vectors: Mapping[str, Vector],
    *,
    rules: Rules,
    silent: Mapping[str, Collection[str]] | None = None,
    session: Session = SESSION,
    ring_bits: RingBits = 32,
    ciphers: Mapping[str, CipherName] | None = None,
    on_disk: bool = False,
    sent: Sent | None = None,
) -> tuple[Vector, tuple[str, ...]]:
    """The unmasked sum and whose vectors are in it.

    Args:
        vectors: encoded, by site.
        rules: the job's.
        silent: by stage (``advert``, ``boxes``, ``masked``, ``signature``, ``revealed``) who is gone from then on.
        session: which.
        ring_bits: of the ring.
        ciphers: of sites that do not take AES.
        on_disk: whether every client is written and read between two stages.
        sent: filled with what the sites send.
    """
    silent = silent or {}
    gone: set[str] = set()
    size = len(next(iter(vectors.values())))
    parties = tuple(sorted(vectors))
    server = Server(session=session, rules=rules, root=authority().root, ring_bits=ring_bits)
    clients = {
        party: client(
            party,
            parties,
            rules=rules,
            session=session,
            ring_bits=ring_bits,
            cipher=(ciphers or {}).get(party, "aes"),
        )
        for party in parties
    }

    def alive(stage: str, among: Collection[str]) -> list[str]:
        gone.update(silent.get(stage, ()))
        if on_disk:
            for party in among:
                floor = Floor(peers=parties, min_survivors=2)
                clients[party] = Client.load(clients[party].dump(), identity=identity(party), floor=floor)
        return [party for party in among if party not in gone]

    for party in alive("advert", parties):
        server.add_advert(party, clients[party].advert)
    roster = server.roster(size=size)
    for party in alive("boxes", roster.parties):
        server.add_boxes(party, clients[party].share(roster, size=size))
    boxes = server.boxes()
    shared = sorted({box.sender for box in boxes})
    masks = {}
    for party in shared:
        clients[party].receive([box for box in boxes if box.recipient == party])
        masks[party] = clients[party].masks()
    for party in alive("masked", shared):
        masked = clients[party].mask(masks[party], adding(vectors[party]))
        if sent is not None:
            sent.masked[party] = masked.copy()
        server.add_masked(party, masked)
    survivors = server.close()
    for party in alive("signature", survivors.survived):
        server.add_signature(party, clients[party].confirm(survivors))
    signatures = server.signatures()
    for party in alive("revealed", [signed.party for signed in signatures]):
        server.add_revealed(party, clients[party].reveal(signatures))
    return server.unmask(), survivors.survived


def adding(vector: Vector) -> Callable[[Vector], object]:
    """What adds an encoded vector to the masks."""
    return lambda masks: np.add(masks, vector, out=masks)


def random_vectors(parties: tuple[str, ...], size: int, seed: int, ring_bits: RingBits = 32) -> dict[str, Vector]:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(f"uint{ring_bits}")
    return {party: rng.integers(0, 2**ring_bits, size, dtype=np.uint64).astype(dtype) for party in parties}
