"""A PACS for each hospital on this machine: Orthanc with its DICOMweb plugin, in a folder of its own.

It answers on this machine only, to one password that is made up at each start, and has no DICOM port. For trying and
testing ``fedct data pull``; a hospital has its own PACS.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from custom.strict import ConfigError
from medical_data.dicomweb_server import Server, ask, connect, quiet
from medical_data.discovery import find_series

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

INSTALL = "apt-get install orthanc orthanc-dicomweb"
PLUGIN = "libOrthancDicomWeb.so"
PLUGIN_FOLDERS = (
    "/usr/share/orthanc/plugins",
    "/usr/local/share/orthanc/plugins",
    "/usr/lib/orthanc",
    "/usr/lib/*/orthanc",
)
HOST, USER = "127.0.0.1", "fedct"

START_S, STOP_S = 60.0, 20.0
PORTS = 3  # tried: between finding a free one and using it, another process may take it
BATCH = 32  # images a request
REQUEST_BYTES = 1 << 30  # below this the client sends a request in one piece, which it can repeat


@dataclass(frozen=True, kw_only=True)
class Pacs:
    """One that runs; as a context manager it is stopped at the end.

    Attributes:
        folder: of its storage, configuration and log.
        url: of its DICOMweb service.
        credentials: ``user:password``; not shown in ``repr``.
        process: Orthanc.
    """

    folder: Path
    url: str
    credentials: str = field(repr=False)
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def credentials_file(self) -> Path:
        """What ``fedct data pull`` takes as ``--credentials-file``."""
        return self.folder / "credentials"

    def load(self, folder: Path) -> int:
        """Store all series of DICOM images below a folder (STOW-RS); an image that is there already stays as it is.

        Returns:
            How many were sent.

        Raises:
            ConfigError: no folder, or images that Orthanc did not store.
            PullFailed: Orthanc does not answer, or with an error.
        """
        if not folder.is_dir():
            raise ConfigError(f"folder = {str(folder)!r}: no such folder; give one with DICOM files")
        client, session = connect(Server(url=self.url, credentials=self.credentials))
        client.set_chunk_size(REQUEST_BYTES)
        images = _images(folder)
        sent = 0
        with session:
            while batch := list(islice(images, BATCH)):
                answer = ask(session, partial(client.store_instances, batch))
                stored = len(answer.get("ReferencedSOPSequence") or [])
                if stored != len(batch):
                    raise ConfigError(
                        f"images = {len(batch)}: {stored} were stored; look into {self.folder / 'log.txt'}"
                    )
                sent += stored
        return sent

    def stop(self) -> None:
        """End it; what it stores stays. Does nothing where it has ended."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Pacs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_pacs(folder: Path, *, marker: Mapping[str, str]) -> Pacs:
    """Start Orthanc on a free port of this machine and wait until it answers.

    Args:
        folder: made where it is not there, mode 0700; what an earlier one stored in it is there again.
        marker: environment variables of the process, by which others can find and stop it. It outlives this one.

    Raises:
        ConfigError: Orthanc or its plugin is not installed, or it does not start.
    """
    program, plugin = _program(), _plugin()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password = secrets.token_urlsafe(24)
    _write_private(folder / "credentials", f"{USER}:{password}\n")
    for _ in range(PORTS):
        port = _free_port()
        _write_private(folder / "orthanc.json", json.dumps(_configuration(folder, plugin, port, password), indent=1))
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  (Orthanc, with a file that was written here)
                [program, str(folder / "orthanc.json")],
                cwd=folder,
                env={**os.environ, **marker},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        url = f"http://{HOST}:{port}/dicom-web"
        pacs = Pacs(folder=folder, url=url, credentials=f"{USER}:{password}", process=process)
        try:
            if _answers(pacs):
                return pacs
        except BaseException:
            pacs.stop()
            raise
        pacs.stop()
    raise ConfigError(f"orthanc = {program!r}: does not start; look into {folder / 'log.txt'}")


def _configuration(folder: Path, plugin: Path, port: int, password: str) -> dict[str, object]:
    """Orthanc's settings: DICOMweb for one user of this machine, and nothing else."""
    return {
        "Name": "fedct",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(plugin)],
        "HttpPort": port,
        "HttpBindAddresses": [HOST],  # from 1.12 on; older ones listen everywhere and refuse all but this machine
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: password},
        "DicomServerEnabled": False,
        "OrthancExplorerEnabled": False,
        "WebDavEnabled": False,
        "ExecuteLuaEnabled": False,
        "OverwriteInstances": False,
        "SaveJobs": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
    }


def _answers(pacs: Pacs) -> bool:
    """Whether it answers to its password in time; false as soon as it has ended."""
    _, session = connect(Server(url=pacs.url, credentials=pacs.credentials))
    system = pacs.url.removesuffix("dicom-web") + "system"
    deadline = time.monotonic() + START_S
    with session, quiet():
        while time.monotonic() < deadline and pacs.process.poll() is None:
            try:
                if session.get(system, timeout=5).ok:
                    return True
            except OSError:  # not yet
                pass
            time.sleep(0.1)
    return False


def _images(folder: Path) -> Iterator[Dataset]:
    """The DICOM images below a folder, links followed; what has no series is none (DICOMDIR, other files)."""
    from pydicom import dcmread

    for series in find_series(folder, "dicom").series:
        for file in series.files if series.refusal is None else ():
            with quiet():
                dataset = dcmread(file, force=True)
            yield dataset


def _program() -> str:
    found = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ConfigError(f"Orthanc = None: not installed; run {INSTALL}")
    return found


def _plugin() -> Path:
    for pattern in PLUGIN_FOLDERS:
        for place in sorted(Path("/").glob(pattern.removeprefix("/"))):
            if (place / PLUGIN).exists():
                return place / PLUGIN
    raise ConfigError(f"{PLUGIN} = None: not in {', '.join(PLUGIN_FOLDERS)}; run {INSTALL}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _write_private(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
