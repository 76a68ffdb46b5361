"""A federation on this machine: where everything of it lies, and how it comes to be there.

<folder>/
  federation.json    which kits are in use, and who is in them
  project.yml        what they were provisioned from
  sites.toml         what each node's local/ is written from, at every start
  kits/              what NVFlare's provisioning made: a folder a node, the root's key in state/
  sites/<site>/      each site's own: secret, caches, state, pictures, ledger
  runs/              the server's: a folder a run
  results/           what was downloaded, a folder a job
  logs/              the console of each node
"""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
import yaml
from nvflare.lighter.constants import CtxKey
from nvflare.lighter.prov_utils import prepare_builders, prepare_packager
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner

from custom.atomic import write_atomically
from custom.site_file import read_tables
from custom.strict import ConfigError, build, require
from poc.kits import prepare_server, prepare_site
from poc.signed_kits import verify_kit

STATE_FILE = "federation.json"
PROJECT, SITES = "project.yml", "sites.toml"  # of a federation, in its folder
PROJECT_FILE, SITES_FILE = Path(__file__).parent / "project.yml", Path(__file__).parent / "sites.toml"


@dataclass(frozen=True, kw_only=True)
class Members:
    """What ``federation.json`` holds.

    Attributes:
        project: the federation's name.
        server: the server's.
        sites: the hospitals' names.
        users: role by user.
        kits: folder of the kits in use, from the federation's folder.
        ports: what the server listens on: for the sites, and for users.
    """

    project: str
    server: str
    sites: tuple[str, ...]
    users: Mapping[str, str]
    kits: str
    ports: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One that was provisioned.

    Attributes:
        folder: absolute.
        members: who is in it.
    """

    folder: Path
    members: Members

    @classmethod
    def load(cls, folder: Path) -> Federation:
        """The federation of a folder; raises ``ConfigError`` if there is none."""
        file = folder / STATE_FILE
        remedy = "no federation there: fedct poc up makes one"
        require(file.is_file(), argument="folder", value=str(folder), remedy=remedy)
        values = json.loads(file.read_text(encoding="utf-8"))
        users = values.pop("users")
        members = build(_Recorded, values, STATE_FILE)
        return cls(folder=folder.resolve(), members=Members(**asdict(members), users=users))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The server and the sites."""
        return (self.members.server, *self.members.sites)

    @property
    def runs(self) -> Path:
        """Where the server leaves its runs."""
        return self.folder / "runs"

    @property
    def results(self) -> Path:
        """Where downloaded results go."""
        return self.folder / "results"

    def kit(self, name: str) -> Path:
        """The workspace of a node or a user."""
        return self.folder / self.members.kits / name

    def home(self, site: str) -> Path:
        """A site's own folder."""
        return self.folder / "sites" / site

    def log(self, name: str) -> Path:
        """What a node writes to its console."""
        return self.folder / "logs" / f"{name}.txt"

    def user(self, role: str) -> str:
        """The first user with a role; raises ``ConfigError`` if there is none."""
        for name, has in self.members.users.items():
            if has == role:
                return name
        raise ConfigError(f"role = {role!r}: nobody has it; the project file has {dict(self.members.users)}")

    def ports_are_free(self) -> bool:
        """Whether the server could listen where its kit says."""
        return all(_is_free(port) for port in self.members.ports)


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    project: str
    server: str
    sites: tuple[str, ...]
    kits: str
    ports: tuple[int, int]


def provision(folder: Path, *, project_file: Path = PROJECT_FILE, sites: Sequence[str] = ()) -> Federation:
    """Make kits with NVFlare's provisioning, for ports that are free; again: new kits of the same root.

    Args:
        folder: of the federation.
        project_file: NVFlare's project file.
        sites: names of hospitals that take the place of the project file's.

    Raises:
        ConfigError: a project file that NVFlare refuses.
    """
    folder = folder.resolve()
    asked = read_project(project_file, sites)
    project = copy.deepcopy(asked)
    server, ports = _one(project, "server"), _free_ports(2)
    server["fed_learn_port"], server["admin_port"] = ports
    try:
        made = prepare_project(copy.deepcopy(project))  # it takes names out of what it is given
        builders, packager = prepare_builders(project), prepare_packager(project)
        context = Provisioner(str(folder / "kits"), builders, packager).provision(made)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"project = {str(project_file)!r}: {error}; mend the project file") from error
    if context.get(CtxKey.BUILD_ERROR):
        raise ConfigError(f"project = {str(project_file)!r}: {context.get(CtxKey.ERRORS)}; mend the project file")
    members = Members(
        project=made.name,
        server=server["name"],
        sites=tuple(one["name"] for one in project["participants"] if one["type"] == "client"),
        users={one["name"]: one["role"] for one in project["participants"] if one["type"] == "admin"},
        kits=str(Path(context["current_prod_dir"]).relative_to(folder)),
        ports=(ports[0], ports[1]),
    )
    write_atomically(folder / PROJECT, yaml.safe_dump(asked, sort_keys=False).encode())
    write_atomically(folder / STATE_FILE, (json.dumps(asdict(members), indent=2) + "\n").encode())
    return Federation(folder=folder, members=members)


