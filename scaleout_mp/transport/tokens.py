"""Tokens: what the user gives, and the access tokens that come of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from scaleout_mp.config import state_folder
from scaleout_mp.errors import AuthenticationError
from scaleout_mp.transport.token_api import TokenApi, claims, is_token
from scaleout_mp.transport.token_cache import TokenCache

if TYPE_CHECKING:
    from scaleout_mp.config import Settings
    from scaleout_mp.transport.token_api import TokenSet

logger = logging.getLogger(__name__)

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

    @property
    def client_id(self) -> str:
        """The id under which the server enrolled this client; empty when it did not, or has not yet."""
        ...

    def tell(self, on_refresh: TokenCallback) -> None:
        """Call `on_refresh(access_token, refresh_token, expires_at)` after each refresh from now on."""
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
    client_id = ""

    def __init__(self, token: str) -> None:
        self._token = token

    def tell(self, on_refresh: TokenCallback) -> None:
        """Do nothing: an API key is never refreshed."""

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
    """Access tokens had for a refresh token, which the server may replace at every refresh, or for an enrollment.

    A replaced refresh token is in the cache before anybody gets the access token that came with it.
    """

    can_refresh = True

    def __init__(
        self,
        given: str,
        api: TokenApi,
        *,
        cache: TokenCache | None = None,
        name: str | None = None,
        client_id: str | None = None,
        on_refresh: TokenCallback | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start from what the user gave; `name` and `client_id` are for enrolling. `clock` is wall time."""
        self._given = given
        self._enrolls = enrolls(given)
        self._who = name, client_id
        self._api = api
        self._cache = cache
        self._on_refresh = on_refresh
        self._clock = clock
        self._lock = threading.Lock()
        self._held: TokenSet | None = None
        #: Whether what is held was had in this process, and not in an earlier one.
        self._fresh = False

    @property
    def due(self) -> bool:
        """Whether the token should be replaced before long, or there is none yet."""
        held = self._held
        return held is None or self._clock() >= held.renew_at

    @property
    def client_id(self) -> str:
        """The id under which the server enrolled this client; empty when it did not, or has not yet."""
        return "" if self._held is None else self._held.client_id

    def tell(self, on_refresh: TokenCallback) -> None:
        """Call `on_refresh(access_token, refresh_token, expires_at)` after each refresh from now on."""
        self._on_refresh = on_refresh

    def peek(self) -> str | None:
        """Return the token that is held while it is valid; never blocks."""
        held = self._held
        return held.access if held is not None and self._clock() < held.expires_at else None

    def access_token(self) -> str:
        """Return a valid token, refreshed first when it is due. Blocks."""
        with self._lock:
            if self.due:
                self._replace(None)
            assert self._held is not None
            return self._held.access

    def refresh(self, *, rejected: str | None = None) -> None:
        """Replace the token, once for all threads that saw it rejected. Blocks."""
        with self._lock:
            held = self._held
            if rejected is not None and held is not None and held.access != rejected:
                return
            self._replace(None if held is None else held.access)

    def _replace(self, refused: str | None) -> None:
        cache = self._cache
        with contextlib.nullcontext() if cache is None else cache.locked():
            kept = None if cache is None else cache.load()
            if kept is not None and (self._held is None or kept.refresh != self._held.refresh):
                # An earlier run, or another process that was given the same token, has been here.
                self._held, self._fresh = kept, False
                if kept.access != refused and self._clock() < kept.renew_at:
                    return
            self._held, self._fresh = self._obtain(), True
            if cache is not None:
                cache.store(self._held)
        logger.debug("access token refreshed", extra={"action": "token_refreshed"})
        self._say(self._held)

    def _obtain(self) -> TokenSet:
        held = self._held
        if held is None:
            return self._begin()
        try:
            return self._api.refresh(held.refresh, client_id=held.client_id)
        except AuthenticationError as error:
            # Only for what an earlier run left: a server that sees a spent token again may revoke all of its line.
            if self._fresh or held.refresh == self._given:
                raise
            logger.warning(
                "%s; that was the one kept from an earlier run: the one given now is tried",
                error,
                extra={"action": "kept_token_refused"},
            )
            self._held = None
            return self._begin()

    def _begin(self) -> TokenSet:
        if not self._enrolls:
            return self._api.refresh(self._given)
        name, client_id = self._who
        return self._api.enroll(self._given, name=name, client_id=client_id)

    def _say(self, tokens: TokenSet) -> None:
        if self._on_refresh is None:
            return
        when = dt.datetime.fromtimestamp(tokens.expires_at, tz=dt.UTC)
        try:
            self._on_refresh(tokens.access, tokens.refresh, when)
        except Exception as error:  # noqa: BLE001
            # The user's callback must not cost the connection; the token itself is in hand. Where it raised, but not
            # what: a message may quote what the callback was called with.
            where = traceback.extract_tb(error.__traceback__)[-1]
            logger.error(  # noqa: TRY400
                "token_refresh_callback raised %s at %s:%s",
                type(error).__name__,
                where.filename,
                where.lineno,
                extra={"action": "token_callback_failed"},
            )


def enrolls(token: str) -> bool:
    """Whether it is a token for enrolling: what the server gives for it is one client's."""
    return claims(token).get("role") == "enrollment"


def token_folder(settings: Settings) -> Path:
    """Return where tokens are kept."""
    return Path(settings.token_cache_dir) if settings.token_cache_dir else state_folder() / "tokens"


def token_source(
    token: str,
    api_url: str | None,
    *,
    settings: Settings,
    name: str | None = None,
    client_id: str | None = None,
    slot: str = "",
    on_refresh: TokenCallback | None = None,
) -> TokenSource:
    """Return the source that fits the kind of token the user gave: API key, refresh token or enrollment token.

    `name` and `client_id` are what the user gave, for enrolling; `slot` tells clients without an id apart.
    Raises ConfigError when `api_url` is no URL, AuthenticationError when the token cannot be used here.
    """
    # Tokens come out of files and shells.
    token = token.strip()
    if token and not is_token(token):
        raise AuthenticationError("this is no token: it has spaces, line breaks or other letters that no token has")
    said = claims(token)
    if said.get("token_type") == "api_key":
        return StaticToken(token)
    if api_url is None:
        raise AuthenticationError("this token needs the API's URL, where access tokens are had")
    api = TokenApi(api_url, settings=settings)
    cache = None
    if settings.persist_tokens:
        folder = token_folder(settings)
        # Each client that enrolls with one token is a client of its own.
        who = (client_id or "", name or "") if enrolls(token) else ()
        cache = TokenCache(folder, api.address, token, *who)
        if who and slot and not client_id:
            # Who was enrolled before its first start has no slot yet.
            cache = TokenCache(folder, api.address, token, *who, slot, spare=cache.path)
    return RefreshedToken(token, api, cache=cache, name=name, client_id=client_id, on_refresh=on_refresh)
