"""A site's part in secure aggregation, on its own disk, so that it outlives the processes that do its tasks.

``<home>/secagg/<run>/<task>-<round>-<nonce>.json`` holds a session's state, secrets included, from its first stage to
its last; of a finished or refused one only that it was. The difference of two sums of one round over different sites
would show one of them. So a sum that this site has helped to unmask is not repeated under another nonce, and opening a
session ends every other but the running one. One process at a time does a stage: two vectors under one mask would show
their difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom.atomic import write_atomically
from custom.config import ExperimentConfig
from custom.device import fast_cipher
from custom.masked_vector import Schema, session_encoding, session_ring, values_of
from custom.site_file import SiteConfig
from custom.strict import require
from medical_data.cache import locked
from privacy.secagg.client import Client, Stage
from privacy.secagg.encoding import IntegerEncoding, QuantisedEncoding, Vector
from privacy.secagg.errors import EncodingRefused, ProtocolViolation
from privacy.secagg.identity import Identity, Root
from privacy.secagg.messages import Advert, Revealed, Roster, Sealed, Session, Signed, Survivors
from privacy.secagg.rules import Floor

FOLDER, LOCK_FILE = "secagg", ".lock"
ROOT_FILE, KEY_FILE, CERTIFICATE_FILE = "rootCA.pem", "client.key", "client.crt"  # NVFlare's names in a kit

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}")


def kit_root(kit: Path) -> Root:
    """The pinned root in a kit; raises ``ConfigError`` where there is none."""
    return Root(certificate=_read(kit, ROOT_FILE))


def _read(kit: Path, name: str) -> bytes:
    file = kit / name
    remedy = f"not in {kit}: name the provisioned kit in the site file, or make simulated ones: fedct simulator-keys"
    require(file.is_file(), argument="kit", value=name, remedy=remedy)
    return file.read_bytes()


@dataclass
class SiteSessions:
    """The sessions of one site in one run.

    Attributes:
        identity: of the site.
        floor: of its policy.
        experiment: of the run.
        folder: ``<home>/secagg/<run>``.
        run_id: of the run.
    """

    identity: Identity
    floor: Floor
    experiment: ExperimentConfig
    folder: Path
    run_id: str

    @classmethod
    def of_run(cls, site: SiteConfig, name: str, experiment: ExperimentConfig, run_id: str) -> SiteSessions:
        """From the site's kit and policy.

        Raises:
            ConfigError: no kit.
            ProtocolViolation: a kit that does not belong together, or no peers in the policy.
        """
        floor = site.policy.secure_aggregation
        if floor is None:
            remedy = "the site's policy names no peers: add policy.secure_aggregation to the site file"
            raise ProtocolViolation(argument="secure_aggregation", value=None, remedy=remedy)
        require(_PLAIN.fullmatch(run_id) is not None, argument="run_id", value=run_id, remedy="give a run's name")
        identity = Identity(
            party=name,
            key=_read(site.kit, KEY_FILE),
            certificate=_read(site.kit, CERTIFICATE_FILE),
            root=kit_root(site.kit),
        )
        return cls(identity, floor, experiment, site.home / FOLDER / run_id, run_id)

    def open(self, session: Session, *, running: Session | None = None) -> Advert:
        """Make one-use keys for a session and say which. All other sessions end, but the running one.

        Args:
            session: to be opened.
            running: whose last stages are still to come; ends, too, if it is another attempt at the same sum.

        Raises:
            ProtocolViolation: opened before, or its sum was unmasked under another nonce; or rules below the floor.
        """
        file = self._file(session)
        with locked(self.folder / LOCK_FILE):
            return self._opened(session, file, running)

    def _opened(self, session: Session, file: Path, running: Session | None) -> Advert:
        if file.exists():
            raise ProtocolViolation(argument="session", value=session.nonce, remedy="opened before; use a fresh nonce")
        others = [self._load(other) for other in sorted(self.folder.glob("*.json"))]
        if any(_same_sum(other.session, session) and other.stage is Stage.DONE for other in others):
            remedy = "summed before: a second sum over other sites would show one of them; start a new run"
            raise ProtocolViolation(argument="session", value=str(session), remedy=remedy)
        for other in others:
            kept = other.session == running and not _same_sum(other.session, session)
            if other.stage not in (Stage.DONE, Stage.ABORTED) and not kept:
                other.abort()
                self._save(other)
        asked = self.experiment.secure_aggregation
        assert asked is not None  # noqa: S101 - the executor asks in such a job only
        client = Client(
            identity=self.identity,
            session=session,
            rules=asked.rules,
            floor=self.floor,
            ring_bits=session_ring(self.experiment, session.task),
            cipher=fast_cipher(),
        )
        self._save(client)
        return client.advert

    def share(self, session: Session, roster: Roster) -> tuple[Sealed, ...]:
        """Deal out shares to the roster; raises as :meth:`Client.share`."""
        size = session_encoding(
            self.experiment, session.task, session.round_number, parties=max(len(roster.adverts), 2)
        ).size
        with self._kept(session) as client:
            return client.share(roster, size=size)

    def masking(self, session: Session, boxes: Sequence[Sealed]) -> Masking:
        """Open the peers' boxes and sum the masks, before the work begins; raises as :meth:`Client.receive`."""
        with self._kept(session) as client:
            client.receive([box for box in boxes if box.recipient == client.party])
        return Masking(sessions=self, session=session, sites=client.parties, masks=client.masks())

    def masked(self, session: Session, masks: Vector, add: Callable[[Vector], object]) -> Vector:
        """The vector under its masks, in their place; raises as :meth:`Client.mask`."""
        with self._kept(session) as client:
            return client.mask(masks, add)

    def confirm(self, session: Session, survivors: Survivors) -> Signed:
        """Sign the survivors; raises as :meth:`Client.confirm`."""
        with self._kept(session) as client:
            return client.confirm(survivors)

    def reveal(self, session: Session, signatures: Sequence[Signed]) -> tuple[Revealed, ...]:
        """Give the shares; raises as :meth:`Client.reveal`."""
        with self._kept(session) as client:
            return client.reveal(signatures)

    @contextmanager
    def _kept(self, session: Session) -> Iterator[Client]:
        """One stage: the state read before, and written after it or its refusal, before anything leaves."""
        file = self._file(session)
        with locked(self.folder / LOCK_FILE):
            client = self._load(file)
            try:
                yield client
            finally:
                self._save(client)

    def _file(self, session: Session) -> Path:
        ours = (session.job, session.run) == (self.experiment.sha256, self.run_id)
        plain = all(_PLAIN.fullmatch(text) for text in (session.task, session.nonce)) and session.round_number >= 0
        if not ours or not plain:
            raise ProtocolViolation(argument="session", value=str(session), remedy="not of this job and run")
        return self.folder / f"{session.task}-{session.round_number:04d}-{session.nonce}.json"

    def _load(self, file: Path) -> Client:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise ProtocolViolation(argument="session", value=file.stem, remedy="not opened; start a new one") from None
        return Client.load(content, identity=self.identity, floor=self.floor)

    def _save(self, client: Client) -> None:
        write_atomically(self._file(client.session), client.dump())


