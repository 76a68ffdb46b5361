"""What a node writes into its kit, asked through NVFlare's own readers; and kits that somebody changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.app_validation import AppValidator
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import AdminCommandNames
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.job_launcher_spec import JobLauncherSpec
from nvflare.apis.storage import StorageSpec
from nvflare.apis.workspace import Workspace
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.fuel.utils.class_utils import instantiate_class
from nvflare.security.security import COMMAND_CATEGORIES, CommandCategory, FLAuthorizer

from custom.filters.masks_required import MasksRequired
from custom.launchers.job_processes import ServerJobLauncher, SiteJobLauncher
from custom.site_file import SITE_FILE
from custom.strict import ConfigError
from custom.validators.site_rules import SiteRules
from poc.federation import Federation, prepare_nodes, provision
from poc.kits import CLASSES, prepare_server, prepare_site
from poc.signed_kits import verify_kit

SERVER, SITES = "server", ("site-1", "site-2", "site-3")
NODES = (SERVER, *SITES)
LEAD = Person("lead@fedct.local", "coordinator", "lead")
COLLEAGUE = Person("second@fedct.local", "coordinator", "lead")
MEMBER = Person("viewer@fedct.local", "coordinator", "member")
# All that NVFlare asks about by name, and what it asks about an application with code in it.
COMMANDS = sorted({value for name, value in vars(AdminCommandNames).items() if name.isupper()})
RIGHTS = sorted({*COMMANDS, *COMMAND_CATEGORIES, *COMMAND_CATEGORIES.values(), "byoc"})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    federation = provision(tmp_path_factory.mktemp("prepared") / "federation")
    prepare_nodes(federation)
    return federation


@pytest.fixture
def kit(prepared: Federation, tmp_path: Path) -> Path:
    """A site's kit that a test may spoil."""
    copied = tmp_path / "kit"
    shutil.copytree(prepared.kit("site-1"), copied)
    return copied


def local(kit: Path, name: str) -> Any:
    return json.loads((kit / "local" / name).read_text())


def component(resources: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in resources["components"] if one["id"] == name)
    return dict(found)


def built(entry: dict[str, Any]) -> Any:
    return instantiate_class(entry["path"], dict(entry.get("args", {})))


# ---- resources.json


@pytest.mark.parametrize("name", NODES)
def test_nvflare_enforces_the_list_of_classes_at_every_node(prepared: Federation, name: str) -> None:
    resources = local(prepared.kit(name), "resources.json")
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["class_allow_list"] == list(CLASSES)
    authorizer, workspace = ComponentPathAuthorizer(), Workspace(str(prepared.kit(name)), site_name=name)
    for path in (
        "custom.executors.diffusion_trainer.DiffusionTrainer",
        "custom.controllers.diffusion_fedavg.DiffusionFedAvg",
        "custom.filters.egress_gate.EgressGate",
        "nvflare.app_opt.he.model_encryptor.HEModelEncryptor",
    ):
        authorizer.authorize_component_config({"path": path, "args": {}}, workspace=workspace)
    for path in (
        "subprocess.Popen",
        "custom.cli.main",
        "custom.executorsevil.X",
        "custom.launchers.job_processes.SiteJobLauncher",
        "nvflare.app_common.executors.model_learner_executor.ModelLearnerExecutor",  # in NVFlare's default
        "nvflare.app_opt.he.model_encryptor.HEModelEncryptorX",
    ):
        with pytest.raises(UnsafeComponentError, match="not in allow_list"):
            authorizer.authorize_component_config({"path": path, "args": {}}, workspace=workspace)


@pytest.mark.parametrize("name", SITES)
def test_no_log_of_a_site_is_streamed(prepared: Federation, name: str) -> None:
    default, resources = (local(prepared.kit(name), file) for file in ("resources.json.default", "resources.json"))
    assert component(default, "site_log_streamer"), "NVFlare's default has it no more: look for its new name"
    assert resources["allow_log_streaming"] is False
    assert "log_stream" not in json.dumps(resources["components"]).lower()


