"""The protocol among honest sites, and what an honest site does when somebody else is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from federation import SESSION, adding, aggregate, authority, client, identity, names, random_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import InvalidPlan
from privacy.secagg.client import Client, Stage
from privacy.secagg.encoding import Block, Encoding, RingBits
from privacy.secagg.errors import ProtocolViolation, SecAggError, TooFew
from privacy.secagg.messages import SEALED_BYTES, Advert, Revealed, Roster, Sealed, Signed, Survivors, packed
from privacy.secagg.rules import Floor, Rules
from privacy.secagg.server import Server
from privacy.secagg.shamir import SHARE_BYTES

STAGES = ("advert", "boxes", "masked", "signature", "revealed")
RULES = Rules(min_survivors=2)
SIZE = 9


def left_after(parties: tuple[str, ...], silent: dict[str, set[str]]) -> tuple[int, set[str], int]:
    """Slow and obvious: roster size, survivors, and the least number that a later stage has left."""
    roster = set(parties) - silent["advert"]
    shared = roster - silent["boxes"]
    survived = shared - silent["masked"]
    signed = survived - silent["signature"]
    return len(roster), survived, len(signed - silent["revealed"])


@given(count=st.integers(3, 12), bits=st.sampled_from([16, 32]), on_disk=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_decoded_mean_is_the_mean_of_the_survivors_or_nothing(
    count: int, bits: RingBits, on_disk: bool, data: st.DataObject
) -> None:
    """Any dropouts at any stage: with t left the mean is right, with fewer nothing is decoded."""
    parties = names(min(count, 10) if bits == 16 else count)
    silent: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for party in parties:
        stage = data.draw(st.sampled_from([*STAGES, *[""] * 10]), label=party)
        if stage:
            silent[stage].add(party)
    rules = Rules(min_survivors=data.draw(st.integers(2, 4)))
    block = Block(name="x", shape=(SIZE - 1,), bound=1.0)
    roster, survived, least = left_after(parties, silent)
    encoding = Encoding(blocks=(block,), parties=max(roster, 1), max_weight=40.0, ring_bits=bits)
    rng = np.random.default_rng(count)
    values = {party: rng.normal(0, 0.5, SIZE - 1) for party in parties}
    weights = {party: float(rng.integers(10, 41)) for party in parties}
    vectors = {party: encoding.encode({"x": values[party]}, weight=weights[party]) for party in parties}
    ciphers = {party: "chacha" for party in parties if data.draw(st.booleans())}
    threshold = max(rules.min_survivors, roster // 2 + 1)

    def run() -> tuple[np.ndarray, tuple[str, ...]]:
        return aggregate(
            vectors,
            rules=rules,
            silent=silent,
            ring_bits=bits,
            ciphers=ciphers,  # type: ignore[arg-type]
            on_disk=on_disk,
        )

    if least < threshold:
        with pytest.raises(TooFew):
            run()
        return
    total, found = run()
    assert set(found) == survived
    means, weight = encoding.decode(total)
    used = sum(weights[party] for party in found)
    wanted = sum(weights[party] * np.clip(values[party], -1, 1) for party in found) / used
    assert np.abs(means["x"] - wanted).max() <= encoding.error_bound(1.0, total_weight=used, parties=len(found))
    assert weight == pytest.approx(used, rel=1e-3 if bits == 32 else 0.1)


def test_sixty_four_sites_with_dropouts_at_every_stage() -> None:
    parties = names(64)
    vectors = random_vectors(parties, 50, seed=1)
    silent = {stage: parties[4 * i : 4 * i + 4] for i, stage in enumerate(STAGES)}
    total, survived = aggregate(vectors, rules=RULES, silent=silent)
    assert set(survived) == set(parties[12:])
    np.testing.assert_array_equal(total, sum(vectors[party] for party in survived))


# ---- dishonest servers, peers and strangers: the honest site refuses, and its part is over


class Federation:
    """Sites up to a stage, with an honest server."""

    def __init__(self, count: int = 3, rules: Rules = RULES, until: str = "revealed") -> None:
        self.parties = names(count)
        self.clients = {party: client(party, self.parties, rules=rules) for party in self.parties}
        self.server = Server(session=SESSION, rules=rules, root=authority().root)
        self.first = self.clients[self.parties[0]]
        for party in self.parties:
            self.server.add_advert(party, self.clients[party].advert)
        self.roster = self.server.roster(size=SIZE)
        self.vectors = random_vectors(self.parties, SIZE, seed=1)
        for stage in ("boxes", "received", "masked", "signature"):
            if stage == until:
                return
            getattr(self, f"_{stage}")()
            if stage == "masked" and until == "survivors":
                return

    def _boxes(self) -> None:
        for party in self.parties:
            self.server.add_boxes(party, self.clients[party].share(self.roster, size=SIZE))

    def boxes_for(self, party: str) -> list[Sealed]:
        return [box for box in self.server.boxes() if box.recipient == party]

    def _received(self) -> None:
        for party in self.parties:
            self.clients[party].receive(self.boxes_for(party))

    def _masked(self) -> None:
        for party in self.parties:
            one = self.clients[party]
            self.server.add_masked(party, one.mask(one.masks(), adding(self.vectors[party])))
        self.survivors = self.server.close()

    def _signature(self) -> None:
        for party in self.parties:
            self.server.add_signature(party, self.clients[party].confirm(self.survivors))


def refuses(site: Client, call: Callable[[], object], said: str) -> None:
    """It raises, says why, and from then on refuses everything and holds no secret."""
    with pytest.raises(ProtocolViolation, match=said):
        call()
    assert site.stage is Stage.ABORTED
    assert not site._secrets.held
    assert not site._secrets.mask_key + site._secrets.share_key + site._secrets.seed
    assert b"secrets" not in site.dump()
    with pytest.raises(ProtocolViolation, match="start a new session"):
        site.reveal(())


def resigned(party: str, advert: Advert, **changes: object) -> Advert:
    changed = replace(advert, **changes)  # type: ignore[arg-type]
    content = packed(SESSION.canonical, changed.canonical)
    return replace(changed, signature=identity(party).sign("advert", content))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("man in the middle", "advert of site-02"),
        ("replayed from another round", "advert of site-02"),
        ("replayed from another attempt", "advert of site-02"),
        ("own advert changed", "not what this site sent"),
        ("own advert missing", "not what this site sent"),
        ("stranger", "no peers of this site"),
        ("twice", "repeated"),
        ("unsorted", "unsorted"),
        ("one key for two sites", "a key twice"),
        ("too few", "at least 2"),
    ],
)
def test_a_roster_that_is_not_right_is_refused(name: str, said: str) -> None:
    federation = Federation(until="boxes")
    one, two, three = federation.roster.adverts
    other = {"replayed from another round": {"round_number": 5}, "replayed from another attempt": {"nonce": "old"}}
    if name == "man in the middle":
        adverts = (one, replace(two, mask_key=bytes(range(32))), three)
    elif name in other:
        session = replace(SESSION, **other[name])  # type: ignore[arg-type]
        adverts = (one, client("site-02", federation.parties, rules=RULES, session=session).advert, three)
    elif name == "own advert changed":
        adverts = (replace(one, cipher="chacha"), two, three)
    elif name == "own advert missing":
        adverts = (two, three)
    elif name == "stranger":
        stranger = client("site-99", (*federation.parties, "site-99"), rules=RULES).advert
        adverts = (one, two, three, stranger)
    elif name == "twice":
        adverts = (one, two, two, three)
    elif name == "unsorted":
        adverts = (two, one, three)
    elif name == "one key for two sites":
        adverts = (one, resigned("site-02", two, mask_key=three.mask_key), three)
    else:
        adverts = (one,)
    refuses(federation.first, lambda: federation.first.share(Roster(adverts=adverts), size=SIZE), said)


def test_a_key_of_low_order_is_refused_by_whoever_meets_it() -> None:
    """Everybody would know the secret that is agreed with it."""
    federation = Federation(until="boxes")
    one, two, three = federation.roster.adverts
    bad = Roster(adverts=(one, resigned("site-02", two, share_key=bytes(32)), three))
    refuses(federation.first, lambda: federation.first.share(bad, size=SIZE), "low order")


def test_shares_that_were_swapped_changed_or_repeated_are_refused() -> None:
    for name in ("swapped", "changed", "twice", "for another", "too few", "of another session"):
        federation = Federation(until="received")
        first = federation.first
        two, three = federation.boxes_for("site-01")
        boxes = {
            "swapped": [replace(two, box=three.box), replace(three, box=two.box)],
            "changed": [replace(two, box=two.box[:-1] + bytes([two.box[-1] ^ 1])), three],
            "twice": [two, two],
            "for another": [box for box in federation.server.boxes() if box.recipient == "site-02"],
            "too few": [],
            "of another session": Federation(until="received").boxes_for("site-01"),
        }[name]
        said = "needed" if name == "too few" else "one from each" if name in ("twice", "for another") else "not open"
        refuses(first, lambda boxes=boxes, first=first: first.receive(boxes), said)  # type: ignore[misc]


def test_a_second_vector_in_one_session_is_refused() -> None:
    """Two vectors under one mask: their difference would be in the clear."""
    federation = Federation(until="survivors")
    vector = federation.vectors["site-01"]
    refuses(federation.first, lambda: federation.first.mask(vector, adding(vector)), "stage")


def test_a_vector_of_another_size_is_refused() -> None:
    federation = Federation(until="masked")
    masks = federation.first.masks()
    refuses(federation.first, lambda: federation.first.mask(masks[:-1], adding(masks[:-1])), "masks")


def test_an_equivocating_server_gets_no_secret() -> None:
    """It tells site-01 that site-03 is gone and the others that all survived: no set gets t signatures twice.

    With n = 4, t = 3: the set without site-03 would need three signatures, and only site-01 saw it.
    """
    federation = Federation(count=4, until="survivors")
    parties, clients = federation.parties, federation.clients
    told = replace(federation.survivors, survived=("site-01", "site-02", "site-04"))
    lie = clients["site-01"].confirm(told)
    truth = [clients[party].confirm(federation.survivors) for party in parties[1:]]
    refuses(clients["site-01"], lambda: clients["site-01"].reveal([lie, *truth]), "signed by a site")
    assert all(clients[party].reveal(truth) for party in parties[1:]), "three honest ones agree and may go on"


def test_a_set_that_too_few_signed_or_one_signed_often_reveals_nothing() -> None:
    for name in ("too few", "one often", "a stranger"):
        federation = Federation(count=4, until="survivors")
        first = federation.first
        signed = [federation.clients[party].confirm(federation.survivors) for party in federation.parties]
        stranger = Signed(party="site-99", signature=b"")
        given = {"too few": signed[:2], "one often": [signed[0]] * 4, "a stranger": [*signed, stranger]}[name]
        refuses(first, lambda f=first, g=given: f.reveal(g), "only survivors|at least 3")  # type: ignore[misc]


@pytest.mark.parametrize(
    "survivors",
    [
        Survivors(shared=("site-01", "site-02"), survived=("site-01", "site-02")),
        Survivors(shared=("site-01", "site-02", "site-03"), survived=("site-02", "site-03")),
        Survivors(shared=("site-01", "site-02", "site-03"), survived=("site-01",)),
        Survivors(shared=("site-01", "site-02", "site-03"), survived=("site-01", "site-99")),
        Survivors(shared=("site-01", "site-02", "site-03"), survived=("site-01", "site-02", "site-02")),
    ],
    ids=["others shared", "without this site", "too few", "a stranger", "one twice"],
)
def test_survivors_that_cannot_be_are_refused(survivors: Survivors) -> None:
    federation = Federation(until="survivors")
    refuses(federation.first, lambda: federation.first.confirm(survivors), "shared|survived")


def test_one_kind_of_share_for_each_peer_and_once() -> None:
    """A second request, for the same survivors or for others, is refused: nobody gets both shares of one peer."""
    federation = Federation(until="revealed")
    first, signatures = federation.first, federation.server.signatures()
    shares = first.reveal(signatures)
    assert sorted(share.peer for share in shares) == list(federation.parties)
    assert first.stage is Stage.DONE
    gone = replace(federation.survivors, survived=("site-01", "site-02"))
    for call in (lambda: first.reveal(signatures), lambda: first.confirm(gone)):
        with pytest.raises(ProtocolViolation, match="start a new session"):
            call()


def test_rules_below_the_site_s_floor_are_refused() -> None:
    floor = Floor(peers=names(5), min_survivors=3, colluding_sites=1)
    with pytest.raises(ProtocolViolation, match=r"min_survivors.*at least 3"):
        client("site-01", names(5), rules=RULES, floor=floor)
    with pytest.raises(ProtocolViolation, match=r"colluding_sites.*at least 1"):
        client("site-01", names(5), rules=Rules(min_survivors=3), floor=floor)
    client("site-01", names(5), rules=Rules(min_survivors=3, colluding_sites=1), floor=floor)


@given(parties=st.integers(2, 200), least=st.integers(2, 20), colluding=st.integers(0, 18))
def test_two_signed_sets_share_an_honest_signer(parties: int, least: int, colluding: int) -> None:
    if least < colluding + 2:
        with pytest.raises(InvalidPlan, match="min_survivors"):
            Rules(min_survivors=least, colluding_sites=colluding)
        return
    rules = Rules(min_survivors=least, colluding_sites=colluding)
    try:
        threshold = rules.threshold(parties)
    except ProtocolViolation:
        assert parties < max(least, colluding + 2)
        return
    assert threshold >= least
    assert 2 * threshold - parties > colluding


def test_a_session_s_secrets_are_on_disk_only_while_it_lasts() -> None:
    federation = Federation(until="revealed")
    first = federation.first
    assert first._secrets.mask_key.hex().encode() in first.dump()
    again = Client.load(first.dump(), identity=identity("site-01"), floor=Floor(peers=names(3), min_survivors=2))
    again.reveal(federation.server.signatures())
    assert first._secrets.mask_key.hex().encode() not in again.dump()
    done = Client.load(again.dump(), identity=identity("site-01"), floor=Floor(peers=names(3), min_survivors=2))
    assert done.stage is Stage.DONE
    with pytest.raises(ProtocolViolation, match="start a new session"):
        done.confirm(federation.survivors)


def test_another_site_s_or_a_damaged_state_is_refused() -> None:
    state = Federation(until="boxes").first.dump()
    floor = Floor(peers=names(3), min_survivors=2)
    with pytest.raises(ProtocolViolation, match="another site's"):
        Client.load(state, identity=identity("site-02"), floor=floor)
    for damaged in (b"", b"{}", state[:-5], state.replace(b'"advertised"', b'"asleep"')):
        with pytest.raises(ProtocolViolation, match="state"):
            Client.load(damaged, identity=identity("site-01"), floor=floor)


# ---- what the server refuses, so that one site does not spoil the others' sum


def test_the_server_refuses_what_a_site_may_not_send() -> None:
    federation = Federation(until="revealed")
    server, clients = federation.server, federation.clients
    received = Federation(until="masked").server
    received.add_masked("site-01", received.total.copy())
    fresh = Server(session=SESSION, rules=RULES, root=authority().root)
    advert = client("site-01", names(3), rules=RULES).advert
    fresh.add_advert("site-01", advert)
    revealed = {party: clients[party].reveal(server.signatures()) for party in federation.parties}
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: fresh.add_advert("site-01", advert), "a second one"),
        (lambda: fresh.add_advert("site-02", advert), "speaks for itself"),
        (lambda: fresh.add_advert("site-02", replace(advert, party="site-02")), "not signed"),
        (lambda: server.add_boxes("site-01", ()), "a second one"),
        (lambda: server.add_boxes("site-99", ()), "one for each peer"),
        (lambda: received.add_masked("site-01", received.total), "one of each"),
        (lambda: received.add_masked("site-99", received.total), "one of each"),
        (lambda: server.add_signature("site-01", Signed(party="site-01", signature=b"")), "a second one"),
        (lambda: server.add_signature("site-99", Signed(party="site-99", signature=b"")), "only survivors"),
        (lambda: server.add_revealed("site-01", revealed["site-01"][1:]), "one for each"),
        (lambda: server.add_revealed("site-99", revealed["site-01"]), "only survivors"),
    ]
    for call, said in refused:
        with pytest.raises(ProtocolViolation, match=said):
            call()
    with pytest.raises(TooFew):
        server.unmask()


@pytest.mark.parametrize("gone", [(), ("site-03",)], ids=["of a seed", "of a masking key"])
def test_a_false_share_is_noticed_and_nothing_is_decoded(gone: tuple[str, ...]) -> None:
    federation = Federation(until="masked")
    server, clients = federation.server, federation.clients
    alive = [party for party in federation.parties if party not in gone]
    for party in alive:
        server.add_masked(party, clients[party].mask(clients[party].masks(), adding(federation.vectors[party])))
    survivors = server.close()
    for party in alive:
        server.add_signature(party, clients[party].confirm(survivors))
    for party in alive:
        shares = clients[party].reveal(server.signatures())
        if party == "site-01":
            shares = (*shares[:-1], Revealed(peer="site-03", share=bytes(SHARE_BYTES)))
        server.add_revealed(party, shares)
    with pytest.raises(SecAggError, match=r"site-03"):
        server.unmask()


def test_a_vector_that_comes_after_the_survivors_were_named_is_not_added() -> None:
    """It would be in the sum, and its masks would stay."""
    federation = Federation(until="masked")
    for party in federation.parties[:2]:
        one = federation.clients[party]
        federation.server.add_masked(party, one.mask(one.masks(), adding(federation.vectors[party])))
    federation.server.close()
    with pytest.raises(ProtocolViolation, match="after the end"):
        federation.server.add_masked("site-03", federation.vectors["site-03"])


def test_a_vector_of_another_ring_is_not_added() -> None:
    federation = Federation(until="masked")
    for wrong in (np.zeros(SIZE, np.uint16), np.zeros(SIZE + 1, np.uint32), [0] * SIZE):
        with pytest.raises(ProtocolViolation, match="size and ring"):
            federation.server.add_masked("site-01", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["mask_key", "share_key", "self_mask"])
def test_messages_of_another_length_are_refused(field: str) -> None:
    advert = Federation(until="boxes").first.advert
    with pytest.raises(InvalidPlan, match=field):
        replace(advert, **{field: b"short"})
    with pytest.raises(InvalidPlan, match="box"):
        Sealed(sender="a", recipient="b", box=b"")
    with pytest.raises(InvalidPlan, match="share"):
        Revealed(peer="a", share=b"")


def test_nothing_long_fits_into_a_message() -> None:
    """What leaves a site beside its vector is bounded: no text, no pixels."""
    advert = Federation(until="boxes").first.advert
    share, box = bytes(SHARE_BYTES), bytes(SEALED_BYTES)
    for build in (
        lambda: replace(advert, party="p" * 256),
        lambda: replace(advert, certificate=bytes(16_385)),
        lambda: replace(advert, signature=bytes(1025)),
        lambda: Signed(party="a", signature=bytes(1025)),
        lambda: Signed(party="p" * 256, signature=b""),
        lambda: Revealed(peer="p" * 256, share=share),
        lambda: Sealed(sender="p" * 256, recipient="b", box=box),
        lambda: Sealed(sender="a", recipient="p" * 256, box=box),
    ):
        with pytest.raises(InvalidPlan, match="at most"):
            build()


def test_a_floor_names_the_peers() -> None:
    for peers in ((), ("site-01",), ("site-01", "site-01"), ["site-01", "site-02"]):
        with pytest.raises(InvalidPlan, match="peers"):
            Floor(peers=peers)  # type: ignore[arg-type]
