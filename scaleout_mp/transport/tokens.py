"""Tokens: what the user gives, and the access tokens that come of it."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from scaleout_mp.errors import AuthenticationError, TransportError, WrongAddressError
from scaleout_mp.transport.http import endpoint, post_json

if TYPE_CHECKING:
    from scaleout_mp.config import Settings
    from scaleout_mp.transport.http import Answer

logger = logging.getLogger(__name__)

#: Seconds before its expiry at which a token is replaced.
REFRESH_MARGIN = 30.0
#: Seconds that a token lives when neither its claims nor the answer say so.
DEFAULT_LIFETIME = 3600.0

TokenCallback = Callable[[str, str, dt.datetime], None]


class TokenSource(Protocol):
    """Gives access tokens. Safe to use from several threads."""

    @property
    def can_refresh(self) -> bool:
        """Whether a refused token can be replaced."""
        ...

    @property
    def due(self) -> bool:
        """Whether the token should be replaced before long, or there is none yet."""
        ...

    def peek(self) -> str | None:
        """Return the token that is held while it is valid; never blocks."""
        ...

    def access_token(self) -> str:
        """Return a valid token, refreshed first when it is due. Blocks."""
        ...

    def refresh(self, *, rejected: str | None = None) -> None:
        """Replace the token. Blocks.

        With `rejected` it does nothing when another thread has replaced that one already.
        Raises AuthenticationError when the server refuses, TransportError when it does not answer.
        """
        ...


class StaticToken:
    """A token that is used as it is: an API key."""

    can_refresh = False
    due = False

    def __init__(self, token: str) -> None:
        self._token = token

    def peek(self) -> str | None:
        """Return the token."""
        return self._token

    def access_token(self) -> str:
        """Return the token."""
        return self._token

    def refresh(self, *, rejected: str | None = None) -> None:
        """Raise AuthenticationError: an API key is refused for good."""
        del rejected
        raise AuthenticationError("the server refused the API key; ask the network's owner for a new one")


class RefreshedToken:
    """Access tokens bought with a refresh token, which the server may replace at every refresh.

    The rotated refresh token is kept in memory and given to `on_refresh`: whoever loses it is locked out.
    """

    can_refresh = True

    def __init__(
        self,
        refresh_token: str,
        *,
        url: str,
        verify: bool = True,
        on_refresh: TokenCallback | None = None,
        clock: Callable[[], float] = time.time,
        post: Callable[..., Answer] = post_json,
    ) -> None:
        """Refresh at `url`; `clock` is wall time, since expiry dates are."""
        self._refresh_token = refresh_token
        self._url = url
        self._verify = verify
        self._on_refresh = on_refresh
        self._clock = clock
        self._post = post
        self._lock = threading.Lock()
        #: The token, when it should be replaced, when it ends: they change together.
        self._held: tuple[str, float, float] | None = None

    @property
    def due(self) -> bool:
        """Whether the token should be replaced before long, or there is none yet."""
        held = self._held
        return held is None or self._clock() >= held[1]

    def peek(self) -> str | None:
        """Return the token that is held while it is valid; never blocks."""
        held = self._held
        return held[0] if held is not None and self._clock() < held[2] else None

    def access_token(self) -> str:
        """Return a valid token, refreshed first when it is due. Blocks."""
        with self._lock:
            if self.due or self._held is None:
                self._replace()
            assert self._held is not None
            return self._held[0]

    def refresh(self, *, rejected: str | None = None) -> None:
        """Replace the token, once for all threads that saw it rejected. Blocks."""
        with self._lock:
            if rejected is not None and self._held is not None and self._held[0] != rejected:
                return
            self._replace()

    def _replace(self) -> None:
        answer = self._post(
            self._url,
            {"refresh_token": self._refresh_token, "role": "client"},
            headers={},
            verify=self._verify,
        )
        access, rotated, expires_in = _read_refresh(self._url, answer)
        if rotated:
            self._refresh_token = rotated
        expiry = _number(claims(access).get("exp"))
        now = self._clock()
        lifetime = expires_in if expires_in is not None else DEFAULT_LIFETIME
        expires_at = max(expiry if expiry is not None else now + lifetime, now + 1)
        # Tokens that live shorter than the margin must not be replaced at every call.
        self._held = access, expires_at - min(REFRESH_MARGIN, (expires_at - now) / 2), expires_at
        logger.debug("access token refreshed", extra={"action": "token_refreshed"})
        self._tell(access, expires_at)

    def _tell(self, access: str, expires_at: float) -> None:
        if self._on_refresh is None:
            return
        when = dt.datetime.fromtimestamp(expires_at, tz=dt.UTC)
        try:
            self._on_refresh(access, self._refresh_token, when)
        except Exception:
            # The user's callback must not cost the connection; the token itself is in hand.
            logger.exception("token_refresh_callback raised", extra={"action": "token_callback_failed"})


def _read_refresh(url: str, answer: Answer) -> tuple[str, str | None, float | None]:
    if answer.status in {400, 401, 403}:
        said = answer.message("no reason given")
        raise AuthenticationError(
            f"the server refused the refresh token ({answer.status}: {said}): it is wrong, expired or spent; "
            "ask the network's owner for a new one"
        )
    body = answer.body if isinstance(answer.body, Mapping) else {}
    access = body.get("access_token") or body.get("access")
    if answer.status == 404:
        raise WrongAddressError(f"there is no Scaleout API at {url}: it answered 404; is the API's URL right?")
    if not 200 <= answer.status < 300 or not isinstance(access, str):
        raise TransportError(f"{url} answered {answer.status} and no access token: is the API's URL right?")
    rotated = body.get("refresh_token") or body.get("refresh")
    return (
        access,
        rotated if isinstance(rotated, str) else None,
        _number(body.get("expires_in")),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def claims(token: str) -> dict[str, Any]:
    """Return the claims of a JWT, unverified; empty for what is not a JWT.

    They only tell which kind of token it is and when it ends; the server verifies.
    """
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        body = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def token_source(
    token: str, api_url: str | None, *, settings: Settings, on_refresh: TokenCallback | None = None
) -> TokenSource:
    """Return the source that fits the kind of token the user gave: an API key or a refresh token.

    Raises ConfigError when `api_url` is no URL, AuthenticationError when the token cannot be used here.
    """
    said = claims(token)
    if said.get("token_type") == "api_key":
        return StaticToken(token)
    if said.get("role") == "enrollment":
        raise AuthenticationError(
            "this is an enrollment token: enroll with it, and connect with the refresh token that you get"
        )
    if api_url is None:
        raise AuthenticationError("a refresh token needs the API's URL, where access tokens are had")
    path = "api/v1/clients/token" if said.get("role") == "client_refresh" else "api/auth/refresh"
    return RefreshedToken(
        token,
        url=endpoint(api_url, path, prefix=settings.url_prefix),
        verify=settings.verify_api_certificates,
        on_refresh=on_refresh,
    )
