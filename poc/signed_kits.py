"""Kits whose every file is signed by the federation's root.

NVFlare signs only kits for confidential computing or homomorphic encryption and relies on mutual TLS for the others: a
kit in which the server's address or the start script was changed would start. With a signature NVFlare's own check at
the start of every process refuses it, and so does ``fedct site check``.
"""

from __future__ import annotations

import json
from pathlib import Path

from nvflare.lighter.constants import CtxKey, ProvFileName
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Project
from nvflare.lighter.spec import Builder
from nvflare.lighter.utils import sign_folders, verify_folder_signature

from custom.site_sessions import ROOT_FILE
from custom.strict import ConfigError


class SignedKits(Builder):
    """The last builder of a project file. It signs ``startup/``; ``local/`` belongs to the site."""

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Write ``signature.json`` into every kit."""
        for participant in project.get_all_participants():
            sign_folders(
                ctx.get_kit_dir(participant), ctx[CtxKey.ROOT_PRI_KEY], signature_file=ProvFileName.SIGNATURE_JSON
            )


def _signed(signature: Path) -> list[str]:
    try:
        return list(json.loads(signature.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{signature.name} = no JSON ({error}): ask the coordinator for a signed kit") from error


def verify_kit(kit: Path) -> None:
    """Hold every file of a kit against the root's signature.

    Args:
        kit: folder with ``startup/``.

    Raises:
        ConfigError: a file was changed, added, or removed with its signature left, or the kit was never signed.
    """
    startup = kit / "startup"
    root, signature = startup / ROOT_FILE, startup / ProvFileName.SIGNATURE_JSON
    for file in (root, signature):
        if not file.is_file():
            raise ConfigError(f"kit = {str(kit)!r}: no startup/{file.name}; ask the coordinator for a signed kit")
    # NVFlare looks at the files that are there; one that was signed and is gone is ours to miss.
    whole = all((startup / name).exists() for name in _signed(signature))
    if not whole or not verify_folder_signature(
        str(startup), str(root), single_signer=True, signature_file=ProvFileName.SIGNATURE_JSON
    ):
        raise ConfigError(
            f"kit = {str(kit)!r}: startup/ is not what the coordinator signed; start nothing of it, ask for a new kit"
        )
