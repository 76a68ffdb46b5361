"""A sealed folder is there whole or not at all, is built once, and a changed byte is noticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medical_data.cache import SEAL, CacheCorrupted, build_once, canonical_json, locked, sha256_of, verify

PROCESSES = multiprocessing.get_context("fork")


def write_one(partial: Path) -> None:
    (partial / "data.bin").write_bytes(bytes(range(256)) * 20_000)
    (partial / "note.json").write_text("{}")


def test_built_once_and_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "site" / "cache" / "key"
    calls: list[Path] = []

    def build(partial: Path) -> None:
        assert not folder.exists()
        calls.append(partial)
        write_one(partial)

    for _ in range(3):
        build_once(folder, build)
        verify(folder)
    assert len(calls) == 1
    assert sorted(f.name for f in folder.iterdir()) == ["data.bin", "note.json", SEAL]
    assert sorted(f.name for f in folder.parent.iterdir()) == ["key", "key.lock"]
    assert folder.stat().st_mode & 0o077 == 0


def test_nothing_stays_of_a_failed_build(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        write_one(partial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "key", fail)
    assert [f.name for f in tmp_path.iterdir()] == ["key.lock"]
    build_once(tmp_path / "key", write_one)
    verify(tmp_path / "key")


def build_slowly(folder: Path, log: Path) -> None:
    def build(partial: Path) -> None:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        write_one(partial)

    build_once(folder, build)
    verify(folder)


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "key", tmp_path / "log"
    several = [PROCESSES.Process(target=build_slowly, args=(folder, log)) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join(30)
    assert [process.exitcode for process in several] == [0, 0, 0]
    assert len(log.read_text().split()) == 1


def hang(folder: Path, ready: Path) -> None:
    def build(partial: Path) -> None:
        (partial / "half.bin").write_bytes(b"half")
        (partial / "spool").mkdir()
        ready.touch()
        time.sleep(60)

    build_once(folder, build)


def test_a_killed_builder_is_succeeded(tmp_path: Path) -> None:
    folder, ready = tmp_path / "key", tmp_path / "ready"
    process = PROCESSES.Process(target=hang, args=(folder, ready))
    process.start()
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert (tmp_path / "key.partial").is_dir()
    assert not folder.exists()
    build_once(folder, write_one)
    verify(folder)
    assert sorted(f.name for f in folder.iterdir()) == ["data.bin", "note.json", SEAL]
    assert not (tmp_path / "key.partial").exists()


@given(st.integers(0, 256 * 20_000 - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, difference: int) -> None:
    folder = SEALED
    file = folder / "data.bin"
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ difference]))
    try:
        with pytest.raises(CacheCorrupted, match=r"^checksum of data\.bin = .*: .*remove cache folder sealed"):
            verify(folder)
    finally:
        with file.open("r+b") as stream:
            stream.seek(position)
            stream.write(bytes([byte]))
    verify(folder)


SEALED = Path()


@pytest.fixture(scope="module", autouse=True)
def sealed(tmp_path_factory: pytest.TempPathFactory) -> None:
    global SEALED
    SEALED = tmp_path_factory.mktemp("cache") / "sealed"
    build_once(SEALED, write_one)


def truncate(folder: Path) -> None:
    os.truncate(folder / "data.bin", 1000)


def remove(folder: Path) -> None:
    (folder / "note.json").unlink()


def add(folder: Path) -> None:
    (folder / "more.bin").write_bytes(b"")


def remove_seal(folder: Path) -> None:
    (folder / SEAL).unlink()


def break_seal(folder: Path) -> None:
    (folder / SEAL).write_text("[]")


def cut_seal(folder: Path) -> None:
    (folder / SEAL).write_text('{"data.bin": "')


@pytest.mark.parametrize("damage", [truncate, remove, add, remove_seal, break_seal, cut_seal])
def test_damage_is_refused(tmp_path: Path, damage: object) -> None:
    build_once(tmp_path / "key", write_one)
    damage(tmp_path / "key")  # type: ignore[operator]
    with pytest.raises(CacheCorrupted, match="prepare again"):
        verify(tmp_path / "key")


def test_lock_is_held_by_one(tmp_path: Path) -> None:
    def wait_for(lock: Path, got: Path) -> None:
        with locked(lock):
            got.touch()

    lock, got = tmp_path / "a.lock", tmp_path / "got"
    with locked(lock):
        process = PROCESSES.Process(target=wait_for, args=(lock, got))
        process.start()
        process.join(0.3)
        assert process.is_alive()
        assert not got.exists()
    process.join(30)
    assert got.exists()


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    # FIPS 180-4, the message "abc".
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": (1, 2.5), "a": "ä"}) == b'{"a":"\\u00e4","b":[1,2.5]}'
    assert json.loads(canonical_json({"x": None})) == {"x": None}
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_json(float("nan"))
