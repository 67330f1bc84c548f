"""JSON over HTTP to the REST API, blocking."""

from __future__ import annotations

import dataclasses
import functools
import http.client
import json
import logging
import re
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Self

import requests
import urllib3

from scaleout_mp.errors import ApiUnavailableError, ConfigError, TransportError, WrongAddressError

if TYPE_CHECKING:
    from scaleout_mp.config import Settings

logger = logging.getLogger(__name__)

#: Seconds without an answer after which a request counts as unanswered.
REQUEST_TIMEOUT = 10.0

_MAX_SAID = 300
_LOGIN_WANTED: Final = 511
_PASSWORD_WANTED: Final = 407
_PROXY_ADVICE: Final = "it wants a name and a password: HTTPS_PROXY=http://name:password@host:port has them"
_MAY_WANT_CERTIFICATE: Final = (
    "a server that wants a client certificate does this: SCALEOUT_MP_CLIENT_CERT_PATH and SCALEOUT_MP_CLIENT_KEY_PATH "
    "name one"
)
#: How the name and password in an address are found.
_USER_INFO: Final = re.compile(r"//[^/@\s]*@")


def without(secrets: tuple[str, ...], text: str) -> str:
    """Return a text that quotes none of the secrets."""
    for secret in secrets:
        text = text.replace(secret, "[token]")
    return text


def shown(url: str) -> str:
    """Return an address as it may be printed: without name and password."""
    return _USER_INFO.sub("//", url)


def one_line(text: str) -> str:
    """Return what a server said as one line of moderate length that is safe to print on a terminal."""
    line = " ".join(text.split())[:_MAX_SAID]
    return "".join(character for character in line if character.isprintable())


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpTls:
    """How far a web server is trusted, and how this client proves itself to it."""

    #: Whether certificates are verified.
    verify: bool = True
    #: PEM file of the root certificates; None: those that requests uses, REQUESTS_CA_BUNDLE included.
    roots: str | None = None
    #: PEM files of certificate and key, for servers that want them.
    certificate: tuple[str, str] | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read the settings."""
        return cls(
            verify=settings.verify_api_certificates,
            roots=settings.api_root_cert_path,
            certificate=settings.client_certificate,
        )

    @property
    def for_requests(self) -> bool | str:
        """What requests takes as `verify`."""
        return self.roots or True if self.verify else False


_VERIFIED: Final = HttpTls()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered. Its repr shows no more than the status: bodies hold tokens."""

    status: int
    #: Decoded JSON; None when the body is not JSON.
    body: Any = dataclasses.field(repr=False)
    #: Whether it is a page for people: what web servers, proxies and the login pages of networks answer for an API.
    page: bool = False
    #: What was sent and must not be quoted.
    secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def message(self, default: str) -> str:
        """Return what the server says in `message`, else `default`."""
        said = self.body.get("message") if isinstance(self.body, Mapping) else None
        return one_line(without(self.secrets, str(said))) if said else default


def endpoint(api_url: str, path: str, *, prefix: str = "") -> str:
    """Return the URL of a path under the API's address, with the prefix that some installations need.

    An address without a scheme means http. Raises ConfigError, in one line, when it is not an address of the
    web.
    """
    if not api_url or not api_url.strip():
        raise ConfigError(f"the API's URL must be like https://example.org, not {api_url!r}")
    address = api_url.strip()
    if address.startswith("eyJ") and address.count(".") == 2:
        raise ConfigError("the API's URL looks like a token: are URL and token in each other's place?")
    # "localhost:8092" has no scheme, although a URL parser takes "localhost" for one.
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address):
        address = f"http://{address}"
    try:
        parts = urllib.parse.urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"the API's URL {shown(api_url)!r} cannot be read: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"the API's URL must start with http:// or https://, not {parts.scheme}://")
    if not host:
        raise ConfigError(f"the API's URL {shown(api_url)!r} names no host")
    pieces = [f"{parts.scheme}://{parts.netloc}", parts.path.strip("/"), prefix.strip("/"), path.lstrip("/")]
    return "/".join(piece for piece in pieces if piece)


