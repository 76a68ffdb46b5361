"""What a site, and only the site, decides: where its data lies, its privacy policy, its limits, its hardware.

A TOML file with a table per site (a provisioned site has just its own) and, for whoever runs the server, a ``server``
table. A job can neither read nor change it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from custom.strict import ConfigError, build, require
from medical_data.cohort import DataLimits, EmbeddedSource, FolderSource, prepare_cohort
from medical_data.preprocess import PreprocessConfig
from privacy.audit.policy import AuditPolicy
from privacy.policy import PrivacyPolicy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SITE_FILE = "fedct.toml"
SITE_FILE_VARIABLE = "FEDCT_SITE_FILE"

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What to compute on.

    Attributes:
        device: ``auto`` takes CUDA where there is one.
        threads: CPU threads of PyTorch; 0 leaves the choice to PyTorch.
        patients_in_memory: with differential privacy, patients whose gradients are held at once: each costs as much
            memory as the model. It changes no result.
        checkpointing: compute a block's activations again in the backward pass instead of keeping them: less memory,
            about a third more time, the same result. Not with differential privacy.
        precision: of a training step's arithmetic; ``auto`` is bfloat16 on CUDA and float32 on the CPU. With
            differential privacy it is float32.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    patients_in_memory: int = 32
    checkpointing: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        patients = self.patients_in_memory
        require(patients >= 1, argument="hardware.patients_in_memory", value=patients, remedy="give at least 1")
        require(self.threads >= 0, argument="hardware.threads", value=self.threads, remedy="give 0 or more")


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """One hospital's own settings.

    Attributes:
        home: the site's own folder: secret, caches, state, pictures, ledger. Never inside a folder that NVFlare wipes.
        source: a folder of scans, or the embedded cohort.
        policy: what the site demands before a job may train on its patients.
        kit: folder with the site's key, its certificate and the federation's root; NVFlare's ``startup/`` by default.
        limits: what the site demands of its cohort.
        hardware: what it trains on.
        audit: what it demands of an audit before a model that knows its patients is released.
        jobs: names of the experiments that the site takes part in; None: in all that its policy lets pass.
    """

    home: Path
    kit: Path
    source: FolderSource | EmbeddedSource
    policy: PrivacyPolicy
    limits: DataLimits = field(default_factory=DataLimits)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    audit: AuditPolicy = field(default_factory=AuditPolicy)
    jobs: tuple[str, ...] | None = None

    def check_part(self, experiment: str) -> None:
        """Raise ``ConfigError`` unless the site takes part in an experiment."""
        chosen = self.jobs is None or experiment in self.jobs
        require(chosen, argument="jobs", value=experiment, remedy="this site takes no part in it")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server's own settings.

    Attributes:
        runs: folder in which every run leaves model, pictures, metrics and receipt.
        kit: folder with the federation's root certificate; NVFlare's ``startup/`` by default.
        models: folder with ``<name>.safetensors`` of models that a job may start from (``fedct pretrain``).
        reference: public images on which updates are judged in a job with ``federation.robust.reference``; a folder of
            scans, or the embedded cohort.
        home: folder for what is prepared of them.
        hardware: what it draws samples on.
    """

    runs: Path
    kit: Path
    models: Path = Path("models")
    home: Path = Path("reference")
    reference: FolderSource | EmbeddedSource | None = None
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def reference_images(self, preprocess: PreprocessConfig) -> NDArray[np.float32]:
        """All images of the public reference, float32 [N, 1, *spatial]; raises ``ConfigError`` if there is none."""
        source, remedy = self.reference, "missing; name public scans in the server's table of the site file"
        require(source is not None, argument="server.reference", value=None, remedy=remedy)
        assert source is not None  # noqa: S101 - checked above
        limits = DataLimits()
        return prepare_cohort(source=source, preprocess=preprocess, limits=limits, home=self.home).images


def site_config(name: str, *, workspace_root: Path) -> SiteConfig:
    """The settings of one site.

    Args:
        name: NVFlare's name of the site.
        workspace_root: the site's NVFlare workspace, which holds ``local/``.

    Raises:
        ConfigError: no site file, no table for this site, or an entry that cannot be meant.
    """
    tables, base = _read(workspace_root)
    sites = tables.get("sites", {})
    require(
        name in sites,
        argument="sites",
        value=sorted(sites),
        remedy=f"add a table [sites.{name}] to the site file",
    )
    return _site(sites[name], f"sites.{name}", base, startup=workspace_root / "startup")