def _same_sum(one: Session, other: Session) -> bool:
    return (one.task, one.round_number) == (other.task, other.round_number)


@dataclass
class Masking:
    """Masks of one session, waiting for the vector.

    Attributes:
        sessions: whose.
        session: which.
        sites: on its roster.
        masks: their sum.
    """

    sessions: SiteSessions
    session: Session
    sites: int
    masks: Vector

    def values(
        self,
        arrays: Mapping[str, NDArray[Any]],
        metrics: Mapping[str, float],
        weight: float,
        bounds: NDArray[np.float32] | None = None,
    ) -> Vector:
        """The masked vector of real numbers, once; raises as :meth:`Encoding.encode` and :meth:`Client.mask`.

        Args:
            arrays, metrics, weight: of the reply.
            bounds: the task's, with an update of few bits, which weighs 1 and has no metrics.
        """
        schema = self._schema(bounds)
        if isinstance(schema, IntegerEncoding):
            raise EncodingRefused(argument="values", value="no noise", remedy="this job's vectors carry shared noise")
        if isinstance(schema, QuantisedEncoding):
            vector = schema.encode(schema.integers(arrays))
            return self.sessions.masked(self.session, self.masks, lambda masks: np.add(masks, vector, out=masks))
        values = values_of(schema, arrays, metrics)
        add = partial(schema.encode, values, weight=weight)
        return self.sessions.masked(self.session, self.masks, lambda masks: add(onto=masks))

    def integers(self, integers: NDArray[np.int64]) -> Vector:
        """The masked vector of integers that carry noise, once; raises as :meth:`IntegerEncoding.encode`."""
        schema = self._schema()
        if not isinstance(schema, IntegerEncoding):
            raise EncodingRefused(argument="integers", value="noise", remedy="this job's vectors carry none of it")
        vector = schema.encode(integers)
        return self.sessions.masked(self.session, self.masks, lambda masks: np.add(masks, vector, out=masks))

    def _schema(self, bounds: NDArray[np.float32] | None = None) -> Schema:
        session, experiment = self.session, self.sessions.experiment
        return session_encoding(experiment, session.task, session.round_number, parties=self.sites, bounds=bounds)
