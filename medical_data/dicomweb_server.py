"""A DICOMweb server (PS3.18) and a session with it: who we are, whom we trust, what its answers hold.

PullFailed
├── Unreachable       no connection, or it broke off
├── AccessDenied      no right to search or to retrieve
├── RequestRefused    the server answers, with an error
└── MalformedAnswer   what it sends is not what the standard asks for
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.auth import HTTPBasicAuth

from medical_data.errors import MedicalDataError
from medical_data.quiet import muted

if TYPE_CHECKING:
    from dicomweb_client.web import DICOMwebClient

T = TypeVar("T")

TIMEOUT_S = (10, 60)  # to connect, between two bytes
ATTEMPTS, WAIT_MS = 4, 250  # waits of 0.5, 1 and 2 s
OVERLOADED = (  # asked again
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)

_UID = re.compile(r"(?=.{1,64}\Z)[0-9]+(\.[0-9]+)*")  # PS3.5 9.1; leading zeros exist and do no harm


class PullFailed(MedicalDataError):
    """The server could not give what was asked for."""


class Unreachable(PullFailed):
    """No connection, one that broke off, or a server that says it cannot now."""


class AccessDenied(PullFailed):
    """The server does not know us or does not let us."""


class RequestRefused(PullFailed):
    """The server answers with an error or with another address."""


class MalformedAnswer(PullFailed):
    """What came is not what the standard asks for."""


class InsecureCredentials(MedicalDataError):
    """Credentials that others can read, or that are none."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A DICOMweb server and how to reach it.

    Attributes:
        url: of the service, such as ``https://pacs.example.org/dicom-web``.
        token: a bearer token (RFC 6750), or None.
        credentials: ``user:password`` (RFC 7617), or None.
        ca: PEM file of the authorities to trust instead of the public ones, or None.
        client_cert: PEM file with our certificate and its key, or None.
        allow_http: whether patients may travel unencrypted to another machine than this one.

    Raises:
        ValueError: an address that cannot be used, plain http to another machine, two ways to log in, no such file.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    credentials: str | None = field(default=None, repr=False)
    ca: Path | None = None
    client_cert: Path | None = None
    allow_http: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if "@" in parts.netloc:
            raise ValueError("url: give user and password by a file or the environment, not in the address")
        if parts.scheme not in ("http", "https") or not host or ":" in host or parts.query or parts.fragment:
            raise ValueError(f"url = {self.url!r}: give https://host[:port]/path, the host as a name or IPv4 address")
        if parts.scheme == "http" and not self.allow_http and not _is_loopback(host):
            raise ValueError(f"url = {self.url!r}: patients would travel unencrypted; give https, or allow http")
        if self.token is not None and self.credentials is not None:
            raise ValueError("token, credentials: both given; give one")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("token: empty or with blanks or other signs than ASCII; give the bare token")
        if self.credentials is not None and not all(self.credentials.partition(":")):
            raise ValueError("credentials: not user:password; give both, with a colon between them")
        for name in ("ca", "client_cert"):
            file = getattr(self, name)
            if file is not None and not file.is_file():
                raise ValueError(f"{name} = {str(file)!r}: no such file; give a PEM file")