def post_json(url: str, payload: Mapping[str, Any], *, headers: Mapping[str, str], tls: HttpTls = _VERIFIED) -> Answer:
    """Post JSON and return the answer, whatever its status below 500.

    Raises ApiUnavailableError on 429, on 5xx and without an answer, which are worth another try; WrongAddressError when
    what listens there is no web server or sends us elsewhere, ConfigError when certificate files cannot be read,
    TransportError when trying again cannot help. None of them quotes a token.
    """
    return _ask("POST", url, headers=headers, tls=tls, payload=payload)


def get_json(url: str, *, headers: Mapping[str, str], tls: HttpTls = _VERIFIED) -> Answer:
    """Get JSON; see `post_json`."""
    return _ask("GET", url, headers=headers, tls=tls, payload=None)


def _ask(verb: str, url: str, *, headers: Mapping[str, str], tls: HttpTls, payload: Mapping[str, Any] | None) -> Answer:
    response = _send(verb, url, headers=headers, tls=tls, payload=payload)
    if response.is_redirect:
        target = urllib.parse.urljoin(url, response.headers["Location"])
        if not _is_same_but_tls(url, target, response.status_code):
            # Followed, a POST would become a GET, or the token would go to somebody else.
            raise WrongAddressError(f"{shown(url)} sends us to {one_line(shown(target))}: {_elsewhere(url, target)}")
        response = _send(verb, target, headers=headers, tls=tls, payload=payload)
    authorization = headers.get("Authorization", "").partition(" ")[2]
    secrets = tuple(filter(None, (authorization, (payload or {}).get("refresh_token"))))
    if response.status_code == _PASSWORD_WANTED:
        raise ApiUnavailableError(f"the proxy does not lead to {shown(url)}: {_PROXY_ADVICE}")
    body = _decoded(response.text)
    page = body is None and response.text.lstrip().startswith("<")
    answer = Answer(status=response.status_code, body=body, page=page, secrets=secrets)
    if answer.status == requests.codes.too_many_requests or answer.status >= 500:
        said = answer.message(response.reason or "")
        # RFC 6585, 6: "the client needs to authenticate to gain network access".
        hint = "; log in to this network first" if answer.status == _LOGIN_WANTED else ""
        raise ApiUnavailableError(f"{shown(url)} answered {answer.status} {said}".rstrip() + hint)
    return answer


def _send(
    verb: str, url: str, *, headers: Mapping[str, str], tls: HttpTls, payload: Mapping[str, Any] | None
) -> requests.Response:
    where = shown(url)
    if not tls.verify:
        # Said once by us, in the log, and not by urllib3 for every request.
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        _warn_unverified(urllib.parse.urlsplit(url).netloc.rpartition("@")[2])
    try:
        return requests.request(
            verb,
            url,
            json=None if payload is None else dict(payload),
            headers=dict(headers),
            verify=tls.for_requests,
            cert=tls.certificate,
            timeout=REQUEST_TIMEOUT,
            allow_redirects=False,
        )
    except requests.exceptions.SSLError as error:
        raise TransportError(_tls_advice(where, _root_cause(error))) from error
    except requests.exceptions.ProxyError as error:
        cause = _root_cause(error)
        hint = f"; {_PROXY_ADVICE}" if str(_PASSWORD_WANTED) in cause else ""
        raise ApiUnavailableError(f"the proxy does not lead to {where}: {cause}{hint}") from error
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        if _is_not_http(error):
            raise WrongAddressError(f"what listens at {where} does not speak HTTP: is the port right?") from error
        # With TLS 1.3 a server refuses a client's certificate only after the handshake.
        hung_up = isinstance(_innermost(error), ConnectionResetError)
        hint = ""
        if hung_up:
            hint = f"; {_MAY_WANT_CERTIFICATE}" if url.startswith("https") else "; is it https://?"
        raise ApiUnavailableError(f"no answer from {where}: {_root_cause(error)}{hint}") from error
    except requests.RequestException as error:
        raise TransportError(f"{where}: {_root_cause(error)}") from error
    except OSError as error:
        # How requests says that a certificate file is not there, or is none.
        raise ConfigError(f"certificates for {where}: {one_line(str(error))}") from error


