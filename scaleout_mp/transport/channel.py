"""The gRPC channel to the combiner, and the metadata that every call carries."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, cast

import grpc
import grpc.aio

from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from scaleout_mp.transport.tokens import TokenSource

logger = logging.getLogger(__name__)

#: What reading a stream gives once it ended; the type stubs of grpc do not know it.
END: Final[Any] = cast("Any", grpc.aio).EOF

_OPTIONS = [
    # Servers expect to allow these pings; they find a dead link in 35 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The default backs off to two minutes; a client should be back soon after its server.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Channels of one process must not share a connection: a client's keepalive and fate are its own.
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(host: str, port: int, *, secure: bool, root_cert_path: str | None = None) -> grpc.aio.Channel:
    """Open a channel on the running loop; nothing is sent until the first call.

    Raises ConfigError when the root certificates cannot be read.
    """
    target = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    if not secure:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    roots = None
    if root_cert_path:
        try:
            with open(root_cert_path, "rb") as file:
                roots = file.read()
        except OSError as error:
            raise ConfigError(
                f"SCALEOUT_GRPC_ROOT_CERT_PATH: cannot read {root_cert_path}: {error.strerror}"
            ) from error
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots), options=_OPTIONS)


class CallCredentials:
    """Who calls: the metadata of each call, with an access token where one is held."""

    def __init__(self, *, client_id: str, name: str, tokens: TokenSource | None = None, scheme: str = "Bearer") -> None:
        self._who = (
            ("client", _header_value(client_id)),
            ("client-id", _header_value(client_id)),
            ("name", _header_value(name)),
        )
        self._tokens = tokens
        self._scheme = scheme
        #: The refresh under way; all calls share it.
        self._refreshing: asyncio.Task[str] | None = None

    @property
    def can_refresh(self) -> bool:
        """Whether a refused token can be replaced."""
        return self._tokens is not None and self._tokens.can_refresh

    @property
    def held(self) -> bool:
        """Whether there is a token at all."""
        return self._tokens is not None

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata for one call.

        A token that is due but still valid is replaced in the background, so that no poll waits for the API.
        Raises AuthenticationError and TransportError when there is no valid token to be had.
        """
        if self._tokens is None:
            return self._who
        token = self._tokens.peek()
        if token is None:
            # Shielded: a call that is cancelled must not cancel the refresh that others wait for.
            token = await asyncio.shield(self._refresh_in_background(self._tokens, None))
        elif self._tokens.due:
            self._refresh_in_background(self._tokens, token)
        return (*self._who, ("authorization", f"{self._scheme} {token}"))

    async def refresh(self, *, rejected: str | None) -> None:
        """Replace a token that the combiner refused, off the loop."""
        if self._tokens is not None:
            await asyncio.shield(self._refresh_in_background(self._tokens, rejected))

    def token_of(self, metadata: tuple[tuple[str, str], ...]) -> str | None:
        """Return the token that a call with this metadata carried."""
        return next((value.partition(" ")[2] for key, value in metadata if key == "authorization"), None)

    def _refresh_in_background(self, tokens: TokenSource, rejected: str | None) -> asyncio.Task[str]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(asyncio.to_thread(_replaced, tokens, rejected))
            self._refreshing.add_done_callback(_say_failure)
        return self._refreshing

    async def aclose(self) -> None:
        """Wait for a refresh under way: a thread cannot be cancelled, but its request has a timeout."""
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])


def _replaced(tokens: TokenSource, rejected: str | None) -> str:
    if rejected is not None:
        tokens.refresh(rejected=rejected)
    return tokens.access_token()


def _say_failure(refresh: asyncio.Task[str]) -> None:
    error = None if refresh.cancelled() else refresh.exception()
    if error is not None:
        # A call that still has a valid token goes on with it, so this may be the only trace.
        logger.warning("token refresh failed: %s", error, extra={"action": "token_refresh_failed"})


def _header_value(text: str) -> str:
    """Return what gRPC can carry: headers are printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in text).strip()
