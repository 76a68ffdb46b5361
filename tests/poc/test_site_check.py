"""``fedct site``: every check holds for a kit that is whole, and each trips on what it is about."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from policies import policy_toml

from custom.cli import main
from poc import site_check
from poc.federation import Federation, provision
from poc.site_check import Check, check_site

SITE = "site-1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def kit(made: Federation, tmp_path: Path) -> Path:
    """A prepared kit of the first site, with a folder of scans that is empty."""
    copy = tmp_path / "kit"
    shutil.copytree(made.kit(SITE), copy)
    (tmp_path / "scans").mkdir()
    table = f'[sites.{SITE}]\nhome = "{tmp_path}/home"\n{policy_toml()}\ndata = {{ folder = "{tmp_path}/scans" }}\n'
    (tmp_path / "site.toml").write_text(table)
    assert main(["site", "prepare", str(copy), "--name", SITE, "--site-file", str(tmp_path / "site.toml")]) == 0
    return copy


def found(kit: Path, **options: object) -> dict[str, Check]:
    """The checks by what they are about."""
    return {check.what: check for check in check_site(kit, SITE, offline=True, **options)}  # type: ignore[arg-type]


def failed(kit: Path, **options: object) -> set[str]:
    return {what for what, check in found(kit, **options).items() if check.holds is False}


def test_a_whole_kit_is_fit(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(kit) == set()
    unasked = {what for what, check in found(kit).items() if check.holds is None}
    assert unasked == {"root of the federation", "server"}
    assert main(["site", "check", str(kit), "--name", SITE, "--offline"]) == 0
    said = capsys.readouterr().out
    assert "fit to be started" in said
    assert "BEGIN" not in said


def test_the_root_s_fingerprint(kit: Path) -> None:
    told = found(kit)["root of the federation"].said.split()[1].rstrip(":")
    assert found(kit, root_sha256=told.upper())["root of the federation"].holds is True
    assert failed(kit, root_sha256="00" + told[2:]) == {"root of the federation"}


def _flip(kit: Path) -> None:
    file = kit / "startup" / "fed_client.json"
    file.write_text(file.read_text().replace("localhost", "elsewhere"))


def _open_key(kit: Path) -> None:
    (kit / "startup" / "client.key").chmod(0o640)


def _allow_more(kit: Path) -> None:
    _change(kit, "resources.json", lambda values: values["class_allow_list"].append("evil."))


def _stream_logs(kit: Path) -> None:
    _change(kit, "resources.json", lambda values: values.update(allow_log_streaming=True))


def _no_rules(kit: Path) -> None:
    _change(kit, "resources.json", lambda values: values.pop("app_validator"))


def _let_code_in(kit: Path) -> None:
    _change(kit, "authorization.json", lambda values: values["permissions"]["lead"].update(byoc="any"))


def _no_filter(kit: Path) -> None:
    _change(kit, "privacy.json", lambda values: values["scopes"][0].update(task_result_filters=[]))


def _no_scans(kit: Path) -> None:
    (kit.parent / "scans").rmdir()


def _change(kit: Path, name: str, change: Callable[[dict[str, object]], object]) -> None:
    file = kit / "local" / name
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_flip, "signature of the kit"),
        (lambda kit: (kit / "startup" / "signature.json").unlink(), "signature of the kit"),
        (_open_key, "private key"),
        (_allow_more, "local/resources.json"),
        (_stream_logs, "local/resources.json"),
        (_no_rules, "local/resources.json"),
        (_let_code_in, "local/authorization.json"),
        (_no_filter, "local/privacy.json"),
        (lambda kit: (kit / "local" / "privacy.json").unlink(), "local/privacy.json"),
        (_no_scans, "data"),
    ],
)
def test_each_check_trips(
    kit: Path, change: Callable[[Path], None], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(kit)
    assert failed(kit) == {what}
    assert main(["site", "check", str(kit), "--name", SITE, "--offline"]) == 1
    assert "1 to mend" in capsys.readouterr().out


def test_a_site_may_say_which_gpus_it_has(kit: Path) -> None:
    def change(values: dict[str, object]) -> None:
        components = values["components"]
        assert isinstance(components, list)
        (manager,) = (one for one in components if one["id"] == "resource_manager")
        manager["args"]["num_of_gpus"] = 2

    _change(kit, "resources.json", change)
    assert failed(kit) == set()


def test_a_certificate_of_another_site(kit: Path, made: Federation) -> None:
    for name in ("client.crt", "client.key"):
        shutil.copy(made.kit("site-2") / "startup" / name, kit / "startup" / name)
    assert "the kit is of 'site-2'" in found(kit)["certificate"].said
    assert failed(kit) == {"signature of the kit", "certificate"}


def test_a_key_that_is_not_the_certificate_s(kit: Path, made: Federation) -> None:
    shutil.copy(made.kit("site-2") / "startup" / "client.key", kit / "startup" / "client.key")
    assert "not whole" in found(kit)["certificate"].said


def test_a_root_that_did_not_issue_the_certificate(kit: Path, tmp_path: Path) -> None:
    other = provision(tmp_path / "other")
    shutil.copy(other.kit(SITE) / "startup" / "rootCA.pem", kit / "startup" / "rootCA.pem")
    assert {"signature of the kit", "certificate"} <= failed(kit)


@pytest.mark.parametrize(("days", "said"), [(-2, "set the clock"), (350, "days left"), (800, "ended")])
def test_a_wrong_clock_or_an_old_certificate(kit: Path, days: int, said: str) -> None:
    now = datetime.now(timezone.utc) + timedelta(days=days)
    check = found(kit, now=now)["validity and clock"]
    assert check.holds is False
    assert said in check.said
    assert failed(kit, now=now) == {"validity and clock"}


def test_a_disk_that_is_nearly_full(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "LEAST_FREE_BYTES", 2**60)
    assert failed(kit) == {"home"}


def test_another_nvflare(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "TESTED_NVFLARE", "2.8.0")
    assert failed(kit) == {"NVFlare"}


def test_without_a_site_file_nothing_is_prepared(
    made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(made.kit(SITE), bare)
    assert main(["site", "prepare", str(bare), "--name", SITE]) == 2
    assert "give the node's site file" in capsys.readouterr().err
    assert not (bare / "local" / "resources.json").exists()


def test_a_kit_that_was_changed_is_not_prepared(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _flip(kit)
    before = (kit / "local" / "resources.json").stat().st_mtime_ns
    assert main(["site", "prepare", str(kit), "--name", SITE]) == 2
    assert "not what the coordinator signed" in capsys.readouterr().err
    assert (kit / "local" / "resources.json").stat().st_mtime_ns == before


def test_the_server_s_kit_is_prepared(made: Federation, tmp_path: Path) -> None:
    copy = tmp_path / "server"
    shutil.copytree(made.kit("server"), copy)
    (tmp_path / "server.toml").write_text('[server]\nruns = "runs"\n')
    assert main(["site", "prepare", str(copy), "--server", "--site-file", str(tmp_path / "server.toml")]) == 0
    resources = json.loads((copy / "local" / "resources.json").read_text())
    assert resources["class_list_enforcement_mode"] == "enforce"


@pytest.fixture
def port() -> Iterator[int]:
    """Something that listens and breaks off whatever begins."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            near, _ = listener.accept()
            near.recv(100)
            near.close()

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]


def test_a_server_that_is_not_there_and_one_that_is_no_server(kit: Path, port: int) -> None:
    def ask(target: str) -> Check:
        file = kit / "startup" / "fed_client.json"
        values = json.loads(file.read_text())
        values["servers"][0]["service"]["target"] = target
        file.write_text(json.dumps(values))
        return next(check for check in check_site(kit, SITE) if check.what == "server")

    assert "firewall" in ask("127.0.0.1:9").said
    check = ask(f"localhost:{port}")
    assert check.holds is False
    assert os.environ.get("HOME", "/nowhere") not in check.said