@functools.cache
def _warn_unverified(host: str) -> None:
    logger.warning(
        "the certificate of %s is not verified, by SCALEOUT_CONNECT_API_SECURE: anybody on the way can read the token",
        host,
        extra={"action": "api_unverified"},
    )


def not_the_api(url: str, status: int) -> str:
    """Return what to say of an answer that is a page for people."""
    return (
        f"{shown(url)} answered {status} with a web page, and not as a Scaleout API does: is the API's URL right "
        "(https:// or http://, and the port), and is there no login page or proxy in between?"
    )


def _elsewhere(url: str, target: str) -> str:
    ours, theirs = urllib.parse.urlsplit(url), urllib.parse.urlsplit(target)
    if ours.path == theirs.path:
        return f"give that server's address instead, {one_line(shown(f'{theirs.scheme}://{theirs.netloc}'))}"
    return "is it this network's login page? Log in there first; else give the API's own address"


def _is_same_but_tls(url: str, target: str, status: int) -> bool:
    """Whether a redirect keeps the call as it is and only asks for https, as web servers in front of an API do."""
    ours, theirs = urllib.parse.urlsplit(url), urllib.parse.urlsplit(target)
    same = ours.hostname == theirs.hostname and (ours.path, ours.query) == (theirs.path, theirs.query)
    return status in {307, 308} and (ours.scheme, theirs.scheme) == ("http", "https") and same


def _tls_advice(where: str, cause: str) -> str:
    advice = {
        "hostname mismatch": "the certificate is for another host: use the name that it is for",
        "ip address mismatch": "the certificate is for another host: use the name that it is for",
        "certificate has expired": "its owner has to renew it, unless this machine's clock is wrong",
        "certificate is not yet valid": "is this machine's clock right?",
        "certificate required": _MAY_WANT_CERTIFICATE,
        "certificate_verify_failed": "for a root certificate of your own set REQUESTS_CA_BUNDLE to its file",
        "eof occurred": _MAY_WANT_CERTIFICATE,
        "no_certificate_or_crl_found": "the file of root certificates holds none",
        "key_values_mismatch": "SCALEOUT_MP_CLIENT_CERT_PATH and SCALEOUT_MP_CLIENT_KEY_PATH do not belong together",
        "wrong version number": "what listens there does not speak TLS: is it http://?",
        "record layer failure": "what listens there does not speak TLS: is it http://?",
    }
    hint = next((text for sign, text in advice.items() if sign in cause.lower()), None)
    return f"{where}: the certificate or the TLS handshake failed ({cause})" + (f"; {hint}" if hint else "")


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_not_http(error: BaseException) -> bool:
    # A peer that hangs up without a word is a kind of bad status line as well, but one that may do better next time.
    cause = _innermost(error)
    return isinstance(cause, http.client.HTTPException) and not isinstance(cause, http.client.RemoteDisconnected)


def _root_cause(error: BaseException) -> str:
    """Return the innermost message: requests wraps what the operating system said three times over."""
    reason = _innermost(error)
    if isinstance(reason, OSError) and reason.strerror:
        return one_line(reason.strerror)
    return one_line(shown(str(reason))) or type(reason).__name__


def _innermost(error: BaseException) -> BaseException:
    reason: BaseException = error
    seen = {id(reason)}
    while True:
        inner = getattr(reason, "reason", None) or reason.__cause__ or reason.__context__
        if inner is None and reason.args:
            inner = reason.args[0]
        if not isinstance(inner, BaseException) or id(inner) in seen:
            return reason
        seen.add(id(inner))
        reason = inner
