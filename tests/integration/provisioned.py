"""A provisioned federation for tests: ``poc``'s own, with sites that train on little and may be told to misbehave."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from simulator import EMBEDDED

from custom.run_folder import RunFolder, newest_run
from custom.strict import ConfigError
from poc import jobs, lifecycle
from poc.federation import PROJECT_FILE, Federation, prepare_nodes, provision
from poc.processes import NODE, running, stop

SERVER = "server"
FAULTY = "faulty_sites."  # classes of tests that a site allows in them


@dataclass(frozen=True, kw_only=True)
class Running:
    """One that runs.

    Attributes:
        federation: where everything of it lies.
    """

    federation: Federation

    @property
    def base(self) -> Path:
        """Its folder."""
        return self.federation.folder

    @property
    def sites(self) -> Sequence[str]:
        """Their names."""
        return self.federation.members.sites

    def log(self, name: str) -> str:
        """What a node and its jobs have logged."""
        kit = self.federation.kit(name)
        files = [self.federation.log(name), *sorted({*kit.glob("log.txt"), *kit.glob("*/log.txt")})]
        return "\n".join(file.read_text(errors="replace") for file in files)

    def submit(self, job: Path, user: str | None = None) -> str:
        """Hand in a job; gives its id."""
        with jobs.session(self.federation, user) as session:
            return jobs.submit(session, job)

    def end(self, job_id: str, *, timeout: float = 240) -> jobs.Followed:
        """Wait for a job's end."""
        with jobs.session(self.federation) as session:
            lines: list[str] = []
            deadline = time.monotonic() + timeout

            def say(text: str) -> None:
                lines.append(text)
                assert time.monotonic() < deadline, lines

            return jobs.follow(self.federation, session, job_id, say)

    def receipt(self, experiment: str, *, timeout: float) -> Path:
        """Wait for the receipt of a run, which is the last that it writes; gives the run's folder."""
        folder = self.wait(lambda: self._receipt(experiment), timeout=timeout, what=f"receipt of {experiment}")
        assert isinstance(folder, Path)
        return folder

    def _receipt(self, experiment: str) -> Path | None:
        try:
            folder = newest_run(self.federation.runs, experiment)
        except ConfigError:  # not begun
            return None
        return folder if (folder / "receipt.json").is_file() else None

    def round_done(self, experiment: str, count: int, *, timeout: float = 120) -> Path:
        """Wait until a run has done so many rounds; gives its folder."""

        def done() -> Path | None:
            try:
                folder = newest_run(self.federation.runs, experiment)
            except ConfigError:
                return None
            return folder if len(RunFolder(folder).records()) >= count else None

        folder = self.wait(done, timeout=timeout, what=f"round {count} of {experiment}")
        assert isinstance(folder, Path)
        return folder

    def wait(self, look: Any, *, timeout: float, what: str) -> object:
        """Look until there is something."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if found := look():
                return found
            time.sleep(0.2)
        raise TimeoutError(f"no {what} in {timeout} s\n{self.errors()}")

    def kill(self, node: str, *, jobs_only: bool = False) -> int:
        """SIGKILL to a node and its jobs, or to its jobs alone; its start script stays. Gives how many there were."""
        module = "worker_process" if node != SERVER else "runner_process"
        count = 0
        for process in running(self.base).get(node, []):
            command = " ".join(process.cmdline())
            if f".{module}" in command or (not jobs_only and f"_train -m {self.federation.kit(node)}" in command):
                process.kill()
                count += 1
        return count

    def errors(self) -> str:
        """The ends of what the nodes have said."""
        files = [self.federation.log(node) for node in self.federation.nodes]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.is_file())


@contextmanager
def federation(
    base: Path,
    policies: Mapping[str, str],
    *,
    connect_to: Mapping[str, int] | None = None,
    rules: bool = True,
    start: bool = True,
    encryption: bool = False,
) -> Iterator[Running]:
    """Provision, start, and in any case stop a federation.

    Args:
        base: a folder.
        policies: the sites' names with their ``policy = …`` line and further lines of their table; site number n has
            hospital n of the embedded cohort.
        connect_to: ports through which sites reach the server, such as a proxy's.
        rules: whether sites apply their rules to jobs that arrive; a test of what lies behind them does without.
        start: whether to start it.
        encryption: whether the kits have contexts for homomorphic encryption, as the project file says in a comment.
    """
    text = PROJECT_FILE.read_text()
    project = yaml.safe_load(
        re.sub(r"^  # (- path: .*HEBuilder|  args:)", r"  \1", text, flags=re.M) if encryption else text
    )
    others = [one for one in project["participants"] if one["type"] != "client"]
    sites = [{"name": name, "type": "client", "org": name.replace("-", "_")} for name in policies]
    for site in sites:
        if site["name"] in (connect_to or {}):
            site["connect_to"] = {"host": "localhost", "port": (connect_to or {})[site["name"]]}
    project["participants"] = [*others, *sites]
    base.mkdir(parents=True, exist_ok=True)
    (base / "project.yml").write_text(yaml.safe_dump(project))
    tables = [
        f"[sites.{name}]\n{policy}\nhardware = {{ threads = 1 }}\n{EMBEDDED.format(number=number)}\n"
        for number, (name, policy) in enumerate(policies.items())
    ]
    (base / "sites.toml").write_text("[server]\nhardware = { threads = 1 }\n\n" + "\n".join(tables))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        made = provision(base, project_file=base / "project.yml")
        prepare_nodes(made, base / "sites.toml")
        for name in policies:
            _change(made.kit(name), rules=rules)
        up = Running(federation=made)
        try:
            if start:
                lifecycle.start(made, timeout_s=120, say=lambda _: None)
            yield up
        finally:
            stop(made.folder)
            assert not running(made.folder), NODE


def _change(kit: Path, *, rules: bool) -> None:
    file = kit / "local" / "resources.json"
    resources = json.loads(file.read_text())
    resources["class_allow_list"].append(FAULTY)
    if not rules:
        del resources["app_validator"]
    file.write_text(json.dumps(resources))