def server_config(*, workspace_root: Path) -> ServerConfig:
    """The server's settings; raises like :func:`site_config`."""
    tables, base = _read(workspace_root)
    require("server" in tables, argument="server", value=None, remedy="add a table [server] to the site file")
    startup = str(workspace_root.resolve() / "startup")
    table = dict(tables["server"])
    reference = _source(table.pop("reference"), "server.reference", base) if "reference" in table else None
    server = build(ServerConfig, {"kit": startup, **table}, "server")
    folders = {name: base / getattr(server, name) for name in ("runs", "models", "kit", "home")}
    return replace(server, reference=reference, **folders)


def simulated_kits(workspace: Path) -> tuple[Path, dict[str, Path]]:
    """Folders of the server's kit and, by name, of each site's, as the simulator's site file names them.

    Raises:
        ConfigError: no site file, or one that names no kits.
    """
    file = workspace / "local" / SITE_FILE
    tables, base = _parse(file), _base(file)
    server, sites = tables.get("server", {}), tables.get("sites", {})
    for name, table in (("server", server), *((f"sites.{name}", table) for name, table in sites.items())):
        require("kit" in table, argument=f"{name}.kit", value=None, remedy="name a folder for its kit in the site file")
    return base / server["kit"], {name: base / table["kit"] for name, table in sites.items()}


def read_tables(file: Path) -> Mapping[str, Any]:
    """The tables of a site file as they stand there; raises like :func:`site_config`."""
    return _parse(file)


def load_site(file: Path, name: str) -> SiteConfig:
    """The settings of one site from a file named on the command line; raises like :func:`site_config`."""
    sites = _parse(file).get("sites", {})
    require(name in sites, argument="--site", value=name, remedy=f"give one of {sorted(sites)}")
    startup = file.resolve().parent.parent / "startup"  # beside a provisioned site's local/
    return _site(sites[name], f"sites.{name}", _base(file), startup=startup)


def _site(table: Mapping[str, Any], name: str, base: Path, *, startup: Path) -> SiteConfig:
    known = {"home", "data", "policy", "kit", "limits", "hardware", "audit", "jobs"}
    require(
        set(table) <= known,
        argument=name,
        value=sorted(set(table) - known),
        remedy=f"known are {sorted(known)}",
    )
    for key in ("home", "data", "policy"):
        require(
            key in table, argument=f"{name}.{key}", value=None, remedy="missing; give it (README, 'Your own scans')"
        )
    return SiteConfig(
        home=base / table["home"],
        source=_source(table["data"], f"{name}.data", base),
        policy=build(PrivacyPolicy, table["policy"], f"{name}.policy"),
        kit=base / table["kit"] if "kit" in table else startup,
        limits=build(DataLimits, table.get("limits", {}), f"{name}.limits"),
        hardware=build(HardwareConfig, table.get("hardware", {}), f"{name}.hardware"),
        audit=build(AuditPolicy, table.get("audit", {}), f"{name}.audit"),
        jobs=_names(table["jobs"], f"{name}.jobs") if "jobs" in table else None,
    )


def _source(data: Any, name: str, base: Path) -> FolderSource | EmbeddedSource:
    if "embedded" not in data:
        source = build(FolderSource, data, name)
        return replace(source, folder=base / source.folder)
    require(set(data) == {"embedded"}, argument=name, value=sorted(data), remedy="give folder or embedded")
    return build(EmbeddedSource, data["embedded"], f"{name}.embedded")


def _names(value: Any, argument: str) -> tuple[str, ...]:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    require(names, argument=argument, value=value, remedy="give an array of experiments' names, such as ['ct_ddpm']")
    return tuple(value)


def _read(workspace_root: Path) -> tuple[Mapping[str, Any], Path]:
    """The parsed site file and the folder from which its relative paths are taken.

    The file that ``FEDCT_SITE_FILE`` names; else ``local/fedct.toml`` beside the site's workspace, which the simulated
    sites share; else ``local/fedct.toml`` in it, where a provisioned site has its own.
    """
    named = os.environ.get(SITE_FILE_VARIABLE)
    if named:
        remedy = "give an absolute path: NVFlare starts its processes in other folders"
        require(Path(named).is_absolute(), argument=SITE_FILE_VARIABLE, value=named, remedy=remedy)
        file = Path(named)
    else:
        shared, own = (folder / "local" / SITE_FILE for folder in (workspace_root.resolve().parent, workspace_root))
        file = shared if shared.is_file() else own
    return _parse(file), _base(file)


def _base(file: Path) -> Path:
    """The folder that holds the workspace if the file lies in a workspace's ``local/``; else the file's own folder."""
    folder = file.resolve().parent
    return folder.parent.parent if folder.name == "local" else folder


def _parse(file: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"site file = {file.name}: {type(error).__name__}; write one (see README, 'Your own scans') "
            f"to the workspace's local/{SITE_FILE} or name it in {SITE_FILE_VARIABLE}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"site file = {file.name}: {error}; mend its TOML") from error