def test_no_server_takes_a_log(prepared: Federation) -> None:
    default, resources = (local(prepared.kit(SERVER), file) for file in ("resources.json.default", "resources.json"))
    assert component(default, "log_receiver"), "NVFlare's default has it no more: look for its new name"
    assert "receiver" not in json.dumps(resources["components"]).lower()


@pytest.mark.parametrize("name", SITES)
def test_a_sites_launcher_and_its_rules_can_be_built_as_they_stand(prepared: Federation, name: str) -> None:
    resources = local(prepared.kit(name), "resources.json")
    launcher, validator = built(component(resources, "process_launcher")), built(resources["app_validator"])
    assert isinstance(launcher, SiteJobLauncher)
    assert isinstance(launcher, JobLauncherSpec)
    assert isinstance(validator, SiteRules)
    assert isinstance(validator, AppValidator)
    if name == "site-1":  # takes seconds
        said, _ = validator.validate(str(prepared.folder / "nowhere" / "job" / "app"))
        assert said.startswith("site-1 refuses this job")


def test_a_servers_launcher_can_be_built_as_it_stands(prepared: Federation) -> None:
    resources = local(prepared.kit(SERVER), "resources.json")
    assert isinstance(built(component(resources, "process_launcher")), ServerJobLauncher)
    assert "app_validator" not in resources


@pytest.mark.parametrize("name", NODES)
def test_every_other_component_of_nvflares_default_is_left_as_it_was(prepared: Federation, name: str) -> None:
    default, resources = (local(prepared.kit(name), file) for file in ("resources.json.default", "resources.json"))
    kept = [one["id"] for one in resources["components"]]
    assert [one["id"] for one in default["components"] if one["id"] in kept] == kept
    assert {one["id"] for one in default["components"]} - set(kept) <= {"site_log_streamer", "log_receiver"}
    for one in resources["components"]:
        if one["id"] not in ("process_launcher", "job_manager"):
            assert one == component(default, one["id"])


def test_what_a_server_stores_lies_in_its_own_kit(prepared: Federation) -> None:
    kit = prepared.kit(SERVER)
    resources = local(kit, "resources.json")
    jobs = Path(component(resources, "job_manager")["args"]["uri_root"])
    storage = resources["snapshot_persistor"]["args"]["storage"]
    snapshots = Path(storage["args"]["root_dir"])
    for place in (jobs, snapshots):
        assert place.is_absolute()
        assert place.is_relative_to(kit)
        assert not place.is_relative_to(kit / "startup")
    assert jobs != snapshots
    assert isinstance(built(storage), StorageSpec)
    assert "/tmp/nvflare" not in json.dumps(resources)  # noqa: S108


def test_what_a_node_decided_earlier_is_written_anew_from_nvflares_default(kit: Path) -> None:
    resources = local(kit, "resources.json")
    resources["class_allow_list"] = ["*"]
    (kit / "local" / "resources.json").write_text(json.dumps(resources))
    prepare_site(kit, "site-1", None)
    assert local(kit, "resources.json")["class_allow_list"] == list(CLASSES)


def test_a_kit_of_another_nvflare_is_refused(kit: Path) -> None:
    default = kit / "local" / "resources.json.default"
    values = json.loads(default.read_text())
    values["format_version"] = 3
    default.write_text(json.dumps(values))
    for prepare in (lambda: prepare_site(kit, "site-1", {}), lambda: prepare_server(kit, {})):
        with pytest.raises(ConfigError, match="format_version = 3"):
            prepare()
    default.unlink()
    with pytest.raises(ConfigError, match="give NVFlare's kit"):
        prepare_site(kit, "site-1", {})


def test_without_a_table_the_site_file_that_is_there_stays(kit: Path) -> None:
    file = kit / "local" / SITE_FILE
    file.write_text("# written by hand\n")
    prepare_site(kit, "site-1", None)
    assert file.read_text() == "# written by hand\n"
    prepare_site(kit, "site-1", {"home": "/srv"})
    assert file.read_text() == '[sites.site-1]\nhome = "/srv"\n'


