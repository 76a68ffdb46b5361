"""What a node writes into ``local/`` of its kit: its own decisions, which no job and no other node can change.

A site gets ``resources.json`` (which classes a job may name, its own rules for jobs, its launcher, no log streaming),
``privacy.json`` (filters that every reply passes, whatever the job says), ``authorization.json`` (who may do what; code
in a job: nobody) and ``fedct.toml``, the site file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from custom.atomic import write_atomically
from custom.site_file import SITE_FILE
from custom.strict import require

# What a job may name, of ours and of NVFlare's encryption.
CLASSES = (
    "custom.controllers.",
    "custom.executors.",
    "custom.filters.",
    "nvflare.app_opt.he.model_decryptor.HEModelDecryptor",
    "nvflare.app_opt.he.model_encryptor.HEModelEncryptor",
)
SITE_LAUNCHER = {"path": "custom.launchers.job_processes.SiteJobLauncher", "args": {}}
SERVER_LAUNCHER = {"path": "custom.launchers.job_processes.ServerJobLauncher", "args": {}}
# Components of NVFlare's default that send a site's error log to the server, or receive it.
LOG_STREAMING = frozenset({"site_log_streamer", "log_receiver"})

_LEAD = {
    "submit_job": "any",
    "clone_job": "n:submitter",
    "manage_job": "n:submitter",
    "download_job": "n:submitter",
    "view": "any",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
}
# A role that is not listed may do nothing. Nobody may send code, nor commands to a node's shell.
AUTHORIZATION = {"format_version": "1.0", "permissions": {"lead": _LEAD, "member": {"view": "any"}}}
# At a site whether it is there, and nothing of what it has logged: errors may name its files, and no gate sees them.
_STATUS = {"view": "none", "check_status": "any"}
SITE_AUTHORIZATION = {"format_version": "1.0", "permissions": {"lead": _LEAD | _STATUS, "member": _STATUS}}
# The gate, and with it the site's demand for masks, on every reply: unlike a job's filters these name no tasks.
PRIVACY = {
    "scopes": [
        {
            "name": "hospital",
            "task_data_filters": [],
            "task_result_filters": [{"path": "custom.filters.masks_required.MasksRequired", "args": {}}],
        }
    ],
    "default_scope": "hospital",
}


def prepare_server(kit: Path, table: Mapping[str, Any]) -> None:
    """Write a server's ``local/``.

    Args:
        kit: folder with ``startup/`` and ``local/``, as provisioning made them.
        table: the ``[server]`` table of its site file.
    """
    resources = _default_resources(kit)
    _component(resources, "process_launcher").update(SERVER_LAUNCHER)
    # NVFlare's default keeps jobs under /tmp, one store for all federations of a machine.
    storage = kit.resolve() / "storage"
    _component(resources, "job_manager")["args"]["uri_root"] = str(storage / "jobs")
    (server,) = resources["servers"]
    server["admin_timeout"] = 60.0  # sites apply their rules before they answer
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
    _write_json(kit, "resources.json", resources)
    _write_json(kit, "authorization.json", AUTHORIZATION)
    _write(kit, SITE_FILE, tomli_w.dumps({"server": table}))


def prepare_site(kit: Path, name: str, table: Mapping[str, Any] | None) -> None:
    """Write a site's ``local/``.

    Args:
        kit: folder with ``startup/`` and ``local/``, as provisioning made them.
        name: the site's.
        table: its table of the site file; None leaves the file that is there.
    """
    _write_json(kit, "resources.json", site_resources(kit, name))
    _write_json(kit, "authorization.json", SITE_AUTHORIZATION)
    _write_json(kit, "privacy.json", PRIVACY)
    if table is not None:
        _write(kit, SITE_FILE, tomli_w.dumps({"sites": {name: table}}))


def site_resources(kit: Path, name: str) -> dict[str, Any]:
    """A site's ``resources.json``, from NVFlare's default in its kit."""
    resources = _default_resources(kit)
    resources["allow_log_streaming"] = False
    resources["app_validator"] = {"path": "custom.validators.site_rules.SiteRules", "args": {"site": name}}
    _component(resources, "process_launcher").update(SITE_LAUNCHER)
    return resources


def _default_resources(kit: Path) -> dict[str, Any]:
    file = kit / "local" / "resources.json.default"
    require(
        file.is_file(), argument="kit", value=str(kit), remedy="no local/resources.json.default: give NVFlare's kit"
    )
    resources: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    version = resources.get("format_version")
    require(version == 2, argument="format_version", value=version, remedy="provision with the NVFlare of this fedct")
    resources["class_list_enforcement_mode"] = "enforce"
    resources["class_allow_list"] = list(CLASSES)
    resources["components"] = [one for one in resources["components"] if one["id"] not in LOG_STREAMING]
    return resources


def _component(resources: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in resources["components"] if one["id"] == name)
    component: dict[str, Any] = found
    return component


def _write_json(kit: Path, name: str, values: Any) -> None:
    _write(kit, name, json.dumps(values, indent=2) + "\n")


def _write(kit: Path, name: str, text: str) -> None:
    write_atomically(kit / "local" / name, text.encode())
