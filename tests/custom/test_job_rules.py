"""What a site lets pass of a job that arrives, and what it refuses by which rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import ALL_STATISTICS, policy_toml

from custom.config import ExperimentConfig
from custom.job_policy import ask_policy
from custom.job_rules import check_job, class_paths
from custom.site_file import SITE_FILE_VARIABLE, load_site, site_config
from custom.strict import ConfigError
from poc.kits import CLASSES
from privacy.policy import PolicyRefused

JOBS = Path(__file__).resolve().parents[2] / "jobs"
EVERY_JOB = sorted(folder.name for folder in JOBS.iterdir() if (folder / "meta.json").is_file())
PEERS = ("site-1", "site-2", "site-3")
ALL_PASS = policy_toml(delta=1e-3, peers=PEERS)
SITE = "site-1"
FOREIGN = "subprocess.Popen"

Change = Callable[[Any], None]


class Site:
    """A site's workspace, to which jobs of this repository arrive."""

    def __init__(self, base: Path) -> None:
        self.workspace = base / "kit"
        (self.workspace / "local").mkdir(parents=True)
        self.allows(CLASSES)
        self.demands(ALL_PASS)

    def allows(self, classes: tuple[str, ...]) -> None:
        text = json.dumps({"class_allow_list": list(classes)})
        (self.workspace / "local" / "resources.json").write_text(text)

    def demands(self, *lines: str) -> None:
        table = [f"[sites.{SITE}]", 'home = "home"', "data = { embedded = { hospital = 0 } }", *lines]
        (self.workspace / "local" / "fedct.toml").write_text("\n".join(table))

    def receives(self, name: str = "ct_ddpm") -> Path:
        app = self.workspace / "a-job" / f"app_{SITE}"
        shutil.copytree(
            JOBS / name / "app", app, ignore=shutil.ignore_patterns(".__nvfl_*")
        )  # left by whoever handed it in
        return app

    def check(self, app: Path) -> None:
        allowed = json.loads((self.workspace / "local" / "resources.json").read_text())["class_allow_list"]
        check_job(site_config(SITE, workspace_root=self.workspace), allowed, app)

    def refuses(self, app: Path, *said: str, error: type[Exception] = ConfigError) -> None:
        with pytest.raises(error) as caught:
            self.check(app)
        assert type(caught.value) is error
        for text in said:
            assert text in str(caught.value)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.delenv(SITE_FILE_VARIABLE, raising=False)
    return Site(tmp_path)


def edit(app: Path, name: str, change: Change) -> None:
    file = app / "config" / name
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_client(app: Path, change: Change) -> None:
    edit(app, "config_fed_client.json", change)


# ---- what passes


@pytest.mark.parametrize("name", EVERY_JOB)
def test_every_job_of_the_repository_passes_a_site_that_demands_nothing(site: Site, name: str) -> None:
    site.check(site.receives(name))


def test_every_job_is_looked_at() -> None:
    volumes = ["ct_ddpm_3d", "ct_ddpm_3d_dp", "ct_ldm_3d"]
    assert sorted(["ct_audit", "ct_ddpm", "ct_ddpm_dp", "ct_ddpm_he", "ct_ddpm_secagg", *volumes]) == EVERY_JOB


def test_the_encrypted_job_needs_nvflares_two_classes(site: Site) -> None:
    site.allows(tuple(entry for entry in CLASSES if not entry.startswith("nvflare.")))
    site.refuses(site.receives("ct_ddpm_he"), "class_allow_list", "HEModelDecryptor")
    shutil.rmtree(site.workspace / "a-job")
    site.check(site.receives("ct_ddpm"))


def test_signatures_of_the_submitter_may_lie_in_every_folder(site: Site) -> None:
    app = site.receives()
    for folder in (app, app / "config"):
        (folder / ".__nvfl_sig.json").write_text("{}")
        (folder / ".__nvfl_submitter.crt").write_text("a certificate")
    site.check(app)


def test_a_component_that_the_site_allows_passes_at_any_depth(site: Site) -> None:
    app = site.receives()
    gate = {"path": "custom.filters.egress_gate.EgressGate", "args": {}}
    edit_client(app, lambda client: client["components"].append({"id": "gate", **gate, "args": {"inner": [gate]}}))
    site.check(app)


# ---- files