class Session(requests.Session):
    """A session that logs in, trusts and follows only what its server's settings say.

    Attributes:
        last: its last response; None where the last request got none.
    """

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.last: requests.Response | None = None
        self.trust_env = False  # no proxies, certificates and .netrc of the environment
        self.max_redirects = 0  # they may lead to another host, or to plain http
        if server.ca is not None:
            self.verify = str(server.ca)
        if server.client_cert is not None:
            self.cert = str(server.client_cert)
        if server.token is not None:
            self.headers["Authorization"] = f"Bearer {server.token}"
        if server.credentials is not None:
            user, _, password = server.credentials.partition(":")
            self.auth = HTTPBasicAuth(user.encode(), password.encode())

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Send, and keep the response. Wildcards and commas of a query go as they are.

        They need no encoding there (RFC 3986 3.4), and Orthanc's plugin 1.7 does not decode them.
        """
        address, mark, query = str(request.url).partition("?")
        for encoded, plain in (("%2A", "*"), ("%3F", "?"), ("%2C", ","), ("+", "%20")):
            query = query.replace(encoded, plain)
        request.url = address + mark + query
        self.last = None
        self.last = super().send(request, **kwargs)
        return self.last


def read_credentials(file: Path) -> str:
    """What a file with a token or with ``user:password`` holds, without the line's end.

    Raises:
        InsecureCredentials: group or others may access it, or it does not hold one line.
    """
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise InsecureCredentials(
            attribute="mode of the file with credentials", value=f"{mode:04o}", remedy="run chmod 600 on it", file=file
        )
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = []
    if len(lines) != 1 or not lines[0].strip() or not lines[0].isprintable():
        raise InsecureCredentials(
            attribute="file with credentials", value="not one line of text", remedy="write one line", file=file
        )
    return lines[0].strip()


def connect(server: Server) -> tuple[DICOMwebClient, Session]:
    """A client for a server, and the session beneath it; nothing is sent."""
    from dicomweb_client.web import DICOMwebClient

    session = Session(server)
    # UIDs are checked here, so that a refusal does not quote them.
    client = DICOMwebClient(server.url.rstrip("/"), session=session, permissive_uid=True, timeout=TIMEOUT_S)
    client.set_http_retry_params(
        max_attempts=ATTEMPTS, wait_exponential_multiplier=WAIT_MS, retriable_error_codes=OVERLOADED
    )
    return client, session


def pages(session: Session, tag: str, search: Callable[[int], list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """All results of a search, each once; a page at a time until one is empty.

    Args:
        session: below ``search``.
        tag: of the UID that tells results apart.
        search: one page from an offset.

    Raises:
        MalformedAnswer: no list of data sets, or a server that begins anew on each page: it would never end, or hide
            what comes after the first.
    """
    seen: set[str] = set()
    offset = 0
    while True:
        page = ask(session, partial(search, offset))
        if not isinstance(page, list) or not all(isinstance(answer, dict) for answer in page):
            raise MalformedAnswer(attribute="search", value="no list of data sets", remedy="check the address")
        if not page:
            return
        fresh = [answer for answer in page if uid_of(answer, tag) not in seen]
        if not fresh:
            raise MalformedAnswer(
                attribute="search", value="the same results at another offset", remedy="the server must support offset"
            )
        for answer in fresh:
            if (uid := uid_of(answer, tag)) not in seen:
                seen.add(uid)
                yield answer
        offset += len(page)


def ask(session: Session, call: Callable[[], T]) -> T:
    """Call the client; what goes wrong becomes a :class:`PullFailed` that quotes neither query nor answer."""
    try:
        with quiet():
            return call()
    except Exception as error:
        status = None if session.last is None else session.last.status_code
        kind = type(error).__name__ if status is None or status < 400 else f"HTTP {status}"
        if status in (401, 403):
            failure: PullFailed = AccessDenied(
                attribute="server", value=kind, remedy="give a token or credentials that may search and retrieve"
            )
        elif status in OVERLOADED:
            failure = Unreachable(attribute="server", value=kind, remedy="call again later: what was fetched stays")
        elif status is not None and status >= 400:
            failure = RequestRefused(attribute="server", value=kind, remedy="check the address and the query")
        elif isinstance(error, requests.exceptions.TooManyRedirects):
            failure = RequestRefused(
                attribute="server", value="a redirect", remedy="give the address that it redirects to"
            )
        elif isinstance(error, requests.exceptions.SSLError):
            failure = Unreachable(
                attribute="server", value=kind, remedy="check its certificate, our CA file and client certificate"
            )
        elif isinstance(error, requests.exceptions.JSONDecodeError) or not isinstance(error, OSError):
            failure = MalformedAnswer(attribute="answer", value=kind, remedy="check that the address is of DICOMweb")
        else:  # no connection, one that broke off, files of certificates that are none
            failure = Unreachable(
                attribute="server", value=kind, remedy="check address and network, call again: what was fetched stays"
            )
    raise failure  # out here no cause hangs on it, which would quote the address, and with it the query


def quiet() -> AbstractContextManager[None]:
    """Nothing is printed: libraries log and warn with addresses, queries and values."""
    return muted("dicomweb_client", "retrying", "urllib3", "requests", "pydicom")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def uid_of(answer: Mapping[str, Any], tag: str) -> str:
    """A UID that a result must have."""
    item = answer.get(tag)
    values = item.get("Value") if isinstance(item, dict) else None
    uid = values[0] if isinstance(values, list) and len(values) == 1 else None
    if not isinstance(uid, str) or not _UID.fullmatch(uid):
        raise MalformedAnswer(
            attribute="search", value=f"a result without a UID in {tag}", remedy="the server must follow PS3.18"
        )
    return uid


def values_of(answer: Mapping[str, Any], keyword: str) -> list[str]:
    """The values of an attribute in DICOM JSON (PS3.18 F), as text; none where it is absent or malformed."""
    from pydicom.datadict import tag_for_keyword

    item = answer.get(f"{tag_for_keyword(keyword):08X}")
    values = item.get("Value") if isinstance(item, dict) else None
    if not isinstance(values, list):
        return []
    texts = [value.get("Alphabetic") if isinstance(value, dict) else value for value in values]
    return [str(text).strip() for text in texts if isinstance(text, str | int | float)]
