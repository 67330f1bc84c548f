"""The token that the user gave, through all the calls that may give it again."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from scaleout_mp.transport.http import endpoint
from scaleout_mp.transport.tokens import token_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.client import EdgeClient
    from scaleout_mp.config import Settings
    from scaleout_mp.transport.tokens import TokenSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
    token: str = dataclasses.field(repr=False)
    #: The API's address; None for a token that needs none.
    where: str | None
    source: TokenSource


class GivenToken:
    """Makes one source of access tokens for one token, however often it is given: its refresh token is replaced."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._given: _Given | None = None

    @property
    def source(self) -> TokenSource | None:
        """What gives access tokens; None before a token was given."""
        return None if self._given is None else self._given.source

    def take(
        self,
        token: str | None,
        url: str | None,
        on_refresh: Callable[..., None] | None,
        *,
        client: EdgeClient,
        given: Mapping[str, Any] | None = None,
        slot: str = "",
    ) -> TokenSource | None:
        """Take what the user gave, or gave again, and return the source.

        `client` and `given` have the name and id for enrolling: what the user gave and no more, for a client without an
        id gets one from the server; `slot` is what it has to itself meanwhile. Raises
        ConfigError and AuthenticationError like `token_source`.
        """
        known = self._given
        where = endpoint(url, "") if url else None
        if token and (known is None or known.token != token or where not in {None, known.where}):
            said = given or {}
            source = token_source(
                token,
                url,
                settings=self._settings,
                name=said.get("name") or client.name,
                client_id=said.get("client_id") or client.client_id,
                slot=slot,
            )
            self._given = _Given(token=token, where=where, source=source)
        if on_refresh is not None and self.source is not None:
            self.source.tell(on_refresh)
        return self.source
