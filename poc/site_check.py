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

from custom.site_file import SITE_FILE, SiteConfig, load_site
from custom.site_sessions import CERTIFICATE_FILE, KEY_FILE, ROOT_FILE
from custom.strict import ConfigError, require
from medical_data.cohort import EmbeddedSource
from poc.kits import AUTHORIZATION, PRIVACY, site_resources
from poc.signed_kits import verify_kit

TESTED_NVFLARE = "2.9.0"
LEAST_DAYS = 14
LEAST_FREE_BYTES = 5 * 2**30
CONNECT_S = 10.0
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
        ("local/authorization.json", lambda: _same(kit, "authorization.json", AUTHORIZATION)),
        (f"local/{SITE_FILE}", lambda: _policy(_site(kit, name))),
        ("data", lambda: _data(_site(kit, name))),
        ("home", lambda: _home(_site(kit, name))),
        ("NVFlare", _nvflare),
    ]
    checks = [_looked(what, look) for what, look in looks]
    if root_sha256 is None and checks[1].holds:
        checks[1] = Check(what=checks[1].what, holds=None, said=checks[1].said)
    if offline:
        return [*checks, Check(what="server", holds=None, said="not asked")]
    return [*checks, _looked("server", lambda: _server(kit))]


def table(checks: list[Check]) -> str:
    """A line each."""
    words = {True: "ok", False: "FAIL", None: "--"}
    return "\n".join(f"{words[check.holds]:5} {check.what:26} {check.said}" for check in checks)


def _looked(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what=what, holds=True, said=look())
    except (ConfigError, ValueError, OSError) as error:
        return Check(what=what, holds=False, said=str(error))


def _signature(kit: Path) -> str:
    verify_kit(kit)
    return "every file of startup/ is as the coordinator signed it"


def _root(kit: Path, told: str | None) -> str:
    root = _load(kit, ROOT_FILE)
    found = hashlib.sha256(root.public_bytes(serialization.Encoding.DER)).hexdigest()
    if told is None:
        return f"SHA-256 {found}: compare it with the coordinator's, by telephone"
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
    (common,) = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    require(common.value == name, argument="--name", value=name, remedy=f"the kit is of {common.value!r}")
    return f"of {name}, issued by the root"


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
        require(left >= LEAST_DAYS, argument=file, value=f"{left} days left", remedy="ask for a new kit now")
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


def _site(kit: Path, name: str) -> SiteConfig:
    return load_site(kit / "local" / SITE_FILE, name)


def _policy(site: SiteConfig) -> str:
    policy = site.policy
    masks = policy.secure_aggregation is not None and policy.secure_aggregation.required
    return (
        f"{'only jobs with' if policy.required else 'jobs with and without'} differential privacy, "
        f"{'only' if masks else 'not only'} under masks; epsilon at most {policy.budgets.per_job.epsilon:g} a job and "
        f"{policy.budgets.total.epsilon:g} in all at delta {policy.budgets.total.delta:g}; "
        f"jobs: {'all' if site.jobs is None else ', '.join(site.jobs) or 'none'}"
    )


def _data(site: SiteConfig) -> str:
    if isinstance(site.source, EmbeddedSource):
        return "the embedded cohort: nobody's scans"
    folder = site.source.folder
    readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    require(readable, argument="data.folder", value=str(folder), remedy="no folder that this user may read")
    return f"{folder} is there; fedct data inspect says what is in it"


def _home(site: SiteConfig) -> str:
    place = site.home
    while not place.exists():
        place = place.parent
    require(
        os.access(place, os.W_OK | os.X_OK), argument="home", value=str(site.home), remedy="this user may not write"
    )
    free = shutil.disk_usage(place).free
    remedy = f"keep at least {LEAST_FREE_BYTES / 2**30:.0f} GiB free: a full disk makes the site refuse its rounds"
    require(free >= LEAST_FREE_BYTES, argument="home", value=f"{free / 2**30:.1f} GiB free", remedy=remedy)
    return f"{site.home}, {free / 2**30:.0f} GiB free"


def _nvflare() -> str:
    found = metadata.version("nvflare")
    require(found == TESTED_NVFLARE, argument="nvflare", value=found, remedy=f"install {TESTED_NVFLARE}")
    secure = os.environ.get("NVFLARE_SECURE_LOGGING", "").lower() in ("1", "true")
    return f"{found}; NVFLARE_SECURE_LOGGING is {'set' if secure else 'not set here: the unit file sets it'}"


def _server(kit: Path) -> str:
    """Connect as the node will: mutual TLS, with the kit's key, to who the root certifies."""
    startup = kit / "startup"
    (server,) = json.loads((startup / "fed_client.json").read_text(encoding="utf-8"))["servers"]
    target = str(server["service"]["target"])
    host, _, port = target.rpartition(":")
    context = ssl.create_default_context(cafile=str(startup / ROOT_FILE))
    context.load_cert_chain(startup / CERTIFICATE_FILE, startup / KEY_FILE)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), timeout=CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            return f"{target} answers with {secure.version()} and a certificate of the root"
    except ssl.SSLError as error:
        remedy = (
            "something between here and the server breaks TLS open, a clock is wrong, or it is another federation's"
        )
        raise ConfigError(f"server = {target!r}: {error.reason or error}: {remedy}") from error
    except OSError as error:
        remedy = "is it up, and does the firewall let this one port out?"
        raise ConfigError(f"server = {target!r}: {error.strerror or error}: {remedy}") from error


def _load(kit: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "startup" / name).read_bytes())
