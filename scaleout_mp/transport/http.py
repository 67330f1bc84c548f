"""JSON over HTTP to the REST API, blocking."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

import requests

from scaleout_mp.errors import ApiUnavailableError, ConfigError, TransportError, WrongAddressError

#: Seconds without an answer after which a request counts as unanswered.
REQUEST_TIMEOUT = 10.0

_MAX_SAID = 300


def one_line(text: str) -> str:
    """Return what a server said as one line of moderate length that is safe to print on a terminal."""
    line = " ".join(text.split())[:_MAX_SAID]
    return "".join(character for character in line if character.isprintable())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered."""

    status: int
    #: Decoded JSON; None when the body is not JSON.
    body: Any
    text: str

    def message(self, default: str) -> str:
        """Return what the server says in `message`, else `default`."""
        said = self.body.get("message") if isinstance(self.body, Mapping) else None
        return one_line(str(said)) if said else default


def endpoint(api_url: str, path: str, *, prefix: str = "") -> str:
    """Return the URL of a path under the API's address, with the prefix that some installations need.

    An address without a scheme means http. Raises ConfigError, in one line, when it is not an address of the
    web.
    """
    if not api_url or not api_url.strip():
        raise ConfigError(f"the API's URL must be like https://example.org, not {api_url!r}")
    address = api_url.strip()
    # "localhost:8092" has no scheme, although a URL parser takes "localhost" for one.
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address):
        address = f"http://{address}"
    try:
        parts = urllib.parse.urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"the API's URL {api_url!r} cannot be read: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"the API's URL must start with http:// or https://, not {parts.scheme}://")
    if not host:
        raise ConfigError(f"the API's URL {api_url!r} names no host")
    pieces = [f"{parts.scheme}://{parts.netloc}", parts.path.strip("/"), prefix.strip("/"), path.lstrip("/")]
    return "/".join(piece for piece in pieces if piece)


def post_json(url: str, payload: Mapping[str, Any], *, headers: Mapping[str, str], verify: bool) -> Answer:
    """Post JSON and return the answer, whatever its status below 500.

    Raises ApiUnavailableError on 429, on 5xx and without an answer, which are worth another try;
    WrongAddressError when what listens there is no web server, TransportError when trying again cannot help.
    """
    try:
        response = requests.post(url, json=dict(payload), headers=dict(headers), verify=verify, timeout=REQUEST_TIMEOUT)
    except requests.exceptions.SSLError as error:
        raise TransportError(
            f"{url}: the certificate or the TLS handshake failed ({_root_cause(error)}); for a self-signed "
            "certificate set SCALEOUT_CONNECT_API_SECURE=false"
        ) from error
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        if _is_not_http(error):
            raise WrongAddressError(f"what listens at {url} does not speak HTTP: is the port right?") from error
        raise ApiUnavailableError(f"no answer from {url}: {_root_cause(error)}") from error
    except requests.RequestException as error:
        raise TransportError(f"{url}: {_root_cause(error)}") from error
    answer = Answer(status=response.status_code, body=_decoded(response.text), text=response.text)
    if answer.status == requests.codes.too_many_requests or answer.status >= 500:
        said = answer.message(response.reason or "")
        raise ApiUnavailableError(f"{url} answered {answer.status} {said}".rstrip())
    return answer


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_not_http(error: BaseException) -> bool:
    # A peer that hangs up without a word is a kind of bad status line as well, but one that may do better next time.
    cause = _innermost(error)
    return isinstance(cause, http.client.HTTPException) and not isinstance(cause, http.client.RemoteDisconnected)


def _root_cause(error: BaseException) -> str:
    """Return the innermost message: requests wraps what the operating system said three times over."""
    reason = _innermost(error)
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return one_line(str(reason)) or type(reason).__name__


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
