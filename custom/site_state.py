"""What a site remembers between rounds, on disk, whatever happens to its processes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from custom.atomic import write_atomically

KEPT_ROUNDS = 2
STATE, PRIVATE_STATE = "state", "private_state"  # folders in the site's home


@dataclass(frozen=True)
class SiteState:
    """State of one run at one site: the optimiser's tensors as they were at the end of each round.

    The file of a round is written once its training is done, so a round that dies starts again from the end of the
    one before, and so does a round that the server asks for twice.

    Attributes:
        folder: ``<home>/state/<experiment>/<run>``, or in ``private_state`` with differential privacy.
    """

    folder: Path

    @classmethod
    def of_run(cls, home: Path, experiment: str, run_id: str, *, private: bool) -> SiteState:
        """The state of a run, by names that came over the wire.

        Raises:
            ValueError: a name that could lead out of the site's folder.
        """
        for argument, value in (("experiment", experiment), ("run_id", run_id)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}", value):
                raise ValueError(f"{argument} = {value!r}: give letters, digits, '_' and '-' only")
        return cls(home / (PRIVATE_STATE if private else STATE) / experiment / run_id)

    def before(self, round_number: int, *, since: int = 0) -> dict[str, Tensor]:
        """Tensors at the end of the newest earlier round this site took part in; empty if there is none.

        Args:
            round_number: before which.
            since: first round that counts; those before it trained another network.
        """
        earlier = [r for r in self._rounds() if since <= r < round_number]
        return dict(load_file(self._file(max(earlier)))) if earlier else {}

    def save(self, round_number: int, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors of a finished round, unless they are kept, and drop those that no restart can need."""
        file, content = self._file(round_number), save(tensors)
        if not file.exists() or file.read_bytes() != content:
            write_atomically(file, content)
        for old in sorted(self._rounds())[:-KEPT_ROUNDS]:
            self._file(old).unlink(missing_ok=True)

    def _file(self, round_number: int) -> Path:
        return self.folder / f"round_{round_number:04d}.safetensors"

    def _rounds(self) -> list[int]:
        return [int(file.stem.removeprefix("round_")) for file in self.folder.glob("round_*.safetensors")]