# ---- authorization.json


def may(kit: Path, who: Person, right: str, submitter: Person | None = None) -> bool:
    authorizer = FLAuthorizer("hospital_1", local(kit, "authorization.json"))
    allowed, _ = authorizer.authorize(AuthzContext(right, who, submitter))
    return bool(allowed)


@pytest.mark.parametrize("name", NODES)
def test_a_lead_submits_jobs_and_manages_the_own_ones(prepared: Federation, name: str) -> None:
    kit = prepared.kit(name)
    assert may(kit, LEAD, AdminCommandNames.SUBMIT_JOB)
    assert may(kit, LEAD, AdminCommandNames.LIST_JOBS) == (name == SERVER)
    for right in (
        AdminCommandNames.ABORT_JOB,
        AdminCommandNames.DELETE_JOB,
        AdminCommandNames.DOWNLOAD_JOB,
        AdminCommandNames.CLONE_JOB,
    ):
        assert may(kit, LEAD, right, LEAD)
        assert not may(kit, COLLEAGUE, right, LEAD)
        assert not may(kit, LEAD, right)


@pytest.mark.parametrize("name", NODES)
def test_nobody_sends_code_or_reads_a_sites_files(prepared: Federation, name: str) -> None:
    shell = [right for right, category in COMMAND_CATEGORIES.items() if category == CommandCategory.SHELL_COMMANDS]
    assert AdminCommandNames.SHELL_CAT in shell
    for who in (LEAD, MEMBER):
        for right in ("byoc", CommandCategory.SHELL_COMMANDS, AdminCommandNames.GET_JOB_LOG, *shell):
            assert not may(prepared.kit(name), who, right, who), right


@pytest.mark.parametrize("name", NODES)
def test_a_lead_cannot_operate_a_node(prepared: Federation, name: str) -> None:
    operate = [right for right, category in COMMAND_CATEGORIES.items() if category == CommandCategory.OPERATE]
    assert AdminCommandNames.SHUTDOWN in operate
    assert not any(may(prepared.kit(name), LEAD, right, LEAD) for right in operate)


@pytest.mark.parametrize("name", SITES)
def test_nobody_reads_what_a_site_has_logged(prepared: Federation, name: str) -> None:
    """Errors may name its files, and NVFlare's command for them passes no filter. That it is there may be seen."""
    looks = [right for right, category in COMMAND_CATEGORIES.items() if category == CommandCategory.VIEW]
    assert AdminCommandNames.SHOW_ERRORS in looks
    for who in (LEAD, MEMBER):
        seen = [right for right in looks if may(prepared.kit(name), who, right, who)]
        assert seen == [AdminCommandNames.CHECK_STATUS]


def test_a_member_looks_at_the_server_and_does_nothing_else(prepared: Federation) -> None:
    allowed = {right for right in RIGHTS if may(prepared.kit(SERVER), MEMBER, right, MEMBER)}
    looks = {right for right, category in COMMAND_CATEGORIES.items() if category == CommandCategory.VIEW}
    assert allowed == looks | {CommandCategory.VIEW}
    assert AdminCommandNames.LIST_JOBS in allowed
    assert AdminCommandNames.SUBMIT_JOB not in allowed


@pytest.mark.parametrize("role", ["project_admin", "org_admin", "site_admin", "", "leader"])
def test_a_role_that_is_not_listed_may_do_nothing(prepared: Federation, role: str) -> None:
    who = Person("somebody", "hospital_1", role)  # even of the site's own organisation
    assert not [right for right in RIGHTS if may(prepared.kit("site-1"), who, right, who)]
    default = FLAuthorizer("hospital_1", local(prepared.kit("site-1"), "authorization.json.default"))
    if role == "project_admin":  # NVFlare's default would let it
        assert default.authorize(AuthzContext(AdminCommandNames.SUBMIT_JOB, who))[0]


# ---- privacy.json


