from __future__ import annotations

from pathlib import Path

import pytest
from policies import ALL_STATISTICS, policy_toml

from custom.site_file import SITE_FILE_VARIABLE, HardwareConfig, load_site, server_config, simulated_kits, site_config
from custom.strict import ConfigError
from medical_data.cohort import EmbeddedSource, FolderSource

TEXT = f"""
[server]
runs = "runs"

[sites.a]
home = "homes/a"
{policy_toml(total=150.0)}
data = {{ folder = "scans", format = "dicom" }}
kit = "kits/a"
limits = {{ min_patients = 3 }}
hardware = {{ device = "cpu", threads = 2, checkpointing = true, precision = "bfloat16" }}

[sites.b]
home = "/somewhere/b"
{policy_toml(required=True)}
data = {{ embedded = {{ hospital = 1, patients = 5, seed = 2 }} }}
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A simulated site's workspace, two folders below where the command was typed; the sites share a file."""
    monkeypatch.delenv(SITE_FILE_VARIABLE, raising=False)
    root = tmp_path / "simulator_workspace" / "a"
    for folder in (root.parent / "local", root / "local"):  # the simulator copies the shared one to each site
        folder.mkdir(parents=True)
        (folder / "fedct.toml").write_text(TEXT)
    return root


def test_paths_are_taken_from_the_folder_that_holds_the_workspace(workspace: Path, tmp_path: Path) -> None:
    site = site_config("a", workspace_root=workspace)
    assert site.home == tmp_path / "homes/a"
    assert site.kit == tmp_path / "kits/a"
    assert site_config("b", workspace_root=workspace).kit == workspace / "startup"
    assert server_config(workspace_root=workspace).kit == workspace / "startup"
    assert site.source == FolderSource(folder=tmp_path / "scans", format="dicom")
    assert site.limits.min_patients == 3
    assert site.hardware == HardwareConfig(device="cpu", threads=2, checkpointing=True, precision="bfloat16")
    assert not site.policy.required
    assert site.policy.budgets.total.epsilon == 150.0
    assert site.policy.may_leave == ALL_STATISTICS
    assert server_config(workspace_root=workspace).runs == tmp_path / "runs"
    other = site_config("b", workspace_root=workspace)
    assert other.home == Path("/somewhere/b")
    assert isinstance(other.source, EmbeddedSource)
    assert other.source.patients == 5


def test_the_command_line_means_the_same_by_the_simulators_file(workspace: Path) -> None:
    file = workspace.parent / "local" / "fedct.toml"
    assert load_site(file, "a") == site_config("a", workspace_root=workspace)


def test_a_provisioned_site_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SITE_FILE_VARIABLE, raising=False)
    kit = tmp_path / "kits" / "a"
    (kit / "local").mkdir(parents=True)
    (kit / "local" / "fedct.toml").write_text(TEXT)
    assert site_config("a", workspace_root=kit).home == tmp_path / "kits" / "homes/a"
    assert load_site(kit / "local" / "fedct.toml", "a") == site_config("a", workspace_root=kit)


def test_a_named_file_wins_and_is_its_own_base(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "elsewhere" / "mine.toml"
    own.parent.mkdir()
    own.write_text(TEXT)
    monkeypatch.setenv(SITE_FILE_VARIABLE, str(own))
    assert site_config("a", workspace_root=workspace).home == own.parent / "homes/a"
    assert load_site(own, "a") == site_config("a", workspace_root=workspace)
    monkeypatch.setenv(SITE_FILE_VARIABLE, "mine.toml")
    with pytest.raises(ConfigError, match="absolute"):
        site_config("a", workspace_root=workspace)


def test_without_a_site_file_nothing_is_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SITE_FILE_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="write one"):
        site_config("a", workspace_root=tmp_path / "w" / "a")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[sites.a]", "[sites.z]", r"\[sites\.a\]"),
        ('home = "homes/a"', "", "home"),
        ("min_patients = 3", "min_patient = 3", "min_patient"),
        ("threads = 2", "threads = -1", "threads"),
        ('"cpu"', '"tpu"', "device"),
        ('"bfloat16"', '"float16"', "precision"),
        ("checkpointing = true", "checkpointing = 1", "checkpointing"),
        ('format = "dicom"', 'format = "jpeg"', "format"),
        ('folder = "scans", ', 'folder = "scans", embedded = {}, ', "folder or embedded"),
        ('data = { folder = "scans", format = "dicom" }', "", "data"),
        (policy_toml(total=150.0), "", "policy"),
        ("total = { epsilon = 150.0", "total = { epsilon = 50.0", "per_job"),
        ("required = false", "requird = false", "requird"),
        ('home = "homes/a"', 'home = "homes/a"\nepsilon = 3', "epsilon"),
        ("[server]", "[server", "TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(workspace: Path, old: str, new: str, named: str) -> None:
    (workspace.parent / "local" / "fedct.toml").write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ConfigError, match=named):
        site_config("a", workspace_root=workspace)


def test_simulated_kits_are_named_or_nothing_is_made(tmp_path: Path, workspace: Path) -> None:
    file = workspace.parent / "local" / "fedct.toml"
    with pytest.raises(ConfigError, match=r"server\.kit"):
        simulated_kits(workspace.parent)
    file.write_text(TEXT.replace("[server]", '[server]\nkit = "kits/server"'))
    with pytest.raises(ConfigError, match=r"sites\.b\.kit"):
        simulated_kits(workspace.parent)
    file.write_text(file.read_text().replace('home = "/somewhere/b"', 'home = "/somewhere/b"\nkit = "kits/b"'))
    assert simulated_kits(workspace.parent) == (
        tmp_path / "kits/server",
        {"a": tmp_path / "kits/a", "b": tmp_path / "kits/b"},
    )


def test_server_table_is_needed_by_the_server(workspace: Path) -> None:
    (workspace.parent / "local" / "fedct.toml").write_text(TEXT.replace("[server]", "[sever]"))
    with pytest.raises(ConfigError, match="server"):
        server_config(workspace_root=workspace)
