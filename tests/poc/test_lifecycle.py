"""What ``fedct poc up`` makes of a folder. No node is started here: tests/integration/test_poc.py does that."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from policies import policy_toml

from custom.site_file import SITE_FILE, load_site
from custom.strict import ConfigError
from poc import lifecycle
from poc.federation import PROJECT_FILE, Federation

SITE = "site-1"
Up = Callable[..., Federation]


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Up:
    monkeypatch.setattr(lifecycle, "start", lambda federation, *, timeout_s, say: None)

    def call(
        *, project_file: Path | None = None, site_file: Path | None = None, sites: Sequence[str] = ()
    ) -> Federation:
        return lifecycle.up(
            tmp_path / "a federation",
            project_file=project_file,
            site_file=site_file,
            sites=sites,
            timeout_s=1,
            say=lambda _: None,
        )

    return call


@pytest.fixture
def strict(tmp_path: Path) -> Path:
    """A site file whose first hospital demands differential privacy, and has a folder of scans beside it."""
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "sites.toml"
    file.write_text(f'[sites.{SITE}]\n{policy_toml(required=True)}\ndata = {{ folder = "scans" }}\n')
    return file


def demands(federation: Federation) -> bool:
    return load_site(federation.kit(SITE) / "local" / SITE_FILE, SITE).policy.required


def test_what_the_hospitals_demand_stays_if_nothing_else_is_said(up: Up, strict: Path) -> None:
    """The second start does not fall back on the policies that fedct brings along."""
    assert demands(up(site_file=strict, sites=[SITE]))
    again = up()
    assert demands(again)
    source = load_site(again.kit(SITE) / "local" / SITE_FILE, SITE).source
    assert getattr(source, "folder", None) == strict.parent / "scans"
    strict.write_text(strict.read_text().replace("required = true", "required = false"))
    assert demands(up())
    assert not demands(up(site_file=strict))


def test_other_ports_change_neither_hospitals_nor_policies_nor_the_root(up: Up, strict: Path) -> None:
    first = up(site_file=strict, sites=[SITE])
    root = (first.kit(SITE) / "startup" / "rootCA.pem").read_text()
    with socket.create_server(("127.0.0.1", first.members.ports[0])):
        second = up()
    assert second.members.ports != first.members.ports
    assert second.members.sites == (SITE,)
    assert second.members.kits != first.members.kits
    assert demands(second)
    assert (second.kit(SITE) / "startup" / "rootCA.pem").read_text() == root


def test_a_folder_keeps_its_project(up: Up, strict: Path, tmp_path: Path) -> None:
    project = tmp_path / "mine.yml"
    values = yaml.safe_load(PROJECT_FILE.read_text())
    project.write_text(yaml.safe_dump(values))
    made = up(project_file=project)
    assert up(project_file=project) == up(project_file=PROJECT_FILE) == made, "the same content"
    values["description"] = "another"
    project.write_text(yaml.safe_dump(values))
    for options in ({"project_file": project}, {"sites": [SITE]}):
        with pytest.raises(ConfigError, match="another project; give another --folder"):
            up(**options)


def test_a_site_file_is_not_passed_over_while_nodes_run(up: Up, strict: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = up(sites=[SITE])
    monkeypatch.setattr(lifecycle, "running", lambda folder: {SITE: [None]})
    assert up() == made
    with pytest.raises(ConfigError, match="fedct poc down, then up"):
        up(site_file=strict)
    monkeypatch.undo()


def test_a_federation_needs_somebody_who_hands_in_jobs(up: Up, tmp_path: Path) -> None:
    values = yaml.safe_load(PROJECT_FILE.read_text())
    values["participants"] = [one for one in values["participants"] if one.get("role") != "lead"]
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="name a lead"):
        up(project_file=tmp_path / "mine.yml")
