"""Folders that are built once, sealed with checksums and shared by the processes of a site.

A folder exists complete or not at all: it is built under another name, flushed to the disk and renamed. A
process that finds another one building waits for it. What a crash left behind is removed by the next builder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medical_data.errors import MedicalDataError

SEAL = "seal.json"
_BLOCK = 1 << 20


class CacheCorrupted(MedicalDataError):
    """A sealed folder whose files are not what was written.

    It is refused and not rebuilt in silence: a disk or a person changed it, other processes may have it
    mapped, and a run that goes on with other pixels could not be repeated.
    """


def canonical_json(value: object) -> bytes:
    """The one way to write a JSON value: sorted keys, no spaces, ASCII, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``file`` (created if need be) among processes; waits for the holder.

    The operating system releases it when a process dies.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)  # closing would not do while a forked child holds the file, too


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Have ``folder`` built and sealed if it is not there yet.

    Args:
        folder: the finished folder; ``<folder>.lock`` and ``<folder>.partial`` beside it are used on the way.
        build: writes plain files into the empty folder it is given. What it raises is passed on, and
            nothing stays.
    """
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    with locked(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            build(partial)
            seal = {file.name: sha256_of(file) for file in sorted(partial.iterdir())}
            (partial / SEAL).write_bytes(canonical_json(seal))
            for file in partial.iterdir():
                _flush(file)
            _flush(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(folder)
        _flush(folder.parent)


def verify(folder: Path) -> None:
    """Read a sealed folder through and compare it with its seal.

    Raises:
        CacheCorrupted: a file is missing, changed, or not part of the seal.
    """
    try:
        seal = json.loads((folder / SEAL).read_bytes())
        found = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != SEAL}
        differing = [name for name in sorted({*seal, *found}) if seal.get(name) != found.get(name)]
    except (OSError, ValueError, AttributeError):
        differing = [SEAL]
    if differing:
        raise CacheCorrupted(
            attribute=f"checksum of {', '.join(differing)}",
            value="not what was written",
            remedy=f"stop the site's jobs, remove cache folder {folder.name} in the site's home and "
            "prepare again; look after the disk if it comes back",
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
