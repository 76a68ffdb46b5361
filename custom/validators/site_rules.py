"""A site's own rules, applied to a job when it arrives: before any of it runs, and with an answer to who sent it.

NVFlare asks a node's ``app_validator`` about every application that is deployed to it. What it refuses it refuses for
itself alone: the job goes on at the others if ``min_clients`` of its ``meta.json`` are left.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidator

TIMEOUT_S = 50  # the server waits for a minute
REFUSED = 3  # of custom.job_rules, which is not imported here: it brings PyTorch with it


class SiteRules(AppValidator):
    """Named in ``local/resources.json`` of a site, where no job reaches it.

    Args:
        site: name of the site.
    """

    def __init__(self, site: str) -> None:
        self._site = site

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        """Ask :func:`custom.job_rules.check_job`, in a process of its own: the site's parent process stays small.

        Args:
            app_folder: ``<workspace>/<job id>/app_<site>``.

        Returns:
            Why the site refuses, or an empty text; and nothing more about the application.
        """
        workspace = Path(app_folder).parents[1]
        command = [sys.executable, "-m", "custom.job_rules", self._site, app_folder, str(workspace)]
        try:
            asked = subprocess.run(  # noqa: S603
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{self._site} refuses this job: its rules were not done in {TIMEOUT_S} s", {}
        if asked.returncode == REFUSED:
            return f"{self._site} refuses this job: {asked.stdout.strip()}", {}
        if asked.returncode:
            print(asked.stderr, file=sys.stderr)
            return f"{self._site} refuses this job: its rules could not be applied; see the site's log", {}
        return "", {}
