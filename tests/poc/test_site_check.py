"""``fedct site``: every check holds for a kit that is whole, and each trips on what it is about."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from policies import policy_toml

from custom.cli import main
from custom.site_file import site_config
from poc import site_check
from poc.federation import Federation, provision
from poc.site_check import Check, check_site

SITE = "site-1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def kit(made: Federation, tmp_path: Path) -> Path:
    """A prepared kit of the first site, with a folder of scans."""
    copy = tmp_path / "kit"
    shutil.copytree(made.kit(SITE), copy)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "scan").touch()
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
    shutil.rmtree(kit.parent / "scans")


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


@pytest.mark.parametrize(("days", "said"), [(-2, "set the clock"), (800, "ended")])
def test_a_wrong_clock_or_an_old_certificate(kit: Path, days: int, said: str) -> None:
    now = datetime.now(timezone.utc) + timedelta(days=days)
    check = found(kit, now=now)["validity and clock"]
    assert check.holds is False
    assert said in check.said
    assert failed(kit, now=now) == {"validity and clock"}


def test_a_certificate_that_ends_soon_is_told_and_keeps_nothing_from_starting(kit: Path) -> None:
    now = datetime.now(timezone.utc) + timedelta(days=350)
    check = found(kit, now=now)["validity and clock"]
    assert check.holds is None
    assert "days left: ask for a new kit now" in check.said
    assert failed(kit, now=now) == set()


def test_a_disk_that_is_nearly_full(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "LEAST_FREE_BYTES", 2**60)
    assert failed(kit) == {"home"}


def test_another_nvflare(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "pinned_nvflare", lambda: "2.8.0")
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


# ---- what would be overlooked


def _code(kit: Path) -> None:
    (kit / "local" / "custom").mkdir()
    (kit / "local" / "custom" / "evil.py").touch()


def _component(kit: Path) -> None:
    entry = {"id": "x", "path": "os.system", "args": {}}
    _change(kit, "resources.json.default", lambda values: values["components"].append(entry))
    _change(kit, "resources.json", lambda values: values["components"].append(entry))


def _other_site_file(kit: Path) -> None:
    (kit.parent / "local").mkdir()
    shutil.copy(kit / "local" / "fedct.toml", kit.parent / "local")


def _home_in_kit(kit: Path) -> None:
    _site_file(kit, f"{kit.parent}/home", f"{kit}/home")


def _home_under_a_file(kit: Path) -> None:
    (kit.parent / "file").touch()
    _site_file(kit, f"{kit.parent}/home", f"{kit.parent}/file/home")


def _not_among_its_peers(kit: Path) -> None:
    _site_file(
        kit, "required = false", 'required = false\nsecure_aggregation = { peers = ["a", "b"], min_survivors = 2 }'
    )


def _site_file(kit: Path, old: str, new: str) -> None:
    file = kit / "local" / "fedct.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


SITE_FILE_ROWS = {"local/fedct.toml", "data", "home"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_code, {"rest of local/"}),
        (_component, {"rest of local/"}),
        (_other_site_file, SITE_FILE_ROWS),
        (lambda kit: (kit / "local" / "fedct.toml").unlink(), SITE_FILE_ROWS),
        (lambda kit: _site_file(kit, f"sites.{SITE}", "sites.other"), SITE_FILE_ROWS),
        (_home_in_kit, {"home"}),
        (_home_under_a_file, {"home"}),
        (_not_among_its_peers, {"local/fedct.toml"}),
        (lambda kit: (kit.parent / "scans" / "scan").unlink(), {"data"}),
        (lambda kit: (kit / "startup" / "added.sh").touch(), {"signature of the kit"}),
        (lambda kit: (kit / "startup" / "start.sh").unlink(), {"signature of the kit"}),
        (lambda kit: (kit / "startup" / "signature.json").write_text("3"), {"signature of the kit"}),
        (lambda kit: (kit / "local" / "resources.json").write_text("3"), {"local/resources.json"}),
    ],
)
def test_what_would_be_overlooked(kit: Path, change: Callable[[Path], None], what: set[str]) -> None:
    change(kit)
    assert failed(kit) == what


def test_a_site_file_that_the_environment_names(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCT_SITE_FILE", str(kit / "local" / "fedct.toml"))
    assert failed(kit) == SITE_FILE_ROWS


def test_a_kit_is_not_prepared_under_another_name(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = kit.parent / "other.toml"
    file.write_text((kit / "local" / "fedct.toml").read_text().replace(SITE, "site-2"))
    assert main(["site", "prepare", str(kit), "--name", "site-2", "--site-file", str(file)]) == 2
    assert "the kit is of 'site-1'" in capsys.readouterr().err
    assert main(["site", "prepare", str(kit), "--server", "--site-file", str(file)]) == 2


def test_paths_are_taken_from_the_site_file_s_folder(kit: Path) -> None:
    folder = kit.parent / "settings"
    (folder / "ct").mkdir(parents=True)
    (folder / "ct" / "scan").touch()
    file = folder / "site.toml"
    file.write_text(f'[sites.{SITE}]\nhome = "home"\n{policy_toml()}\ndata = {{ folder = "ct" }}\n')
    assert main(["site", "prepare", str(kit), "--name", SITE, "--site-file", str(file)]) == 0
    site = site_config(SITE, workspace_root=kit)
    assert site.home == folder.resolve() / "home"
    assert failed(kit) == set()
    file.write_text(f'[sites.{SITE}]\nkit = "kit"\n' + file.read_text().split("\n", 1)[1])
    assert main(["site", "prepare", str(kit), "--name", SITE, "--site-file", str(file)]) == 2


# ---- the server


@contextmanager
def listening(
    made: Federation, *, kit_of: str = "server", asks: str = "site-1", frame: bytes = b"\0\0\0\4"
) -> Iterator[None]:
    """A server on the port of the kits, with a node's certificate; it takes clients of the root of ``asks``."""
    startup, root = made.kit(kit_of) / "startup", made.kit(asks) / "startup" / "rootCA.pem"
    name = "server" if kit_of == "server" else "client"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(startup / f"{name}.crt", startup / f"{name}.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(root)
    context.set_alpn_protocols(["h2"])

    def answer(listener: socket.socket) -> None:
        near, _ = listener.accept()
        with suppress(OSError), context.wrap_socket(near, server_side=True) as tls:
            tls.sendall(frame)
            tls.recv(100)

    with socket.create_server(("localhost", made.members.ports[0])) as listener:
        thread = threading.Thread(target=answer, args=(listener,), daemon=True)
        thread.start()
        yield
        thread.join(10)


def server(kit: Path) -> Check:
    return next(check for check in check_site(kit, SITE) if check.what == "server")


def test_a_server_that_takes_this_site(kit: Path, made: Federation) -> None:
    with listening(made):
        check = server(kit)
    assert check.holds is True, check.said
    assert "takes this site's certificate" in check.said


def test_a_server_that_is_not_there(kit: Path) -> None:
    check = server(kit)
    assert check.holds is False
    assert "firewall" in check.said


def test_a_server_that_does_not_take_this_site(kit: Path, made: Federation, tmp_path: Path) -> None:
    other = provision(tmp_path / "other")
    mixed = tmp_path / "mixed"
    shutil.copytree(made.folder, mixed)
    shutil.copy(other.kit(SITE) / "startup" / "rootCA.pem", mixed / made.members.kits / SITE / "startup")
    with listening(Federation.load(mixed)):
        assert server(kit).holds is False


def test_a_server_that_does_not_speak_http2(kit: Path, made: Federation) -> None:
    with listening(made, frame=b"\0\0\0\0"):
        check = server(kit)
    assert check.holds is False
    assert "does not take" in check.said


def test_another_node_in_the_server_s_place(kit: Path, made: Federation) -> None:
    with listening(made, kit_of="site-2"):
        assert server(kit).holds is False


def test_something_that_breaks_off_whatever_begins(kit: Path, made: Federation) -> None:
    with socket.create_server(("localhost", made.members.ports[0])) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        check = server(kit)
    assert check.holds is False


def test_nobody_calls_the_address_of_a_kit_that_was_changed(kit: Path) -> None:
    _flip(kit)
    assert "not to be trusted" in server(kit).said
    assert server(kit).holds is None
