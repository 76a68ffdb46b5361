"""Whether a hospital's node is fit to be started: kit, certificate, clock, own decisions, disk, way to the server.

Nothing of a patient is read, and no key is shown.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import ssl
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from custom.site_file import SITE_FILE, SITE_FILE_VARIABLE, SiteConfig, site_config
from custom.site_sessions import CERTIFICATE_FILE, KEY_FILE, ROOT_FILE
from custom.strict import ConfigError, require
from medical_data.cohort import EmbeddedSource
from poc.kits import LOG_STREAMING, PRIVACY, SITE_AUTHORIZATION, site_resources
from poc.signed_kits import verify_kit

LEAST_DAYS = 14
LEAST_FREE_BYTES = 5 * 2**30
CONNECT_S = 10.0
# What may lie in local/ beside NVFlare's *.default and *.sample; from local/custom NVFlare would load code.
LOCAL = frozenset(
    {SITE_FILE, "resources.json", "privacy.json", "authorization.json", "log_config.json", "comm_config.json"}
)
COMPONENTS = frozenset({"resource_manager", "resource_consumer", "process_launcher"})
# The beginning of HTTP/2, with empty SETTINGS (RFC 9113, 3.4); the kind of frame with which a server answers it.
HTTP2, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), 4
HARDWARE = ("resource_manager", "resource_consumer")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: it is about.
        holds: None where it was not checked.
        said: what was found, or what to do.
    """

    what: str
    holds: bool | None
    said: str


def check_site(
    kit: Path, name: str, *, root_sha256: str | None = None, offline: bool = False, now: datetime | None = None
) -> list[Check]:
    """Look at everything, whatever fails.

    Args:
        kit: folder with ``startup/`` and ``local/``.
        name: the site's.
        root_sha256: fingerprint of the federation's root as the coordinator told it, hexadecimal, colons or none.
        offline: do not connect to the server.
        now: the time, with its zone; this machine's by default.
    """
    moment = datetime.now(timezone.utc) if now is None else now
    looks: list[tuple[str, Callable[[], str]]] = [
        ("signature of the kit", lambda: _signature(kit)),
        ("root of the federation", lambda: _root(kit, root_sha256)),
        ("private key", lambda: _key(kit)),
        ("certificate", lambda: _certificate(kit, name)),
        ("validity and clock", lambda: _validity(kit, moment)),
        ("local/resources.json", lambda: _same(kit, "resources.json", site_resources(kit, name))),
        ("local/privacy.json", lambda: _same(kit, "privacy.json", PRIVACY)),
        ("local/authorization.json", lambda: _same(kit, "authorization.json", SITE_AUTHORIZATION)),
        (f"local/{SITE_FILE}", lambda: _policy(name, _site(kit, name))),
        ("rest of local/", lambda: _rest(kit)),
        ("data", lambda: _data(_site(kit, name))),
        ("home", lambda: _home(kit, _site(kit, name))),
        ("NVFlare", _nvflare),
    ]
    checks = [_looked(what, look) for what, look in looks]
    trusted = not any(check.holds is False for check in checks[:2])
    if offline or not trusted:
        said = "not asked" if offline else "not asked: the address in this kit is not to be trusted"
        return [*checks, Check(what="server", holds=None, said=said)]
    return [*checks, _looked("server", lambda: _server(kit))]


def table(checks: list[Check]) -> str:
    """A line each."""
    words = {True: "ok", False: "FAIL", None: "--"}
    return "\n".join(f"{words[check.holds]:5} {check.what:26} {check.said}" for check in checks)


class _ForPeople(Exception):
    """Nothing is wrong, and somebody has to do something."""


def _looked(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what=what, holds=True, said=look())
    except _ForPeople as open_question:
        return Check(what=what, holds=None, said=str(open_question))
    except (ConfigError, OSError) as error:
        return Check(what=what, holds=False, said=str(error))
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # a file of another shape
        return Check(what=what, holds=False, said=f"cannot be read ({type(error).__name__}): ask for a new kit")


def _signature(kit: Path) -> str:
    verify_kit(kit)
    return "every file of startup/ is as the coordinator signed it"


def _root(kit: Path, told: str | None) -> str:
    root = _load(kit, ROOT_FILE)
    found = hashlib.sha256(root.public_bytes(serialization.Encoding.DER)).hexdigest()
    if told is None:
        raise _ForPeople(f"SHA-256 {found}: compare it with the coordinator's, by telephone")
    same = told.replace(":", "").lower() == found
    require(same, argument="--root-sha256", value=told, remedy=f"the kit has {found}: start nothing of it")
    return f"SHA-256 {found}, as told"


def _key(kit: Path) -> str:
    file = kit / "startup" / KEY_FILE
    open_to = stat.S_IMODE(file.stat().st_mode) & 0o077
    require(not open_to, argument=KEY_FILE, value=oct(open_to), remedy=f"others may read it: chmod 600 {file}")
    return "only its owner may read it"


