"""Processes of a federation with real processes: found by their mark, ended, and nothing else with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from custom.site_file import SITE_FILE_VARIABLE
from custom.strict import ConfigError
from poc import processes
from poc.processes import LEFT_BEHIND, MARK, NODE, environment, running, start_node, stop

SLEEPS = (sys.executable, "-S", "-c", "print('ready', flush=True); import time; time.sleep(60)")
IGNORES = (
    sys.executable,
    "-S",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)",
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path.resolve() / "a federation"
    made.mkdir()
    return made


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command in the environment of a node, or in another one; waits until it says that it is ready."""
    started: list[subprocess.Popen[str]] = []

    def begin(command: Sequence[str], env: dict[str, str], cwd: Path | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def pids(folder: Path) -> dict[str, set[int]]:
    return {node: {one.pid for one in some} for node, some in running(folder).items()}


def unmarked() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in (MARK, NODE)}


def test_processes_are_found_by_node_and_those_of_others_are_not(folder: Path, start: Start) -> None:
    one, two = start(SLEEPS, environment(folder, "site-1")), start(SLEEPS, environment(folder, "site-1"))
    server = start(SLEEPS, environment(folder, "server"))
    without_name = start(SLEEPS, {name: value for name, value in environment(folder, "x").items() if name != NODE})
    start(SLEEPS, environment(folder.with_name("a federation 2"), "site-1"))
    start(SLEEPS, environment(folder / "inside", "site-1"))
    start(SLEEPS, unmarked())
    assert pids(folder) == {
        "site-1": {one.pid, two.pid},
        "server": {server.pid},
        "?": {without_name.pid},
    }


def test_a_process_that_has_ended_is_none_even_before_its_parent_asks(folder: Path, start: Start) -> None:
    process = start(SLEEPS, environment(folder, "site-1"))
    process.kill()
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert running(folder) == {}
    assert stop(folder) == 0


def test_everything_of_this_folder_ends_and_nothing_else(folder: Path, start: Start) -> None:
    ours = [start(SLEEPS, environment(folder, name)) for name in ("server", "site-1", "site-2")]
    others = [
        start(SLEEPS, environment(folder.with_name("a federation 2"), "server")),
        start(SLEEPS, environment(folder.parent, "server")),
        start(SLEEPS, unmarked()),
    ]
    assert stop(folder) == 3
    assert [process.wait(5) for process in ours] == [-signal.SIGTERM] * 3
    assert [process.poll() for process in others] == [None] * 3
    assert running(folder) == {}


def test_only_the_named_nodes_end(folder: Path, start: Start) -> None:
    server, one, two = (start(SLEEPS, environment(folder, name)) for name in ("server", "site-1", "site-11"))
    assert stop(folder, ["site-1", "site-9"]) == 1
    assert one.wait(5) == -signal.SIGTERM
    assert pids(folder) == {"server": {server.pid}, "site-11": {two.pid}}
    assert stop(folder, []) == 0
    assert set(pids(folder)) == {"server", "site-11"}


def test_where_nothing_runs_nothing_is_stopped(folder: Path) -> None:
    assert running(folder) == {}
    assert stop(folder) == 0
    assert stop(folder, ["server"]) == 0


def test_a_process_that_does_not_end_when_asked_is_killed(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 1.0)
    stubborn = start(IGNORES, environment(folder, "site-1"))
    began = time.monotonic()
    assert stop(folder) == 1
    assert time.monotonic() - began >= 1.0
    assert stubborn.wait(5) == -signal.SIGKILL


def test_what_a_node_started_ends_with_it(folder: Path, start: Start) -> None:
    """A grandchild in a session of its own, as NVFlare starts the process of a job."""
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"
    parent = start((sys.executable, "-S", "-c", script, *SLEEPS), environment(folder, "site-1"))
    (child,) = psutil.Process(parent.pid).children()
    assert pids(folder) == {"site-1": {parent.pid, child.pid}}
    parent.kill()  # the grandchild has no parent now
    parent.wait(5)
    assert pids(folder) == {"site-1": {child.pid}}
    assert stop(folder) == 1
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_script_that_would_start_a_node_again_goes_first(folder: Path, start: Start) -> None:
    script = 'while true; do echo x >> starts; "$@"; done'
    start(("bash", "-c", script, "bash", *SLEEPS), environment(folder, "site-1"), folder)
    assert stop(folder) == 2
    time.sleep(0.3)
    assert running(folder) == {}
    assert (folder / "starts").read_text() == "x\n"


def test_processes_that_nothing_ends_are_named(folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is not delivered stands in for a process in an uninterruptible sleep."""
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    monkeypatch.setattr(psutil.Process, "terminate", lambda self: None)
    monkeypatch.setattr(psutil.Process, "kill", lambda self: None)
    process = start(SLEEPS, environment(folder, "site-1"))
    with pytest.raises(ConfigError, match=rf"processes = \[{process.pid}\].*by hand"):
        stop(folder)


def test_a_node_inherits_no_settings_of_somebody_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SITE_FILE_VARIABLE, "/somewhere/sites.toml")
    monkeypatch.setenv("NVFL_WORKSPACE", "/somewhere")
    monkeypatch.setenv("NVFLARE_SECURE_LOGGING", "0")
    monkeypatch.setenv(MARK, "/another/federation")
    monkeypatch.setenv(NODE, "another")
    monkeypatch.setenv("LANG", "C.UTF-8")
    made = environment(folder, "site-1")
    assert SITE_FILE_VARIABLE not in made
    assert "NVFL_WORKSPACE" not in made
    assert made["NVFLARE_SECURE_LOGGING"] == "1"
    assert (made[MARK], made[NODE]) == (str(folder), "site-1")
    assert made["LANG"] == "C.UTF-8"
    assert made["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_a_node_is_started_by_its_kits_script_and_outlives_who_started_it(folder: Path) -> None:
    kit, log = folder / "kits" / "site-1", folder / "logs" / "site-1.txt"
    (kit / "startup").mkdir(parents=True)
    told = "import json, os; json.dump([os.getcwd(), dict(os.environ)], open('told.json', 'w'))"
    script = f"echo out; echo err >&2\n'{sys.executable}' -S -c \"{told}\"\nmv told.json whole.json\nsleep 60\n"
    (kit / "startup" / "sub_start.sh").write_text(script)
    for name in LEFT_BEHIND:
        (kit / name).write_text("1")
    log.parent.mkdir()
    log.write_text("before\n")
    try:
        start_node(folder, "site-1", kit, log)
        deadline = time.monotonic() + 10
        while not (kit / "whole.json").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        cwd, seen = json.loads((kit / "whole.json").read_text())
        assert cwd == str(kit)
        assert (seen[MARK], seen[NODE]) == (str(folder), "site-1")
        assert log.read_text() == "before\nout\nerr\n"
        assert not [name for name in LEFT_BEHIND if (kit / name).exists()]
        found = running(folder)
        assert set(found) == {"site-1"}
        assert not {one.pid for one in found["site-1"]} & {one.pid for one in psutil.Process().children()}
        assert all(os.getsid(one.pid) != os.getsid(0) for one in found["site-1"])
    finally:
        assert stop(folder) >= 1
    assert running(folder) == {}
