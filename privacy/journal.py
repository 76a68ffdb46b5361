"""An append-only file that survives a crash at any moment and notices when it is not what was written.

Three files stand side by side: ``<file>``, an SQLite database (WAL, synchronous=FULL) with one row an entry, each under
an HMAC-SHA256 (RFC 2104) that chains it to all before it; ``<file>.anchor``, which knows how many entries there are and
the last link, so that rows cut off at the end are missed; and ``<file>.lock``.

An entry is committed to the database first and to the anchor second, both flushed to disk, under one lock. A crash in
between leaves a database that is *ahead* of its anchor by entries with valid links: that is accepted. Anything else
that differs is refused.

What this does not notice: all files put back together to an earlier state (a restored backup of the whole folder), all
of them removed, and forgery by somebody who has the key.

PrivacyError
└── JournalRefused         nothing may be built on these files until a person has looked
    ├── JournalMissing     there was one and it is gone, or nothing was ever written
    ├── JournalTampered    not what was written
    └── JournalUnavailable cannot be read or written now
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from privacy.errors import PrivacyError

KEY_BYTES = 16  # at least: 128 bits
LOCK_TIMEOUT_S = 30.0  # for a reader that is none of ours; our own processes queue at the lock file

_SCHEMA = "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL, link BLOB NOT NULL)"

Entry = Mapping[str, Any]


class JournalRefused(PrivacyError):
    """The files cannot be relied on."""


class JournalMissing(JournalRefused):
    """No journal, and it may not be made here: there was one, or nothing was ever written."""


class JournalTampered(JournalRefused):
    """The files are not what was written, or the key is not the one they were written with."""


class JournalUnavailable(JournalRefused):
    """The files cannot be read or written now: disk full, no permission, held by somebody else."""


def canonical_json(value: object) -> str:
    """The one way to write a JSON value: sorted keys, no spaces, ASCII, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class _Anchor:
    """What the second file says: whose journal this is, how many entries it has, and the link of the last."""

    journal: str
    entries: int
    link: str


