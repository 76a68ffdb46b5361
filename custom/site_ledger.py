"""A site's ledger, as jobs use it: where it lies, and what a release's bytes are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from custom.site_state import PRIVATE_STATE
from medical_data.deidentify import site_secret
from privacy.accounting import epsilon
from privacy.journal import JournalMissing
from privacy.ledger import LEDGER_FILE, Ledger


def open_ledger(home: Path) -> Ledger:
    """The ledger in a site's home; the first reservation makes it.

    Raises:
        JournalMissing: there is none, but private training has left its state here: what it spent would be forgotten.
    """
    if not (home / LEDGER_FILE).exists() and any((home / PRIVATE_STATE).rglob("*.safetensors")):
        raise JournalMissing(
            argument=LEDGER_FILE,
            value=f"not there, but {PRIVATE_STATE} shows that jobs have run",
            remedy="restore ledger, anchor and secret from a backup as new as they ever were",
        )
    return Ledger(home / LEDGER_FILE, key=site_secret(home / "secret"), cost=epsilon)


def release_sha256(arrays: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, by which the ledger knows what it charged."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode() + array.tobytes())
    return digest.hexdigest()
