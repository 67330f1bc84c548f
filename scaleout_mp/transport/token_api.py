"""What the REST API gives for the tokens that users have: access tokens, and the refresh tokens that replace them."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import AuthenticationError, TransportError, WrongAddressError
from scaleout_mp.transport.http import HttpTls, endpoint, not_the_api, post_json

if TYPE_CHECKING:
    from scaleout_mp.config import Settings
    from scaleout_mp.transport.http import Answer

logger = logging.getLogger(__name__)

#: Seconds before its expiry at which a token is replaced.
REFRESH_MARGIN: Final = 30.0
#: Seconds that a token lives when neither its claims nor the answer say so.
DEFAULT_LIFETIME: Final = 3600.0
#: Seconds that a token lives at most, as far as the client is concerned: a date must come of it. Some never expire, and
#: some servers say milliseconds.
_LONGEST: Final = 10 * 365 * 86400.0

REFRESH: Final = "api/auth/refresh"
CLIENT_REFRESH: Final = "api/v1/clients/token"
ENROLL: Final = "api/v1/clients/enroll"

#: How servers say that they will not have a token.
_REFUSALS: Final = frozenset({400, 401, 403})


def claims(token: str) -> dict[str, Any]:
    """Return the claims of a JWT, unverified; empty for what is not a JWT.

    They only tell which kind of token it is and when it ends; the server verifies.
    """
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        body = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSet:
    """An access token and what replaces it. Its repr shows neither."""

    access: str = dataclasses.field(repr=False)
    refresh: str = dataclasses.field(repr=False)
    #: When the server gave it and when the access token ends, in seconds since the epoch.
    obtained_at: float
    expires_at: float
    #: The id under which the server enrolled this client; empty when it did not.
    client_id: str = ""

    @property
    def renew_at(self) -> float:
        """When to replace it. Tokens that live shorter than the margin must not be replaced at every call."""
        return self.expires_at - min(REFRESH_MARGIN, (self.expires_at - self.obtained_at) / 2)


class TokenApi:
    """The calls that give tokens. They block, and may be made from any thread.

    All raise AuthenticationError when the server refuses the token, ApiUnavailableError when it is worth another try,
    and other TransportErrors.
    """

    def __init__(
        self,
        api_url: str,
        *,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        post: Callable[..., Answer] = post_json,
    ) -> None:
        """Use the API at `api_url`; raises ConfigError when that is no URL. `clock` is wall time."""
        #: Where a path of this API lies.
        self.address = endpoint(api_url, "", prefix=settings.url_prefix)
        self._tls = HttpTls.of(settings)
        self._clock = clock
        self._post = post

    def refresh(self, token: str, *, client_id: str = "") -> TokenSet:
        """Exchange a refresh token. The server may have replaced it: the set has the one to use next."""
        # What enrolling gave is a client's own token, whatever it looks like.
        own = client_id or claims(token).get("role") == "client_refresh"
        url = f"{self.address}/{CLIENT_REFRESH if own else REFRESH}"
        answer = self._post(url, {"refresh_token": token, "role": "client"}, headers={}, tls=self._tls)
        body = _granted(url, answer, "refresh token")
        rotated = body.get("refresh_token") or body.get("refresh")
        return self._token_set(body, refresh=rotated if isinstance(rotated, str) else token, client_id=client_id)

    def enroll(self, token: str, *, name: str | None, client_id: str | None) -> TokenSet:
        """Enroll this client with an enrollment token; the server may give it an id of its own."""
        url = f"{self.address}/{ENROLL}"
        payload = {key: value for key, value in (("name", name), ("client_id", client_id)) if value}
        answer = self._post(url, payload, headers={"Authorization": f"Bearer {token}"}, tls=self._tls)
        body = _granted(url, answer, "enrollment token")
        refresh, given_id = body.get("refresh_token"), body.get("client_id")
        if not isinstance(refresh, str) or not isinstance(given_id, str) or not given_id:
            raise TransportError(f"{url} enrolled this client but gave no client id or no refresh token")
        return self._token_set(body, refresh=refresh, client_id=given_id)

    def _token_set(self, body: Mapping[str, Any], *, refresh: str, client_id: str) -> TokenSet:
        now = self._clock()
        access = _access(body)
        assert access is not None
        said = claims(access)
        expiry, issued, lives = _number(said.get("exp")), _number(said.get("iat")), _number(body.get("expires_in"))
        if expiry is not None and expiry <= now:
            logger.warning(
                "the server gave an access token that ended %.0f s ago by this machine's clock: is it ahead?",
                now - expiry,
                extra={"action": "clock_ahead"},
            )
            # Else it would be replaced at every call.
            lives, expiry = (expiry - issued if issued is not None else lives), None
        ends = now + (lives if lives is not None else DEFAULT_LIFETIME) if expiry is None else expiry
        ends = min(max(ends, now + 1), now + _LONGEST)
        return TokenSet(access=access, refresh=refresh, obtained_at=now, expires_at=ends, client_id=client_id)


def _granted(url: str, answer: Answer, what: str) -> Mapping[str, Any]:
    if answer.page and answer.status != 404:
        # Not a refusal: a client at work behind a network's login page must not give its tokens up.
        raise WrongAddressError(not_the_api(url, answer.status))
    if answer.status in _REFUSALS:
        said = answer.message("no reason given")
        raise AuthenticationError(
            f"the server refused the {what} ({answer.status}: {said}): it is wrong, expired or spent; "
            "ask the network's owner for a new one"
        )
    if answer.status == 404:
        raise WrongAddressError(f"there is no Scaleout API at {url}: it answered 404; is the API's URL right?")
    body = answer.body if isinstance(answer.body, Mapping) else {}
    if not 200 <= answer.status < 300 or _access(body) is None:
        raise TransportError(f"{url} answered {answer.status} and no access token: is the API's URL right?")
    return body


def _access(body: Mapping[str, Any]) -> str | None:
    """Return the access token of an answer; None when there is none that a header can carry."""
    given = body.get("access_token") or body.get("access")
    return given if isinstance(given, str) and is_token(given) else None


def is_token(text: str) -> bool:
    """Whether a text has only what tokens, and the headers that carry them, have."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