class Transaction:
    """All entries, verified, and room for one more; nobody else reads or writes until it ends.

    Attributes:
        entries: oldest first; each has ``at``, the time of its writing (ISO 8601, UTC).
    """

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.appended: Entry | None = None

    def append(self, entry: Entry) -> Entry:
        """Have ``entry`` written when the transaction ends without an exception.

        Returns:
            The entry as it will be read back.

        Raises:
            ValueError: a second entry in one transaction.
        """
        if self.appended is not None:
            raise ValueError("append = a second entry: write one entry a transaction")
        self.appended = {**entry, "at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        return self.appended


class Journal:
    """One journal.

    Args:
        path: the database, on a local disk (neither WAL nor the lock is reliable on a network share).
        key: the site's secret, at least 16 bytes; the journal's own key is derived from it.

    Raises:
        ValueError: a short key.
    """

    def __init__(self, path: Path, *, key: bytes) -> None:
        if len(key) < KEY_BYTES:
            raise ValueError(f"key = {len(key)} bytes: give at least {KEY_BYTES} secret bytes")
        self._path = path
        self._anchor_file = path.with_name(path.name + ".anchor")
        self._lock_file = path.with_name(path.name + ".lock")
        self._key = hmac.new(key, b"fedct journal\x00", hashlib.sha256).digest()

    @contextmanager
    def transaction(self, *, create: bool) -> Iterator[Transaction]:
        """Hold the journal alone: verify it, hand out its entries, write what was appended, flush, let go.

        Nothing is written if the body raises. When this returns, the entry is on disk and cannot be cut off unnoticed.

        Args:
            create: make the journal if there never was one.

        Raises:
            JournalMissing, JournalTampered, JournalUnavailable: as their names say.
        """
        with ExitStack() as stack:
            with self._reported():
                if create:
                    self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                elif not self._path.parent.is_dir():
                    raise self._never_written()
                stack.enter_context(self._locked())
                anchor = self._read_anchor(create=create)
                connection = stack.enter_context(closing(self._connect(anchor)))
                entries, links = self._read(connection, anchor)
            transaction = Transaction(entries)
            yield transaction
            with self._reported():
                if transaction.appended is not None:
                    body = canonical_json(transaction.appended)
                    links.append(self._link(links[-1], len(links), body))
                    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (len(links) - 1, body, links[-1]))
                connection.execute("COMMIT")
                now = _Anchor(anchor.journal, len(links) - 1, links[-1].hex())
                if now != anchor:  # also when an earlier process died before it could say so
                    self._write_anchor(now)

    def _connect(self, anchor: _Anchor) -> sqlite3.Connection:
        """Open the database with a write transaction begun; an empty one is made only where nothing was written."""
        if not self._path.exists():
            if anchor.entries:
                raise JournalMissing(
                    argument=self._path.name,
                    value=f"gone, but its anchor remembers {anchor.entries} entries",
                    remedy="restore the file from a backup that is as new as the anchor",
                )
            os.close(_private(self._path, os.O_RDWR | os.O_CREAT))
        connection = sqlite3.connect(self._path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            connection.close()
            raise
        except sqlite3.DatabaseError as error:  # "file is not a database", "disk image is malformed"
            connection.close()
            raise self._tampered(str(error)) from error
        return connection

    def _read(self, connection: sqlite3.Connection, anchor: _Anchor) -> tuple[list[Entry], list[bytes]]:
        """All entries and all links, the first link being that of the empty journal; raises if one does not hold."""
        links = [self._link(b"", 0, anchor.journal)]
        entries: list[Entry] = []
        try:
            schema = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master")]
            if not schema and not anchor.entries:
                connection.execute(_SCHEMA)
            elif schema != [_SCHEMA]:
                raise self._tampered("another schema")
            rows = connection.execute("SELECT sequence, body, link FROM entries ORDER BY sequence").fetchall()
        except sqlite3.DatabaseError as error:
            raise self._tampered(str(error)) from error
        for sequence, body, link in rows:
            expected = self._link(links[-1], len(links), str(body))
            if sequence != len(links) or not isinstance(link, bytes) or not hmac.compare_digest(link, expected):
                raise self._tampered(f"entry {len(links)} does not hold")
            links.append(expected)
            entries.append(json.loads(body))
        if len(rows) < anchor.entries:
            raise self._tampered(f"{len(rows)} entries where there were {anchor.entries}")
        if links[anchor.entries].hex() != anchor.link:
            raise self._tampered("the anchor belongs to other entries")
        return entries, links

    def _link(self, before: bytes, sequence: int, body: str) -> bytes:
        return self._mac("link", before + sequence.to_bytes(8, "big") + body.encode())

    def _mac(self, purpose: str, message: bytes) -> bytes:
        return hmac.new(self._key, f"{purpose}\x00".encode() + message, hashlib.sha256).digest()

    def _read_anchor(self, *, create: bool) -> _Anchor:
        try:
            signed = json.loads(self._anchor_file.read_bytes())
            anchor = _Anchor(signed["journal"], signed["entries"], signed["link"])
            mac = bytes.fromhex(signed["mac"])
        except FileNotFoundError:
            if self._path.exists():
                raise self._tampered("its anchor is gone") from None
            if not create:
                raise self._never_written() from None
            journal = secrets.token_hex(16)
            anchor = _Anchor(journal, 0, self._link(b"", 0, journal).hex())
            self._write_anchor(anchor)  # before the database: one without an anchor is never right
            return anchor
        except (ValueError, KeyError, TypeError) as error:
            raise self._tampered("its anchor cannot be read") from error
        if not hmac.compare_digest(mac, self._anchor_mac(anchor)):
            raise self._tampered("its anchor does not hold")
        return anchor

    def _write_anchor(self, anchor: _Anchor) -> None:
        signed = {**vars(anchor), "mac": self._anchor_mac(anchor).hex()}
        partial = self._anchor_file.with_name(self._anchor_file.name + ".partial")
        with os.fdopen(_private(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="ascii") as stream:
            stream.write(canonical_json(signed))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._anchor_file)
        folder = os.open(self._anchor_file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _anchor_mac(self, anchor: _Anchor) -> bytes:
        return self._mac("anchor", canonical_json(vars(anchor)).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock file among processes and threads; the operating system lets go when a process dies."""
        with os.fdopen(_private(self._lock_file, os.O_WRONLY | os.O_CREAT), "w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(stream, fcntl.LOCK_UN)  # closing would not do while a forked child holds the file, too

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what the disk or SQLite says into an error with a remedy."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JournalUnavailable(
                argument=self._path.name,
                value=f"{type(error).__name__}: {error}",
                remedy="look after disk space, permissions and other programs that hold the file, then repeat",
            ) from error

    def _never_written(self) -> JournalMissing:
        return JournalMissing(
            argument=self._path.name,
            value="not there",
            remedy="nothing was ever written, or database and anchor are both gone: then restore both from a backup",
        )

    def _tampered(self, what: str) -> JournalTampered:
        return JournalTampered(
            argument=self._path.name,
            value=what,
            remedy="it was changed, cut or restored in part, or the site's secret is another; nothing is released "
            "until database, anchor and secret are restored together, as new as they ever were",
        )


def _private(file: Path, flags: int) -> int:
    """A file descriptor; what is created can be read by its owner only."""
    return os.open(file, flags, 0o600)
