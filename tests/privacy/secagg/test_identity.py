from __future__ import annotations

import pytest
from federation import Authority, authority, identity
from nvflare.lighter.utils import sign_content

from privacy.secagg.errors import ProtocolViolation
from privacy.secagg.identity import Identity, Root


def verify(party: str, certificate: bytes, signature: bytes, content: bytes = b"text", purpose: str = "advert") -> None:
    authority().root.verify(
        party=party,
        certificate=certificate,
        purpose=purpose,  # type: ignore[arg-type]
        content=content,
        signature=signature,
    )


def test_a_signature_holds_for_its_signer_purpose_and_content_only() -> None:
    site = identity("site-01")
    signature = site.sign("advert", b"text")
    verify("site-01", site.certificate, signature)
    for changed in (
        {"party": "site-02"},
        {"content": b"texT"},
        {"purpose": "survivors"},
        {"signature": signature[:-1] + bytes([signature[-1] ^ 1])},
        {"certificate": identity("site-02").certificate},
        {"certificate": b"no certificate"},
    ):
        arguments = {"party": "site-01", "certificate": site.certificate, "signature": signature} | changed
        with pytest.raises(ProtocolViolation):
            verify(**arguments)  # type: ignore[arg-type]


def test_a_login_of_nvflare_is_no_signature_of_ours() -> None:
    """NVFlare signs ``name + nonce`` of the server's choice with the same key; it cannot begin with our tag."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from privacy.secagg.identity import _tagged

    site = identity("site-01")
    key = load_pem_private_key(site.key, password=None)
    content = _tagged("advert", b"text")
    login = sign_content("site-01" + content.decode("latin-1"), key, return_str=False)
    with pytest.raises(ProtocolViolation):
        verify("site-01", site.certificate, login)
    verify("site-01", site.certificate, sign_content(content, key, return_str=False))  # the same padding and hash


def test_another_root_a_user_and_a_certificate_out_of_date_are_refused() -> None:
    stranger = Authority("project").identity("site-01")
    with pytest.raises(ProtocolViolation, match="pinned root"):
        verify("site-01", stranger.certificate, stranger.sign("advert", b"text"))
    for role, days, begins, said in (
        ("lead", 360, 0, "a user's"),
        (None, 1, -3, "out of date"),
        (None, 360, 2, "out of date"),
    ):
        key, certificate = authority().certified("site-01", role=role, days=days, begins=begins)
        with pytest.raises(ProtocolViolation, match=said):
            Identity(party="site-01", key=key, certificate=certificate, root=authority().root)


def test_a_kit_that_does_not_belong_together_is_refused() -> None:
    one, two = identity("site-01"), identity("site-02")
    for key, certificate, root in (
        (two.key, one.certificate, one.root),
        (one.key, two.certificate, one.root),
        (one.key, one.certificate, Authority("other").root),
        (b"no key", one.certificate, one.root),
        (one.key, one.certificate, Root(certificate=b"none")),
    ):
        with pytest.raises(ProtocolViolation):
            Identity(party="site-01", key=key, certificate=certificate, root=root)


def test_the_private_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(identity("site-01"))
