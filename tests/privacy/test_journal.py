from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from privacy import journal as room
from privacy.errors import PrivacyError
from privacy.journal import Journal, JournalMissing, JournalRefused, JournalTampered, JournalUnavailable

KEY = b"k" * 32
ENTRIES = 5
MEMORY = Path("/dev/shm")  # noqa: S108 - flushing costs nothing there


def write(journal: Journal, value: int) -> None:
    with journal.transaction(create=True) as transaction:
        transaction.append({"value": value})


def read(journal: Journal) -> list[int]:
    with journal.transaction(create=False) as transaction:
        return [entry["value"] for entry in transaction.entries]


@pytest.fixture
def home() -> Iterator[Path]:
    """A journal with five entries, in memory where there is such a folder."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for value in range(ENTRIES):
            write(Journal(Path(folder, "home", "j"), key=KEY), value)
        yield Path(folder, "home")


def test_entries_come_back_in_order_and_nothing_else_is_made(home: Path) -> None:
    assert read(Journal(home / "j", key=KEY)) == list(range(ENTRIES))
    files = {file.name for file in home.iterdir()}
    assert files == {"j", "j.anchor", "j.lock"}
    assert {(home / name).stat().st_mode & 0o077 for name in files} == {0}


def test_a_body_that_raises_writes_nothing(home: Path) -> None:
    journal = Journal(home / "j", key=KEY)

    def fail() -> None:
        with journal.transaction(create=True) as transaction:
            transaction.append({"value": 7})
            raise OSError("of the body")  # and is not taken for one of the disk

    def write_two() -> None:
        with journal.transaction(create=True) as transaction:
            transaction.append({"value": 7})
            transaction.append({"value": 8})

    with pytest.raises(OSError, match="of the body"):
        fail()
    with pytest.raises(ValueError, match="one entry"):
        write_two()
    assert read(journal) == list(range(ENTRIES))


def test_what_is_committed_is_flushed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test that fails if someone makes the ledger faster by taking the flushes away."""
    settings, flushed = [], []

    class Asked(sqlite3.Connection):
        def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:  # type: ignore[override]
            if sql == "COMMIT":
                settings.append([super(Asked, self).execute(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS])
            return super().execute(sql, *arguments)  # type: ignore[arg-type]

    connect, fsync = sqlite3.connect, os.fsync
    monkeypatch.setattr(room.sqlite3, "connect", lambda *a, **n: connect(*a, factory=Asked, **n))
    monkeypatch.setattr(room.os, "fsync", lambda descriptor: (flushed.append(descriptor), fsync(descriptor)))
    write(Journal(home / "j", key=KEY), 5)
    assert settings == [["wal", FULL]]
    assert len(flushed) == 2  # the anchor and its folder


PRAGMAS, FULL = ("journal_mode", "synchronous"), 2


def sql(statement: str) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        with closing(sqlite3.connect(home / "j")) as connection:
            connection.executescript(statement)

    return change


def anchored(home: Path, **values: object) -> None:
    anchor = json.loads((home / "j.anchor").read_text())
    (home / "j.anchor").write_text(json.dumps({**anchor, **values}))


def other(home: Path) -> Path:
    """Another journal of the same site, as long."""
    for value in range(ENTRIES):
        write(Journal(home / "other", key=KEY), value)
    return home / "other"


def branch(home: Path) -> None:
    """Database of one and anchor of the other of two journals that were one until their last entry."""
    shutil.copytree(home, home / "branch")
    write(Journal(home / "branch" / "j", key=KEY), 5)
    write(Journal(home / "j", key=KEY), 6)
    shutil.copy(home / "branch" / "j", home / "j")


def cut_with_its_anchor(home: Path) -> None:
    """The last entry cut off, and the anchor written as it was before, but for what needs the key."""
    sql("DELETE FROM entries WHERE sequence = 5")(home)
    with closing(sqlite3.connect(home / "j")) as connection:
        (link,) = connection.execute("SELECT link FROM entries WHERE sequence = 4").fetchone()
    anchored(home, entries=4, link=link.hex())


def without_the_log(home: Path) -> None:
    """The database as it is while its newest entry stands in SQLite's write-ahead log only, without that log."""
    with closing(sqlite3.connect(home / "j")) as reader:
        reader.execute("SELECT * FROM entries").fetchone()
        write(Journal(home / "j", key=KEY), 5)
        assert (home / "j-wal").stat().st_size > 0
        shutil.copy(home / "j", home / "copy")
        shutil.copy(home / "j.anchor", home / "copy.anchor")
    for name in ("j", "j.anchor"):
        shutil.move(home / name.replace("j", "copy"), home / name)


TAMPERED: dict[str, Callable[[Path], object]] = {
    "an entry edited": sql("UPDATE entries SET body = replace(body, '2', '9') WHERE sequence = 3"),
    "a link edited": sql("UPDATE entries SET link = zeroblob(32) WHERE sequence = 5"),
    "a link of another type": sql("UPDATE entries SET link = 'x' WHERE sequence = 5"),
    "a body that is no text": sql("UPDATE entries SET body = x'ff' WHERE sequence = 5"),
    "the last entry cut off": sql("DELETE FROM entries WHERE sequence = 5"),
    "the last three cut off": sql("DELETE FROM entries WHERE sequence > 2"),
    "all cut off": sql("DELETE FROM entries"),
    "the first cut off": sql("DELETE FROM entries WHERE sequence = 1"),
    "one cut out": sql("DELETE FROM entries WHERE sequence = 3"),
    "one cut out, the rest moved up": sql(
        "DELETE FROM entries WHERE sequence = 3; UPDATE entries SET sequence = sequence - 1 WHERE sequence > 3"
    ),
    "two swapped": sql(
        "UPDATE entries SET sequence = -3 WHERE sequence = 3; UPDATE entries SET sequence = 3 WHERE sequence = 4;"
        "UPDATE entries SET sequence = 4 WHERE sequence = -3"
    ),
    "all moved up": sql("UPDATE entries SET sequence = -sequence; UPDATE entries SET sequence = 10 - sequence"),
    "one repeated": sql("INSERT INTO entries SELECT 6, body, link FROM entries WHERE sequence = 5"),
    "one made up": sql("INSERT INTO entries VALUES (6, '{}', zeroblob(32))"),
    "a trigger": sql("CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries WHERE sequence = 1; END"),
    "no table": sql("DROP TABLE entries"),
    "another table": sql("DROP TABLE entries; CREATE TABLE entries (sequence, body, link)"),
    "an empty database": lambda home: (home / "j").write_bytes(b""),
    "no database": lambda home: (home / "j").write_bytes(b"not SQLite " * 500),
    "a page of the database": lambda home: (home / "j").write_bytes(
        (home / "j").read_bytes()[:4096] + bytes((home / "j").stat().st_size - 4096)
    ),
    "the write-ahead log removed": without_the_log,
    "the anchor removed": lambda home: (home / "j.anchor").unlink(),
    "the anchor set back": lambda home: anchored(home, entries=4),
    "the anchor set back with the last entry": cut_with_its_anchor,
    "another branch": branch,
    "the anchor empty": lambda home: (home / "j.anchor").write_text(""),
    "the anchor no JSON object": lambda home: (home / "j.anchor").write_text("[]"),
    "the anchor of another journal": lambda home: shutil.copy(f"{other(home)}.anchor", home / "j.anchor"),
    "the entries of another journal": lambda home: shutil.copy(other(home), home / "j"),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_tampering_is_refused_every_time(home: Path, change: Callable[[Path], object]) -> None:
    change(home)
    for _ in range(2):  # the first refusal mends nothing
        with pytest.raises(JournalTampered, match=r"restored together"):
            read(Journal(home / "j", key=KEY))
        with pytest.raises(JournalTampered):
            write(Journal(home / "j", key=KEY), 6)


def test_a_backup_of_the_database_alone_is_refused(home: Path) -> None:
    backup = (home / "j").read_bytes()
    write(Journal(home / "j", key=KEY), 5)
    (home / "j").write_bytes(backup)
    with pytest.raises(JournalTampered, match="5 entries where there were 6"):
        read(Journal(home / "j", key=KEY))


def test_a_journal_that_is_gone_is_refused_and_never_made_anew(home: Path) -> None:
    (home / "j").unlink()
    for _ in range(2):
        with pytest.raises(JournalMissing, match="remembers 5 entries"):
            write(Journal(home / "j", key=KEY), 0)
    assert not (home / "j").exists()


def test_reading_makes_no_journal(tmp_path: Path) -> None:
    for path in (tmp_path / "j", tmp_path / "no" / "folder" / "j"):
        with pytest.raises(JournalMissing, match="nothing was ever written"):
            read(Journal(path, key=KEY))
        assert not path.exists()
        assert not path.with_name("j.anchor").exists()


def test_another_key_is_refused(home: Path) -> None:
    with pytest.raises(JournalTampered, match="secret"):
        read(Journal(home / "j", key=b"l" * 32))
    with pytest.raises(ValueError, match="at least 16"):
        Journal(home / "j", key=b"short")


def test_a_database_ahead_of_its_anchor_is_a_crash_and_is_caught_up(home: Path) -> None:
    """Whoever can only put the old anchor back gains nothing: the entries are all there, and the anchor follows."""
    old = (home / "j.anchor").read_bytes()
    write(Journal(home / "j", key=KEY), 5)
    (home / "j.anchor").write_bytes(old)
    assert read(Journal(home / "j", key=KEY)) == list(range(6))
    sql("DELETE FROM entries WHERE sequence = 6")(home)
    with pytest.raises(JournalTampered, match="5 entries where there were 6"):
        read(Journal(home / "j", key=KEY))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(room, "LOCK_TIMEOUT_S", 0.05)
    return


@pytest.mark.usefixtures("impatient")
def test_a_database_that_somebody_holds_is_unavailable(home: Path) -> None:
    with closing(sqlite3.connect(home / "j", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalUnavailable, match=r"locked.*then repeat"):
            write(Journal(home / "j", key=KEY), 5)
    assert read(Journal(home / "j", key=KEY)) == list(range(ENTRIES))


def test_a_disk_that_fails_after_the_commit_loses_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(room.os, "fsync", full)
        with pytest.raises(JournalUnavailable, match="No space left"):
            write(Journal(home / "j", key=KEY), 5)
    assert read(Journal(home / "j", key=KEY)) == list(range(6))  # written, but nobody was told that it was


def test_the_errors_are_refusals_of_this_package() -> None:
    for error in (JournalMissing, JournalTampered, JournalUnavailable):
        assert issubclass(error, JournalRefused)
        assert issubclass(error, PrivacyError)
