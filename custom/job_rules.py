"""What a site asks of a job that arrives: only configuration, only what it allows, only within its policy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from custom.config import EXPERIMENT_FILE, ExperimentConfig
from custom.job_policy import ask_policy
from custom.site_file import site_config
from custom.strict import ConfigError, require
from privacy.policy import PolicyRefused

CLIENT_FILE, SERVER_FILE = "config_fed_client.json", "config_fed_server.json"
# All that a job may consist of, beside the submitter's signatures.
FILES = frozenset({CLIENT_FILE, SERVER_FILE, EXPERIMENT_FILE})
SIGNATURES = frozenset({".__nvfl_sig.json", ".__nvfl_submitter.crt"})


def check_job(site: str, folder: Path, workspace: Path) -> None:
    """Let an application pass, or raise.

    Args:
        site: name of the site.
        folder: the application, with ``config/`` in it.
        workspace: the site's, with its ``local/``.

    Raises:
        ConfigError: code or other files, an experiment in which the site takes no part, a class that it does not allow,
            or a configuration that cannot be meant.
        PolicyRefused: less privacy than the site demands, naming the rule.
    """
    own = site_config(site, workspace_root=workspace)
    for file in sorted(file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()):
        if file.name in SIGNATURES and not file.is_symlink():
            continue
        known = file.parent == folder / "config" and file.name in FILES and not file.is_symlink()
        name, remedy = str(file.relative_to(folder)), f"a job brings {sorted(FILES)} in config/, and no code"
        require(known, argument="files", value=name, remedy=remedy)
    experiment = ExperimentConfig.load(folder / "config" / EXPERIMENT_FILE)
    own.check_part(experiment.name)
    allowed = _read(workspace / "local" / "resources.json")["class_allow_list"]
    for path in class_paths(_read(folder / "config" / CLIENT_FILE)):
        passes = any(path == entry or (entry.endswith(".") and path.startswith(entry)) for entry in allowed)
        require(passes, argument="class_allow_list", value=path, remedy=f"this site allows {allowed} only")
    ask_policy(own.policy, experiment)


def class_paths(config: Any) -> list[str]:
    """Every class that the configuration of a job names, at any depth.

    Raises:
        ConfigError: an executor, filter or component without a ``path``: NVFlare would look for its class by other
            keys.
    """
    if isinstance(config, list):
        return [path for entry in config for path in class_paths(entry)]
    if not isinstance(config, dict):
        return []
    built = [config["executor"]] if "executor" in config else []
    built += [entry for key in ("filters", "components") for entry in config.get(key, [])]
    for entry in built:
        named = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        require(named, argument="class_allow_list", value=entry, remedy="name the class in its path")
    own = [str(config[key]) for key in ("path", "class_path", "name") if key in config]  # NVFlare takes any of them
    return own + [path for value in config.values() for path in class_paths(value)]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file.name}: {type(error).__name__}: give a JSON file") from error


def main() -> int:
    """Ask in a process of its own; what a site refuses is written to the output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site")
    parser.add_argument("folder", type=Path)
    parser.add_argument("workspace", type=Path)
    options = parser.parse_args()
    try:
        check_job(options.site, options.folder, options.workspace)
    except (PolicyRefused, ConfigError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
