"""The gRPC channel to the combiner, and the metadata that every call carries."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import ssl
from typing import TYPE_CHECKING, Any, Final, Self, cast

import grpc
import grpc.aio
import requests.utils

from scaleout_mp.errors import ConfigError
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.http import shown

if TYPE_CHECKING:
    from scaleout_mp.config import Settings
    from scaleout_mp.transport.tokens import TokenSource

logger = logging.getLogger(__name__)

#: What reading a stream gives once it ended; the type stubs of grpc do not know it.
END: Final[Any] = cast("Any", grpc.aio).EOF

#: Read by gRPC alone.
_GRPC_PROXY_VARIABLES: Final = ("grpc_proxy", "no_grpc_proxy")

#: Between refreshes that fail while the token is still good.
_BACKOFF: Final = Backoff(first=1.0, cap=30.0)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpcTls:
    """Whom the combiner's certificate must come from, and how this client proves itself to it."""

    #: PEM file; None: the roots that come with gRPC, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH included.
    roots: str | None = None
    #: PEM files of certificate and key, for combiners that want them.
    certificate: tuple[str, str] | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read the settings."""
        return cls(roots=settings.grpc_root_cert_path, certificate=settings.client_certificate)

    def context(self) -> ssl.SSLContext:
        """Return what Python's own TLS makes of the files. Raises ConfigError, in one line, when they are no good.

        gRPC would only say at the first call that a handshake failed.
        """
        context = ssl.create_default_context()
        context.set_alpn_protocols(["h2"])
        if self.roots is not None:
            context = _with_roots(self.roots)
        if self.certificate is not None:
            _load_certificate(context, *self.certificate)
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the same for gRPC. Raises ConfigError."""
        self.context()
        roots = None if self.roots is None else _bytes_of(self.roots)
        certificate, key = map(_bytes_of, self.certificate) if self.certificate else (None, None)
        return grpc.ssl_channel_credentials(roots, key, certificate)


def _with_roots(path: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=path)
    except OSError as error:
        # An SSLError is one as well; it is what a file that holds no certificate gives.
        why = "it holds no certificate in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"SCALEOUT_GRPC_ROOT_CERT_PATH: cannot read {path}: {why}") from error
    context.set_alpn_protocols(["h2"])
    return context


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    def no_password() -> str:
        raise ConfigError(f"SCALEOUT_MP_CLIENT_KEY_PATH: the key {key} has a password; give it without")

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        why = (
            "they do not belong together" if "MISMATCH" in str(error) else "they are no certificate and key in PEM form"
        )
        raise ConfigError(
            f"SCALEOUT_MP_CLIENT_CERT_PATH and SCALEOUT_MP_CLIENT_KEY_PATH: {certificate}, {key}: {why}"
        ) from error
    except OSError as error:
        raise ConfigError(
            "SCALEOUT_MP_CLIENT_CERT_PATH and SCALEOUT_MP_CLIENT_KEY_PATH: cannot read "
            f"{certificate} and {key}: {error.strerror}"
        ) from error


def _bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def target_of(host: str, port: int) -> str:
    """Return host and port as gRPC and URLs write them."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def proxy_options(host: str, port: int, *, secure: bool) -> list[tuple[str, Any]]:
    """Return the options for the proxy that the environment names for this address, read as requests reads it.

    gRPC reads fewer spellings of the variables than requests, and lists of exceptions differently; where it has
    variables of its own, they count. Raises ConfigError for a proxy that gRPC cannot use.
    """
    if any(os.environ.get(name) for name in _GRPC_PROXY_VARIABLES):
        return []
    proxy = _proxy(host, port, secure=secure)
    if not proxy:
        return [("grpc.enable_http_proxy", 0)]
    if not proxy.startswith("http://"):
        raise ConfigError(
            f"the combiner cannot be reached through {shown(proxy)}: gRPC needs a proxy that starts with http://; "
            "NO_PROXY names hosts that need none"
        )
    return [("grpc.http_proxy", proxy)]


def proxy_of(host: str, port: int, *, secure: bool) -> str:
    """Return the proxy that the environment names for this address, without its password; empty for none."""
    return shown(os.environ.get(_GRPC_PROXY_VARIABLES[0]) or _proxy(host, port, secure=secure))


def _proxy(host: str, port: int, *, secure: bool) -> str:
    url = f"{'https' if secure else 'http'}://{target_of(host, port)}"
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or ""
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def open_channel(host: str, port: int, *, secure: bool, tls: GrpcTls | None = None) -> grpc.aio.Channel:
    """Open a channel on the running loop; nothing is sent until the first call.

    Raises ConfigError when certificates cannot be read, or the proxy cannot be used.
    """
    options = [*_OPTIONS, *proxy_options(host, port, secure=secure)]
    if not secure:
        return grpc.aio.insecure_channel(target_of(host, port), options=options)
    return grpc.aio.secure_channel(target_of(host, port), (tls or GrpcTls()).credentials(), options=options)


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
        #: Refreshes that failed in a row, and when, on the loop's clock, one may begin while the token is still good.
        self._failures = 0
        self._again_at = 0.0

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
        elif self._tokens.due and asyncio.get_running_loop().time() >= self._again_at:
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
            self._refreshing.add_done_callback(self._on_refreshed)
        return self._refreshing

    def _on_refreshed(self, refresh: asyncio.Task[str]) -> None:
        error = None if refresh.cancelled() else refresh.exception()
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        wait = _BACKOFF.delay(self._failures)
        self._again_at = refresh.get_loop().time() + wait
        # A call that still has a valid token goes on with it, so this may be the only trace.
        logger.log(
            logging.WARNING if self._failures == 1 else logging.DEBUG,
            "token refresh failed: %s",
            error,
            extra={"action": "token_refresh_failed"},
        )

    async def aclose(self) -> None:
        """Wait for a refresh under way: a thread cannot be cancelled, but its request has a timeout."""
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])


def _replaced(tokens: TokenSource, rejected: str | None) -> str:
    if rejected is not None:
        tokens.refresh(rejected=rejected)
    return tokens.access_token()


def _header_value(text: str) -> str:
    """Return what gRPC can carry: headers are printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in text).strip()