@pytest.mark.parametrize(
    "name",
    [
        "custom/evil.py",
        "config/evil.py",
        "config/deeper/config_fed_client.json",
        "config/config_fed_client.conf",
        "config/config_fed_client.yml",
        "config/config_exchange.json",
        "experiment.json",
        "README",
        "config/.hidden",
    ],
)
def test_any_other_file_is_refused_by_its_name(site: Site, name: str) -> None:
    app = site.receives()
    (app / name).parent.mkdir(parents=True, exist_ok=True)
    (app / name).write_text("{}")
    site.refuses(app, "files = ", name, "no code")


def test_a_link_is_refused_whatever_it_is_called_and_wherever_it_leads(site: Site) -> None:
    app = site.receives()
    file = app / "config" / "experiment.json"
    elsewhere = site.workspace / "elsewhere.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    site.refuses(app, "files = ", "config/experiment.json")
    file.unlink()
    file.symlink_to("nowhere")
    site.refuses(app, "files = ", "config/experiment.json")


def test_a_linked_folder_is_refused_because_nobody_looks_into_it(site: Site) -> None:
    app = site.receives()
    outside = site.workspace / "outside"
    outside.mkdir()
    for name in ("custom", ".__nvfl_sig.json"):
        (app / name).symlink_to(outside, target_is_directory=True)
        site.refuses(app, f"files = '{name}'")
        (app / name).unlink()
    outside.rmdir()
    (app / "config").rename(outside)
    (app / "config").symlink_to(outside, target_is_directory=True)
    site.refuses(app, "files = 'config'")


@pytest.mark.parametrize("name", ["config_fed_client.json", "experiment.json"])
@pytest.mark.parametrize("content", [None, "no JSON", ""])
def test_a_missing_or_broken_file_is_refused(site: Site, name: str, content: str | None) -> None:
    app = site.receives()
    file = app / "config" / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    site.refuses(app, name)


# ---- classes


def as_executor(client: Any) -> None:
    client["executors"][0]["executor"]["path"] = FOREIGN


def as_filter(client: Any) -> None:
    client["task_result_filters"][0]["filters"].append({"path": FOREIGN, "args": {}})


def as_data_filter(client: Any) -> None:
    client["task_data_filters"].append({"tasks": ["*"], "filters": [{"path": FOREIGN}]})


def as_component(client: Any) -> None:
    client["components"].append({"id": "one", "path": FOREIGN})


def as_argument(client: Any) -> None:
    client["executors"][0]["executor"]["args"] = {"helper": {"path": FOREIGN, "args": {}}}


def as_argument_of_an_argument(client: Any) -> None:
    inner = {"list": [{"deeper": {"class_path": FOREIGN}}]}
    gate = {"id": "gate", "path": "custom.filters.egress_gate.EgressGate", "args": inner}
    client["components"].append(gate)


def beside_everything_known(client: Any) -> None:
    client["unknown_section"] = {"path": FOREIGN}


@pytest.mark.parametrize(
    "change",
    [
        as_executor,
        as_filter,
        as_data_filter,
        as_component,
        as_argument,
        as_argument_of_an_argument,
        beside_everything_known,
    ],
)
def test_a_class_that_the_site_does_not_allow_is_refused_wherever_it_stands(site: Site, change: Change) -> None:
    app = site.receives()
    edit_client(app, change)
    site.refuses(app, f"class_allow_list = '{FOREIGN}'", "not on this site's list of classes")


@pytest.mark.parametrize(
    "path",
    [
        "custom.executorsevil.Trainer",
        "custom.executors",
        "custom",
        "Custom.Executors.X",
        " custom.executors.diffusion_trainer.DiffusionTrainer",
        "xcustom.executors.diffusion_trainer.DiffusionTrainer",
        "nvflare.app_opt.he.model_encryptor.HEModelEncryptorAndMore",
        "nvflare.app_opt.he.model_encryptor.",
        "{x}",
        "",
    ],
)
def test_nothing_that_only_resembles_an_allowed_class_passes(site: Site, path: str) -> None:
    app = site.receives()
    edit_client(app, lambda client: client["executors"][0]["executor"].update(path=path))
    site.refuses(app, f"class_allow_list = {path!r}")


