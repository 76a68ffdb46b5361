"""A federation's folder: provisioned for real, read back, provisioned again, and its nodes' own files."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from custom.run_folder import RunFolder
from custom.site_file import SITE_FILE, SITE_FILE_VARIABLE, load_site, read_tables, server_config, site_config
from custom.strict import ConfigError
from medical_data.cohort import EmbeddedSource, FolderSource
from poc.federation import (
    PROJECT_FILE,
    SITES_FILE,
    STATE_FILE,
    Federation,
    prepare_nodes,
    provision,
)
from poc.signed_kits import verify_kit

SITES = ("site-1", "site-2", "site-3")
HOSPITALS = tuple(read_tables(SITES_FILE)["sites"])
EMBEDDED = "data = { embedded = { hospital = 0 } }"
POLICY = """policy = { required = false, budgets = { per_job = { epsilon = 1.0, delta = 1e-3 }, \
total = { epsilon = 1.0, delta = 1e-3 } } }"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """In a folder with a space in its name; for looking only."""
    return provision(tmp_path_factory.mktemp("made") / "a federation")


@pytest.fixture
def federation(made: Federation, tmp_path: Path) -> Federation:
    """A copy that a test may write to."""
    folder = tmp_path / "a federation"
    shutil.copytree(made.folder, folder)
    return Federation.load(folder)


def project() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(PROJECT_FILE.read_text())
    return values


def write(file: Path, values: Any) -> Path:
    file.write_text(yaml.safe_dump(values))
    return file


def root(federation: Federation, name: str = "server") -> str:
    return (federation.kit(name) / "startup" / "rootCA.pem").read_text()


# ---- provisioning


def test_a_folder_with_a_space_in_its_name_holds_a_signed_kit_of_everybody(made: Federation) -> None:
    assert made.nodes == ("server", *SITES)
    assert made.members.users == {"lead@fedct.local": "lead", "viewer@fedct.local": "member"}
    for name in (*made.nodes, *made.members.users):
        verify_kit(made.kit(name))
        assert made.kit(name).is_relative_to(made.folder)
    assert made.user("lead") == "lead@fedct.local"
    assert made.user("member") == "viewer@fedct.local"
    with pytest.raises(ConfigError, match="nobody has it"):
        made.user("project_admin")


def test_what_was_provisioned_is_read_back_the_same(made: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Federation.load(made.folder) == made
    monkeypatch.chdir(made.folder.parent)
    assert Federation.load(Path(made.folder.name)) == made  # absolute, wherever one stands
    for place in (made.runs, made.results, made.home("site-1"), made.log("site-1"), made.kit("server")):
        assert place.is_absolute()
        assert place.is_relative_to(made.folder)


def test_a_folder_without_a_federation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedct poc up makes one"):
        Federation.load(tmp_path)


@pytest.mark.parametrize("change", [{"more": 1}, {"sites": "site-1"}, {"ports": [1]}, {"ports": ["a", "b"]}])
def test_a_state_file_that_cannot_be_meant_is_refused(federation: Federation, change: dict[str, Any]) -> None:
    file = federation.folder / STATE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=STATE_FILE):
        Federation.load(federation.folder)


def test_the_server_listens_where_its_kit_and_the_sites_kits_say(made: Federation) -> None:
    for_sites, for_users = made.members.ports
    assert for_sites != for_users
    assert str(for_sites) in (made.kit("site-1") / "startup" / "fed_client.json").read_text()
    assert str(for_users) in (made.kit("lead@fedct.local") / "startup" / "fed_admin.json").read_text()
    text = (made.kit("server") / "startup" / "fed_server.json").read_text()
    assert str(for_sites) in text
    assert str(for_users) in text


def test_a_second_time_there_are_new_kits_of_the_same_root(federation: Federation) -> None:
    again = provision(federation.folder)
    assert again.members.kits != federation.members.kits
    assert root(again) == root(federation)
    assert Federation.load(federation.folder) == again
    for name in again.nodes:
        verify_kit(again.kit(name))
        verify_kit(federation.kit(name))  # the earlier ones are still there
    own = [one.kit("site-1") / "startup" / "client.key" for one in (federation, again)]
    assert own[0].read_bytes() == own[1].read_bytes()


def test_two_federations_have_two_roots(made: Federation, tmp_path: Path) -> None:
    assert root(provision(tmp_path / "other")) != root(made)


def test_named_hospitals_take_the_place_of_the_project_files(tmp_path: Path) -> None:
    federation = provision(tmp_path, sites=("large-1", "large-2"))
    assert federation.members.sites == ("large-1", "large-2")
    assert federation.members.server == "server"
    assert federation.user("lead") == "lead@fedct.local"
    assert not federation.kit("site-1").exists()
    for name in federation.nodes:
        verify_kit(federation.kit(name))


def test_the_project_file_itself_is_left_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "project.yml", project())
    before = file.read_bytes()
    provision(tmp_path / "federation", project_file=file, sites=("a",))
    assert file.read_bytes() == before


def no_yaml(file: Path) -> None:
    file.write_text("participants: [")


def a_list(file: Path) -> None:
    file.write_text("- a\n- b\n")


def empty(file: Path) -> None:
    file.write_text("")


def no_file(file: Path) -> None:
    file.unlink(missing_ok=True)


def without_a_server(file: Path) -> None:
    values = project()
    values["participants"] = [one for one in values["participants"] if one["type"] != "server"]
    write(file, values)


def with_two_servers(file: Path) -> None:
    values = project()
    (server,) = (one for one in values["participants"] if one["type"] == "server")
    values["participants"].append({**server, "name": "second"})
    write(file, values)


def twice_the_same_site(file: Path) -> None:
    values = project()
    values["participants"].append(dict(values["participants"][1]))
    write(file, values)


def without_builders(file: Path) -> None:
    values = project()
    del values["builders"]
    write(file, values)


def with_an_unknown_builder(file: Path) -> None:
    values = project()
    values["builders"].append({"path": "poc.signed_kits.Nobody", "args": {}})
    write(file, values)


def of_another_version(file: Path) -> None:
    write(file, project() | {"api_version": 1})


def without_a_type(file: Path) -> None:
    values = project()
    del values["participants"][-1]["type"]
    write(file, values)


def with_a_name_that_is_a_path(file: Path) -> None:
    values = project()
    values["participants"][1]["name"] = "../site"
    write(file, values)


def with_a_participant_that_is_text(file: Path) -> None:
    write(file, project() | {"participants": ["server", "site-1"]})


def with_a_user_without_role(file: Path) -> None:
    values = project()
    del values["participants"][-1]["role"]
    write(file, values)


def with_a_user_who_may_do_anything(file: Path) -> None:
    values = project()
    values["participants"][-1]["role"] = "super"
    write(file, values)


HOSPITALS_THAT_CANNOT_BE_MEANT = [twice_the_same_site, with_a_name_that_is_a_path]
PROJECTS_THAT_CANNOT_BE_MEANT = [
    no_yaml,
    a_list,
    empty,
    no_file,
    without_a_server,
    with_two_servers,
    without_builders,
    with_an_unknown_builder,
    of_another_version,
    without_a_type,
    with_a_participant_that_is_text,
    with_a_user_without_role,
    with_a_user_who_may_do_anything,
]


@pytest.mark.parametrize(
    ("spoil", "sites"),
    [
        *((spoil, ()) for spoil in (*PROJECTS_THAT_CANNOT_BE_MEANT, *HOSPITALS_THAT_CANNOT_BE_MEANT)),
        *((spoil, ("a", "b")) for spoil in PROJECTS_THAT_CANNOT_BE_MEANT),
    ],
)
def test_a_project_file_that_cannot_be_meant_is_refused_and_leaves_no_federation(
    tmp_path: Path, spoil: Any, sites: tuple[str, ...]
) -> None:
    file = tmp_path / "project.yml"
    spoil(file)
    with pytest.raises(ConfigError):
        provision(tmp_path / "federation", project_file=file, sites=sites)
    assert not (tmp_path / "federation" / STATE_FILE).exists()


def test_a_second_provisioning_that_fails_leaves_the_first_federation(federation: Federation, tmp_path: Path) -> None:
    file = tmp_path / "project.yml"
    with_an_unknown_builder(file)
    with pytest.raises(ConfigError):
        provision(federation.folder, project_file=file)
    assert Federation.load(federation.folder) == federation


# ---- the nodes' own files


def table(name: str, *lines: str) -> str:
    return "\n".join([f"[sites.{name}]", POLICY, *lines, ""])


def test_every_hospital_of_our_site_file_is_read_from_its_own_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SITE_FILE_VARIABLE, raising=False)
    assert {f"{kind}-{number}" for kind in ("site", "large", "volumes") for number in (1, 2, 3)} == set(HOSPITALS)
    federation = provision(tmp_path, sites=HOSPITALS)
    prepare_nodes(federation)
    for name in HOSPITALS:
        site = load_site(federation.kit(name) / "local" / SITE_FILE, name)
        assert site == site_config(name, workspace_root=federation.kit(name))
        assert site.home == federation.home(name)
        assert site.kit == federation.kit(name) / "startup"
        assert isinstance(site.source, EmbeddedSource)
        assert site.policy.required == name.startswith("large")
        assert site.policy.secure_aggregation is not None
        assert name in site.policy.secure_aggregation.peers
        tables = read_tables(federation.kit(name) / "local" / SITE_FILE)
        assert list(tables) == ["sites"]
        assert list(tables["sites"]) == [name], "a site learns nothing of another one's settings"
    server = server_config(workspace_root=federation.kit("server"))
    assert server.runs == federation.runs
    assert server.kit == federation.kit("server") / "startup"
    assert list(read_tables(federation.kit("server") / "local" / SITE_FILE)) == ["server"]


def test_homes_and_kits_are_the_federations_and_data_is_found_from_the_site_file(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "settings"
    folder.mkdir()
    (folder / "sites.toml").write_text(
        '[server]\nruns = "/elsewhere/runs"\nkit = "/elsewhere"\nmodels = "my models"\n\n'
        + table("site-1", 'home = "/elsewhere/home"', 'kit = "/elsewhere/kit"', 'data = { folder = "ct scans" }')
        + table("site-2", 'data = { folder = "/data/ct", format = "nifti" }')
        + table("site-3", EMBEDDED, 'jobs = ["ct_ddpm"]')
    )
    monkeypatch.chdir(tmp_path)
    prepare_nodes(federation, Path("settings/sites.toml"))
    one, two, three = (load_site(federation.kit(name) / "local" / SITE_FILE, name) for name in SITES)
    assert [site.home for site in (one, two, three)] == [federation.home(name) for name in SITES]
    assert [site.kit for site in (one, two, three)] == [federation.kit(name) / "startup" for name in SITES]
    assert isinstance(one.source, FolderSource)
    assert one.source.folder == folder.resolve() / "ct scans"
    assert isinstance(two.source, FolderSource)
    assert (two.source.folder, two.source.format) == (Path("/data/ct"), "nifti")
    assert isinstance(three.source, EmbeddedSource)
    assert (one.jobs, three.jobs) == (None, ("ct_ddpm",))
    server = server_config(workspace_root=federation.kit("server"))
    assert server.runs == federation.runs
    assert server.kit == federation.kit("server") / "startup"
    assert server.models == folder.resolve() / "my models"


def test_a_site_without_a_table_is_refused_by_name(federation: Federation, tmp_path: Path) -> None:
    file = tmp_path / "sites.toml"
    file.write_text(table("site-1", EMBEDDED) + table("site-3", EMBEDDED))
    with pytest.raises(ConfigError, match="no table for 'site-2'"):
        prepare_nodes(federation, file)


def test_a_kit_that_was_changed_is_not_prepared_in_silence(federation: Federation) -> None:
    file = federation.kit("site-2") / "startup" / "start.sh"
    file.write_text(file.read_text() + "\n# more\n")
    with pytest.raises(ConfigError, match=r"site-2.*not what the coordinator signed"):
        prepare_nodes(federation)


def test_a_federation_is_prepared_twice_with_the_same_result(federation: Federation) -> None:
    def written() -> dict[Path, bytes]:
        files = [file for name in federation.nodes for file in (federation.kit(name) / "local").iterdir()]
        return {file: file.read_bytes() for file in files}

    prepare_nodes(federation)
    first = written()
    prepare_nodes(federation)
    assert written() == first


# ---- ports


def on(federation: Federation, *ports: int) -> Federation:
    return replace(federation, members=replace(federation.members, ports=(ports[0], ports[1])))


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_ports_are_not_free_while_somebody_listens_there(made: Federation, address: str) -> None:
    with socket.socket() as listener, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        other = probe.getsockname()[1]
        probe.close()
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not on(made, port, other).ports_are_free()
        assert not on(made, other, port).ports_are_free()
        listener.close()
        assert on(made, other, port).ports_are_free()


def test_a_port_of_a_connection_that_has_just_ended_is_free(made: Federation) -> None:
    """A server that is started again finds its port in TIME_WAIT, and may have it."""
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        client.connect(("127.0.0.1", port))
        accepted, _ = listener.accept()
        accepted.close()  # the server's side closes first, and so it is the one that waits
        client.recv(1)
    with socket.socket() as strict:
        if sys.platform == "linux":
            with pytest.raises(OSError, match="in use"):
                strict.bind(("127.0.0.1", port))
    assert on(made, port, port).ports_are_free()


def test_the_folder_of_runs_is_where_the_server_looks_for_them(federation: Federation, experiment: Any) -> None:
    run = RunFolder.create(federation.runs, experiment)
    assert run.path.is_relative_to(federation.folder / "runs")