@pytest.mark.parametrize("name", SITES)
def test_every_reply_of_a_site_passes_the_filter_that_demands_masks(prepared: Federation, name: str) -> None:
    privacy = local(prepared.kit(name), "privacy.json")
    (scope,) = privacy["scopes"]
    assert privacy["default_scope"] == scope["name"]
    (entry,) = scope["task_result_filters"]
    made = built(entry)
    assert isinstance(made, Filter)
    assert isinstance(made, MasksRequired)


# ---- signatures


@pytest.mark.parametrize("name", [*NODES, "lead@fedct.local", "viewer@fedct.local"])
def test_every_kit_is_what_the_root_signed(prepared: Federation, name: str) -> None:
    verify_kit(prepared.kit(name))


def flip_a_byte(startup: Path) -> None:
    content = bytearray((startup / "sub_start.sh").read_bytes())
    content[len(content) // 2] ^= 1
    (startup / "sub_start.sh").write_bytes(content)


def flip_a_byte_of_the_certificate(startup: Path) -> None:
    content = bytearray((startup / "client.crt").read_bytes())
    content[-30] ^= 1
    (startup / "client.crt").write_bytes(content)


def name_another_server(startup: Path) -> None:
    file = startup / "fed_client.json"
    assert "localhost" in file.read_text()
    file.write_text(file.read_text().replace("localhost", "elsewhere"))


def add_a_file(startup: Path) -> None:
    (startup / "sitecustomize.py").write_text("")


def add_a_folder(startup: Path) -> None:
    (startup / "more").mkdir()


def add_a_link(startup: Path) -> None:
    (startup / "more.sh").symlink_to(startup / "start.sh")


def delete_a_file(startup: Path) -> None:
    (startup / "stop_fl.sh").unlink()


def swap_two_files(startup: Path) -> None:
    start, stop = (startup / name for name in ("start.sh", "stop_fl.sh"))
    content = start.read_bytes()
    start.write_bytes(stop.read_bytes())
    stop.write_bytes(content)


def forget_a_signature(startup: Path) -> None:
    file = startup / "signature.json"
    signatures = json.loads(file.read_text())
    del signatures["start.sh"]
    file.write_text(json.dumps(signatures))


@pytest.mark.parametrize(
    "change",
    [
        flip_a_byte,
        flip_a_byte_of_the_certificate,
        name_another_server,
        add_a_file,
        add_a_folder,
        add_a_link,
        delete_a_file,
        swap_two_files,
        forget_a_signature,
    ],
)
def test_a_kit_that_somebody_changed_is_refused(kit: Path, change: Callable[[Path], None]) -> None:
    verify_kit(kit)
    change(kit / "startup")
    with pytest.raises(ConfigError, match="not what the coordinator signed"):
        verify_kit(kit)


@pytest.mark.parametrize("name", ["signature.json", "rootCA.pem"])
def test_a_kit_without_signature_or_root_is_refused(kit: Path, name: str) -> None:
    (kit / "startup" / name).unlink()
    with pytest.raises(ConfigError, match=f"no startup/{name}"):
        verify_kit(kit)


def test_a_file_of_another_sites_kit_is_refused(prepared: Federation, kit: Path) -> None:
    shutil.copyfile(prepared.kit("site-2") / "startup" / "client.key", kit / "startup" / "client.key")
    with pytest.raises(ConfigError, match="not what the coordinator signed"):
        verify_kit(kit)


def test_a_kit_under_another_root_is_refused(prepared: Federation, kit: Path, tmp_path: Path) -> None:
    other = provision(tmp_path / "other").kit("site-1") / "startup"
    shutil.copyfile(other / "rootCA.pem", kit / "startup" / "rootCA.pem")
    with pytest.raises(ConfigError, match="not what the coordinator signed"):
        verify_kit(kit)


def test_what_a_site_writes_into_its_local_folder_breaks_no_signature(kit: Path) -> None:
    (kit / "local" / "more.json").write_text("{}")
    prepare_site(kit, "site-1", {"home": "/srv"})
    verify_kit(kit)