@pytest.mark.parametrize(
    "component",
    [
        {"id": "x", "name": "FilesystemStorage", "args": {}},
        {"id": "x", "class_path": "custom.filters.egress_gate.EgressGate"},
        {"id": "x", "path": None},
        {"id": "x", "path": ["custom.filters.egress_gate.EgressGate"]},
        {},
        "custom.filters.egress_gate.EgressGate",
    ],
)
def test_a_component_that_names_its_class_in_another_way_is_refused(site: Site, component: Any) -> None:
    app = site.receives()
    edit_client(app, lambda client: client["components"].append(component))
    site.refuses(app, "class_allow_list", "path")


def test_an_executor_and_a_filter_without_path_are_refused(site: Site) -> None:
    app = site.receives()
    edit_client(app, lambda client: client["executors"][0].update(executor={"name": "NPTrainer"}))
    site.refuses(app, "class_allow_list", "NPTrainer", "path")
    edit_client(app, lambda client: client["executors"][0].update(executor=None))
    site.refuses(app, "class_allow_list", "None")
    shutil.rmtree(site.workspace / "a-job")
    app = site.receives()
    edit_client(app, lambda client: client["task_result_filters"][0]["filters"].append({"name": "ExcludeVars"}))
    site.refuses(app, "class_allow_list", "ExcludeVars", "path")


def test_an_argument_whose_class_nvflare_would_find_by_its_name_is_refused(site: Site) -> None:
    app = site.receives()
    helper = {"helper": {"name": "FilesystemStorage", "args": {}}}
    edit_client(app, lambda client: client["executors"][0]["executor"].update(args=helper))
    site.refuses(app, "class_allow_list", "FilesystemStorage")


keys = st.sampled_from(["args", "tasks", "id", "config_type", "disabled", "x", "", "pfad"])
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
wraps = st.lists(st.sampled_from(["list", "args", "executor", "filters", "components", "anything"]), max_size=6)


@given(beside=trees, wraps=wraps, key=st.sampled_from(["path", "class_path", "name"]))
def test_a_class_is_found_at_any_depth_of_anything(beside: Any, wraps: list[str], key: str) -> None:
    config: Any = {"path": "a.B", key: FOREIGN, "beside": beside}
    for wrap in wraps:
        if wrap == "list":
            config = [beside, config]
        elif wrap in ("filters", "components"):
            config = {wrap: [config] if isinstance(config, dict) else [{"path": "a.B", "args": config}]}
        elif wrap == "executor":
            config = {wrap: config if isinstance(config, dict) else {"path": "a.B", "args": config}}
        else:
            config = {wrap: config, "beside": beside}
        if isinstance(config, dict):
            config["path"] = "a.B"
    assert FOREIGN in class_paths(config)


@given(trees)
def test_where_no_class_is_named_none_is_found(tree: Any) -> None:
    assert class_paths(tree) == []


# ---- the experiment


def test_an_unknown_key_of_the_experiment_is_refused(site: Site) -> None:
    app = site.receives()
    edit(app, "experiment.json", lambda values: values["training"].update(step_per_round=3))
    site.refuses(app, "experiment.training.step_per_round", "unknown")


def test_the_sites_own_list_of_experiments_decides(site: Site) -> None:
    app = site.receives()
    site.demands(ALL_PASS, 'jobs = ["ct_audit", "ct_ddpm"]')
    site.check(app)
    site.demands(ALL_PASS, 'jobs = ["ct_audit", "ct_ddp", "ct_ddpm_dp"]')
    site.refuses(app, "jobs = 'ct_ddpm': this site takes no part in it")
    site.demands(ALL_PASS, "jobs = []")
    site.refuses(app, "jobs = 'ct_ddpm'", "takes no part in it")
    site.demands(ALL_PASS)
    site.check(app)


@pytest.mark.parametrize("value", ['"ct_ddpm"', "[1]", "true", "{}"])
def test_a_list_of_experiments_that_is_none_lets_nothing_pass(site: Site, value: str) -> None:
    site.demands(ALL_PASS, f"jobs = {value}")
    site.refuses(site.receives(), f"sites.{SITE}.jobs", "give an array")


def test_a_site_without_a_table_or_a_file_lets_nothing_pass(site: Site) -> None:
    app = site.receives()
    file = site.workspace / "local" / "fedct.toml"
    file.write_text(file.read_text().replace(SITE, "site-9"))
    site.refuses(app, f"add a table [sites.{SITE}]")
    file.unlink()
    site.refuses(app, "site file")


def test_a_site_without_a_list_of_classes_lets_nothing_pass(site: Site) -> None:
    app = site.receives()
    site.allows(())
    site.refuses(app, "class_allow_list")


# ---- the policy


