"""The newest release of a run with this site's own noise, kept at the site so that it can be sent again.

A server that was killed resumes its run and asks for the same round with the same weights. Training anew would be a
second release of the same patients. The bytes of the first one tell nobody anything new (post-processing), so a site
sends them again and is charged once.

The file is written before the ledger's charge. After a crash between the two the ledger does not know what the file
holds, and it is never sent; after a crash behind the charge it can be, and the state of training that belongs to it is
there, too. Whether it is sent depends on the request and on the ledger, never on the patients.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from custom.atomic import write_atomically
from custom.site_ledger import release_sha256
from custom.strict import build
from privacy.ledger import Ledger, Run

KEPT_FILE = "kept_release.safetensors"  # beside the run's state; one a run: a server resumes from its newest checkpoint

_ARRAYS, _STATE = "release/", "state/"  # before the tensors' names in the file


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a release answers; with anything else in it, it is another request.

    Attributes:
        run: whose.
        release: name of the planned release, such as ``round-0003``.
        round_number: from 0.
        arrays_sha256: of what the server sent, as :func:`custom.site_ledger.release_sha256`.
        config_sha256: of the experiment.
    """

    run: Run
    release: str
    round_number: int
    arrays_sha256: str
    config_sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptRelease:
    """A release as it was charged.

    Attributes:
        request: that it answers.
        arrays: float32 on the CPU, by name: what the ledger's SHA-256 is of.
        state: of training after it, for the site's later rounds; empty before training.
    """

    request: Request
    arrays: dict[str, Tensor]
    state: dict[str, Tensor]


def keep(folder: Path, kept: KeptRelease) -> None:
    """Write it, atomically, in place of the run's last one; before the charge.

    Args:
        folder: of the run's state, :attr:`custom.site_state.SiteState.folder`.
        kept: the release.
    """
    arrays = {_ARRAYS + name: tensor.contiguous() for name, tensor in kept.arrays.items()}
    state = {_STATE + name: tensor.contiguous() for name, tensor in kept.state.items()}
    # The ledger vouches for the arrays; of the state it knows nothing.
    metadata = {"request": json.dumps(asdict(kept.request)), "state_sha256": release_sha256(kept.state)}
    write_atomically(folder / KEPT_FILE, save({**arrays, **state}, metadata))


def charged_release(folder: Path, ledger: Ledger, run: Run) -> KeptRelease | None:
    """The run's newest release, if the ledger's newest charge for it is for exactly these arrays.

    Args:
        folder: as of :func:`keep`.
        ledger: the site's.
        run: whose folder it is.

    Raises:
        JournalRefused: the ledger's files are not as they were left.

    Returns:
        None if there is none, if it is damaged or of another run, or if the ledger does not know it.
    """
    kept = _read(folder / KEPT_FILE)
    if kept is None or kept.request.run != run:
        return None
    charge = ledger.newest_charge(run, kept.request.release)
    return kept if charge is not None and charge.sha256 == release_sha256(kept.arrays) else None


def drop(folder: Path) -> None:
    """Remove it when the run is over; what is not there is fine."""
    (folder / KEPT_FILE).unlink(missing_ok=True)


def _read(file: Path) -> KeptRelease | None:
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            # Copies: what is checked is what is sent, whatever becomes of the file in between.
            tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118 (no mapping)
        request = build(Request, json.loads(metadata["request"]), "request")
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    arrays, state = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (_ARRAYS, _STATE)
    )
    whole = len(arrays) + len(state) == len(tensors) and release_sha256(state) == metadata.get("state_sha256")
    return KeptRelease(request=request, arrays=arrays, state=state) if whole else None