def _certificate(kit: Path, name: str) -> str:
    root, own = _load(kit, ROOT_FILE), _load(kit, CERTIFICATE_FILE)
    key = serialization.load_pem_private_key((kit / "startup" / KEY_FILE).read_bytes(), password=None)
    remedy = "the kit is not whole; ask for a new one"
    require(key.public_key() == own.public_key(), argument=KEY_FILE, value="another key's certificate", remedy=remedy)
    public = root.public_key()
    if not isinstance(public, rsa.RSAPublicKey) or own.signature_hash_algorithm is None:
        raise ConfigError(f"{ROOT_FILE} = {type(public).__name__}: not of NVFlare's provisioning; {remedy}")
    try:
        public.verify(own.signature, own.tbs_certificate_bytes, padding.PKCS1v15(), own.signature_hash_algorithm)
    except InvalidSignature:
        raise ConfigError(f"{CERTIFICATE_FILE} = not issued by the kit's root: {remedy}") from None
    named = certified_name(kit)
    require(named == name, argument="--name", value=name, remedy=f"the kit is of {named!r}")
    return f"of {name}, issued by the root"


def certified_name(kit: Path) -> str:
    """Whom the certificate of a kit names."""
    (common,) = _load(kit, CERTIFICATE_FILE).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(common.value)


def _validity(kit: Path, now: datetime) -> str:
    said = ""
    for file in (ROOT_FILE, CERTIFICATE_FILE):
        certificate = _load(kit, file)
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if now < begin:
            raise ConfigError(f"clock = {now:%Y-%m-%d %H:%M}: {file} begins {begin:%Y-%m-%d %H:%M}; set the clock")
        if now > end:
            remedy = "ask for a new kit, or set the clock if it is wrong"
            raise ConfigError(f"clock = {now:%Y-%m-%d %H:%M}: {file} ended {end:%Y-%m-%d}; {remedy}")
        left = (end - now).days
        if left < LEAST_DAYS:
            raise _ForPeople(f"{file} has {left} days left: ask for a new kit now")
        said = f"until {end:%Y-%m-%d}, {left} days; this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
    return said


def _same(kit: Path, name: str, expected: object) -> str:
    file = kit / "local" / name
    remedy = "fedct site prepare writes it"
    require(file.is_file(), argument=f"local/{name}", value=None, remedy=remedy)
    found = _ours(json.loads(file.read_text(encoding="utf-8")))
    expected = _ours(expected)
    if found != expected:
        where = ", ".join(sorted(set(_differences(found, expected)))) or "its order"
        raise ConfigError(f"local/{name} = other at {where}: {remedy}; what you changed on purpose you answer for")
    return "as fedct site prepare writes it"


def _ours(resources: Any) -> Any:
    """Without the components that say which GPUs there are: a site sets them itself."""
    if not isinstance(resources, dict) or not isinstance(resources.get("components"), list):
        return resources
    components = {str(one.get("id")): one for one in resources["components"] if one.get("id") not in HARDWARE}
    return resources | {"components": components}