def policy_refuses(site: Site, app: Path, rule: str) -> None:
    with pytest.raises(PolicyRefused) as caught:
        site.check(app)
    assert caught.value.rule == rule
    assert str(caught.value).startswith(f"{rule} = ")


def test_a_site_that_requires_privacy_refuses_a_job_without(site: Site) -> None:
    site.demands(policy_toml(required=True, delta=1e-3))
    policy_refuses(site, site.receives(), "required")
    shutil.rmtree(site.workspace / "a-job")
    site.check(site.receives("ct_ddpm_dp"))


def test_a_job_that_asks_for_more_epsilon_than_the_ceiling_is_refused(site: Site) -> None:
    app = site.receives("ct_ddpm_dp")  # asks for 8
    site.demands(policy_toml(per_job=7.9, delta=1e-3))
    policy_refuses(site, app, "budgets.per_job.epsilon")
    site.demands(policy_toml(per_job=8.01, delta=1e-3))
    site.check(app)


def test_the_job_is_held_against_every_rule_that_the_site_sets(site: Site) -> None:
    app = site.receives("ct_ddpm_dp")  # 5 rounds, δ = 0.001, C = 1
    for rules, rule in (
        (policy_toml(delta=9e-4), "budgets.per_job.delta"),
        (policy_toml(delta=1e-2), "budgets.total.delta"),  # 800 patients
        (policy_toml(delta=1e-3, max_rounds=4), "max_rounds"),
        (policy_toml(delta=1e-3, max_clip_norm=0.5), "max_clip_norm"),
        (policy_toml(delta=1e-3, min_noise_multiplier=50.0), "min_noise_multiplier"),
    ):
        site.demands(rules)
        policy_refuses(site, app, rule)
    site.demands(policy_toml(delta=1e-3, max_rounds=5, max_clip_norm=1.0))
    site.check(app)


def test_a_site_that_requires_masks_refuses_a_job_without(site: Site) -> None:
    site.demands(policy_toml(peers=PEERS, masks_required=True))
    for name in ("ct_ddpm", "ct_audit"):
        policy_refuses(site, site.receives(name), "secure_aggregation.required")
        shutil.rmtree(site.workspace / "a-job")
    site.check(site.receives("ct_ddpm_secagg"))


def test_a_site_that_names_no_peers_refuses_masks(site: Site) -> None:
    app = site.receives("ct_ddpm_secagg")
    site.demands(policy_toml())
    policy_refuses(site, app, "secure_aggregation.peers")
    site.demands(policy_toml(peers=PEERS, min_survivors=3))
    policy_refuses(site, app, "secure_aggregation.min_survivors")


@pytest.mark.parametrize("kept", ["weight", "train_loss", "held_out_loss", "seconds"])
def test_a_statistic_that_may_not_leave_refuses_the_job_that_would_send_it(site: Site, kept: str) -> None:
    site.demands(policy_toml(may_leave=tuple(name for name in ALL_STATISTICS if name != kept)))
    policy_refuses(site, site.receives(), "may_leave")


def test_an_audit_is_asked_for_what_it_sends_and_not_for_a_plan(site: Site) -> None:
    app = site.receives("ct_audit")
    site.demands(policy_toml(required=True, may_leave=("audit_counts",), max_rounds=1))
    site.check(app)
    site.demands(policy_toml(may_leave=tuple(name for name in ALL_STATISTICS if name != "audit_counts")))
    policy_refuses(site, app, "may_leave")


def test_the_policy_gives_as_many_patients_as_it_and_the_plan_need(tmp_path: Path) -> None:
    def patients(name: str, least: int) -> int:
        file = tmp_path / "sites.toml"
        policy = policy_toml(delta=1e-4, per_job=100.0, min_patients=least)
        file.write_text(f'[sites.a]\nhome = "h"\ndata = {{ embedded = {{ hospital = 0 }} }}\n{policy}\n')
        experiment = ExperimentConfig.of_job(JOBS / name)
        if experiment.privacy is not None:
            values = experiment.to_json()
            values["privacy"]["delta"] = 1e-4
            experiment = ExperimentConfig.from_json(values)
        return ask_policy(load_site(file, "a").policy, experiment)

    assert patients("ct_ddpm", 17) == 17
    assert patients("ct_audit", 17) == 17
    assert patients("ct_ddpm_dp", 17) == 800
    assert patients("ct_ddpm_dp", 801) == 801
