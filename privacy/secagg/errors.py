"""What secure aggregation refuses.

SecAggError (PrivacyError)
├── EncodingRefused      numbers that cannot be encoded
├── ProtocolViolation    a peer, the server or the order of things is not as it must be; this party's part is over
└── TooFew               fewer parties than the threshold; nothing is decoded
"""

from __future__ import annotations

from privacy.errors import PrivacyError


class SecAggError(PrivacyError):
    """Base of every refusal of this package."""


class EncodingRefused(SecAggError):
    """NaN, infinity, or another shape than declared."""


class ProtocolViolation(SecAggError):
    """A bad signature, a replay, a second request, another roster: the session is over for whoever sees it."""


class TooFew(SecAggError):
    """Fewer parties than the threshold; nothing is decoded, and a new session with fresh keys is needed."""