def _differences(found: object, expected: object, place: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() | expected.keys():
            yield from _differences(found.get(key), expected.get(key), f"{place}.{key}" if place else str(key))
    elif found != expected:
        yield place or "the top"


def _rest(kit: Path) -> str:
    """Nothing else that NVFlare reads: no code, and no component that came with the default ``resources.json``."""
    others = sorted(
        entry.name
        for entry in (kit / "local").iterdir()
        if entry.name not in LOCAL and entry.suffix not in (".default", ".sample")
    )
    require(not others, argument="local/", value=others, remedy="not of the kit nor of fedct; look, and take it away")
    default = json.loads((kit / "local" / "resources.json.default").read_text(encoding="utf-8"))
    more = sorted({one["id"] for one in default["components"]} - COMPONENTS - LOG_STREAMING)
    remedy = "not NVFlare's default: ask for a new kit"
    require(not more, argument="local/resources.json.default", value=more, remedy=remedy)
    return "nothing that nobody put there"


def _site(kit: Path, name: str) -> SiteConfig:
    """As jobs will read it: another file may come before the kit's own."""
    named, shared = os.environ.get(SITE_FILE_VARIABLE), kit.resolve().parent / "local" / SITE_FILE
    remedy = f"jobs would read it instead of the kit's local/{SITE_FILE}; unset it"
    require(not named, argument=SITE_FILE_VARIABLE, value=named, remedy=remedy)
    remedy = f"jobs would read it instead of the kit's local/{SITE_FILE}; move it, or the kit"
    require(not shared.is_file(), argument="site file", value=str(shared), remedy=remedy)
    site = site_config(name, workspace_root=kit)
    own = (kit / "startup").resolve()
    remedy = "take it out of the site file: a provisioned site has its own"
    require(site.kit.resolve() == own, argument=f"sites.{name}.kit", value=str(site.kit), remedy=remedy)
    return site


def _policy(name: str, site: SiteConfig) -> str:
    policy, floor = site.policy, site.policy.secure_aggregation
    if floor is not None:
        remedy = f"name all sites, {name} among them"
        require(name in floor.peers, argument="secure_aggregation.peers", value=floor.peers, remedy=remedy)
        only, least = "only" if floor.required else "also without masks, or", f"{floor.min_survivors} at least"
        masks = f"{only} under masks with {', '.join(floor.peers)} ({least})"
    else:
        masks = "without masks: the server sees this site's updates"
    one, total = policy.budgets.per_job, policy.budgets.total
    return (
        f"{'only jobs with' if policy.required else 'jobs with and WITHOUT'} differential privacy; {masks}; "
        f"epsilon at most {one.epsilon:g} a job and {total.epsilon:g} in all at delta {total.delta:g}; "
        f"{policy.min_patients} patients at least; may leave beside the update: "
        f"{', '.join(policy.may_leave) or 'nothing'}; "
        f"jobs: {'all' if site.jobs is None else ', '.join(site.jobs) or 'none'}"
    )


def _data(site: SiteConfig) -> str:
    if isinstance(site.source, EmbeddedSource):
        return "the embedded cohort: nobody's scans"
    folder = site.source.folder
    readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    require(readable, argument="data.folder", value=str(folder), remedy="no folder that this user may read")
    some = any(True for _ in folder.iterdir())
    require(some, argument="data.folder", value=str(folder), remedy="it is empty; is it mounted?")
    return f"{folder} is there; fedct data inspect says what is in it"


def _home(kit: Path, site: SiteConfig) -> str:
    inside = site.home.resolve().is_relative_to(kit.resolve())
    remedy = "it lies in the kit: a new kit would take the ledger's place; name a folder outside"
    require(not inside, argument="home", value=str(site.home), remedy=remedy)
    place = site.home
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = f"this user may not write there ({error.strerror}); make it, and give it to the node's user"
        raise ConfigError(f"home = {str(site.home)!r}: {remedy}") from error
    free = shutil.disk_usage(place).free
    remedy = f"keep at least {LEAST_FREE_BYTES / 2**30:.0f} GiB free: a full disk makes the site refuse its rounds"
    require(free >= LEAST_FREE_BYTES, argument="home", value=f"{free / 2**30:.1f} GiB free", remedy=remedy)
    return f"{site.home}, {free / 2**30:.0f} GiB free{'' if place == site.home else '; it will be made'}"


def pinned_nvflare() -> str:
    """The version that fedct asks for."""
    (pin,) = (one for one in metadata.requires("fedct") or () if one.startswith("nvflare=="))
    return pin.removeprefix("nvflare==")


def _nvflare() -> str:
    found, asked = metadata.version("nvflare"), pinned_nvflare()
    require(found == asked, argument="nvflare", value=found, remedy=f"install {asked}, for which this fedct was made")
    secure = os.environ.get("NVFLARE_SECURE_LOGGING", "").lower() in ("1", "true")
    return f"{found}; NVFLARE_SECURE_LOGGING is {'set' if secure else 'not set here: the unit file sets it'}"


def _server(kit: Path) -> str:
    """Connect as the node will, up to the server's first frame: TLS 1.3 shakes hands before it has judged our side."""
    startup = kit / "startup"
    (server,) = json.loads((startup / "fed_client.json").read_text(encoding="utf-8"))["servers"]
    target, identity = str(server["service"]["target"]), str(server["identity"])
    host, _, port = target.rpartition(":")
    context = ssl.create_default_context(cafile=str(startup / ROOT_FILE))
    context.load_cert_chain(startup / CERTIFICATE_FILE, startup / KEY_FILE)
    context.set_alpn_protocols(["h2"])
    between = "does something between here and the server break TLS open?"
    try:
        with (
            socket.create_connection((host, int(port)), timeout=CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            peer = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
            named = [str(entry.value) for entry in peer.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
            require(named == [identity], argument="server", value=named, remedy=f"the kit expects {identity!r}")
            spoken = secure.selected_alpn_protocol()
            require(spoken == "h2", argument="server", value=spoken, remedy=f"it does not speak HTTP/2; {between}")
            secure.sendall(HTTP2)
            answer = secure.recv(9)
            takes = len(answer) > 3 and answer[3] == SETTINGS
            remedy = "it ends the connection: it does not take this site's certificate; ask the coordinator"
            require(takes, argument="server", value=target, remedy=remedy)
            return f"{target}: {secure.version()}, of the root, and it takes this site's certificate"
    except ssl.SSLError as error:
        remedy = f"{between} Else a clock is wrong, or it is another federation's"
        raise ConfigError(f"server = {target!r}: {error.reason or error}: {remedy}") from error
    except OSError as error:
        remedy = "is it up, and does the firewall let this one port out?"
        raise ConfigError(f"server = {target!r}: {error.strerror or error}: {remedy}") from error


def _load(kit: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "startup" / name).read_bytes())
