"""The local network's tokens: one secret that its owner hands out, and short-lived access tokens made from it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_LIFETIME: Final = 3600


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Tokens:
    """Makes and checks access tokens: JWTs signed with HMAC-SHA-256 under a key that lives as long as the network.

    They are JWTs because clients read the expiry from the claim `exp`.
    """

    def __init__(
        self, token: str | None, *, lifetime: int = DEFAULT_LIFETIME, clock: Callable[[], float] = time.time
    ) -> None:
        """Accept `token` as refresh token and API key; None: everybody is let in."""
        self._token = token
        self._key = secrets.token_bytes(32)
        self._clock = clock
        #: Seconds that an access token is good for.
        self.lifetime = lifetime

    @property
    def required(self) -> bool:
        """Whether clients must show a token."""
        return self._token is not None

    def accepts_refresh(self, token: str) -> bool:
        """Whether `token` may be exchanged for an access token."""
        return self._token is None or hmac.compare_digest(token.encode(), self._token.encode())

    def issue(self) -> str:
        """Return a new access token."""
        now = int(self._clock())
        claims = {"token_type": "access", "role": "client", "iat": now, "exp": now + self.lifetime}
        head = _encode(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
        body = f"{head}.{_encode(json.dumps({**claims, 'jti': secrets.token_hex(8)}).encode())}"
        return f"{body}.{_encode(self._sign(body))}"

    def accepts(self, authorization: str | None) -> bool:
        """Whether the value of an authorization header, `<scheme> <token>`, lets its sender in."""
        if self._token is None:
            return True
        _, _, token = (authorization or "").strip().partition(" ")
        return hmac.compare_digest(token.encode(), self._token.encode()) or self._valid(token)

    def _sign(self, body: str) -> bytes:
        return hmac.digest(self._key, body.encode(), hashlib.sha256)

    def _valid(self, token: str) -> bool:
        body, _, signature = token.rpartition(".")
        try:
            if not hmac.compare_digest(_decode(signature), self._sign(body)):
                return False
        except (binascii.Error, ValueError):
            return False
        # The signature is ours, so the claims are what `issue` wrote.
        claims = json.loads(_decode(body.rpartition(".")[2]))
        return bool(claims["exp"] > self._clock())
