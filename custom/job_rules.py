"""What a site asks of a job that arrives: only configuration, only what it allows, only within its policy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom.config import EXPERIMENT_FILE, ExperimentConfig
from custom.job_policy import ask_policy
from custom.site_file import SiteConfig, site_config
from custom.strict import ConfigError, require
from privacy.policy import PolicyRefused

REFUSED = 3  # exit code that custom.validators.site_rules knows; an exception ends with 1
CLIENT_FILE, SERVER_FILE = "config_fed_client.json", "config_fed_server.json"
# All that a job may consist of, beside the submitter's signatures.
FILES = frozenset({CLIENT_FILE, SERVER_FILE, EXPERIMENT_FILE})
SIGNATURES = frozenset({".__nvfl_sig.json", ".__nvfl_submitter.crt"})


def check_job(own: SiteConfig, allowed: Sequence[str], folder: Path) -> None:
    """Let an application pass, or raise. What is raised goes to whoever sent the job: it speaks of the job only.

    Args:
        own: the site's settings.
        allowed: classes that a job may name, whole or, with a dot at the end, by how they begin.
        folder: the application, with ``config/`` in it.

    Raises:
        ConfigError: code or other files, an experiment in which the site takes no part, a class that it does not allow,
            or a configuration that cannot be meant.
        PolicyRefused: less privacy than the site demands, naming the rule, and the limit.
    """
    for file in sorted(file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()):
        if file.name in SIGNATURES and not file.is_symlink():
            continue
        known = file.parent == folder / "config" and file.name in FILES and not file.is_symlink()
        name, remedy = str(file.relative_to(folder)), f"a job brings {sorted(FILES)} in config/, and no code"
        require(known, argument="files", value=name, remedy=remedy)
    experiment = ExperimentConfig.load(folder / "config" / EXPERIMENT_FILE)
    own.check_part(experiment.name)
    for path in class_paths(_read(folder / "config" / CLIENT_FILE)):
        passes = any(path == entry or (entry.endswith(".") and path.startswith(entry)) for entry in allowed)
        require(passes, argument="class_allow_list", value=path, remedy="not on this site's list of classes")
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
    """Ask in a process of its own. What a job is refused for is written to the output.

    Whatever is wrong with the site's own files ends in a traceback, which stays at the site.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site")
    parser.add_argument("folder", type=Path)
    parser.add_argument("workspace", type=Path)
    options = parser.parse_args()
    own = site_config(options.site, workspace_root=options.workspace)
    resources = json.loads((options.workspace / "local" / "resources.json").read_text(encoding="utf-8"))
    allowed: list[str] = resources["class_allow_list"]
    try:
        check_job(own, allowed, options.folder)
    except (PolicyRefused, ConfigError) as error:
        print(error)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
