"""The local network's tokens: JWTs of every kind that clients know, refresh tokens that are replaced when used."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import hashlib
import hmac
import json
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_LIFETIME: Final = 3600
#: Seconds that tokens live which people hand out.
LONG_LIFETIME: Final = 30 * 24 * 3600

_HEAD: Final = {"alg": "HS256", "typ": "JWT"}


class TokenKind(enum.StrEnum):
    """What a token is for."""

    #: Lets its bearer call, for a short time.
    ACCESS = "access"
    #: Exchanged for access tokens; each exchange replaces it.
    REFRESH = "refresh"
    #: The same for a client that was enrolled.
    CLIENT_REFRESH = "client_refresh"
    #: Makes whoever has it a client of the network.
    ENROLLMENT = "enrollment"
    #: Lets its bearer call for as long as it is not revoked.
    API_KEY = "api_key"


#: How the kinds are told apart from outside: the claims that clients read.
_CLAIMS: Final = {
    TokenKind.ACCESS: {"token_type": "access", "role": "client"},
    TokenKind.REFRESH: {"token_type": "refresh", "role": "client"},
    TokenKind.CLIENT_REFRESH: {"token_type": "refresh", "role": "client_refresh"},
    TokenKind.ENROLLMENT: {"token_type": "enrollment", "role": "enrollment"},
    TokenKind.API_KEY: {"token_type": "api_key", "role": "client"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grant:
    """What is given for a refresh or enrollment token."""

    access: str = dataclasses.field(repr=False)
    #: Replaces the token that was shown; None: that one stays good.
    refresh: str | None = dataclasses.field(repr=False)
    #: Whom the tokens are for; empty for nobody in particular.
    client_id: str = ""


@dataclasses.dataclass
class _Family:
    """All refresh tokens that came one of another; of them one is good at a time."""

    kind: TokenKind
    client_id: str
    #: Number of the token that is good, of the last one shown, and of the last one of which anything came back.
    current: int = 0
    shown: int = -1
    arrived: int = 0
    revoked: bool = False


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Tokens:
    """Makes and checks tokens, signed with HMAC-SHA-256 under a key that lives as long as the network.

    Lives on the network's loop. `clock` is wall time.
    """

    def __init__(
        self,
        token: str | None,
        *,
        required: bool | None = None,
        lifetime: float = DEFAULT_LIFETIME,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Accept `token` as refresh token, which stays good, and as API key.

        `required`: whether clients must show a token at all; None: when there is a `token`.
        """
        self._token = token
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._families: dict[str, _Family] = {}
        self._revoked: set[str] = set()
        #: Seconds that an access token is good for.
        self.lifetime = lifetime
        #: Whether clients must show a token.
        self.required = token is not None if required is None else required

    def issue(self, kind: TokenKind, *, client_id: str = "", lifetime: float = LONG_LIFETIME) -> str:
        """Return a new token of a kind that people hand out."""
        if kind in {TokenKind.REFRESH, TokenKind.CLIENT_REFRESH}:
            family = secrets.token_hex(8)
            self._families[family] = _Family(kind=kind, client_id=client_id)
            return self._refresh_token(family, lifetime)
        return self._signed(kind, lifetime, sub=client_id)

    def revoke(self, token: str) -> None:
        """Take a token back; of a refresh token also all that came of it."""
        claims = self._claims(token)
        self._revoked.add(str(claims["jti"]))
        family = self._families.get(str(claims.get("fam")))
        if family is not None:
            family.revoked = True

    def exchange(self, token: str) -> Grant:
        """Give an access token, and a new refresh token, for a refresh token. Raises AuthenticationError.

        A token that is shown a second time has been stolen, or its owner has: the whole family is revoked. Unless
        nothing of what was given for it has come back: then the answer may have been lost.
        """
        if not self.required or self._is_owners(token):
            return Grant(access=self._signed(TokenKind.ACCESS, self.lifetime), refresh=None)
        claims = self._claims(token)
        name, number = str(claims.get("fam")), claims.get("gen")
        family = self._families.get(name)
        if family is None or claims["token_type"] != _CLAIMS[TokenKind.REFRESH]["token_type"]:
            raise AuthenticationError("this is no refresh token")
        if family.revoked:
            raise AuthenticationError("the refresh token was revoked")
        lost = number == family.shown and family.arrived <= family.shown
        if number != family.current and not lost:
            family.revoked = True
            raise AuthenticationError("the refresh token was used before: all that came of it is revoked")
        family.shown, family.current = int(claims["gen"]), family.current + 1
        family.arrived = max(family.arrived, family.shown)
        access = self._signed(TokenKind.ACCESS, self.lifetime, sub=family.client_id, fam=name, gen=family.current)
        return Grant(access=access, refresh=self._refresh_token(name, LONG_LIFETIME), client_id=family.client_id)

    def enroll(self, token: str, client_id: str) -> Grant:
        """Make a client of whoever has an enrollment token. Raises AuthenticationError."""
        if self._claims(token)["role"] != "enrollment":
            raise AuthenticationError("this is no enrollment token")
        return self.exchange(self.issue(TokenKind.CLIENT_REFRESH, client_id=client_id))

    def accepts(self, authorization: str | None) -> bool:
        """Whether the value of an authorization header, `<scheme> <token>`, lets its sender in."""
        if not self.required:
            return True
        _, _, token = (authorization or "").strip().partition(" ")
        if self._is_owners(token):
            return True
        try:
            claims = self._claims(token)
        except AuthenticationError:
            return False
        if claims["token_type"] not in {"access", "api_key"}:
            return False
        family = self._families.get(str(claims.get("fam")))
        if family is not None:
            if family.revoked:
                return False
            family.arrived = max(family.arrived, int(claims["gen"]))
        return True

    def _is_owners(self, token: str) -> bool:
        return self._token is not None and hmac.compare_digest(token.encode(), self._token.encode())

    def _refresh_token(self, family: str, lifetime: float) -> str:
        known = self._families[family]
        return self._signed(known.kind, lifetime, sub=known.client_id, fam=family, gen=known.current)

    def _signed(self, kind: TokenKind, lifetime: float, **more: Any) -> str:
        now = int(self._clock())
        claims = {
            **_CLAIMS[kind],
            "iss": "scaleout-mp localnet",
            "iat": now,
            "exp": now + int(lifetime),
            "jti": secrets.token_hex(8),
            **{name: value for name, value in more.items() if value != ""},
        }
        body = ".".join(_encode(json.dumps(part).encode()) for part in (_HEAD, claims))
        return f"{body}.{_encode(self._signature(body))}"

    def _signature(self, body: str) -> bytes:
        return hmac.digest(self._key, body.encode(), hashlib.sha256)

    def _claims(self, token: str) -> dict[str, Any]:
        """Return the claims of a token that is ours, not over and not revoked. Raises AuthenticationError."""
        body, _, signature = token.rpartition(".")
        try:
            genuine = hmac.compare_digest(_decode(signature), self._signature(body))
        except (binascii.Error, ValueError):
            genuine = False
        if not genuine:
            raise AuthenticationError("the token was not made by this network")
        # The signature is ours, and so is what it covers, the algorithm included.
        claims: dict[str, Any] = json.loads(_decode(body.rpartition(".")[2]))
        if claims["exp"] <= self._clock():
            raise AuthenticationError("the token has expired")
        if claims["jti"] in self._revoked:
            raise AuthenticationError("the token was revoked")
        return claims