def prepare_nodes(federation: Federation, site_file: Path | None = None) -> None:
    """Hold every node's kit against the root's signature and write its ``local/``.

    Args:
        federation: it must not be running.
        site_file: tables of the server and of every site, which the federation keeps. None: those that it has; fedct's
            own for a new one. Homes and runs lie in the federation's folder; other relative paths are taken from the
            file's.

    Raises:
        ConfigError: no table for a site, or a kit that was changed.
    """
    own = federation.folder / SITES
    tables = _tables(federation, site_file or (own if own.is_file() else SITES_FILE))
    for node in federation.nodes:
        verify_kit(federation.kit(node))
    write_atomically(own, tomli_w.dumps(tables).encode())
    prepare_server(federation.kit(federation.members.server), tables["server"])
    for site, table in tables["sites"].items():
        prepare_site(federation.kit(site), site, table)


def keeps(federation: Federation, site_file: Path) -> bool:
    """Whether a federation's nodes were prepared from what a site file says."""
    own = federation.folder / SITES
    return own.is_file() and _tables(federation, own) == _tables(federation, site_file)


def _tables(federation: Federation, site_file: Path) -> dict[str, Any]:
    """The tables of the server and of each site in a federation, with paths that hold wherever they stand."""
    given, sites = read_tables(site_file), {}
    known = given.get("sites", {})
    for site in federation.members.sites:
        remedy = f"{site_file} has no table for {site!r}; add one"
        require(site in known, argument="sites", value=sorted(known), remedy=remedy)
        table = dict(known[site]) | {"home": str(federation.home(site))}
        table.pop("kit", None)  # its own
        if "folder" in table.get("data", {}):
            table["data"] = dict(table["data"]) | {"folder": str(site_file.resolve().parent / table["data"]["folder"])}
        sites[site] = table
    server = dict(given.get("server", {})) | {"runs": str(federation.runs)}
    server.pop("kit", None)
    if "models" in server:
        server["models"] = str(site_file.resolve().parent / server["models"])
    return {"server": server, "sites": sites}


def read_project(file: Path, sites: Sequence[str] = ()) -> dict[str, Any]:
    """A project file, with other hospitals if they are given; raises ``ConfigError`` if it cannot be meant."""
    try:
        project = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"project = {str(file)!r}: {error}; give an NVFlare project file") from error
    participants = project.get("participants") if isinstance(project, dict) else None
    named = isinstance(participants, list) and all(isinstance(one, dict) for one in participants)
    require(named, argument="project", value=str(file), remedy="it names no participants")
    roles = {str(one.get("role")) for one in project["participants"] if one.get("type") == "admin"}
    remedy = "NVFlare lets this role do anything, whatever a site says; name a lead"
    require("super" not in roles, argument="role", value="super", remedy=remedy)
    require("lead" in roles, argument="role", value=sorted(roles), remedy="name a lead: who hands in jobs")
    if sites:
        others = [one for one in project["participants"] if one.get("type") != "client"]
        new = [
            {"name": name, "type": "client", "org": f"hospital_{number + 1}", "allow_log_streaming": False}
            for number, name in enumerate(sites)
        ]
        project["participants"] = [*others, *new]
    return dict(project)


def _one(project: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found = [one for one in project["participants"] if one.get("type") == kind]
    require(len(found) == 1, argument=kind, value=len(found), remedy=f"the project file must have one {kind}")
    one: dict[str, Any] = found[0]
    return one


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
